"""An edit of the model takes effect in training, validation and generation, or is announced before step 1.

Each edit has its expected result. `graphs`: steps as graphs follow it, and their gradients are those of the edited
model. `definition`: the fast implementation of an operation no longer agrees, and its definition runs, also in graphs.
`eager`: the check names the difference, and the run takes eager steps. And whether generation follows the edit.
"""

import contextlib
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from small_models import TWO_STAGES
from torch import nn

import hnet_config
import hnet_simple
import hnet_trainable as H
from hnet_kernels import dispatch
from hnet_kernels.dispatch import OPERATIONS, forcing
from hnet_routers import Rule
from hnet_runtime import UserError, distributed
from hnet_runtime.checks import agreement, equivalence
from hnet_runtime.runs import weights
from hnet_runtime.steps import graphs
from hnet_runtime.steps.graphs import GraphedModel
from hnet_runtime.steps.plain import PlainModel
from hnet_simple import HNetInference
from hnet_trainable import HNetConfig

CONFIG = HNetConfig.load(TWO_STAGES)


class Edit(NamedTuple):
    make: Callable
    training: str  # graphs, definition or eager
    generation: bool
    says: str = ""  # words of what is announced, where something is
    config: dict = {}
    definitions: Sequence[str] = ()  # operations whose definitions run, where that is not what `says` says


EDITS: dict[str, Edit] = {}


def edit(name: str, training: str = "graphs", generation: bool = True, **more):
    """Decorator over a function that makes the edit, given pytest's monkeypatch.setattr."""

    def enter(make):
        EDITS[name] = Edit(make, training, generation, **more)

    return enter


def after(method):
    """A decorator: `method` with what it returns changed."""

    def decorate(change):
        return lambda self, *args: change(self, method(self, *args))

    return decorate


# --------------------------------------------------------------------------------------------------------------- block


@edit("a factor in Block")
def _(set_):
    def forward(self, residual_TD, packing):
        residual_TD = residual_TD + 0.5 * packing.mix(self.mixer, self.norm1(residual_TD))
        return residual_TD + self.mlp(self.norm2(residual_TD)) if self.has_mlp else residual_TD

    set_(H.Block, "forward", forward)


@edit("mixer and MLP side by side: two norms read the residual stream")
def _(set_):
    def forward(self, residual_TD, packing):
        mixed_TD = packing.mix(self.mixer, self.norm1(residual_TD))
        if self.has_mlp:
            mixed_TD = mixed_TD + self.mlp(self.norm2(residual_TD))
        return residual_TD + mixed_TD

    set_(H.Block, "forward", forward)


@edit("another reader of the residual stream")
def _(set_):
    forward = H.Block.forward
    set_(H.Block, "forward", lambda self, x, packing: forward(self, x + 0.1 * torch.tanh(x), packing))


@edit("the residual stream scaled")
def _(set_):
    forward = H.Block.forward
    set_(H.Block, "forward", lambda self, x, packing: forward(self, x * 0.9, packing))


@edit("blocks with an MLP skipped")
def _(set_):
    forward = H.Block.forward
    set_(H.Block, "forward", lambda self, x, packing: x if self.has_mlp else forward(self, x, packing))


@edit("a new weight in Block")
def _(set_):
    init, forward = H.Block.__init__, H.Block.forward

    def __init__(self, layer, config, s):
        init(self, layer, config, s)
        self.scale = nn.Parameter(torch.ones(config.d_model[s]))

    set_(H.Block, "__init__", __init__)
    set_(H.Block, "forward", lambda self, x, packing: forward(self, x + 0.1 * self.scale, packing))


@edit("a buffer in Block")
def _(set_):
    init, forward = H.Block.__init__, H.Block.forward

    def __init__(self, layer, config, s):
        init(self, layer, config, s)
        self.register_buffer("scale", torch.full((config.d_model[s],), 0.7, dtype=torch.float64))

    set_(H.Block, "__init__", __init__)
    set_(H.Block, "forward", lambda self, x, packing: forward(self, x * self.scale, packing))


