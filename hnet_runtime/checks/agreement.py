"""Checks before a run that fast code computes what the model file and the definitions say.

- `operations`: each operation of hnet_kernels has a fast implementation beside its definition. Where they differ, such
  as after an edit of the definition, the definition runs.
- `steps_as_graphs`: graphs call the parts of the model, not its forward. A small model with the config's stages,
  letters and options runs both ways, in float64 on the CPU.
- `captured`: the run's own model on its device, captured and replayed, is compared with the same model run eagerly.
- `generation`: prefill and steps continue from a cache, where training reads complete documents.

The first difference is named, and the run takes the next slower way that agrees.

The models on the CPU are so small that several threads would only wait for each other.
"""

import contextlib
import copy
import logging
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hnet_kernels as K
from hnet_kernels.dispatch import OPERATIONS, forcing, one_thread, requested
from hnet_runtime.checks import equivalence
from hnet_runtime.steps.graphs import GraphedModel, frozen
from hnet_simple import GenerationError, HNetInference, why_no_generation
from hnet_trainable import (
    BOS,
    NORM_EPS,
    Documents,
    HNetConfig,
    HNetLM,
    flat,
    initial_weight,
    nested_like,
    rotary_tables,
    training_loss,
)

logger = logging.getLogger("hnet")

ALPHA = 0.3  # weight of the ratio losses in a check; any value at which both losses matter
EXACT = 1e-9  # float64: another order of summation differs by 1e-12, a wrong formula by far more
# bfloat16 against float64: each output and each operand of a matrix product is rounded by up to 2^-9, 1e-3 on average;
# a mixer has several of these in a row
ROUNDED = 2e-2
# captured with padding against eager without it, which round differently: at most 4.5e-3 of all gradients on an H200
CAPTURED = 3e-2

CAPTURED_BYTES = 1024  # of a batch on which captured steps are compared
# Two batches of equal size with different document lengths: rows of one byte, and inner stages that need padding
BATCHES = ([37, 1, 58], [2] * 8 + [80])


def _gap(found: Tensor, wanted: Tensor) -> float:
    """The distance of two tensors over the norm of the second; infinite if one is not finite."""
    return _ratio(_norm(found.double() - wanted.double()), _norm(wanted.double()))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _ratio(off: Tensor, size: Tensor) -> float:
    return (off / size.clamp_min(1e-9)).nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# ---------------------------------------------------------------------------------------------------------- operations


