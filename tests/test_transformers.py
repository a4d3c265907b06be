"""The H-Net of transformers gives what ours gives: logits, loss, texts, log-likelihoods; saved, exported and adapted.

Runs where the extra `transformers` is installed: `make test-transformers` makes an environment for it.
"""

import ast
import copy
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="skipped, since transformers is not installed: make test-transformers")

from processes import made_once
from safetensors.torch import load_file
from test_docs import MICRO, SENTENCE, python_of
from test_simple import config_of, nested, random_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import fineweb
from hnet_config import CONFIGS, HNetConfig
from hnet_decoder import generate
from hnet_runtime.evaluation.scoring import Likelihoods
from hnet_runtime.runs import weights
from hnet_simple import HNetInference, Sampling
from hnet_trainable import BOS, EOS, HNet, HNetLM, Mamba2, RoutingModule, SwiGLU, flat, training_loss
from hnet_transformers import PAD, HNetForCausalLM, HNetTransformersConfig, Utf8LogitsProcessor, byte_tokenizer
from hnet_transformers.folder import code_files, flat_name, path_of

ROOT = Path(__file__).parent.parent
TWO_STAGES = config_of(["m1t1", ["T1m1", ["M1T1"], "m1"], "t1"], [32, 64, 96], window_size=[20, 3, -1])
TEXTS = ["Hello wörld, how are you?", "a", "", "something rather longer than all of the others " * 2]
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def ours(config: HNetConfig = TWO_STAGES, dtype: torch.dtype = torch.float64) -> HNetInference:
    return HNetInference.from_training(random_model(config, dtype))


