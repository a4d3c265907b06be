"""docs/CHANGING.md is correct: its Python blocks run and do what the text says, and the files, names and messages that
it mentions exist."""

import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Job, program
from small_models import ONE_STAGE
from test_edits import losses, set_  # noqa: F401 (a fixture)
from torch import nn

import fineweb
import hnet_trainable as H
from hnet_config import MIXERS, ROUTERS
from hnet_kernels.dispatch import OPERATIONS
from hnet_routers import Router
from hnet_runtime import distributed, flops
from hnet_runtime.checks import agreement
from hnet_trainable import HNetConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "CHANGING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"# hnet_trainable\.py(?:, class (\w+))?\n")  # such a block replaces a function there
EDITS = [block for block in BLOCKS if PLACE.match(block)]
(MIXER,) = (block for block in BLOCKS if "MIXERS[" in block)
(ROUTER,) = (block for block in BLOCKS if "ROUTERS[" in block)
(OPERATION,) = (block for block in BLOCKS if "@operation" in block)
LETTER = ONE_STAGE | {"arch_layout": ["c1m1", ["T1C1"], "m1c1"]}
DIFFERS = "generation (hnet_simple.py) differs from hnet_trainable.py"
CPU = torch.device("cpu")


def execute(block: str) -> SimpleNamespace:
    """What a block defines. One that stands in hnet_trainable.py knows the names of that file."""
    names = {"__name__": "changing"} | (dict(vars(H)) if PLACE.match(block) else {})
    before = dict(names)
    exec(compile(block, "docs/CHANGING.md", "exec"), names)
    return SimpleNamespace(**{name: x for name, x in names.items() if x is not before.get(name)})


@pytest.fixture
def run():
    """`execute`, but what a block registers is taken back when the test ends."""
    registries = [(registry, dict(registry)) for registry in (MIXERS, ROUTERS, OPERATIONS, agreement.EXAMPLES)]
    yield execute
    for registry, before in registries:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block, run):
    assert vars(run(block))


def test_edits_of_formulas_take_effect_and_stay_in_graphs(run, set_):  # noqa: F811
    config = HNetConfig.load(ONE_STAGE)
    found = [losses(config)]
    assert len(EDITS) == 4
    for block in EDITS:
        where = PLACE.match(block)[1]
        owner = getattr(H, where) if where else H
        for name, function in vars(run(block)).items():
            if inspect.isfunction(function):
                assert hasattr(owner, name)
                set_(owner, name, function)
        found.append(losses(config))
        assert found[-1] != pytest.approx(found[-2], rel=1e-4), block
    assert agreement.steps_as_graphs(config) is None
    assert agreement.generation(config) is None


# ------------------------------------------------------------------------------------------------------------- a mixer


def test_the_mixer_runs_as_graphs_and_generates(run):
    run(MIXER)
    config = HNetConfig.load(LETTER)
    assert "c" in str(agreement.toy_config(config).arch_layout), "the toy has it"
    assert agreement.steps_as_graphs(config) is None
    assert agreement.generation(config) is None


def test_a_wrong_prefill_of_the_mixer_is_named(run, monkeypatch):
    mixer = run(MIXER).ShortConv
    monkeypatch.setattr(mixer, "prefill", lambda self, x_TD, state, span: self.in_proj(x_TD)[:, : x_TD.shape[1]])
    assert agreement.generation(HNetConfig.load(LETTER)) == f"{DIFFERS}: backbone.encoder.layers.0"


def test_without_methods_for_generation_the_mixer_trains_and_a_sentence_says_what_it_lacks(run, monkeypatch):
    mixer = run(MIXER).ShortConv
    for name in ("new_state", "prefill", "step", "flops"):
        monkeypatch.delattr(mixer, name)
    config = HNetConfig.load(LETTER | {"vocab_size": 300})  # which no other test counts, as counts are cached
    assert agreement.steps_as_graphs(config) is None
    said = agreement.generation(config)
    assert said.endswith("it has no new_state and no prefill and no step")
    assert said.startswith(f"{DIFFERS}: ShortConv trains, but cannot generate") and f"    no samples: {said}\n" in TEXT
    assert (
        flops.count_flops(config, [[5], [2]]).mixing == flops.count_flops(HNetConfig.load(ONE_STAGE), [[5], [2]]).mixing
    )


