"""Routers by name: each computes what an independent definition says, alone and packed, as graphs, in generation, over
processes and when a run is resumed."""

import importlib.util
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_io import pack
from hypothesis import given
from hypothesis import strategies as st
from processes import Job, program, run_train, start_train
from reference import Reference
from small_models import ONE_STAGE, TWO_STAGES, build

import fineweb
import hnet_trainable as H
from hnet_config import BOS, EOS, ConfigError, HNetConfig
from hnet_decoder import Decoder, PaddedPrefill
from hnet_routers import Space
from hnet_runtime import UserError, flops
from hnet_runtime.checks import agreement, equivalence
from hnet_runtime.data import cuts
from hnet_runtime.runs import weights
from hnet_runtime.runs.metrics import RouterHealth
from hnet_simple import GenerationError, HNetInference, why_no_generation
from hnet_trainable import HNetLM, nested_like

ROOT = Path(__file__).parent.parent
TEXTS = [b"A rule, two rules; three!", b"", "é ü  ŷ日本".encode(), b"a", b"  x1y2\n\n\tZ " * 3]
DOCUMENTS = [np.frombuffer(bytes([BOS]) + text + bytes([EOS]), np.uint8) for text in TEXTS]
KINDS = {
    "space": ["space", "learned"],
    "stride": ["stride:4", "stride:2"],
    "inner stride": ["learned", "stride:3"],
    "given": ["given", "given"],
    "one mask": ["given", "learned"],
    "given and stride": ["given_causal", "stride:2"],
}
CAUSAL = ("space", "stride", "inner stride")


def config_of(routers: list[str], raw: dict = TWO_STAGES, **more) -> dict:
    return raw | {"routers": routers} | more


def levels_of(document: np.ndarray) -> list[int]:
    """How many stages of `given` open a chunk at each input of a document: any numbers that depend on the bytes."""
    return [int(byte) * 7 % 5 % 3 for byte in document[:-1]]


def cuts_of(routers: list[str], iids: torch.Tensor, documents: list[np.ndarray]) -> torch.Tensor | None:
    stages = sum(router.startswith("given") for router in routers)
    levels = torch.tensor([level for document in documents for level in levels_of(document)])
    return None if not stages else nested_like(levels if stages > 1 else levels > 0, iids)


# ------------------------------------------------------------------------------------ definitions, a document at a time


def is_spacelike(byte: int) -> bool:
    """The rule in words: everything but ASCII's digits and letters, and bytes 10xxxxxx of UTF-8."""
    return not (chr(byte).isascii() and chr(byte).isalnum()) and byte >> 6 != 0b10


def opened_by_space(data: bytes) -> list[int]:
    opens = []
    for t, byte in enumerate(data):
        after_word = t > 0 and is_spacelike(byte) and not is_spacelike(data[t - 1])
        opens.append(int(t == 0 or byte == 0xFE or after_word))
    return opens


def opened_by(router: str, document: np.ndarray, at: list[int], s: int) -> list[int]:
    """0 or 1 for each token of stage s, which are the bytes `at` of the document."""
    if router == "space":
        return opened_by_space(document[:-1].tobytes())
    if router.startswith("stride:"):
        return [int(i % int(router[7:]) == 0) for i in range(len(at))]
    levels = levels_of(document)
    return [int(i == 0 or levels[t] > s) for i, t in enumerate(at)]