def theirs(config: HNetConfig = TWO_STAGES, dtype: torch.dtype = torch.float64) -> HNetForCausalLM:
    """The same weights in transformers' model."""
    model = HNetForCausalLM(HNetTransformersConfig(config)).to(dtype)
    model.load_state_dict(random_model(config, dtype).state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def model() -> HNetForCausalLM:
    return theirs()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def batch(tokenizer):
    """TEXTS, padded on the left."""
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


def rows(batch) -> list[torch.Tensor]:
    return [ids[mask.bool()] for ids, mask in zip(batch.input_ids, batch.attention_mask)]


def labels_of(batch) -> torch.Tensor:
    return batch.input_ids.masked_fill(batch.attention_mask == 0, -100)


def continuation(sequence: torch.Tensor, prompt: int) -> bytes:
    """The bytes behind the prompt's columns, until EOS."""
    return bytes(sequence[prompt:].tolist()).split(bytes([EOS]))[0]


# ------------------------------------------------------------------------------------------------------- the tokenizer


def test_a_token_is_a_byte(tokenizer, tmp_path):
    text = "Hé <|bos|> 日本 😀\n\x00ÿþý|"
    ids = tokenizer(text).input_ids
    assert ids == [BOS, *text.encode()] and tokenizer("").input_ids == [BOS] and len(tokenizer) == 256
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(["a", "bcd"], padding=True).input_ids == [[PAD, PAD, BOS, 97], [BOS, 98, 99, 100]]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids and again.padding_side == "left" and again.model_max_length == 8192
    assert again.decode([*b"\xc3", EOS, PAD], skip_special_tokens=True) == "\ufffd"


# -------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch_are_ours(model, side):
    batch = byte_tokenizer(padding_side=side)(TEXTS, return_tensors="pt", padding=True)
    wanted = ours()(nested(rows(batch))).logits.unbind()
    for cached in (False, True):
        out = model(**batch, use_cache=cached)
        for logits_LV, mask_L, wanted_LV in zip(out.logits, batch.attention_mask.bool(), wanted):
            torch.testing.assert_close(logits_LV[mask_L], wanted_LV, rtol=0, atol=1e-12)
            assert not logits_LV[~mask_L].any()
    (last, one) = model(**batch).logits, model(**batch, logits_to_keep=1).logits
    assert torch.equal(model(**batch, logits_to_keep=3).logits, last[:, -3:])
    torch.testing.assert_close(one[:, 0], torch.stack([w[-1] for w in wanted]), rtol=0, atol=1e-12)


def test_loss_is_that_of_training(batch):
    """The last byte of a text is a label alone, as EOS is in training; a text of one byte has none."""
    model, reference = theirs(), random_model(TWO_STAGES)
    out = model(**batch, labels=labels_of(batch))
    texts = [row for row in rows(batch) if len(row) > 1]
    wanted = reference(nested([row[:-1] for row in texts]), nested([row[1:] for row in texts]))
    loss = training_loss(wanted.ce, wanted.ratio_losses, 0.03)
    assert torch.equal(out.ratio_losses, wanted.ratio_losses) and torch.equal(out.ce, wanted.ce)
    assert torch.equal(out.loss, loss)
    out.loss.backward()
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
    everything = model(**batch).logits
    for logits_LV, mask_L, complete_LV in zip(out.logits, batch.attention_mask.bool(), everything):
        torch.testing.assert_close(logits_LV[mask_L][:-1], complete_LV[mask_L][:-1], rtol=0, atol=1e-12)
        assert not logits_LV[mask_L][-1].any() and not logits_LV[~mask_L].any()


def test_a_loss_that_is_edited_in_the_forward_is_that_of_training(batch, monkeypatch):
    """Label smoothing and an auxiliary term; some labels cannot be left out then, which is said in a sentence."""
    before = HNetLM.forward

    def forward(self, iids, labels=None, cuts=None):
        out = before(self, iids, labels, cuts)
        if labels is None:
            return out
        ce = torch.nn.functional.cross_entropy(flat(out.logits), flat(labels), label_smoothing=0.3)
        return out._replace(ce=ce, ratio_losses=out.ratio_losses + 0.1 * flat(out.logits).square().mean())

    plain = theirs()(**batch, labels=labels_of(batch))
    monkeypatch.setattr(HNetLM, "forward", forward)
    out = theirs()(**batch, labels=labels_of(batch))
    texts = [row for row in rows(batch) if len(row) > 1]
    wanted = random_model(TWO_STAGES)(nested([row[:-1] for row in texts]), nested([row[1:] for row in texts]))
    assert torch.equal(out.ce, wanted.ce) and torch.equal(out.ratio_losses, wanted.ratio_losses)
    assert out.ce != plain.ce and not torch.equal(out.ratio_losses, plain.ratio_losses)
    some = labels_of(batch)
    some[-1, -3:] = -100
    with pytest.raises(ValueError, match="labels: some are -100, which the edited cross entropy of HNetLM.forward"):
        theirs()(**batch, labels=some)


def test_labels_can_be_ignored(model, batch):
    """Only the last text's second half counts; shares of micro-batches add up to the mean over all labels."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[-1, -30:] = batch.input_ids[-1, -30:]
    logits = model(**batch).logits[-1, -31:-1]
    wanted = torch.nn.functional.cross_entropy(logits, labels[-1, -30:])
    out = model(**batch, labels=labels)
    torch.testing.assert_close(out.ce, wanted)
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=120).loss, out.loss / 4)
    nothing = model(**batch, labels=torch.full_like(labels, -100))
    assert nothing.ce == 0 and torch.equal(nothing.loss, 0.03 * out.ratio_losses.sum())


def test_boundaries_are_those_of_the_routers(model, batch):
    wanted = ours().prefill(rows(batch)).starts_BLS
    for cached in (False, True):
        found = model(**batch, use_cache=cached, output_boundaries=True).boundaries
        for found_LS, mask_L, wanted_LS in zip(found, batch.attention_mask.bool(), wanted):
            assert torch.equal(found_LS[mask_L], wanted_LS[: mask_L.sum()]) and not found_LS[~mask_L].any()
    assert 0 < found.double().mean() < 0.5


def test_bfloat16_keeps_what_needs_float32(tmp_path):
    theirs(dtype=torch.float32).save_pretrained(tmp_path / "float32")
    half = HNetForCausalLM.from_pretrained(tmp_path / "float32", dtype="bfloat16")
    wanted = weights.cast(random_model(TWO_STAGES, torch.float32).state_dict(), torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    for found in (half, HNetForCausalLM.from_pretrained(tmp_path / "bfloat16")):
        state = found.state_dict()
        assert all(state[name].dtype == w.dtype and torch.equal(state[name], w) for name, w in wanted.items())
    drawn = AutoModelForCausalLM.from_config(HNetTransformersConfig(TWO_STAGES), dtype=torch.bfloat16)
    assert {n: p.dtype for n, p in drawn.named_parameters()} == {n: w.dtype for n, w in wanted.items()}


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("utf8", [False, True])
def test_greedy_texts_are_ours(model, tokenizer, batch, cached, utf8):
    """Alone and in a padded batch; with valid UTF-8 the last character ends where the text does."""
    wanted = generate(ours(), TEXTS, max_bytes=24, sampling=Sampling(0.0), valid_utf8=utf8)
    processors = {"logits_processor": [Utf8LogitsProcessor()]} if utf8 else {}
    found = model.generate(**batch, **GREEDY, **processors, use_cache=cached)
    for sequence, want in zip(found, wanted):
        assert continuation(sequence, batch.input_ids.shape[1]) == want.continuation
    alone = tokenizer(TEXTS[0], return_tensors="pt")
    found = model.generate(**alone, **GREEDY, **processors, use_cache=cached)[0]
    assert continuation(found, alone.input_ids.shape[1]) == wanted[0].continuation
    assert not utf8 or all(len(want.continuation.decode()) > 6 for want in wanted)


def test_generation_that_an_edit_left_behind_is_refused(monkeypatch):
    """As scripts/generate.py does it: with a cache the old formula would run. Without one, the new one does."""
    before = Mamba2.forward
    monkeypatch.setattr(Mamba2, "forward", lambda self, x_TD, packing: 2 * before(self, x_TD, packing))
    model = theirs(config_of(["m1", ["T1"], "m2"], [32, 64]))
    with pytest.raises(ValueError, match=r"generation \(hnet_simple.py\) differs from hnet_trainable.py: backbone"):
        model.generate(IDS, max_new_tokens=2)
    assert model.generate(IDS, max_new_tokens=2, use_cache=False).shape == (2, 5)


def test_routers_that_are_rules(tokenizer, tmp_path):
    """They have no ratio loss; texts are ours, with and without cache, also from a folder that was saved."""
    config = HNetConfig.load(TWO_STAGES.to_dict(), routers=["space", "stride:3"])
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    model = theirs(config)
    out = model(**batch, labels=labels_of(batch))
    assert out.ratio_losses.tolist() == [0, 0] and torch.equal(out.loss, out.ce)
    wanted = generate(ours(config), TEXTS, max_bytes=24, sampling=Sampling(0.0))
    model.save_pretrained(tmp_path)
    for found in (model, HNetForCausalLM.from_pretrained(tmp_path)):
        assert found.config.hnet_config.routers == ("space", "stride:3")
        for cached in (True, False):
            texts = found.generate(**batch, **GREEDY, use_cache=cached)
            made = [continuation(text, batch.input_ids.shape[1]) for text in texts]
            assert made == [want.continuation for want in wanted]


def test_only_bytes_are_drawn(tokenizer):
    config = config_of(["m1", ["T1"], "M1"], [32, 64], vocab_size=320)
    one = tokenizer(TEXTS[0], return_tensors="pt")
    found = theirs(config).generate(**one, **GREEDY)[0]
    (wanted,) = generate(ours(config), TEXTS[:1], max_bytes=24, sampling=Sampling(0.0))
    assert continuation(found, one.input_ids.shape[1]) == wanted.continuation


def test_sampling_draws_the_same_with_and_without_cache(model, batch):
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.9}
        options |= {"repetition_penalty": 1.1, "logits_processor": [Utf8LogitsProcessor()]}
        found.append(model.generate(**batch, max_new_tokens=12, num_return_sequences=2, use_cache=cached, **options))
    assert torch.equal(*found) and len(found[0]) == 2 * len(TEXTS) and not torch.equal(found[0][0], found[0][1])
    for sequence in found[0]:
        continuation(sequence, batch.input_ids.shape[1]).decode()


def test_beams_are_the_same_with_and_without_cache(model, batch):
    found = [model.generate(**batch, max_new_tokens=8, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


def test_stop_strings_are_found_by_their_bytes(model, tokenizer):
    """Each text ends behind its stop string, whose characters may have several bytes."""
    options = {**GREEDY, "max_new_tokens": 60, "logits_processor": [Utf8LogitsProcessor()]}
    one = tokenizer(TEXTS[0], return_tensors="pt")
    prompt = one.input_ids.shape[1]
    text = continuation(model.generate(**one, **options)[0], prompt).decode()
    stop = next(character for character in text[3:] if len(character.encode()) > 1)
    found = continuation(model.generate(**one, **options, stop_strings=["never", stop])[0], prompt).decode()
    assert found == text[: text.index(stop) + 1] != text


def test_a_stream_has_every_byte(model, tokenizer, capsys):
    one = tokenizer(TEXTS[0], return_tensors="pt")
    options = {**GREEDY, "logits_processor": [Utf8LogitsProcessor()]}
    found = model.generate(**one, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))[0]
    assert capsys.readouterr().out == continuation(found, one.input_ids.shape[1]).decode() + "\n"


def test_a_cache_is_handed_on(model, batch):
    """More text, with texts that had ended before others; and once more from a copy of the cache."""
    prompt = batch.input_ids.shape[1]
    usual = model.generate(**batch, **GREEDY, eos_token_id=None)
    end = int(usual[1, prompt + 5])
    first = model.generate(**batch, **GREEDY, eos_token_id=end, return_dict_in_generate=True)
    cache, sequences = first[-1], first.sequences
    mask = torch.cat([batch.attention_mask, torch.ones_like(sequences[:, prompt:])], 1)
    for row, sequence in enumerate(sequences[:, prompt:].tolist()):
        mask[row, prompt + (sequence.index(end) + 1 if end in sequence else len(sequence)) :] = 0
    assert not mask.all(1)[1] and mask[0].any()
    more = torch.tensor([list(b" and")]).expand(len(TEXTS), -1)
    both = {"input_ids": torch.cat([sequences, more], 1), "attention_mask": torch.cat([mask, torch.ones_like(more)], 1)}
    wanted = model.generate(**both, **GREEDY, eos_token_id=None, use_cache=False)
    copied = copy.deepcopy(cache)
    for handed in (cache, copied):
        assert torch.equal(model.generate(**both, **GREEDY, eos_token_id=None, cache=handed), wanted)


def test_a_long_prompt_is_read_in_pieces(model, tokenizer):
    one = tokenizer(TEXTS[-1], return_tensors="pt")
    assert torch.equal(model.generate(**one, **GREEDY, prefill_chunk_size=7), model.generate(**one, **GREEDY))


def test_a_pipeline_continues_texts(model, tokenizer):
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)(TEXTS[:2], batch_size=2, max_new_tokens=4)
    assert [text["generated_text"].startswith(TEXTS[n]) for n, (text,) in enumerate(made)] == [True, True]


def test_the_page_does_what_it_says(run, tmp_path, monkeypatch):
    """All Python of docs/TRANSFORMERS.md, one block after the other."""
    pytest.importorskip("peft")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    (tmp_path / "my_texts").symlink_to(run.parent / "texts")
    monkeypatch.chdir(tmp_path)
    blocks = python_of(ROOT / "docs" / "TRANSFORMERS.md")
    assert len(blocks) == 6
    exec(compile("\n".join(block for _, block in blocks), "TRANSFORMERS.md", "exec"), {})


# ----------------------------------------------------------------------------------------------------------- bad input


IDS = torch.tensor([[BOS, 97, 98], [BOS, 99, 100]])
ZEROS = torch.tensor([[1, 1, 1], [0, 0, 0]])
BAD = {
    "of another vocabulary": (lambda m: m(IDS + 50_000), "50254; expected 0 to 255, since this model reads bytes"),
    "above 255": (lambda m: m.generate(IDS + 100), "input_ids: holds 354; expected 0 to 255"),
    "empty prompt": (lambda m: m.generate(IDS[:, :0]), "input_ids: empty; expected at least one byte a text"),
    "empty batch": (lambda m: m(IDS[:, :0]), "input_ids: empty"),
    "all padding": (lambda m: m(IDS, attention_mask=ZEROS), "attention_mask: text 1 is all padding"),
    "mask": (lambda m: m(IDS, attention_mask=ZEROS[:, :2]), r"attention_mask: \(2, 2\); expected \(2, 3\)"),
    "floats": (lambda m: m(IDS.float()), r"input_ids: torch.float32 \(2, 3\); expected whole numbers"),
    "labels": (lambda m: m(IDS, labels=IDS + 200), "labels: holds 300; expected 0 to 255, or -100"),
    "no next byte": (lambda m: m(IDS[:, :1], labels=IDS[:, :1]), "labels: no text has two bytes"),
    "labels with a cache": (lambda m: m(IDS, labels=IDS, use_cache=True), "labels: given with a cache"),
    "embeddings": (lambda m: m(inputs_embeds=torch.zeros(1, 2, 32)), "inputs_embeds: not supported"),
    "hidden states": (lambda m: m(IDS, output_hidden_states=True), "output_hidden_states: not supported"),
    "foreign cache": (lambda m: m(IDS, cache=object()), "cache: object of something else"),
    "other batch": (lambda m: m(IDS[:1], cache=m(IDS, use_cache=True)[-1]), "1 texts; expected 2"),
    "static cache": (lambda m: m.generate(IDS, cache_implementation="static"), "cache_implementation: 'static'"),
    "assistant": (lambda m: m.generate(IDS[:1], assistant_model=m), "assisted_generation: not supported"),
    "look-up": (lambda m: m.generate(IDS[:1], prompt_lookup_num_tokens=2), "assisted_generation: not supported"),
    "empty stop": (lambda m: m.generate(IDS, stop_strings=[""]), "stop_strings: an empty string"),
    "chunked padding": (
        lambda m: m.generate(IDS, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]), prefill_chunk_size=2),
        "prefill_chunk_size: given with padded texts",
    ),
    "resized": (lambda m: m.resize_token_embeddings(300), "300 tokens; the vocabulary of an H-Net is its 256 bytes"),
    "config": (lambda m: HNetTransformersConfig({"d_model": [4]}), "arch_layout: missing"),
    "misplaced key": (lambda m: HNetTransformersConfig(d_model=[4]), "d_model: a key of an H-Net's config; expected"),
    "cuts": (
        lambda m: HNetForCausalLM(HNetTransformersConfig(TWO_STAGES.to_dict() | {"routers": ["given", "learned"]})),
        "routers: given is told where chunks begin, which batches of transformers don't say",
    ),
    "no config": (lambda m: HNetForCausalLM(HNetTransformersConfig()), "hnet: missing"),
    "reentrant": (
        lambda m: m._set_gradient_checkpointing(True, __import__("functools").partial(print, use_reentrant=True)),
        "use_reentrant: True; expected False",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_refused_in_a_sentence(model, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ load and save


RUN_STEPS = ["--mbs", "256", "--global-slices", "1", "--steps", "2", "--val-every", "1", "--val-slices", "1"]


@pytest.fixture(scope="session")
def run(tmp_path_factory, worker_id) -> Path:
    """A run of train.py."""
    return made_once(tmp_path_factory, worker_id, "run", train) / "mine"


def train(folder: Path) -> None:
    (folder / "texts").mkdir()
    for n in range(20):
        (folder / "texts" / f"{n}.txt").write_text(SENTENCE.format(n) * 4, encoding="utf-8")
    fineweb.prepare(str(folder / "texts"), str(folder / "some_data"), holdout=0.2, processes=1)
    (folder / "micro.json").write_text(json.dumps(MICRO))
    flags = ["-c", "micro.json", "--data", "some_data", "--save-dir", "mine", "--device", "cpu", "--sample-bytes", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    called = [sys.executable, str(ROOT / "train.py"), *flags, *RUN_STEPS]
    done = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_becomes_a_folder_with_a_card(run, tmp_path):
    """And what it holds loads again, here and as weights of this repository."""
    model = HNetForCausalLM.from_pretrained(run)
    wanted = weights.load(run)
    assert all(torch.equal(model.state_dict()[name], w) for name, w in wanted.weights.items())
    assert model.config.hnet_config == wanted.config and model.config.ratio_weight == 0.2  # alpha of train.py
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    bpb = model.config.trained["curve"][-1][1]
    assert f"**{bpb:.3f} bits per byte**" in card and "`some_data` for 2 steps" in card and str(tmp_path) not in card
    assert "trust_remote_code=True" in card and json.dumps(wanted.config.to_dict(), indent=1) in card
    for picture in ("chunks.png", "curve.png"):
        assert f"({picture})" in card and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert set(load_file(tmp_path / "model.safetensors")) == set(wanted.weights)
    again = HNetForCausalLM.from_pretrained(tmp_path)
    assert again.config.trained == model.config.trained and again.config.hnet == model.config.hnet
    ours = weights.load(tmp_path)
    assert ours.config == wanted.config and all(torch.equal(ours.weights[n], w) for n, w in wanted.weights.items())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HNetForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is HNetTransformersConfig


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_exported_weights_load(tmp_path, form):
    config = config_of(["m1", ["T1"], "M1"], [32, 64], tie_embeddings=True)
    reference = random_model(config, torch.float32)
    file, *_ = weights.export(reference, tmp_path, form)
    for source in (tmp_path, file):
        model = HNetForCausalLM.from_pretrained(source)
        assert model.lm_head.weight is model.embeddings.weight and model.config.trained is None
        assert torch.equal(model(IDS).logits.flatten(0, 1), reference(nested(list(IDS))).logits.values())


def test_every_key_of_a_config_is_kept(tmp_path):
    for file in CONFIGS.glob("*.json"):
        config = HNetTransformersConfig(file.stem)
        config.save_pretrained(tmp_path)
        read = HNetTransformersConfig.from_pretrained(tmp_path)
        assert read.hnet_config == HNetConfig.load(file) and set(read.hnet) == set(HNetConfig.load(file).to_dict())


def test_a_copy_of_a_model_is_its_own(model):
    other = copy.deepcopy(model)
    other.lm_head.weight.data.zero_()
    assert not other(IDS).logits.any() and model(IDS).logits.any()


def test_weights_are_drawn_as_train_draws_them():
    def drawn(seed: int) -> HNetForCausalLM:
        torch.manual_seed(seed)
        return HNetForCausalLM(HNetTransformersConfig(TWO_STAGES))

    first, again, other = drawn(0), drawn(0), drawn(1)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (set(a.unique().tolist()) <= {0, 1}), name  # ones, zeros, the identity
    assert torch.equal(first.backbone.routing_module.q_proj_layer.weight, torch.eye(32))


def test_tensors_of_an_edited_layer_begin_as_init_says(monkeypatch, tmp_path):
    """A weight that `initial_weight` does not know, when it is new; constants that no file holds, also when loaded."""
    init, forward = SwiGLU.__init__, SwiGLU.forward

    def __init__(self, width, d_intermediate):
        init(self, width, d_intermediate)
        self.gain = torch.nn.Parameter(torch.full((width,), 2.0))
        self.register_buffer("shift", torch.full((width,), 0.75), persistent=False)
        self.bend = torch.tensor(0.125)

    def bent(self, x_TD):
        return torch.tanh(forward(self, x_TD) * self.gain + self.shift) * self.bend.to(x_TD)

    monkeypatch.setattr(SwiGLU, "__init__", __init__)
    monkeypatch.setattr(SwiGLU, "forward", bent)
    model = HNetForCausalLM(HNetTransformersConfig(config_of(["m1", ["T1"], "M1"], [32, 64])))
    gains = [weight for name, weight in model.named_parameters() if name.endswith("gain")]
    assert len(gains) == 2 and all((weight == 2).all() for weight in gains)
    model.save_pretrained(tmp_path)
    again = HNetForCausalLM.from_pretrained(tmp_path)
    layers = [layer for layer in again.modules() if type(layer) is SwiGLU]
    assert len(layers) == 2 and all((layer.shift == 0.75).all() and layer.bend == 0.125 for layer in layers)
    assert torch.equal(again(IDS).logits, model(IDS).logits)

    def noise(self, width, d_intermediate):
        __init__(self, width, d_intermediate)
        self.register_buffer("shift", torch.randn(width), persistent=False)

    monkeypatch.setattr(SwiGLU, "__init__", noise)
    with pytest.raises(ValueError, match=r"mlp.shift: __init__ draws it at random and the saved"):
        HNetForCausalLM.from_pretrained(tmp_path)


def test_what_an_edit_adds_to_the_model_is_trained_and_saved(monkeypatch, tmp_path):
    """A weight, a module and a buffer of HNetLM itself, under their own names."""
    before = HNetLM.__init__

    def __init__(self, config):
        before(self, config)
        self.logit_scale = torch.nn.Parameter(torch.full((), 2.0))
        self.second_head = torch.nn.Linear(config.d_model[0], config.vocab_size, bias=False)
        self.register_buffer("prior", torch.full((config.vocab_size,), 3.0))

    def head(self, x_TD):
        return self.lm_head(x_TD) * self.logit_scale + self.second_head(x_TD) + self.prior.to(x_TD)

    monkeypatch.setattr(HNetLM, "__init__", __init__)
    monkeypatch.setattr(HNetLM, "head", head)
    config = config_of(["m1", ["T1"], "M1"], [32, 64])
    model = HNetForCausalLM(HNetTransformersConfig(config))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in HNetLM(config).named_parameters()}
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in (model.logit_scale, model.second_head.weight))
    with torch.no_grad():
        model.logit_scale.fill_(0.5)
        model.prior.fill_(0.75)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "saved")
    weights.export(model.hnet, tmp_path / "exported", "safetensors")
    for other in (copied, *(HNetForCausalLM.from_pretrained(tmp_path / name) for name in ("saved", "exported"))):
        assert other.logit_scale.item() == 0.5 and (other.prior == 0.75).all()
        assert torch.equal(other(IDS).logits, model(IDS).logits)
        other.double().logit_scale.data.zero_()
        assert other.hnet.logit_scale is other.logit_scale and model.logit_scale.item() == 0.5
        assert {tensor.dtype for tensor in other.hnet.state_dict().values()} == {torch.float64}


def test_weights_that_an_edit_ties_stay_one(monkeypatch, tmp_path):
    """Within a module, and by a module in two places; saved once, and read by this repository, too."""
    stage, router = HNet.__init__, RoutingModule.__init__

    def tie_stage(self, config, s=0):
        stage(self, config, s)
        if not self.is_innermost:
            self.decoder.layers[0].mixer = self.encoder.layers[0].mixer

    def tie_router(self, width, argument=""):
        router(self, width, argument)
        self.k_proj_layer.weight = self.q_proj_layer.weight

    monkeypatch.setattr(HNet, "__init__", tie_stage)
    monkeypatch.setattr(RoutingModule, "__init__", tie_router)
    config = config_of(["m1", ["T1"], "m1"], [32, 64], tie_embeddings=True)
    model = HNetForCausalLM(HNetTransformersConfig(config))
    weights.export(model.hnet, tmp_path / "exported", "safetensors")
    model.save_pretrained(tmp_path / "saved")
    names = {name for name, _ in model.named_parameters()}
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == names
    for folder in ("exported", "saved"):
        again = HNetForCausalLM.from_pretrained(tmp_path / folder)
        assert {name for name, _ in again.named_parameters()} == names
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        read = weights.load_inference(tmp_path / folder)
        assert torch.equal(read(nested(list(IDS))).logits.values(), model(IDS).logits.flatten(0, 1))


@pytest.fixture
def cache_of_the_hub(tmp_path, monkeypatch):
    """Makes repositories in a cache of the Hub's client that was never online."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def make(name: str, home: Path = tmp_path) -> Path:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        return repository / "snapshots" / commit

    return make


OFFICIAL = ["hnet_1stage_L", "hnet_1stage_XL", "hnet_2stage_L", "hnet_2stage_XL"]
OFFICIAL += sorted(f.stem for f in CONFIGS.glob("hnet_2stage_XL_*.json"))


@pytest.mark.parametrize("name", OFFICIAL)
def test_released_checkpoints_load_by_name(cache_of_the_hub, name, tmp_path):
    """Files of the right names and shapes; each weight is one element that is repeated, so that the file is small."""
    with torch.device("meta"):
        expected = HNetLM(HNetConfig.load(name)).state_dict()
    values = {key: torch.tensor([n / 64], dtype=torch.bfloat16) for n, key in enumerate(expected)}
    state = {key: values[key].expand(w.shape) for key, w in expected.items()}
    torch.save(state, cache_of_the_hub(f"cartesia-ai/{name}") / f"{name}.pt")
    model = HNetForCausalLM.from_pretrained(f"cartesia-ai/{name}")
    assert model.config.hnet_config == HNetConfig.load(name)
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(found[key].shape == w.shape and found[key].flatten()[0] == values[key] for key, w in expected.items())


def test_an_official_file_becomes_a_model(cache_of_the_hub, tmp_path):
    reference = random_model(config_of(["m1", ["T1"], "M1"], [32, 64]), torch.bfloat16)
    weights.export(reference, cache_of_the_hub("someone/small"), "pt")
    model = HNetForCausalLM.from_pretrained("someone/small", dtype=torch.float32)
    assert model.name_or_path == "someone/small"
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight.float())
    with pytest.raises(weights.CheckpointError, match="cache_dir can't be used"):
        HNetForCausalLM.from_pretrained("someone/small", cache_dir=str(tmp_path))