def check_the_mixer_without_generation(folder: str) -> None:
    mixer = execute(MIXER).ShortConv
    for name in ("prefill", "step"):
        delattr(mixer, name)
    program("-c", f"{folder}/model.json", "-e", "generate", "--device", "cpu")


def test_the_equivalence_check_of_a_mixer_without_generation_ends_in_one_sentence(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(LETTER))
    job = Job(tmp_path / "logs", 1, check_the_mixer_without_generation, lambda rank: (str(tmp_path),))
    assert job.wait() == [2]
    (said,) = (line for line in job.printed().splitlines() if line.startswith("error: "))
    assert said.endswith("ShortConv trains, but cannot generate: it has no prefill and no step")
    assert "Traceback" not in job.printed()


def test_the_mixers_flops_are_counted(run):
    """Of each: products with 4 D^2 weights, and 2 * 4 taps a channel; three times, for forward and backward."""
    run(MIXER)
    D, inner, tokens, chunks = 64, 128, 100, 30
    before, after = (flops.count_flops(HNetConfig.load(raw), [[tokens], [chunks]]) for raw in (ONE_STAGE, LETTER))
    mlp = 3 * D * inner
    assert after.matmul - before.matmul == 6 * (2 * tokens * 4 * D * D + chunks * (4 * D * D + mlp))
    assert after.mixing - before.mixing == 3 * (2 * tokens + chunks) * 2 * 4 * D


def test_initial_weights_of_the_mixer_go_by_name(run):
    run(MIXER)
    config = HNetConfig.load(LETTER | {"d_model": [256, 256]})
    model = H.init_weights(H.HNetLM(config), 0)
    mixer, branches = model.backbone.decoder.layers[1].mixer, 4
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(branches), rel=0.02)
    assert 0.49 < mixer.conv1d.weight.abs().max() <= 0.5, "uniform, up to the root of one over four taps"
    decays = {name: group["weight_decay"] for group in H.parameter_groups(model, 1.0, 0.1) for name in group["names"]}
    assert {x for name, x in decays.items() if "decoder.layers.1.mixer" in name} == {0.1}


def train_with_the_mixer(folder: str) -> None:
    execute(MIXER)
    flags = f"-c {folder}/model.json --data {folder}/data --mbs 256 --steps 3 --device cpu -C graph --sample-bytes 8"
    program(*flags.split(), "--save-dir", f"{folder}/run", "--val-slices", "1")


def test_the_mixer_trains_validates_and_writes_a_sample(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"the quick brown fox number {i} jumps over lazy dogs. " * 8)
    fineweb.prepare(str(tmp_path / "texts"), str(tmp_path / "data"), holdout=0.2)
    (tmp_path / "model.json").write_text(json.dumps(LETTER | {"d_intermediate": [0, 64]}))
    printed = Job(tmp_path / "logs", 1, train_with_the_mixer, lambda rank: (str(tmp_path),)).succeed()
    assert "steps run as graphs, and compute what hnet_trainable.py says" in printed and "no samples" not in printed
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and math.isfinite(last["val_bpb"]) and "the model writes" in printed


# ------------------------------------------------------------------------------------------------------------ a router


def test_the_router_opens_lines_runs_as_graphs_and_generates(run):
    run(ROUTER)
    config = HNetConfig.load(ONE_STAGE | {"routers": ["lines"]})
    iids = torch.nested.nested_tensor([torch.tensor(list(b"a\nbc\n\nd")), torch.tensor([7, 8])], layout=torch.jagged)
    (stage,) = H.init_weights(H.HNetLM(config), 0)(iids).stages
    assert stage.b_T.tolist() == [True, False, True, False, False, True, True, True, False]
    assert agreement.steps_as_graphs(config) is None
    assert agreement.generation(config) is None