def defined(model: HNetLM, routers: list[str], document: np.ndarray) -> tuple[torch.Tensor, list]:
    """Logits of a document alone, and (p, b) of each stage, by tests/reference.py."""
    reference = Reference(dict(model.named_parameters()), model.config.to_dict())
    ids = torch.from_numpy(document[:-1].astype(np.int64))
    at = list(range(len(ids)))  # the bytes that reach a stage
    for s, router in enumerate(routers):
        if router != "learned":
            opens = opened_by(router, document, at, s)
            reference.rules[s] = lambda n, opens=opens: opens
        elif s + 1 < len(routers):  # its decisions do not depend on what is inside, where any rule will do
            reference.rules |= {inner: lambda n: [1] * n for inner in range(s + 1, len(routers))}
            opens = reference(ids)[1][s][1].int().tolist()
        at = [t for t, opened in zip(at, opens) if opened]
    return reference(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_definition(kind):
    """In float64, packed; the definition takes one document at a time."""
    routers = KINDS[kind]
    model = build(H, config_of(routers))
    iids, labels = pack(DOCUMENTS)
    out = model(iids, labels, cuts_of(routers, iids, DOCUMENTS))
    loss = H.training_loss(out.ce, out.ratio_losses, 0.3)
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)

    alone = [defined(model, routers, document) for document in DOCUMENTS]
    logits = torch.cat([logits for logits, _ in alone])
    wanted_loss = torch.nn.functional.cross_entropy(logits, labels.values())
    for s, (router, N) in enumerate(zip(routers, model.config.target_ratios)):
        p, b = (torch.cat([decisions[s][i] for _, decisions in alone]) for i in (0, 1))
        assert torch.equal(out.stages[s].b_T, b) and 1 < b.sum() < len(b)
        torch.testing.assert_close(out.stages[s].p_T, p, rtol=1e-9, atol=1e-9)
        if router == "learned":
            F, G = b.double().mean(), p.mean()
            wanted_loss = wanted_loss + 0.3 * N / (N - 1) * ((N - 1) * F * G + (1 - F) * (1 - G))
        else:
            assert out.ratio_losses[s] == 0 and not out.stages[s].p_T.requires_grad
    # float64: the definition adds in another order
    torch.testing.assert_close(out.logits.values(), logits, rtol=1e-8, atol=1e-8)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-10)
    wanted = torch.autograd.grad(wanted_loss, list(model.parameters()), materialize_grads=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_documents_packed_together_are_cut_as_alone(kind):
    routers = KINDS[kind]
    model = build(H, config_of(routers))
    iids, _ = pack(DOCUMENTS)
    together = model(iids, None, cuts_of(routers, iids, DOCUMENTS))
    for i, document in enumerate(DOCUMENTS):
        iids, _ = pack([document])
        alone = model(iids, None, cuts_of(routers, iids, [document]))
        torch.testing.assert_close(alone.logits.values(), together.logits.unbind()[i], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.stages[0].b_T, together.stages[0].boundary_mask.unbind()[i])


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4))
def test_space_is_spacebytes_rule(rows):
    """Rows of any bytes, also those that begin inside a character or hold BOS."""
    ids = [torch.tensor(list(row)) for row in rows]
    iids = torch.nested.nested_tensor(ids, layout=torch.jagged)
    packing = H.Packing.of(iids, 0, iids.values())
    p_T = Space(8)(torch.zeros(len(iids.values()), 8), packing)
    assert p_T.tolist() == [opened for row in rows for opened in opened_by_space(row)]


def test_space_opens_at_the_space_and_at_every_character_beyond_ascii():
    assert opened_by_space("a b, cé日".encode()) == [1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0]


# ------------------------------------------------------------------------------------------------- graphs, generation


@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_graphs_compute_the_same(kind):
    """Losses and every gradient to 1e-9, over two batches, on a small model of the config."""
    config = HNetConfig.load(config_of(KINDS[kind]))
    assert agreement.toy_config(config).routers == tuple(KINDS[kind])
    assert agreement.steps_as_graphs(config) is None


@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_is_the_training_forward(kind):
    """Prefill, steps and what the decoder writes, layer by layer."""
    model = equivalence.random_model(HNetConfig.load(config_of(KINDS[kind])), 0, "cpu", torch.float64)
    documents = [text.replace(b"\xff", b"") for text in TEXTS]
    report = equivalence.check(model, HNetInference.from_training(model), documents, new_bytes=12)
    assert report.first_disagreement is None
    assert report.ok


@pytest.mark.parametrize("kind", CAUSAL)
def test_prompts_that_are_padded_are_read_the_same(kind):
    """As graphs read them on a GPU; the second time after other prompts."""
    lm = as_inference(equivalence.random_model(HNetConfig.load(config_of(KINDS[kind])), 0, "cpu", torch.float64))
    padded = PaddedPrefill(lm, 4, 32, captures=False)
    for prompts in ([b"x y,  z!", b"a" * 32], [bytes([BOS]) + b"The end", b" b, c", b"1"]):
        logits_BV, tokens_SB, _ = padded.read(prompts)
        read = lm.prefill(prompts)
        torch.testing.assert_close(logits_BV, read.last_logits(), rtol=1e-9, atol=1e-9)
        assert tokens_SB == [state.tokens for state in read.cache.stages]


def test_the_check_of_generation_sees_a_byte_too_far_back(monkeypatch):
    """The byte before the new ones is part of a cache."""
    right = Space.starts
    monkeypatch.setattr(Space, "starts", lambda self, packing: right(self, packing).roll(1) & (packing.position_T > 0))
    assert agreement.generation(HNetConfig.load(config_of(KINDS["space"]))) is not None