def test_a_name_on_the_hub_loads_what_was_pushed(cache_of_the_hub):
    model = theirs(dtype=torch.float32)
    model.save_pretrained(cache_of_the_hub("someone/pushed"))
    again = HNetForCausalLM.from_pretrained("someone/pushed")
    assert again.name_or_path == "someone/pushed"
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_push_uploads_a_complete_folder(model, monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub

    uploaded = {}

    def upload(self, *, folder_path, **options):
        uploaded.update(options, files=sorted(os.listdir(folder_path)))
        return "url"

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    made = lambda self, name, **options: SimpleNamespace(repo_id=f"me/{name}")  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", made)
    assert model.push_to_hub("small", commit_message="Upload") == "url"
    assert uploaded["repo_id"] == "me/small" and uploaded["commit_message"] == "Upload"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", *code_files()} <= set(uploaded["files"])


def test_weights_of_another_config_are_refused(run, tmp_path):
    other = HNetTransformersConfig(TWO_STAGES)
    with pytest.raises(weights.CheckpointError, match="its config differs: .*arch_layout is"):
        HNetForCausalLM.from_pretrained(run, config=other)
    theirs(config_of(["m1", ["T1"], "M1"], [32, 64]), torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the weights don't fit the config: \d+ missing \(backbone") as caught:
        HNetForCausalLM.from_pretrained(tmp_path, config=other)
    assert "\n" not in str(caught.value)
    for absent in (tmp_path / "nothing", "no name at all"):
        with pytest.raises(weights.CheckpointError, match="no such file or folder, and no name on the Hub"):
            HNetForCausalLM.from_pretrained(absent)


def test_a_device_map_names_one_device(tmp_path):
    theirs(dtype=torch.float32).save_pretrained(tmp_path)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        model = HNetForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        assert model.generate(IDS, max_new_tokens=2).shape == (2, 5)
    split = {"embeddings": "cpu", "backbone": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="device_map: puts the model on cpu, meta; expected one device"):
        HNetForCausalLM.from_pretrained(tmp_path, device_map=split, offload_folder=str(tmp_path / "offloaded"))


# --------------------------------------------------------------------------------------------------- exported folders


def without_imports(text: str) -> str:
    """The syntax tree of a file without import statements, and without the `try` around some."""

    class Remover(ast.NodeTransformer):
        def visit_Import(self, node):
            return None

        visit_ImportFrom = visit_Import

        def visit_Try(self, node):
            self.generic_visit(node)
            handler = [ast.unparse(x) for h in node.handlers for x in h.body]
            return node if node.body or handler != ["raise"] else None

    return ast.dump(Remover().visit(ast.parse(text)))


def test_exported_code_differs_in_import_statements_alone():
    files = code_files()
    modules = {
        path_of(name) for name in ("hnet_config", "hnet_routers", "hnet_trainable", "hnet_simple", "hnet_kernels")
    }
    modules |= set((ROOT / "hnet_kernels").glob("*.py")) - {
        ROOT / "hnet_kernels" / f"{n}.py" for n in ("adamw", "adamw_triton", "capture")
    }
    modules |= {path_of(f"hnet_transformers.{name}") for name in ("configuration_hnet", "modeling_hnet")}
    named = {}
    for path in modules:
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        named[f"{flat_name(dotted)}.py"] = path
    assert set(files) == set(named)
    for name, text in files.items():
        assert without_imports(text) == without_imports(named[name].read_text()), name
        for node in ast.walk(ast.parse(text)):  # nothing of ours is imported by its own name
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not node.module.startswith("hnet_") or node.module == "hnet_transformers.hub", (
                    name,
                    node.module,
                )


FOREIGN = """
import json, os, sys
from importlib.machinery import PathFinder

HIDDEN = {"triton", "tyro", "rich", "datasets", "matplotlib", "pyarrow", "peft", "lm_eval", "accelerate", "fineweb"}

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        return None if top in HIDDEN or top.startswith("hnet_") else super().find_spec(name, path, target)

finders = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.meta_path = [Hiding if finder is PathFinder else finder for finder in finders]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import check_imports

folder, name = sys.argv[1:]
checked = [file for file in sorted(os.listdir(folder)) if file.endswith(".py")]
for file in checked:
    check_imports(os.path.join(folder, file))
found = {"checked": checked}
for source in (folder, name):
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    batch = tokenizer(["Hello wörld", "a"], return_tensors="pt", padding=True)
    found[source] = model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()
model.save_pretrained(folder + "/again")
made = pipeline("text-generation", model=folder + "/again", tokenizer=tokenizer, trust_remote_code=True)
found["pipeline"] = made("Hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]
print("FOUND", json.dumps(found))
"""


def test_an_exported_folder_loads_where_there_is_only_transformers(cache_of_the_hub, tmp_path, tokenizer, capsys):
    """By path and by a name of the Hub, whose files are checked and copied one by one; saved again; as a pipeline."""
    reference = random_model(TWO_STAGES, torch.float32)
    weights.export(reference, tmp_path / "weights", "safetensors")
    export = runpy.run_path(str(ROOT / "scripts" / "export.py"))["main"]
    export([str(tmp_path / "weights"), str(tmp_path / "out"), "--form", "transformers"])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sorted(line.split()[0].rsplit("/", 1)[-1] for line in capsys.readouterr().out.splitlines()) == written
    snapshot = cache_of_the_hub("someone/exported")
    for path in (tmp_path / "out").iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    called = [sys.executable, "-c", FOREIGN, str(tmp_path / "out"), "someone/exported"]
    done = subprocess.run(called, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND ", 1)[1])
    assert set(found["checked"]) == set(code_files())
    batch = tokenizer(["Hello wörld", "a"], return_tensors="pt", padding=True)
    wanted = theirs(dtype=torch.float32).generate(**batch, max_new_tokens=8, do_sample=False).tolist()
    assert found[str(tmp_path / "out")] == found["someone/exported"] == wanted
    assert found["pipeline"].startswith("Hello")


HALVED = """
import hnet_trainable as H
from my_scales import SCALE

class Halved(H.Attention):
    def forward(self, x_TD, packing): return SCALE * super().forward(x_TD, packing)
    def prefill(self, x_TD, state, span): return SCALE * super().prefill(x_TD, state, span)
    def step(self, x_TD, state, span): return SCALE * super().step(x_TD, state, span)

H.MIXERS["h"] = Halved
"""
MAKE = """
import sys, torch
from hnet_runtime.runs import weights
from hnet_trainable import HNetConfig, HNetLM, init_weights
from hnet_transformers import HNetForCausalLM, byte_tokenizer
from hnet_transformers.hub import export
from pathlib import Path

weights.export(init_weights(HNetLM(HNetConfig.load("micro.json")), 0), Path("weights"), "safetensors")
export("weights", Path(sys.argv[1]))
batch = byte_tokenizer()(["Hello wörld", "a"], return_tensors="pt", padding=True)
print("FOUND", HNetForCausalLM.from_pretrained("weights").generate(**batch, max_new_tokens=8, do_sample=False).tolist())
"""


@pytest.fixture
def repository(tmp_path):
    """Runs Python where a copy of the repository has letters of its own, in files beside hnet_trainable.py."""
    shutil.copytree(
        ROOT, copied := tmp_path / "repository", ignore=lambda folder, names: {n for n in names if n.startswith(".")}
    )
    (short_conv,) = (block for _, block in python_of(ROOT / "docs" / "CHANGING.md") if "MIXERS[" in block)
    for name, text in {"my_mixers": short_conv, "my_scales": "SCALE = 0.5\n", "my_halved": HALVED}.items():
        (copied / f"{name}.py").write_text(text)
    model = (copied / "hnet_trainable.py").read_text()
    registered = 'MIXERS |= {"m": Mamba2, "t": Attention}\n'
    edit = f"{registered}\nimport my_mixers\nimport my_halved\n"
    assert model.count(registered) == 1
    (copied / "hnet_trainable.py").write_text(model.replace(registered, edit))
    letters = {"arch_layout": ["m1c1", ["T1H1"], "c1"]}
    (tmp_path / "micro.json").write_text(json.dumps(MICRO | letters))

    def python(*called: str, path: str = str(copied)) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path
        }  # fmt: skip
        called = [sys.executable, *called]
        return subprocess.run(called, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    return python


def test_an_exported_folder_has_the_letters_of_an_edited_model(repository, cache_of_the_hub, tmp_path):
    """And the files that it imports, which import it in turn."""
    done = repository("-c", MAKE, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    snapshot = cache_of_the_hub("someone/exported")
    for path in (tmp_path / "out").iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    assert {"my_mixers.py", "my_halved.py", "my_scales.py"} <= {p.name for p in snapshot.iterdir()}
    loaded = repository("-c", FOREIGN, str(tmp_path / "out"), "someone/exported", path="")
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    wanted, found = (json.loads(run.stdout.split("FOUND ", 1)[1]) for run in (done, loaded))
    assert found[str(tmp_path / "out")] == found["someone/exported"] == wanted


def test_an_export_that_would_lack_a_file_is_refused(repository, tmp_path):
    """A module that is elsewhere or a package, and imports that flat files cannot have."""
    copied, elsewhere = tmp_path / "repository", tmp_path / "elsewhere"
    (elsewhere / "my_scales").mkdir(parents=True)
    (copied / "my_scales.py").rename(elsewhere / "my_scales" / "__init__.py")
    done = repository("-c", MAKE, str(tmp_path / "out"), path=f"{copied}{os.pathsep}{elsewhere}")
    last = done.stderr.strip().splitlines()[-1]
    assert f"{elsewhere}/my_scales/__init__.py: the model's code imports it, so the folder needs it; expected" in last
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "statement", ["from .linear import linear", "import math, hnet_config", "import hnet_kernels.ssd"]
)
def test_an_import_that_flat_files_cannot_have_is_refused(monkeypatch, tmp_path, statement):
    from hnet_transformers import folder

    (tmp_path / "hnet_edited.py").write_text(f'"""Text."""\n\n{statement}\n')
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    with pytest.raises(weights.CheckpointError, match=rf"hnet_edited.py: line 3 \({statement}\) can't be exported"):
        folder.flattened("hnet_edited")


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_an_export_replaces_no_files_of_others(run, tmp_path, name):
    from hnet_transformers import hub

    (tmp_path / name).write_text("mine")
    with pytest.raises(weights.CheckpointError, match=f"has a {name} that is of no export"):
        hub.export(str(run), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_an_export_that_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    from hnet_transformers import hub

    (tmp_path / "file").write_text("")
    with pytest.raises(weights.CheckpointError, match="can't be written"):
        hub.export(str(run), tmp_path / "file" / "out")

    def fill(model, folder, **options):
        (Path(folder) / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HNetForCausalLM, "save_pretrained", fill)
    with pytest.raises(weights.CheckpointError, match=r"can't be written \(No space left on device\)"):
        hub.export(str(run), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def dataset(tokenizer):
    texts = [f"The chunk number {n} holds some words, a comma, and a name.\n" for n in range(32)]
    return [{"input_ids": tokenizer(text).input_ids + [EOS]} for text in texts]


def trained(model, tokenizer, dataset, folder: Path, **options) -> Trainer:
    """Ten steps of Trainer."""
    arguments = TrainingArguments(
        str(folder), max_steps=10, logging_steps=1, learning_rate=3e-3, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, **{"per_device_train_batch_size": 4} | options,
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset[:6], data_collator=collate)
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_ten_steps_of_trainer(tokenizer, dataset, tmp_path):
    """The loss falls; checkpointing changes nothing; two half micro-batches are one; autocast comes near."""
    found = {}
    for name, options in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "halves": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "autocast": {"bf16": True},
    }.items():
        model = theirs(config_of(["m1", ["T1"], "m1"], [32, 64]), torch.float32)
        trainer = trained(model, tokenizer, dataset, tmp_path, **options)
        found[name] = losses(trainer)
    assert len(found["plain"]) == 10 and found["plain"][-1] < found["plain"][0] - 0.3
    assert found["checkpointing"] == found["plain"]
    assert found["halves"] == pytest.approx(found["plain"], rel=0.02)  # ratio losses are taken over each half
    assert found["autocast"] == pytest.approx(found["plain"], rel=0.02)  # bfloat16 has 8 bits
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(tmp_path / "trained"))
    again = HNetForCausalLM.from_pretrained(tmp_path / "trained")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trainer.model.parameters()))


def test_checkpointed_gradients_have_the_same_bits(batch):
    model = theirs()
    found = []
    for enable in (False, True, False):
        model._set_gradient_checkpointing(enable)
        model.zero_grad()
        model(**batch, labels=labels_of(batch)).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found))