@edit("weight norm, whose submodules have numbers for names")
def _(set_):
    init = H.SwiGLU.__init__

    def __init__(self, width, inner):
        init(self, width, inner)
        nn.utils.parametrizations.weight_norm(self.fc2)

    set_(H.SwiGLU, "__init__", __init__)


@edit("frozen embeddings, twice as large", "eager", says="embeddings.weight needs no gradient")
def _(set_):
    set_(H.HNetLM, "__init__", after(H.HNetLM.__init__)(lambda self, _: self.embeddings.requires_grad_(False) and None))
    set_(H.HNetLM, "embed", after(H.HNetLM.embed)(lambda self, x: 2 * x))


@edit("one norm for two layers, and encoder and decoder with the same MLP")
def _(set_):
    init = H.HNet.__init__

    def __init__(self, config, s=0):
        init(self, config, s)
        if not self.is_innermost and len(self.encoder.layers) == 2:
            first, second = self.encoder.layers
            second.norm1 = first.norm1
            mlps = [layer for stack in (self.encoder, self.decoder) for layer in stack.layers if layer.has_mlp]
            mlps[-1].mlp = mlps[0].mlp

    set_(H.HNet, "__init__", __init__)


@edit("a hook of each norm", says="")
def _(set_):
    init = H.RMSNorm.__init__

    def __init__(self, width):
        init(self, width)
        self.register_forward_hook(lambda module, inputs, output: 1.1 * output)

    set_(H.RMSNorm, "__init__", __init__)


@edit("a hook of each mixer, which generation does not call", generation=False, says="layers.0")
def _(set_):
    init = H.Block.__init__

    def __init__(self, layer, config, s):
        init(self, layer, config, s)
        self.mixer.register_forward_hook(lambda module, inputs, output: 1.1 * output)

    set_(H.Block, "__init__", __init__)


# -------------------------------------------------------------------------------------------------------------- layers


@edit("GeGLU")
def _(set_):
    def forward(self, x_TD):
        value, gate = self.fc1(x_TD).chunk(2, dim=-1)
        return self.fc2(F.gelu(gate) * value)

    set_(H.SwiGLU, "forward", forward)


@edit("1 + weight in RMSNorm")
def _(set_):
    set_(H.RMSNorm, "forward", lambda self, x: H.rms_norm(x, 1 + self.weight, H.NORM_EPS))


@edit("LayerNorm for RMSNorm")
def _(set_):
    def forward(self, x_TD):
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        return F.layer_norm(x_TD, x_TD.shape[-1:]).to(self.weight.dtype) * self.weight

    set_(H.RMSNorm, "forward", forward)


@edit("another eps")
def _(set_):
    set_(H, "NORM_EPS", 1e-2)


@edit("a subclass of RMSNorm")
def _(set_):
    class Doubled(H.RMSNorm):
        def forward(self, x_TD):
            return 2 * super().forward(x_TD)

    set_(H, "RMSNorm", Doubled)


@edit("an adapter around a projection")
def _(set_):
    class Adapter(nn.Module):
        def __init__(self, around, inner):
            super().__init__()
            self.around, self.inner = around, inner
            self.down = nn.Linear(around.in_features, 4, bias=False)
            self.up = nn.Linear(4, around.out_features, bias=False)

        def forward(self, x_TD):
            return self.around(x_TD) + self.up(self.down(x_TD))

    init = H.SwiGLU.__init__

    def __init__(self, width, d_intermediate):
        init(self, width, d_intermediate)
        self.fc2 = Adapter(self.fc2, 4)

    set_(H.SwiGLU, "__init__", __init__)


# -------------------------------------------------------------------------------------------------------------- mixers


@edit("a factor in Mamba2.forward alone", generation=False, says="encoder.layers.0")
def _(set_):
    set_(H.Mamba2, "forward", after(H.Mamba2.forward)(lambda self, y: 0.5 * y))