@pytest.mark.parametrize(
    "routers, why",
    [
        (["given", "learned"], "given of stage 0 depends on later bytes"),
        (["given_causal", "learned"], "given_causal of stage 0 is told by the caller where chunks begin"),
    ],
)
def test_a_router_that_is_not_of_past_bytes_cannot_generate(routers, why):
    model = build(H, config_of(routers))
    assert why in why_no_generation(model.config) == agreement.generation(model.config)
    for start in (lambda: HNetInference.from_training(model).prefill([b"a"]), lambda: Decoder(as_inference(model))):
        with pytest.raises(GenerationError, match=why):
            start()


def as_inference(model: HNetLM) -> HNetInference:
    return HNetInference.from_training(model)


# ------------------------------------------------------------------------------------------------- weights, and counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_has_no_weights(kind, tmp_path):
    config = HNetConfig.load(config_of(KINDS[kind]))
    model = H.init_weights(HNetLM(config), 0)
    assert sum(p.numel() for p in model.parameters()) == config.count_parameters()
    with_router = {name.partition("routing_module")[0] for name in model.state_dict() if "routing_module" in name}
    stages = [at for at, learns in zip(("backbone.", "backbone.main_network."), config.is_learned) if learns]
    assert with_router == set(stages)
    groups = H.parameter_groups(model, 1.0, 0.1)
    assert {name for group in groups for name in group["names"]} == set(dict(model.named_parameters()))
    weights.export(model, tmp_path, "safetensors")
    loaded = weights.load_training(tmp_path / "model.safetensors")
    assert loaded.config == config and loaded.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(weights.CheckpointError, match="released code has no router"):
        weights.export(model, tmp_path, "pt")


def test_a_rules_products_are_not_counted():
    D, tokens = TWO_STAGES["d_model"][0], 100
    plain, ruled = (
        flops.count_flops(HNetConfig.load(config_of(routers)), [[tokens], [30], [9]]).total
        for routers in (["learned", "learned"], ["space", "learned"])
    )
    assert plain - ruled == 6 * 2 * D * D * tokens


def test_weights_of_a_learned_router_do_not_fit_a_rule(tmp_path):
    model = build(H, config_of(["learned", "learned"]))
    weights.export(model, tmp_path, "safetensors")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config_of(["space", "learned"])))
    with pytest.raises(weights.CheckpointError, match=r"routers is \['learned', 'learned'\] there, \['space', "):
        weights.load(tmp_path / "model.safetensors", other)


def test_configs_without_a_rule_are_written_as_before():
    config = HNetConfig.load(TWO_STAGES)
    assert config.routers == ("learned", "learned") and "routers" not in config.to_dict()
    assert HNetConfig.load(config.to_dict()) == config
    ruled = HNetConfig.load(config_of(["space", "stride:4"]))
    assert ruled.N_compress == (1, 3, 12), "the stride is known, and the target of a rule of bytes is measured"
    assert HNetConfig.load(ruled.to_dict()) == ruled


@pytest.mark.parametrize(
    "change, said",
    [
        ({"routers": ["space"]}, "routers: 1 names for 2 chunking stages"),
        ({"routers": "space"}, "routers: 'space'; expected a list"),
        ({"routers": ["word", "learned"]}, "routers: 'word' for stage 0; expected one of .*stride:K"),
        ({"routers": [3, "learned"]}, "routers: 3 for stage 0; expected one of"),
        ({"routers": ["stride:0", "learned"]}, "routers: 'stride:0' for stage 0; expected stride:K with K from 2"),
        ({"routers": ["stride:1", "learned"]}, "routers: 'stride:1' for stage 0; expected stride:K with K from 2"),
        ({"routers": ["stride", "learned"]}, "routers: 'stride' for stage 0; expected stride:K"),
        ({"routers": ["space:2", "learned"]}, "routers: 'space:2' for stage 0; expected space"),
        ({"routers": ["learned", "space"]}, "routers: 'space' for stage 1; it reads bytes, so only stage 0"),
        ({"routers": ["learned", "given"]}, "routers: 'given' for stage 1; expected a router of this kind for stage 0"),
        ({"routers": ["tokens:no.json", "learned"]}, "routers: the file 'no.json' for stage 0 is missing"),
        ({"routers": ["stride:4", "learned"], "N_compress": [1, 3, 9]}, "expected 4 in place of 3"),
    ],
)
def test_what_a_config_cannot_have_is_named(change, said):
    with pytest.raises(ConfigError, match=said):
        HNetConfig.load(TWO_STAGES | change)