class _Draw:
    """Inputs for an operation: random tensors that need a gradient, and documents of 1, 40 and 23 tokens."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.generator, self.device, self.dtype = torch.Generator().manual_seed(0), device, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.cu = torch.tensor([0, 1, 41, 64], dtype=torch.int32, device=device)
        self.position = torch.cat([torch.arange(n) for n in (1, 40, 23)]).to(device, torch.int32)
        self.tables = rotary_tables(64, 16, self.wide, device)

    def __call__(self, *shape: int, wide: bool = False, around: float = 0.0, scale: float = 1.0) -> Tensor:
        x = around + scale * torch.randn(*shape, generator=self.generator)
        return x.to(self.device, self.wide if wide else self.dtype).requires_grad_()

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def _stream(x: Tensor, delta: Tensor, first: Tensor, second: Tensor) -> Tensor:
    residual = K.residual_stream(x)
    h = K.rms_norm(residual, first, NORM_EPS)
    residual = residual + delta * h
    return K.rms_norm(residual, second, NORM_EPS) + residual.mean()


def _cut(p: Tensor, position: Tensor, cu: Tensor) -> list[Tensor]:
    p, G, chunks = K.cut(p, p.detach() > 0.5, position, cu)
    C = int(chunks.counts[0])
    return [p * 1, G, chunks.b_T, chunks.chunk_T, chunks.start_C[:C], chunks.cu_seqlens, chunks.shares[0]]


def _chunks(draw: _Draw) -> tuple[Tensor, Tensor]:
    """(chunk_T, start_C) of 64 tokens in chunks of four."""
    token_T = torch.arange(64, device=draw.device)
    return token_T // 4, token_T[::4].contiguous()


# For each operation, by its name in OPERATIONS: the call and its inputs. d: draws the inputs.
EXAMPLES: dict[str, Callable[[_Draw], tuple[Callable[..., Any], list[Any]]]] = {
    "embed": lambda d: (K.embed, [d.whole(256, 64), d(256, 64)]),
    "linear": lambda d: (K.linear, [d(64, 64), d(48, 64, scale=0.1)]),
    "wide_linear": lambda d: (K.wide_linear, [d(64, 64), d(64, 64, wide=True, scale=0.1), d(64, wide=True)]),
    "widen": lambda d: (K.widen, [d(64, 48), d(16)]),
    "residual_stream": lambda d: (_stream, [d(64, 64), d(64, 64), d(64, around=1), d(64, around=1)]),
    "swiglu": lambda d: (K.swiglu, [d(64, 128)]),
    "rotary_attention": lambda d: (
        lambda qkv: K.rotary_attention(qkv * 1, 2, 7, *d.tables, d.position, d.cu),
        [d(64, 192)],
    ),
    "mamba2_inner": lambda d: (
        lambda *x: K.mamba2_inner(*x, d.position, d.cu, NORM_EPS),
        [
            d(64, 1064, scale=0.5),
            d(544, 1, 4, scale=0.3),
            d(544, scale=0.3),
            *(d(8, wide=True, around=a) for a in (-2, 0, 1)),
            d(512, around=1, scale=0.1),
        ],  # fmt: skip
    ),
    "boundary_probability": lambda d: (
        lambda q, k: K.boundary_probability(q, k, d.position),
        [d(64, 64), d(64, 64)],
    ),
    "take_rows": lambda d: (K.take_rows, [d(64, 64), _chunks(d)[1]]),
    "cut": lambda d: (lambda p: _cut(p.sigmoid(), d.position, d.cu), [d(64, wide=True)]),
    "smooth": lambda d: (
        lambda y, p: K.smooth(y, p.sigmoid(), d.cu),
        [d(64, 64), d(64, wide=True)],
    ),
    "upsample": lambda d: (
        lambda z, scale, residual: K.upsample(z, scale, *_chunks(d), residual, d.dtype),
        [d(16, 64, wide=True), d(64, wide=True), d(64, 64, wide=True)],
    ),
    "cross_entropy": lambda d: (K.cross_entropy, [d(64, 256), d.whole(256, 64)]),
}


def _outputs_and_gradients(name: str, draw: _Draw, values: list[Any] | None, fast: bool) -> tuple[list[Tensor], list]:
    """Outputs and gradients of an operation's example; then its inputs. values: the inputs, in another dtype."""
    call, inputs = EXAMPLES[name](draw)
    if values is not None:
        for x, value in zip(inputs, values):
            x.data.copy_(value)
    with forcing(fast):
        found = call(*inputs)
        outputs = found if isinstance(found, list) else [found]
        ends = [x for x in outputs if x.requires_grad]
        weights = torch.Generator().manual_seed(1)
        doutputs = [torch.randn(x.shape, generator=weights).to(x.device, x.dtype) for x in ends]
        leaves = [x for x in inputs if x.requires_grad]
        gradients = torch.autograd.grad(ends, leaves, doutputs)
    return [*(x.detach() for x in outputs), *gradients], [x.detach() for x in inputs]