@edit("a factor in Mamba2, in forward, prefill and step")
def _(set_):
    for name in ("forward", "prefill", "step"):
        set_(H.Mamba2, name, after(getattr(H.Mamba2, name))(lambda self, y: 0.5 * y))


@edit("Mamba2 without D")
def _(set_):
    init, weights = H.Mamba2.__init__, H.Mamba2.weights

    def __init__(self, config, s):
        init(self, config, s)
        self.D = None

    set_(H.Mamba2, "__init__", __init__)
    set_(H.Mamba2, "weights", lambda self: weights(self)._replace(D_H=None))


@edit("a new weight in Mamba2", generation=False, says="encoder.layers.0")
def _(set_):
    init, forward = H.Mamba2.__init__, H.Mamba2.forward

    def __init__(self, config, s):
        init(self, config, s)
        self.gain = nn.Parameter(torch.ones(config.d_model[s]))

    set_(H.Mamba2, "__init__", __init__)
    set_(H.Mamba2, "forward", lambda self, x, packing: forward(self, x, packing) * (1 + self.gain))


@edit("a factor in Attention.forward alone", generation=False, says="layers.0")
def _(set_):
    set_(H.Attention, "forward", after(H.Attention.forward)(lambda self, y: 0.5 * y))


@edit("queries, keys and values read before and after they are turned", generation=False, says="layers.0")
def _(set_):
    def forward(self, x_TD, packing):
        qkv_TX = self.Wqkv(x_TD)
        before_TD = qkv_TX[:, : x_TD.shape[1]] * 0.3
        o_TD = H.rotary_attention(
            qkv_TX, self.n_heads, self.window, packing.cos_MR, packing.sin_MR, packing.position_T, packing.cu_seqlens
        )
        return self.out_proj(o_TD + before_TD)

    set_(H.Attention, "forward", forward)


@edit("queries read after they are turned", definitions=["rotary_attention"], generation=False, says="layers.0")
def _(set_):
    def forward(self, x_TD, packing):
        qkv_TX = self.Wqkv(x_TD)
        o_TD = H.rotary_attention(
            qkv_TX, self.n_heads, self.window, packing.cos_MR, packing.sin_MR, packing.position_T, packing.cu_seqlens
        )
        return self.out_proj(o_TD + qkv_TX[:, : x_TD.shape[1]])

    set_(H.Attention, "forward", forward)


@edit("torch's checkpointing of a block", "eager", definitions=["residual_stream"], says="CheckpointError")
def _(set_):
    forward = H.Block.forward

    def checkpointed(self, residual_TD, packing):
        return torch.utils.checkpoint.checkpoint(forward, self, residual_TD, packing, use_reentrant=False)

    set_(H.Block, "forward", checkpointed)


@edit("a subclass of Attention with another window")
def _(set_):
    class Near(H.Attention):
        def __init__(self, config, s):
            super().__init__(config, s)
            self.window = 1

    set_(H.MIXERS, "t", Near)


@edit("a subclass of Mamba2 that doubles", generation=False, says="encoder.layers.0")
def _(set_):
    class Doubled(H.Mamba2):
        def forward(self, x_TD, packing):
            return 2 * super().forward(x_TD, packing)

    set_(H.MIXERS, "m", Doubled)


class Shift(nn.Module):
    """Each token gets a product of itself with a projection of the one before it, in its document."""

    def __init__(self, config, s):
        super().__init__()
        self.proj = H.Linear(config.d_model[s], config.d_model[s])

    def forward(self, x_TD, packing):
        before_TD = torch.where(packing.position_T[:, None] > 0, self.proj(x_TD).roll(1, 0), 0)
        return x_TD * before_TD


LETTER = {"arch_layout": ["m1", ["G1m1", ["t1M1"], "m1T1"], "g1"]}


@edit("a new letter", generation=False, says="Shift trains, but cannot generate: it has no new_state", config=LETTER)
def _(set_):
    set_(H.MIXERS, "g", Shift)