def test_cuts_that_do_not_fit_are_refused():
    iids, _ = pack(DOCUMENTS)
    shorter, _ = pack(DOCUMENTS[:-1])
    flags = nested_like(torch.ones(len(iids.values()), dtype=torch.bool), iids)
    learned, one, two = (build(H, config_of(r)) for r in (["learned"] * 2, ["given", "learned"], ["given"] * 2))
    counts = torch.zeros(len(iids.values()), dtype=torch.int64)
    gaps = torch.nested.nested_tensor_from_jagged(flags.values(), iids.offsets(), iids.offsets().diff())
    for model, given_cuts, said in (
        (learned, flags, "the routers learned, learned do not read them"),
        (one, None, "cuts: missing; the router given"),
        (one, iids, "of bool"),
        (two, flags, "whole numbers from 0 to 2"),
        (one, nested_like(torch.ones(len(shorter.values()), dtype=torch.bool), shorter), "as long as those of iids"),
        (one, flags.values(), "expected a nested tensor"),
        (two, nested_like(counts + 3, iids), "from 3 to 3; expected whole numbers from 0 to 2"),
        (two, nested_like(counts - 1, iids), "from -1 to -1; expected"),
        (two, nested_like(counts + 256, iids), "from 256 to 256; expected"),  # 0 in eight bits
        (one, gaps, "without gaps between them"),
    ):
        with pytest.raises(ValueError, match=said):
            model(iids, None, given_cuts)


def test_a_rule_is_never_unhealthy():
    """Of a rule that opens no chunk; the learned router beside it is named."""
    health, said = RouterHealth([None, 3.0], 100), []
    for step in range(RouterHealth.PATIENCE):
        said += health.look(step, {"rows": 1.0, "stage0_F": 0.01, "stage1_F": 1.0})
    assert said and all(line.startswith("stage 1 ") for line in said)


# ------------------------------------------------------------------------------------------------------------- tokens


def words(text: str) -> list[int]:
    """A tokenizer whose tokens are letters, runs of digits, and single characters of other kinds."""
    return [i for i, c in enumerate(text) if not (i and c.isdigit() and text[i - 1].isdigit())]


def test_tokens_begin_at_bytes_of_characters():
    """Tokens are in characters; BOS is not read, and bytes that are no UTF-8 are characters of their own."""
    rows = [bytes([BOS]) + "é12x日".encode(), b"\xa9\xe6\x9712", bytes([BOS]), b"3"]
    data = np.frombuffer(b"".join(rows), np.uint8)
    lengths = np.array([len(row) for row in rows])
    found = cuts.cuts_of_rows(words, data, lengths)
    wanted = [1, 1, 0, 1, 0, 1, 1, 0, 0] + [1, 1, 1, 1, 0] + [1] + [1]
    assert found.astype(int).tolist() == wanted
    for row, ours in zip(rows, np.split(found, np.cumsum(lengths)[:-1])):
        alone = cuts.cuts_of_rows(words, np.frombuffer(row, np.uint8), np.array([len(row)]))
        assert np.array_equal(alone, ours)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is optional")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over a lazy dog, über alles. " * 50], trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    tokenizer.save(str(file))
    return file


def test_the_cuts_of_a_tokenizer_are_its_tokens(tokenizer_file):
    import tokenizers

    text = "the über dog   jumps"
    config = HNetConfig.load(config_of([f"tokens:{tokenizer_file}"], ONE_STAGE))
    data = np.frombuffer(bytes([BOS]) + text.encode(), np.uint8)
    opens = cuts.cutter(config)(data, np.array([len(data)]))
    pieces = [data[a:b].tobytes() for a, b in zip(np.flatnonzero(opens), [*np.flatnonzero(opens)[1:], len(data)])]
    tokens = tokenizers.Tokenizer.from_file(str(tokenizer_file)).encode(text)
    assert pieces == [bytes([BOS]), *(text[a:b].encode() for a, b in tokens.offsets)] and 5 < len(pieces) < len(text)


def test_a_missing_library_or_a_file_that_is_no_tokenizer_is_named(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    config = HNetConfig.load(config_of([f"tokens:{file}"], ONE_STAGE))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="needs the package tokenizers, which is not installed"):
        cuts.cutter(config)
    monkeypatch.undo()
    pytest.importorskip("tokenizers", reason="the package tokenizers is optional")
    with pytest.raises(UserError, match="tokenizer.json is no tokenizer of the package tokenizers"):
        cuts.cutter(config)