def call_example(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Runs the fast implementation of an operation's example once, forward and backward."""
    _outputs_and_gradients(name, _Draw(device, dtype), None, True)


def operations(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The operations whose fast implementation differs from the definition, each with the difference.

    Outputs and the gradient of every input are compared with those of the definition in float64 on the CPU, on the same
    inputs.
    """
    limit, found = EXACT if dtype == torch.float64 else ROUNDED, {}
    for name in EXAMPLES:
        if OPERATIONS[name].uses_definition:
            continue
        try:
            fast, inputs = _outputs_and_gradients(name, _Draw(device, dtype), None, True)
            exact, _ = _outputs_and_gradients(name, _Draw(torch.device("cpu"), torch.float64), inputs, False)
            gaps = [_gap(a.cpu(), b) for a, b in zip(fast, exact, strict=True)]
        except Exception as error:  # edited code can raise anything
            found[name] = _failure(error)
            continue
        if max(gaps) > limit:
            found[name] = f"off by {max(gaps):.1e}"
    return found


@one_thread()
def choose_implementations(device: torch.device, dtype: torch.dtype, config: HNetConfig | None = None) -> list[str]:
    """Makes definitions run where fast implementations differ from them, on the device or in float64 on the CPU.

    Also where only a small model of the config differs, for example because it reads a tensor that a fast
    implementation changes in place. Returns the names of these operations and logs them.
    """
    requested()  # a wrong HNET_KERNELS is an error, no difference
    K.cards.start(device)
    differing = _definitions_for(operations(torch.device("cpu"), torch.float64))
    if config and (difference := _fast_steps(config)):
        first = ["residual_stream", "rotary_attention"]  # they change tensors in place
        tries = [*([name] for name in dict.fromkeys([*first, *OPERATIONS])), list(OPERATIONS)]
        for chosen in tries:
            before = {name: OPERATIONS[name].uses_definition for name in chosen}
            for name in chosen:
                OPERATIONS[name].uses_definition = True
            if chosen is tries[-1] or not _fast_steps(config):
                break
            for name in chosen:
                OPERATIONS[name].uses_definition = before[name]
        logger.warning("%s: definitions in hnet_kernels run, as %s", ", ".join(chosen), difference)
        differing |= dict.fromkeys(chosen, difference)
    # last, as it waits for kernels that are being compiled
    if device.type == "cuda" and OPERATIONS["linear"].runs_fast(torch.empty(0, dtype=dtype, device=device)):
        differing |= _definitions_for(operations(device, dtype))
    return list(differing)


def _definitions_for(differing: dict[str, str]) -> dict[str, str]:
    """Makes the definitions of these operations run, and returns the operations."""
    for name, how in differing.items():
        OPERATIONS[name].uses_definition = True
        logger.warning("%s: its definition in hnet_kernels runs, as its fast implementation differs (%s)", name, how)
    return differing


def _fast_steps(config: HNetConfig) -> str | None:
    """How forward and backward of a small model differ between fast implementations and definitions; or None."""
    pair = _batch(BATCHES[0], torch.device("cpu"), config)

    def step() -> Step:
        with torch.random.fork_rng(devices=[]):  # both ways draw the same numbers
            torch.manual_seed(0)
            return _plain_step(model, pair)

    try:
        model = equivalence.random_model(toy_config(config), 0, "cpu", torch.float64).train()
        with forcing(False):
            wanted = step()
            if _difference(step(), wanted, "", ""):
                return None  # two runs differ in any case
    except Exception:  # of edited code; the run will report it
        return None
    try:
        with forcing(True):
            return _difference(step(), wanted, "with fast operations", "with definitions")
    except Exception as error:
        return f"a small model of this config fails with {_failure(error)}"


# ----------------------------------------------------------------------------------------------------- steps as graphs


def toy_config(config: HNetConfig) -> HNetConfig:
    """A config with the same stages, letters and options, but few layers and small sizes.

    Stages have 64 channels, or a multiple of it where the config's stages widen.
    """
    raw = config.to_dict()
    raw["arch_layout"] = _few_layers(raw["arch_layout"])
    growths = [0]
    for outer, inner in zip(config.d_model, config.d_model[1:]):
        growths.append(growths[-1] + (inner > outer))
    raw["d_model"] = [64 * (1 + growth) for growth in growths]
    raw["d_intermediate"] = [128 * (n > 0) for n in config.d_intermediate]
    raw["ssm_cfg"]["d_state"] = 16
    attn = config.attn_cfg
    raw["attn_cfg"] |= {
        "num_heads": [2 * (n > 0) for n in attn.num_heads],
        "rotary_emb_dim": [min(n, 16) for n in attn.rotary_emb_dim],
        "window_size": [min(n, 7) for n in attn.window_size],
    }
    return HNetConfig.load(raw)


def thin_config(config: HNetConfig) -> HNetConfig:
    """The config with at most two layers of a kind in each place."""
    raw = config.to_dict()
    raw["arch_layout"] = _few_layers(raw["arch_layout"])
    return HNetConfig.load(raw)


def _few_layers(layout: Any) -> Any:
    if isinstance(layout, str):
        return re.sub("[0-9]+", lambda count: str(min(int(count[0]), 2)), layout)
    return [_few_layers(part) for part in layout]


def _batch(lengths: list[int], device: torch.device, config: HNetConfig | None = None) -> tuple[Tensor, ...]:
    """A batch as `HNetLM.forward` takes it. Routers that are told where chunks begin get random places."""
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    ids = torch.randint(97, 109, (sum(lengths),), generator=generator)  # few letters, which repeat as in text
    ids[ids == 108] = 32  # a space, for the router of that name
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ids[ends[:-1]] = BOS
    iids = Documents.between(ends.to(device), min(lengths), max(lengths)).nest(ids.to(device))
    pair = iids, nested_like(flat(iids).roll(-1), iids)
    if not config or not (stages := config.stages_by_cuts):
        return pair
    cuts_T = torch.randint(len(stages) + 1, (sum(lengths),), generator=generator).to(device)
    return *pair, nested_like(cuts_T.bool() if len(stages) == 1 else cuts_T, iids)


Step = tuple[dict[str, Tensor], dict[str, Tensor]]  # losses, and gradients by weight


def _plain_step(model: HNetLM, pair: tuple[Tensor, ...], alpha: float | Tensor = ALPHA) -> Step:
    """Losses and gradients by autograd through the model's forward."""
    out = model(*pair)
    loss = training_loss(out.ce, out.ratio_losses, alpha)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    losses = {"the cross entropy": out.ce.detach()}
    losses |= {f"the ratio loss of stage {s}": x for s, x in enumerate(out.ratio_losses.detach())}
    losses |= {f"F of stage {s}": stage.F.detach() for s, stage in enumerate(out.stages)}
    losses |= {f"G of stage {s}": stage.G.detach() for s, stage in enumerate(out.stages)}
    return losses, dict(zip(weights, gradients))


def _graph_step(graphed: GraphedModel, pair: tuple[Tensor, ...]) -> Step:
    for gradient in graphed.optimizer.gradients:
        gradient.fill_(torch.nan)  # so that a gradient that is not written is found
    ce, ratio_S, F_S, G_S = (x[0] for x in graphed.forward_backward([pair], reduces=False))
    losses = {"the cross entropy": ce}
    for name, x_S in (("the ratio loss", ratio_S), ("F", F_S), ("G", G_S)):
        losses |= {f"{name} of stage {s}": x for s, x in enumerate(x_S)}
    return losses, {name: p.grad.clone() for name, p in graphed.masters.named_parameters()}


def _draws_random_numbers(call: Callable[[], Any]) -> bool:
    """Of torch, Python or numpy."""
    before, *others = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    call()
    return not torch.equal(before, torch.get_rng_state()) or others != [random.getstate(), str(np.random.get_state())]


@one_thread()
def steps_as_graphs(
    config: HNetConfig, ac: str = "none", prepare: Callable[[HNetLM], None] = lambda model: None
) -> str | None:
    """How a small model's steps as graphs differ from its forward under autograd, in float64 on the CPU; or None.

    prepare: changes the small model as the run changes its own, such as the form of its ratio loss.
    Compares losses, F, G and the gradient of every weight to 1e-9, over two batches of different lengths.
    """
    pairs = [_batch(lengths, torch.device("cpu"), config) for lengths in BATCHES]
    try:
        model = equivalence.random_model(toy_config(config), 0, "cpu", torch.float64).train()
        prepare(model)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        plain = [_plain_step(model, pair) for pair in pairs]
        for name, buffer in model.named_buffers():
            if name not in buffers or not torch.equal(buffer, buffers[name]):
                return f"the buffer {name} changes in a forward, which in graphs has padding in it"
        if _draws_random_numbers(lambda: model(*pairs[0])):
            return "the model draws random numbers, which a graph would draw only once"
        if changed := _first_change(_plain_step(model, pairs[0]), plain[0]):
            return f"{changed} is another when a batch comes again, and a graph repeats what was captured"
    except Exception as error:  # edited code can raise anything
        return f"a small model of this config fails with {_failure(error)}"
    if reason := frozen(model):
        return reason
    try:
        graphed = GraphedModel(model, torch.float64, ALPHA, ac=ac)
        for step, pair in zip(plain, pairs):
            if difference := _difference(_graph_step(graphed, pair), step, "in graphs", "by hnet_trainable.py"):
                return difference
    except Exception as error:
        return f"graphs of a small model of this config fail with {_failure(error)}"
    return None


def _first_change(found: Step, before: Step) -> str | None:
    for kind, ours, theirs in zip(("", "the gradient of "), found, before):
        if changed := [name for name, x in ours.items() if not torch.equal(x, theirs[name])]:
            return f"{kind}{changed[0]}"
    return None


def _difference(found: Step, wanted: Step, here: str, there: str) -> str | None:
    (losses, gradients), (wanted_losses, wanted_gradients) = found, wanted
    for name, x in wanted_losses.items():
        if name not in losses or _gap(losses[name], x) > EXACT:
            said = f"{losses[name].item():.6g}" if name in losses else "missing"
            return f"{name} is {said} {here} and {x.item():.6g} {there}"
    for name, x in wanted_gradients.items():
        if name not in gradients:
            return f"the weight {name} is not in the graphs' model"
        if (gap := _gap(gradients[name], x)) > EXACT:
            return f"the gradient of {name} differs by {gap:.1e} of its size"
    return None


def captured(graphed: GraphedModel, tokens: int = CAPTURED_BYTES) -> str | None:
    """How graphs of the run's own model, captured and replayed, differ from the model run eagerly; or None.

    Both run the same operations in the compute dtype, over two batches of documents. Where rounding changes a boundary,
    a batch says nothing, so a difference counts only if other documents show it too. Every process of a run does this
    on its own; `distributed.first_answer` brings their answers together.
    """
    found = None
    for seed in range(2):
        documents = [tokens - 2 - seed, 1, 1 + seed], [2] * 16 + [tokens - 32 - seed] + [1] * seed
        pairs = [_batch(lengths, graphed.device, graphed.model.config) for lengths in documents]
        try:
            for pair in (*pairs, pairs[0]):
                losses, gradients = _graph_step(graphed, pair)
                wanted_losses, wanted = _plain_step(graphed.model, pair, graphed.alpha)
                found = _roughly(losses, gradients, wanted_losses, wanted)
                if found:
                    break
        except Exception as error:
            found = f"the capture fails with {_failure(error)}"
        if not found:
            break
    for gradient in graphed.optimizer.gradients:  # also the padding between weights, which no step writes
        gradient.zero_()
    graphed.forget()
    return found


def _roughly(losses, gradients, wanted_losses, wanted) -> str | None:
    for name in ("the cross entropy", *(n for n in wanted_losses if n.startswith("the ratio loss"))):
        if not math.isclose(losses[name].item(), wanted_losses[name].item(), rel_tol=CAPTURED):
            return f"{name} is {losses[name].item():.6g} in graphs and {wanted_losses[name].item():.6g} eagerly"
    norms = [(_norm(gradients[name].float() - x.float()), _norm(x)) for name, x in wanted.items()]
    off, size = (torch.stack(column).norm() for column in zip(*norms))
    if (gap := _ratio(off, size)) > CAPTURED:
        worst = max(wanted, key=lambda name: _gap(gradients[name], wanted[name]))
        return f"the gradient differs by {gap:.1e} of its size, most of all that of {worst}"
    return None


# --------------------------------------------------------------------------------------------------------- what to know


@one_thread()
def warn_of(config: HNetConfig, repeats: bool = False) -> None:
    """Warns of what an edited model does that a run would not show, as found on a small model of the config.

    repeats: `steps_as_graphs` has found that a batch that comes again gives the same.
    """
    looks = [_other_first_values, _other_cross_entropy, _looks_ahead]
    for look in looks if repeats else [*looks, _remembers]:
        with contextlib.suppress(Exception):  # of edited code; the run will report it
            if found := look(toy_config(config)):
                logger.warning("%s", found)


class _UnfilledIsNan(TorchFunctionMode):
    """Inside, memory that nobody fills is nan.

    `torch.use_deterministic_algorithms` does it too, but imports torch._inductor for half a second, in
    github.com/pytorch/pytorch/blob/main/torch/__init__.py (2.11 to 2.13). When it no longer does, this can go.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, Tensor.new_empty) and made.is_floating_point():
            made.data.fill_(math.nan)  # of `data`, so that `_version` does not count it
        return made


def _other_first_values(config: HNetConfig) -> str | None:
    """A weight to which `__init__` gives a value of its own, in place of which `initial_weight` draws one."""
    with _UnfilledIsNan():
        model = HNetLM(config)
    for name, p in model.named_parameters():
        drawn = initial_weight(name, p.shape, config, 0)
        # torch's layers fill their weights once, which is no choice of the model
        is_torchs = hasattr(model.get_submodule(name.rpartition(".")[0]), "reset_parameters") and p._version <= 1
        if not (drawn is None or is_torchs or p.isnan().any() or p.equal(drawn)):
            return f"{name}: initial_weight draws its first value, so that of __init__ has no effect"
    return None


def _other_cross_entropy(config: HNetConfig) -> str | None:
    """Whether the cross entropy that a step reports is not that of the logits."""
    model = equivalence.random_model(config, 0, "cpu", torch.float64).eval()
    iids, labels, *cuts = _batch(BATCHES[0], torch.device("cpu"), config)
    with torch.no_grad():
        out = model(iids, labels, *cuts)
    if _gap(out.ce, F.cross_entropy(flat(out.logits), flat(labels))) <= EXACT:
        return None
    return "HNetLM.forward returns a ce that is not the cross entropy of its logits: bpb follows it, val_bpb does not"


def _looks_ahead(config: HNetConfig) -> str | None:
    """Whether logits or p depend on later bytes or other documents. A router that says so is left out."""
    if config.stages_not_causal:
        return None
    model = equivalence.random_model(config, 0, "cpu", torch.float64).eval()
    n = 24  # documents of n bytes, of which document i has the first i bytes of the last one, and other bytes behind
    iids, *_ = _batch([n] * n, torch.device("cpu"), config)
    byte_BL = flat(iids).view(n, n)
    is_same_BL = torch.ones(n, n, dtype=torch.bool).tril(-1)
    byte_BL = torch.where(is_same_BL, byte_BL[-1], byte_BL)
    with torch.no_grad():
        out = model(nested_like(byte_BL.flatten(), iids))
    for x_TX in (flat(out.logits), *(stage.p_T[:, None] for stage in out.stages[:1])):
        x_BLX = x_TX.unflatten(0, (n, n))
        if _gap(x_BLX[is_same_BL], x_BLX[-1:].expand_as(x_BLX)[is_same_BL]) > EXACT:
            return (
                "what the model knows at a byte depends on later bytes or on other documents, so bits per byte (bpb) "
                "are not those of a model that generates; a router that looks ahead has is_causal = False"
            )
    return None


def _remembers(config: HNetConfig) -> str | None:
    """Whether a step depends on more than weights, buffers, the batch and torch's random numbers."""
    model = equivalence.random_model(config, 0, "cpu", torch.float64).train()
    pair, state = _batch(BATCHES[0], torch.device("cpu"), config), copy.deepcopy(model.state_dict())

    def step() -> Step:
        model.load_state_dict(state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _plain_step(model, pair)

    changed = _first_change(step(), step())
    return changed and (
        f"{changed} is another when a batch comes again with the same weights, buffers and random numbers of torch: "
        "the model remembers what no checkpoint has, so a resumed run differs from one that was not interrupted"
    )


# ---------------------------------------------------------------------------------------------------------- generation


@one_thread()
def generation(config: HNetConfig) -> str | None:
    """Why a model of this config can't generate, or how a small one's generation differs from its forward: the first
    layer that does. None if they agree.
    """
    if reason := why_no_generation(config):
        return reason
    try:
        training = equivalence.random_model(toy_config(config), 0, "cpu", torch.float64).eval()
        training(*_batch(BATCHES[0], torch.device("cpu"), config))
    except Exception as error:  # edited code can raise anything
        return f"a small model of this config fails with {_failure(error)}"
    try:
        inference = HNetInference.from_training(training)
        for stage in inference.new_cache(1).stages:
            for mixer, state in stage.layers.items():
                _require_tensors(mixer, state)
        report = equivalence.check(training, inference, (b"", b"one, two", b"a longer line\n"), new_bytes=2)
        difference = report.first_disagreement
    except GenerationError as error:
        difference = str(error)
    except Exception as error:
        difference = f"a small model fails with {_failure(error)}"
    return difference and f"generation (hnet_simple.py) differs from hnet_trainable.py: {difference}"


def _require_tensors(mixer: nn.Module, state: Any) -> None:
    """GenerationError for a mixer's state with tensors that a cache, which looks at its attributes, would not find."""
    for name, x in vars(state).items():
        if not isinstance(x, Tensor | int | float | str | torch.dtype | torch.device | None):
            raise GenerationError(
                f"{type(mixer).__name__}.new_state returns an object whose {name} is no tensor; expected all tensors "
                "of the state as its attributes"
            )