@edit("the rotary base")
def _(set_):
    tables = H.rotary_tables

    def of_another_base(M, rotary_dim, dtype, device):
        cos, sin = tables(M, rotary_dim, dtype, device)
        return cos.roll(1, 1), sin.roll(1, 1)

    set_(H, "rotary_tables", of_another_base)


# --------------------------------------------------------------------------------------------------- stages and chunks


@edit("a router with a temperature")
def _(set_):
    set_(H.RoutingModule, "forward", after(H.RoutingModule.forward)(lambda self, p: p.clamp_min(1e-6) ** 0.7))


@edit("another threshold")
def _(set_):
    set_(H.RoutingModule, "opens", lambda self, p_T: p_T.detach() > 0.6)


@edit("another ratio loss")
def _(set_):
    set_(H, "ratio_loss", lambda stage, N: (stage.G - 1 / N).square())


@edit("another sum of losses")
def _(set_):
    set_(H, "training_loss", lambda ce, ratio_losses, alpha: ce + alpha * ratio_losses.square().sum())


@edit("chunks that are not smoothed", generation=False, says="dechunk")
def _(set_):
    set_(H.HNet, "smooth", lambda self, y_CD, p_C, cu_seqlens: y_CD.to(p_C.dtype))


@edit("another clamp of the smoothing")
def _(set_):
    set_(H, "EMA_CLAMP", 0.45)


@edit("no straight-through estimator: z times the confidence")
def _(set_):
    def forward(self, z_CD, p_T, chunks, residual_TD, dtype, spare=None):
        c_T = torch.where(chunks.b_T, p_T, 1 - p_T)
        return H.upsample(z_CD, c_T, chunks.chunk_T, chunks.start_C, residual_TD, dtype, spare)

    set_(H.HNet, "upsample", forward)


@edit("z used twice on the way out")
def _(set_):
    upsample = H.HNet.upsample
    set_(H.HNet, "upsample", lambda self, z, *args: upsample(self, z + 0.1 * z * z, *args))


@edit("a new weight in HNet")
def _(set_):
    init, upsample = H.HNet.__init__, H.HNet.upsample

    def __init__(self, config, s=0):
        init(self, config, s)
        self.gain = nn.Parameter(torch.ones(config.d_model[s]))

    set_(H.HNet, "__init__", __init__)
    set_(H.HNet, "upsample", lambda self, z, *args: upsample(self, z * (1 + self.gain), *args))


@edit("a new module in HNet, used on the way in and out")
def _(set_):
    init, encode, decode = H.HNet.__init__, H.HNet.encode, H.HNet.decode

    def __init__(self, config, s=0):
        init(self, config, s)
        self.mix = nn.Linear(config.d_model[s], config.d_model[s])

    set_(H.HNet, "__init__", __init__)
    set_(H.HNet, "encode", lambda self, x, packing: self.mix(encode(self, x, packing)))
    set_(H.HNet, "decode", lambda self, x, packing: decode(self, self.mix(x), packing))


@edit("HNet.forward itself", "eager", generation=False, says="the cross entropy is", config={})
def _(set_):
    forward = H.HNet.forward

    def scaled(self, *inputs):
        y_BjD, stages = forward(self, *inputs)
        return H.nested_like(1.1 * y_BjD.values(), y_BjD), stages

    set_(H.HNet, "forward", scaled)


# --------------------------------------------------------------------------------------------------------------- model


@edit("a scale of the embeddings")
def _(set_):
    set_(H.HNetLM, "embed", after(H.HNetLM.embed)(lambda self, x: 8 * x))


@edit("a softcap of the logits")
def _(set_):
    set_(H.HNetLM, "head", after(H.HNetLM.head)(lambda self, logits: 5 * (logits / 5).tanh()))