def test_a_tokenizer_is_found_beside_its_config(tmp_path, monkeypatch):
    (tmp_path / "bpe.json").write_text("{}")
    (tmp_path / "model.json").write_text(json.dumps(config_of(["tokens:bpe.json"], ONE_STAGE)))
    wanted = (f"tokens:{tmp_path.resolve() / 'bpe.json'}",)
    assert HNetConfig.load(tmp_path / "model.json").routers == wanted
    monkeypatch.chdir(tmp_path)
    assert HNetConfig.load(config_of(["tokens:bpe.json"], ONE_STAGE)).routers == wanted


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    known = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog,", "chunks;", "größer", "12", "345"]
    (folder / "texts").mkdir()
    for i in range(30):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(rng.choices(known, k=rng.randint(20, 300))))
    fineweb.prepare(str(folder / "texts"), str(folder / "data"), holdout=0.2)
    return folder


def flags(corpus: Path, routers: list[str], folder: Path, steps: int = 4) -> list[str]:
    model = folder.parent / f"{folder.name}.json"
    model.write_text(json.dumps(config_of(routers)))
    written = f"-c {model} --data {corpus}/data --mbs 256 --global-slices 2 --lr 2e-3 --device cpu --val-slices 2"
    return [
        *written.split(),
        "--save-dir",
        str(folder),
        "--steps",
        str(steps),
        "--save-every",
        "2",
        "--stats-every",
        "3",
    ]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(corpus: Path, *argv: str) -> str:
    done = run_train(argv, corpus, environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def records(folder: Path) -> list[dict]:
    of_the_process = ("step_ms", "bytes_per_s", "mfu", "save_ms", "graphs_captured")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in of_the_process} for row in rows]


@pytest.fixture(scope="module", params=["space", "tokens"])
def undisturbed(request, corpus, tmp_path_factory) -> tuple[list[str], Path, str]:
    """(routers, folder, output) of a run with steps as graphs."""
    file = request.getfixturevalue("tokenizer_file") if request.param == "tokens" else None
    routers = ["space", "stride:2"] if file is None else [f"tokens:{file}", "learned"]
    folder = tmp_path_factory.mktemp("runs") / request.param
    return routers, folder, run(corpus, *flags(corpus, routers, folder), "-C", "graph")


def test_a_run_reports_what_its_rules_do(corpus, undisturbed):
    routers, folder, said = undisturbed
    assert "steps run as graphs, and compute what hnet_trainable.py says" in said
    last, config = records(folder)[-1], HNetConfig.load(folder / "config.json")
    assert not {"stage0_ratio_loss", "stage0_target"} & last.keys() and math.isfinite(last["stage0_compression"])
    is_causal = routers[0] == "space"
    assert ("bpb" in last, "val_bpb" in last, "sample" in last) == (is_causal,) * 3
    assert ("val_bpb_given_cuts" in last) == (not is_causal) == ("no samples: the model cannot generate" in said)
    assert ("given chunks that depend on later bytes" in said) == (not is_causal)
    assert ("stage1_ratio_loss" in last) == (routers[1] == "learned")
    assert f"{routers[0]}: {config.N_compress[1]:g} bytes per chunk in" in said
    assert " instead of 1-" in said and "the config has" not in said, "a config may have no N_compress"
    stream = fineweb.ByteStream(str(corpus / "data"), slice_bytes=256, cutter=cuts.cutter(config))
    slices = list(stream.slices_once(256))
    if is_causal:
        rows = [row.tobytes() for s in slices for row in np.split(s.inputs, np.cumsum(s.row_lengths)[:-1])]
        chunks = sum(sum(opened_by_space(row)) for row in rows)
        assert config.N_compress[2] == pytest.approx(2 * config.N_compress[1])
    else:
        chunks = sum(s.cuts.sum() for s in slices)
    assert config.N_compress[1] == round(sum(len(s.inputs) for s in slices) / chunks, 2)


@pytest.mark.parametrize("undisturbed", [pytest.param("space", marks=pytest.mark.soak), "tokens"], indirect=True)
def test_killed_and_resumed_equals_undisturbed(corpus, undisturbed, tmp_path):
    routers, whole, _ = undisturbed
    folder = tmp_path / "run"
    command = [*flags(corpus, routers, folder), "-C", "graph", "--resume", "auto"]
    process = start_train(command, corpus, environment(), (tmp_path / "out", tmp_path / "err"))
    while process.is_alive() and not (folder / "checkpoints" / "step_00000002").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    run(corpus, *command)
    assert records(folder) == records(whole)
    assert (folder / "config.json").read_text() == (whole / "config.json").read_text()