class Neighbour(Router):
    """A learned router with one weight vector: sigmoid of its product with a token's difference to the one before."""

    usage, is_learned = "neighbour", True

    def __init__(self, width: int, argument: str = ""):
        super().__init__()
        self.direction = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, x_TD, packing):
        difference_TD = (x_TD - x_TD.roll(1, 0)).to(torch.promote_types(x_TD.dtype, torch.float32))
        return (
            (difference_TD @ self.direction.to(difference_TD.dtype)).sigmoid().masked_fill(packing.position_T == 0, 1.0)
        )

    def opens(self, p_T):
        return p_T.detach() > 0.5


def test_a_learned_router_of_ones_own_trains_as_graphs_and_generates(run, monkeypatch):
    monkeypatch.setitem(ROUTERS, "neighbour", Neighbour)
    config = HNetConfig.load(ONE_STAGE | {"routers": ["neighbour"]})
    model = H.init_weights(H.HNetLM(config), 0)
    iids = torch.nested.nested_tensor([torch.arange(20)], layout=torch.jagged)
    out = model(iids, iids)
    (gradient,) = torch.autograd.grad(out.ratio_losses.sum(), model.backbone.routing_module.direction)
    assert out.ratio_losses[0] > 0 and gradient.norm() > 0
    assert agreement.steps_as_graphs(config) is None
    assert agreement.generation(config) is None


# ------------------------------------------------------------------------------------------------------------ a weight


def with_new_weights(set_):  # noqa: F811
    init = H.Block.__init__

    def __init__(self, layer, config, s):
        init(self, layer, config, s)
        self.gain = nn.Parameter(torch.full((config.d_model[s],), 0.7))
        self.extra = nn.Linear(config.d_model[s], 4)

    set_(H.Block, "__init__", __init__)


@pytest.mark.gpu
def test_weights_that_are_drawn_ahead_have_the_same_bits(set_):  # noqa: F811
    with_new_weights(set_)
    config, world = HNetConfig.load(ONE_STAGE), SimpleNamespace(shards=1, device=torch.device("cuda", 0))
    ahead = distributed.draw_ahead(config, world, 3)
    first, second = (distributed.build_model(config, world, torch.float32, 3, drawn=ahead) for _ in range(2))
    one_by_one = distributed.build_model(config, SimpleNamespace(shards=1, device=CPU), torch.float32, 3)
    for name, p in one_by_one.named_parameters():
        assert torch.equal(first.get_parameter(name).cpu(), p), name
        assert torch.equal(second.get_parameter(name).cpu(), p), name  # after what was drawn ahead has been used


def test_weights_are_not_drawn_ahead_where_a_gpu_may_not_hold_them():
    config = HNetConfig.load(ONE_STAGE)
    for shards, device in ((1, "cpu"), (2, "cuda")):
        assert distributed.draw_ahead(config, SimpleNamespace(shards=shards, device=torch.device(device)), 0) is None


def test_a_new_weight_starts_with_the_value_of_its_init(set_, caplog):  # noqa: F811
    with_new_weights(set_)
    config, world = HNetConfig.load(ONE_STAGE), SimpleNamespace(shards=1, device=CPU)
    caplog.set_level("INFO", "hnet")
    one, same, other = (dict(distributed.build_model(config, world, torch.float32, seed).named_parameters())
                        for seed in (1, 1, 2))  # fmt: skip
    first, n = "backbone.encoder.layers.0.", sum(name.endswith(".gain") for name in one)
    assert n > 2 and all((p == 0.7).all() for name, p in one.items() if name.endswith(".gain"))
    assert torch.equal(one[first + "extra.weight"], same[first + "extra.weight"])
    assert not torch.equal(one[first + "extra.weight"], other[first + "extra.weight"])
    assert f"{first}gain and {3 * n - 1} more: not in initial_weight; __init__ gives the first value" in caplog.messages
    (quoted,) = re.findall(r"^    (backbone.*first value)$", TEXT, re.MULTILINE)
    assert re.sub(" and [0-9]+ more", "", caplog.messages[-1]) == re.sub(" and [0-9]+ more", "", quoted)
    assert H.has_weight_decay("backbone.encoder.gain") and not H.has_weight_decay("backbone.encoder.norm.gain")