@edit("a softcap in HNetLM.forward", "eager", generation=False, says="logits")
def _(set_):
    def forward(self, iids, labels=None):
        out = plain(self, iids, labels)
        logits = H.nested_like(5 * (out.logits.values() / 5).tanh(), iids)
        ce = None if labels is None else F.cross_entropy(logits.values(), labels.values())
        return out._replace(logits=logits, ce=ce)

    plain = H.HNetLM.forward
    set_(H.HNetLM, "forward", forward)


@edit("a router that looks at the decision before", generation=False, says="boundaries of stage 0 (p agrees;")
def _(set_):
    set_(H.RoutingModule, "opens", lambda self, p_T: (p_T.detach() > 0.5) & (p_T.detach().roll(1) < 0.9))


@edit("a state in a state", generation=False, says="Attention.new_state returns an object whose inner is no tensor")
def _(set_):
    set_(H.Attention, "new_state", after(H.Attention.new_state)(lambda self, state: types.SimpleNamespace(inner=state)))
    set_(H.Attention, "forward", after(H.Attention.forward)(lambda self, y: 2 * y))


@edit("tied embeddings", config={"tie_embeddings": True})
def _(set_):
    pass


@edit(
    "dropout, and queries read after they are turned", "eager", False,
    definitions=["rotary_attention"], says="random numbers",
)  # fmt: skip
def _(set_):
    EDITS["queries read after they are turned"].make(set_)
    EDITS["dropout"].make(set_)


@edit("a ratio loss of documents", "eager", says="graphs of a small model of this config fail with")
def _(set_):
    """In graphs a stage has no documents."""
    set_(H, "ratio_loss", lambda stage, N: ((stage.boundary_prob.values().mean() - 1 / N) * N) ** 2)


@edit("dropout", "eager", generation=False, says="random numbers")
def _(set_):
    set_(H.SwiGLU, "forward", after(H.SwiGLU.forward)(lambda self, y: F.dropout(y, 0.1)))


@edit("a number that grows with each call", "eager", generation=False, says="when a batch comes again")
def _(set_):
    def forward(self, x_TD):
        self.calls = getattr(self, "calls", 0) + 1
        return mlp(self, x_TD) * (1 + 0.01 * self.calls)

    mlp = H.SwiGLU.forward
    set_(H.SwiGLU, "forward", forward)


@edit("an error", "eager", generation=False, says="RuntimeError")
def _(set_):
    set_(H.SwiGLU, "forward", lambda self, x_TD: x_TD @ x_TD)


# --------------------------------------------------------------------------------------------------------- definitions


def definition(name: str, change: Callable):
    """An edit of a definition in hnet_kernels. Generation has a Mamba-2 and an attention of its own."""

    @edit(f"the definition of {name}", "definition", generation=name != "rotary_attention", says=name)
    def _(set_):
        plain = OPERATIONS[name].definition
        set_(OPERATIONS[name], "definition", lambda *args: change(plain(*args)))


definition("swiglu", lambda h: 1.01 * h)
definition("linear", lambda y: y * 1.1)
definition("upsample", lambda x: x.relu())
definition("boundary_probability", lambda p: p * (3 - p) / 2)
definition("cross_entropy", lambda ce: ce + 0.1 * ce * ce)
definition("rotary_attention", lambda o: 0.9 * o)


# --------------------------------------------------------------------------------------------------------------- tests


@contextlib.contextmanager
def edits_undone():
    """A setattr that lasts until the end; of a name in hnet_trainable.py wherever it is imported, as an edit would."""
    holders = [H, hnet_simple, agreement, graphs]

    with pytest.MonkeyPatch.context() as patch:

        def set_everywhere(owner, name, value, *_):
            if isinstance(owner, dict):
                return patch.setitem(owner, name, value)
            for place in holders if owner is H else [owner]:
                if owner is not H or hasattr(place, name):
                    patch.setattr(place, name, value)

        yield set_everywhere
    for operation in OPERATIONS.values():
        operation.uses_definition = False


@pytest.fixture
def set_():
    with edits_undone() as set_everywhere:
        yield set_everywhere