@pytest.mark.parametrize("undisturbed", [pytest.param("space", marks=pytest.mark.soak), "tokens"], indirect=True)
def test_two_processes_train_as_one(corpus, undisturbed, tmp_path):
    """Sharded, and eagerly; both add in another order than one process with graphs, in float32."""
    routers, whole, _ = undisturbed
    argv = flags(corpus, routers, tmp_path / "run")
    job = Job(tmp_path / "logs", 2, program, lambda rank: argv)
    job.succeed()
    for ours, theirs in zip(records(tmp_path / "run"), records(whole), strict=True):
        for key, value in theirs.items():
            if isinstance(value, float) and key.startswith(
                ("ce", "bpb", "val_bpb", "stage0_F", "stage1_F", "grad_norm")
            ):
                assert ours[key] == pytest.approx(value, rel=2e-3), key
    assert ("sample" in records(tmp_path / "run")[-1]) == (routers[0] == "space")


@pytest.mark.parametrize("undisturbed", ["tokens"], indirect=True)
def test_a_run_resumes_with_a_tokenizer_that_moved_but_not_with_one_that_changed(corpus, undisturbed, tmp_path):
    routers, whole, _ = undisturbed
    file = tmp_path / "bpe.json"
    shutil.copy(routers[0].removeprefix("tokens:"), file)
    shutil.copytree(whole, tmp_path / "run")
    argv = [*flags(corpus, [f"tokens:{file}", routers[1]], tmp_path / "run"), "--resume", "auto"]
    assert "all 4 steps are done" in run(corpus, *argv)
    file.write_text(file.read_text() + "\n")
    done = run_train(argv, corpus, environment())
    assert done.returncode == 2 and "the file of the router tokens differs" in done.stderr


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scripts_know_what_a_model_was_told(undisturbed, tmp_path, capsys):
    """evaluate.py finds the run's bits per byte, under a name of its own where cuts depend on later bytes."""
    routers, folder, _ = undisturbed
    is_causal, last = routers[0] == "space", records(folder)[-1]
    script("evaluate").main([str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--dtype", "float32"])
    found, name = json.loads((tmp_path / "out.json").read_text())["text"], "bpb" if is_causal else "bpb_given_cuts"
    assert found[name] == pytest.approx(last[f"val_{name}"], rel=1e-4)
    assert (
        {"bpb", "bpb_given_cuts"} & found.keys()
        == {name}
        == {"bpb", "bpb_given_cuts"} & found["by_length"].popitem()[1].keys()
    )
    page = (tmp_path / "out.md").read_text()
    assert ("do not compare" in page) == (not is_causal) and f"{found[name]:.4f}" in page
    script("compare").main([str(folder), str(folder / "checkpoints" / "step_00000002"), "--device", "cpu"])
    assert ("given cuts" in capsys.readouterr().out) == (not is_causal)
    script("explore").main([str(folder), "--out", str(tmp_path / "page.html"), "--device", "cpu"])
    assert f'"given_cuts": {"false" if is_causal else "true"}' in (tmp_path / "page.html").read_text()
    generate = [str(folder), "--prompt", "the ", "--max-bytes", "4", "--device", "cpu"]
    if is_causal:
        script("generate").main(generate)
        return
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}) + "\n")
    for name, argv, said in (
        ("generate", generate, "the model cannot generate: the router tokens:.* depends on later bytes"),
        ("evaluate", [str(folder), "--choices", str(questions), "--device", "cpu"], "--choices: the router tokens:"),
        ("evaluate", [str(folder), "--tasks", "a", "--device", "cpu"], "--tasks: the router tokens:"),
        ("compare", [str(folder), "--how-b", "steps", "--device", "cpu"], "the model cannot generate"),
    ):
        with pytest.raises(UserError, match=said):
            script(name).main(argv)


def test_train_cannot_be_told_where_chunks_begin(corpus, tmp_path):
    done = run_train(flags(corpus, ["given", "learned"], tmp_path / "run"), corpus, environment())
    assert done.returncode == 2 and "routers: given for stage 0 is told from Python" in done.stderr
    assert not (tmp_path / "run").exists()