def test_weights_of_the_model_are_all_known():
    for name in ("hnet_2stage_XL", "hnet_1stage_tiny"):
        config = HNetConfig.load(name)
        with torch.device("meta"):
            names = [name for name, _ in H.HNetLM(config).named_parameters()]
        assert [name for name in names if H.initial_weight(name, (2, 2), config, 0) is None] == []


# -------------------------------------------------------------------------------------------------------- an operation


def test_the_operation_agrees_with_its_definition(run, monkeypatch, set_):  # noqa: F811
    made = run(OPERATION)
    only = {"scale_channels": agreement.EXAMPLES["scale_channels"]}
    monkeypatch.setattr(agreement, "EXAMPLES", only)
    assert agreement.choose_implementations(CPU, torch.float32) == []

    def forward(self, residual_TD, packing):
        mixed_TD = packing.mix(self.mixer, self.norm1(residual_TD))
        mixed_TD = made.scale_channels(made.scale_channels(mixed_TD, self.gain), self.norm1.weight)
        return residual_TD + mixed_TD

    init = H.Block.__init__

    def __init__(self, layer, config, s):
        init(self, layer, config, s)
        self.gain = nn.Parameter(torch.ones(config.d_model[s]))

    set_(H.Block, "__init__", __init__)
    set_(H.Block, "forward", forward)
    assert agreement.steps_as_graphs(HNetConfig.load(ONE_STAGE | {"arch_layout": ["m1", ["t1"], "m1"]})) is None


def test_an_edit_of_the_operations_definition_is_announced_as_the_table_says(run, monkeypatch, caplog):
    made = run(OPERATION)
    monkeypatch.setattr(agreement, "EXAMPLES", {"scale_channels": agreement.EXAMPLES["scale_channels"]})
    monkeypatch.setattr(made.scale_channels, "definition", lambda x_TD, weight_D: 1.1 * x_TD * weight_D)
    assert agreement.choose_implementations(CPU, torch.float32) == ["scale_channels"]
    assert any(re.fullmatch(pattern, caplog.messages[-1]) for pattern in map(as_pattern, messages()))


# ---------------------------------------------------------------------------------------------------- what it mentions


def messages() -> list[str]:
    """The lines of the table of messages; dots stand for what differs from run to run."""
    return re.findall(
        r"^\| `(.*?)` \|", TEXT.partition("## What the checks say")[2].partition("\n## ")[0], re.MULTILINE
    )


def as_pattern(message: str) -> str:
    return ".+".join(map(re.escape, message.split("...")))


def test_its_messages_are_those_of_the_code():
    files = [ROOT / name for name in ("train.py", "hnet_simple.py", "hnet_decoder.py")]
    files += (ROOT / "hnet_runtime").rglob("*.py")
    source = re.sub(r'"\n\s+f?"', "", "".join(file.read_text(encoding="utf-8") for file in files))
    quoted = re.findall(r"^    (steps run .*)$", TEXT, re.MULTILINE)
    known = messages()
    assert len(known) >= 10 and len(quoted) == 1
    for message in known + quoted:
        for words in re.split(r"\.\.\.|: (?=the cross entropy)|(?=off by)|(?<=entropy) (?=is)", message):
            if len(words.split()) > 1:
                assert words.strip(" ()") in source, words


def test_its_files_and_names_exist():
    code = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"\b(?:\w+/)*\w+\.py\b", code):
        assert (ROOT / path).exists(), path
    for owner, name in re.findall(r"`(H?\w+)\.(\w+)`", code):
        if hasattr(H, owner):
            assert hasattr(getattr(H, owner), name), f"{owner}.{name}"
    for name in re.findall(r"`([a-zA-Z_]\w+)`", code.partition("Edit the function")[2].partition("Each of these")[0]):
        assert hasattr(H, name) or name in ("forward", "prefill", "step", "residual_proj"), name