def toy(config: HNetConfig) -> H.HNetLM:
    return equivalence.random_model(agreement.toy_config(config), 0, "cpu", torch.float64)


def losses(config: HNetConfig) -> list[float]:
    model = toy(config)
    out = model(*agreement._batch(agreement.BATCHES[0], torch.device("cpu")))
    return [out.ce.item(), *out.ratio_losses.tolist(), H.training_loss(out.ce, out.ratio_losses, 0.3).item()]


@pytest.fixture(scope="module")
def unedited() -> list[float]:
    return losses(CONFIG)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_takes_effect_or_is_announced(name, set_, unedited):
    change = EDITS[name]
    change.make(set_)
    config = HNetConfig.load(TWO_STAGES | change.config)
    if change.training != "eager":
        assert losses(config) != pytest.approx(unedited, rel=1e-4), "an edit that changes nothing shows nothing"
    if not name.startswith("the definition of"):  # the others leave hnet_kernels as it is
        set_(agreement, "operations", lambda device, dtype: {})
    differing = agreement.choose_implementations(torch.device("cpu"), torch.float32, config)
    assert differing == (change.definitions or ([change.says] if change.training == "definition" else []))
    said = agreement.steps_as_graphs(config)
    if change.training == "eager":
        assert said and (change.says in said or "cross entropy" in said), said
    else:
        assert said is None, said
        pair = agreement._batch(agreement.BATCHES[0], torch.device("cpu"))
        model = toy(config)
        with forcing(True), torch.no_grad():  # as validation does on a GPU
            assert model(*pair).ce.item() == pytest.approx(losses(config)[0], rel=1e-9)
    said = agreement.generation(config)
    if change.generation:
        assert said is None, said
    else:
        assert said and (change.says in said or change.training != "graphs"), said
        assert said.startswith("a small model of this config fails with") == (name == "an error"), said


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, change in EDITS.items() if change.training != "eager"])
def test_captured_graphs_follow_an_edit(name, set_):
    """In bfloat16, captured and replayed, as near to the edited model run eagerly as without an edit."""
    change = EDITS[name]
    change.make(set_)
    config = HNetConfig.load(TWO_STAGES | change.config)
    differing = agreement.choose_implementations(torch.device("cuda"), torch.bfloat16, config)
    assert differing == (change.definitions or ([change.says] if change.training == "definition" else []))
    masters = equivalence.random_model(agreement.toy_config(config), 0, "cuda", torch.float32).train()
    assert agreement.captured(GraphedModel(masters, torch.bfloat16, 0.3), tokens=300) is None


def test_every_operation_is_compared():
    assert set(agreement.EXAMPLES) == set(OPERATIONS)


GAIN = [("persistent", True), ("not persistent", False), ("attribute", None)]


def gain(set_, persistent: bool | None, value=lambda: torch.tensor(0.7)):
    """Multiplies what an MLP returns by a constant: a buffer or, if `persistent` is None, a tensor attribute."""
    init = H.SwiGLU.__init__

    def __init__(self, *sizes):
        init(self, *sizes)
        if persistent is None:
            self.gain = value()
        else:
            self.register_buffer("gain", value(), persistent)

    set_(H.SwiGLU, "__init__", __init__)
    set_(H.SwiGLU, "forward", after(H.SwiGLU.forward)(lambda self, y: y * self.gain.to(y.dtype)))


def built(config: HNetConfig, **weights) -> H.HNetLM:
    world = types.SimpleNamespace(shards=1, device=torch.device("cpu"))
    return distributed.build_model(config, world, torch.float32, 0, **weights)


@pytest.fixture
def world():
    yield distributed.start("cpu")
    distributed.stop()


def test_buffers_have_their_values_in_a_run(set_):
    """Which builds models on the meta device."""
    EDITS["a buffer in Block"].make(set_)
    buffers = dict(built(CONFIG).named_buffers())
    assert len(buffers) == 8 and all((x == 0.7).all() for x in buffers.values())