# ---------------------------------------------------------------------------------------------------------------- peft

PROJECTIONS = ["in_proj", "out_proj", "Wqkv", "fc1", "fc2", "q_proj_layer", "k_proj_layer", "residual_proj", "lm_head"]


def adapted(config, **options):
    """A model with random adapters, so that each of them counts."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    found = peft.get_peft_model(theirs(config), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return found.double().eval()


def test_adapters_count_everywhere(tokenizer, tmp_path):
    """Each of them, with and without cache; and merged weights give the same text."""
    peft = pytest.importorskip("peft")
    batch = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    model = adapted(TWO_STAGES, target_modules=PROJECTIONS)
    logits = model(**batch).logits
    adapters = [name for name, _ in model.named_parameters() if "lora_B" in name]
    projections = [n for n, m in theirs().named_modules() if n.rsplit(".")[-1] in PROJECTIONS]
    assert len(adapters) == len(projections)
    for name in adapters:
        parameter = model.get_parameter(name)
        value = parameter.data.clone()
        parameter.data.zero_()
        plain, cached = (model(**batch, use_cache=cached).logits for cached in (False, True))
        parameter.data.copy_(value)
        assert (plain - logits).abs().max() > 1e-6, name
        torch.testing.assert_close(plain, cached, rtol=0, atol=1e-9, msg=name)
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(theirs(), tmp_path)(**batch).logits, logits)
    texts = [model.generate(**batch, **GREEDY, use_cache=cached) for cached in (True, False)]
    merged = model.merge_and_unload()
    texts += [merged.generate(**batch, **GREEDY, use_cache=cached) for cached in (True, False)]
    assert all(torch.equal(texts[0], text) for text in texts[1:])
    assert not torch.equal(texts[0], theirs().generate(**batch, **GREEDY))


TIED = config_of(["m1", ["T1"], "m1"], [32, 64], tie_embeddings=True)
IGNORED = {
    "conv1d": (
        TWO_STAGES,
        {"target_parameters": ["conv1d.weight"]},
        TypeError,
        "conv1d of a Mamba-2 mixer was replaced",
    ),
    "norm": (
        TWO_STAGES,
        {"target_modules": ["fc1"], "modules_to_save": ["mixer.norm"]},
        TypeError,
        "norm of a Mamba-2",
    ),
    "tied": (TIED, {"target_modules": ["lm_head"]}, ValueError, "embeddings and lm_head share one weight"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of tied weights, too
@pytest.mark.parametrize("case", IGNORED)
def test_an_adapter_that_would_be_ignored_is_refused(batch, case):
    config, options, kind, message = IGNORED[case]
    model = adapted(config, **options)
    for cached in (False, True):
        with pytest.raises(kind, match=message):
            model(**batch, use_cache=cached)


@pytest.mark.parametrize("part", ["mixer", "norm1", "rmsnorm", "routing_module", "decoder", "embeddings"])
def test_a_part_that_is_trained_as_a_copy_counts(batch, part):
    model = adapted(TWO_STAGES, target_modules=["fc1"], modules_to_save=[part])
    plain, cached = (model(**batch, use_cache=cached).logits for cached in (False, True))
    torch.testing.assert_close(plain, cached, rtol=0, atol=1e-9)
    copied = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    for parameter in copied:
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert copied and (model(**batch).logits - plain).abs().max() > 1e-6


def test_a_peft_run_lowers_the_loss(tokenizer, dataset, tmp_path):
    peft = pytest.importorskip("peft")
    base = config_of(["m1", ["T1"], "m1"], [32, 64])
    options = peft.LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs(base, torch.float32), options)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    found = losses(trained(model, tokenizer, dataset, tmp_path, gradient_checkpointing=True))
    assert found[-1] < found[0] - 0.3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(theirs(base, torch.float32), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


# ------------------------------------------------------------------------------------------------------------- lm_eval


def test_lm_eval_gives_our_log_likelihoods(run, tmp_path):
    """By default those of continuations; with add_bos_token=False those of complete texts."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    HNetForCausalLM.from_pretrained(run).save_pretrained(tmp_path)
    reference = Likelihoods(weights.load_training(run), 8192)
    pairs = [("The dog", " barks at the cat."), ("", "no context"), ("Émile said:", " naïve 日本"), ("a" * 100, "b")]
    texts = ["one text", "Another, quite a bit longer text that goes on.", "日本語"]

    def ask(kind: str, requests: list, **options) -> list:
        model = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=3, dtype="float32", **options)
        asked = [Instance(request_type=kind, doc={}, arguments=args, idx=n) for n, args in enumerate(requests)]
        return getattr(model, kind)(asked, disable_tqdm=True)

    wanted = reference.of_continuations([(a.encode(), b.encode()) for a, b in pairs])
    for (found, found_best), (want, want_best) in zip(ask("loglikelihood", pairs), wanted):
        assert found == pytest.approx(want, abs=1e-4) and found_best == want_best
    found = ask("loglikelihood_rolling", [(text,) for text in texts], add_bos_token=False)
    assert found == pytest.approx(reference.of_texts([text.encode() for text in texts]), abs=1e-4)