@pytest.mark.parametrize("persistent", [kind for _, kind in GAIN], ids=[name for name, _ in GAIN])
def test_constants_have_their_values_in_loaded_weights(persistent, set_, tmp_path):
    gain(set_, persistent)
    model = built(agreement.toy_config(CONFIG)).eval()
    weights.export(model, tmp_path, "safetensors")
    text = [b"\xfea line of text"]
    wanted = HNetInference.from_training(model).prefill(text).logits_BLV
    assert torch.equal(weights.load_inference(tmp_path).prefill(text).logits_BLV, wanted)
    assert torch.equal(HNetInference.from_training(weights.load_training(tmp_path)).prefill(text).logits_BLV, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["plain", "sharded"])
def test_a_run_from_weights_starts_with_their_buffers(dtype, set_, tmp_path, world):
    """-p RUN: such as a mean that training updates."""
    gain(set_, True)
    config = agreement.toy_config(CONFIG)
    state = built(config).state_dict()
    for name in state:
        if name.endswith("gain"):
            state[name] = torch.tensor(0.3)
    weights.export(weights.Checkpoint(config, state), tmp_path, "safetensors")
    start = weights.load(tmp_path)
    model = distributed.build_model(start.config, world, dtype, 0, start.weights)
    assert [x.item() for x in model.buffers()] == [pytest.approx(0.3)] * 3


def test_a_buffer_that_only_weights_or_model_have_is_named(set_, tmp_path):
    config = agreement.toy_config(CONFIG)
    weights.export(built(config), tmp_path / "without", "safetensors")
    with edits_undone() as set_here:
        gain(set_here, True)
        weights.export(built(config), tmp_path / "with", "safetensors")
        with pytest.raises(UserError, match=r"3 missing \(backbone.main_network.encoder.layers.0.mlp.gain, "):
            weights.load(tmp_path / "without")
    with pytest.raises(UserError, match=r"3 unknown \(backbone.main_network.decoder.layers.1.mlp.gain, "):
        weights.load(tmp_path / "with")


def test_a_buffer_may_have_the_name_of_the_released_codes_tables(set_, tmp_path):
    """Which `fit` leaves out: rotary tables are computed."""
    set_(
        H.SwiGLU, "__init__", after(H.SwiGLU.__init__)(lambda self, _: self.register_buffer("inv_freq", torch.ones(2)))
    )
    model = built(agreement.toy_config(CONFIG))
    weights.export(model, tmp_path, "safetensors")
    assert list(weights.load(tmp_path).weights) == list(model.state_dict())


class Vowels(Rule):
    """A rule with a table."""

    usage, reads_bytes = "vowels", True

    def __init__(self, width: int, argument: str = ""):
        super().__init__(width, argument)
        self.register_buffer("table", torch.zeros(256, dtype=torch.bool))
        self.table[list(b"aeiou ")] = True
        self.register_buffer("fine", torch.tensor(1 / 3))

    def starts(self, packing):
        return self.table[packing.byte_T]


def test_tables_of_booleans_stay_what_they_are(set_, tmp_path):
    set_(hnet_config.ROUTERS, "vowels", Vowels)
    raw = {key: value for key, value in TWO_STAGES.items() if key != "N_compress"}
    config = HNetConfig.load(raw | {"routers": ["vowels", "learned"]})
    assert agreement.steps_as_graphs(config) is None and agreement.generation(config) is None
    weights.export(built(agreement.toy_config(config)), tmp_path, "safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = weights.load_inference(tmp_path, dtype=dtype)
        assert model.backbone.routing_module.fine == torch.tensor(1 / 3), "training does not round it to bfloat16"
        assert model.prefill([b"\xfea bee sees"]).boundaries[0].tolist() == [
            [c in b"\xfeae " for c in b"\xfea bee sees"]
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["plain", "sharded"])
def test_generation_has_the_buffers_of_a_model_in_training(dtype, set_, world):
    """Also those of the HNetLM itself, and where its modules are not those that train."""
    gain(set_, None)
    set_(H.HNetLM, "__init__", after(H.HNetLM.__init__)(lambda self, _: self.register_buffer("prior", torch.ones(256))))
    set_(H.HNetLM, "head", after(H.HNetLM.head)(lambda self, logits: logits + self.prior.to(logits.dtype)))
    config = agreement.toy_config(CONFIG)
    assert agreement.generation(config) is None
    model = distributed.build_model(config, world, dtype, 0)
    inference = HNetInference.from_training(model)
    for factor in (1, 2):
        model.prior *= factor  # as training may
        with inference.unsharded():
            found = inference.prefill([b"\xfeab"]).logits_BLV[0]
        iids = torch.nested.nested_tensor([torch.tensor(list(b"\xfeab"))], layout=torch.jagged)
        assert torch.allclose(found, model(iids).logits.values(), atol=0.05)


def test_a_constant_that_is_drawn_and_not_saved_is_refused(set_, tmp_path):
    gain(set_, False, lambda: torch.randn(()))
    weights.export(built(agreement.toy_config(CONFIG)), tmp_path, "safetensors")
    with pytest.raises(UserError, match=r"mlp.gain: __init__ draws it at random and the checkpoint does not have it"):
        weights.load_inference(tmp_path)


def test_a_frozen_weight_is_left_out_by_the_model_that_can(set_, world):
    EDITS["frozen embeddings, twice as large"].make(set_)
    model = distributed.build_model(agreement.toy_config(CONFIG), world, torch.bfloat16, 0)
    for captures in (False, True):
        with pytest.raises(
            ValueError, match=r"embeddings.weight needs no gradient \(requires_grad\), .*; use PlainModel"
        ):
            GraphedModel(model, torch.bfloat16, 0.3, captures=captures)
    groups = distributed.optimizer_groups(H.parameter_groups(model, 0.1, 0.1))
    steps, before = PlainModel(model, 0.3, world, groups), {n: p.detach().clone() for n, p in model.named_parameters()}
    steps.forward_backward([agreement._batch([5, 9], torch.device("cpu"))])
    steps.optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == ["embeddings.weight"]


def test_dropout_is_no_difference_of_generation(set_, capsys):
    set_(H.SwiGLU, "forward", after(H.SwiGLU.forward)(lambda self, y: F.dropout(y, 0.1, self.training)))
    assert equivalence.run(agreement.toy_config(CONFIG), dtype=torch.float64), capsys.readouterr().out


def test_a_wrong_choice_of_kernels_is_one_error_and_no_difference(monkeypatch, caplog):
    monkeypatch.setenv("HNET_KERNELS", "foo")
    dispatch.requested.cache_clear()
    try:
        with pytest.raises(dispatch.KernelError, match="HNET_KERNELS=foo: expected one of"):
            agreement.choose_implementations(torch.device("cpu"), torch.float32, CONFIG)
        assert caplog.messages == [] and not any(one.uses_definition for one in OPERATIONS.values())
    finally:
        monkeypatch.undo()
        dispatch.requested.cache_clear()


def test_most_edits_stay_in_graphs():
    kinds = [change.training for change in EDITS.values()]
    assert len(kinds) >= 25 and kinds.count("graphs") >= 20 and kinds.count("eager") <= len(kinds) / 5


def test_a_toy_keeps_stages_letters_and_options():
    config = HNetConfig.load(
        TWO_STAGES | {"arch_layout": ["m4", ["T1m4", ["t3M2"], "m4T1"], "t1"], "d_model": [512, 512, 1024],
                      "tie_embeddings": True}
    )  # fmt: skip
    toy = agreement.toy_config(config)
    assert toy.arch_layout == ["m2", ["T1m2", ["t2M2"], "m2T1"], "t1"] and toy.d_model == (64, 64, 128)
    assert toy.tie_embeddings and toy.attn_cfg.window_size == (7, 3, -1) and toy.N_compress == config.N_compress
