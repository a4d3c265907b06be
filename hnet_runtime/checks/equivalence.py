"""Compares the inference model with the training model: the check behind `train.py -e generate`.

The same documents go through the training forward (all packed), one prefill (all together, padded) and steps (one byte
at a time). The output of every layer is compared token by token, then the continuations. Differences are in units of a
layer's size: the largest |x - y| of a token (as vectors) over the root mean square of the training forward's tokens.

Rounding can change a boundary where p is close to 0.5 and the two p agree within the tolerance. From there on the two
runs cut the text differently. Such a boundary is counted and excused, and what depends on it is not compared. The
outermost encoder and router depend on no boundary, so there every one is counted; further in, the first of a document.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hnet_decoder import generate
from hnet_kernels import Residual
from hnet_runtime.data.cuts import cuts_like
from hnet_runtime.runs import weights
from hnet_simple import HNetInference, Noise, Sampling
from hnet_trainable import BOS, Documents, HNetConfig, HNetLM, RoutingModule, init_weights, stage_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}  # of a layer's output, see above
P_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}  # of a boundary probability, absolute
# In bfloat16 a layer's limit is also this many times the rounding error of the training forward, measured against a
# float32 forward of the same weights. It depends on the weights: 1% of a layer's size or, deep in a trained model, 10%.
# Two runs with this error each differ by up to twice as much; the third is a margin for single tokens.
ROUNDINGS = 3.0

DOCUMENTS = (
    b"",
    b"A",
    b"Boundaries are learnt: where does a chunk begin, and who decides?\n",
    b"for i in range(10):\n    total += rows[i] ** 2  # squares\n" * 2,
    "Grüße aus Köln, 東京から、и из Москвы 🙂🙃. ".encode() * 3,
    bytes(range(0, 256, 2)) + b"\x00\x00\x00   \n\n",
)


@dataclasses.dataclass
class Trace:
    """The results of one way of running: by layer in the order of computation, then by document, one row per token."""

    layers: dict[str, list[Tensor]]
    p: list[list[Tensor]]  # [stage][document]
    b: list[list[Tensor]]

    @property
    def logits(self) -> list[Tensor]:
        return self.layers["logits"]


@dataclasses.dataclass
class Row:
    """The comparison of one layer over `tokens` tokens. NaN or infinity makes a difference infinite."""

    layer: str
    stage: int
    tokens: int
    prefill: float
    step: float
    limit: float
    values: list[Tensor]  # of the training forward

    @property
    def ok(self) -> bool:
        return max(self.prefill, self.step) <= self.limit


@dataclasses.dataclass
class Report:
    """The result of `check`. `rows`: in the order of computation; `turned[stage]`: |p - 0.5| of excused boundaries."""

    rows: list[Row]
    positions: list[int]  # tokens of each chunking stage
    turned: list[list[float]]  # in the training forward, against prefill or steps, whichever has more
    nearest: list[float]  # the smallest |p - 0.5| of each stage
    continuations: dict[str, tuple[int, int]]  # greedy, sampled: bytes that differ, bytes compared
    exact_continuations: bool
    exact_boundaries: bool  # in float64 no p is as close to a threshold as rounding is

    @property
    def first_disagreement(self) -> str | None:
        """The first layer that disagrees, or else the kind of continuation; None if all agree."""
        wrong = [row.layer for row in self.rows if not row.ok]
        if self.exact_boundaries:
            turned = [s for s, found in enumerate(self.turned) if found]
            wrong += [f"boundaries of stage {s} (p agrees; `opens` gets one token at a time)" for s in turned]
        if self.exact_continuations:
            wrong += [f"{kind} continuation" for kind, (differ, _) in self.continuations.items() if differ]
        return wrong[0] if wrong else None

    @property
    def ok(self) -> bool:
        return self.first_disagreement is None

    def print(self, console: Console | None = None) -> None:
        """Prints a table of the largest differences, then boundaries, continuations and the verdict."""
        console = console or Console()
        lovely = lovely_summary()
        table = Table("stage", "layer", "tokens", "prefill", "steps", "limit", *["training forward"] * bool(lovely))
        for row in self.rows:
            cells = (
                str(row.tokens),
                f"{row.prefill:.1e}",
                f"{row.step:.1e}",
                f"{row.limit:.2g}",
                *([str(lovely(torch.cat(row.values).float()))] if lovely else []),
            )
            layer = row.layer.removeprefix("backbone.").removeprefix("main_network." * row.stage)
            table.add_row(str(row.stage), layer, *cells, style=None if row.ok else "bold red")
        console.print(table)
        for s, (n, turned, nearest) in enumerate(zip(self.positions, self.turned, self.nearest)):
            excused = f"{len(turned)} differ (|p - 0.5| up to {max(turned):.1e})" if turned else "all equal"
            console.print(f"stage {s}: {n} boundaries, {excused}; nearest |p - 0.5| {nearest:.1e}", highlight=False)
        for kind, (differ, total) in self.continuations.items():
            console.print(f"{kind} continuations: {total - differ} of {total} bytes equal", highlight=False)
        if self.ok:
            console.print("equal: the training forward, prefill and step by step are one model", style="green")
        else:
            console.print(f"first to disagree: {self.first_disagreement}", style="bold red", highlight=False)


# ----------------------------------------------------------------------------------------------------------- recording


def _taps(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """The modules whose values are recorded, by name: (module, whether its input). Both models have the same names."""
    taps = {}
    for name, module in model.named_modules():
        name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        kind = type(module).__name__
        if name.endswith("._orig_mod"):
            continue
        if kind == "Isotropic":
            if name.endswith(".decoder"):
                taps[name.removesuffix("decoder") + "dechunk"] = module, True
            taps[name + ".rmsnorm"] = module, False
            taps |= {f"{name}.layers.{i}": (block, False) for i, block in enumerate(module.layers)}
        elif name in ("embeddings", "lm_head"):
            taps[name] = module, False
    return taps


@contextlib.contextmanager
def _listening(model: nn.Module, heard: dict[str, list[Tensor]]) -> Iterator[None]:
    def listen(name: str, to_input: bool):
        def hook(module, args, *output):
            x = args[0] if to_input else output[0]
            x = x.value() if isinstance(x, Residual) else x
            heard.setdefault(name, []).append(x.detach().clone())

        return hook

    handles = []
    for name, (module, to_input) in _taps(model).items():
        register = module.register_forward_pre_hook if to_input else module.register_forward_hook
        handles.append(register(listen(name, to_input)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stage(name: str, config: HNetConfig) -> int:
    return stage_of(name, config) if name.startswith("backbone") else 0


@torch.no_grad()
def trace_training(model: HNetLM, documents: Sequence[bytes]) -> Trace:
    """Runs the training forward of all documents (with BOS), packed."""
    device, heard = next(model.parameters()).device, {}
    lengths = torch.tensor([len(d) for d in documents])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    packed = torch.tensor(list(b"".join(documents)), device=device)
    iids = Documents.between(offsets, int(lengths.min()), int(lengths.max())).nest(packed)
    with _listening(model, heard):
        out = model(iids, None, cuts_like(iids, model.config))
    b = [list(stage.boundary_mask.unbind()) for stage in out.stages]
    counts = [lengths.tolist(), *([int(mask.sum()) for mask in masks] for masks in b)]
    heard["logits"] = [out.logits.values()]
    layers = {name: list(x[0].split(counts[_stage(name, model.config)])) for name, x in heard.items()}
    return Trace(layers, [list(stage.boundary_prob.unbind()) for stage in out.stages], b)


def trace_prefill(model: HNetInference, documents: Sequence[bytes]) -> Trace:
    """Runs one prefill of all documents."""
    heard: dict[str, list[Tensor]] = {}
    with _listening(model, heard):
        out = model.prefill(documents)
    counts = [out.lengths, *(b.sum(1).tolist() for b in out.boundaries)]

    def cut(x_BLX: Tensor, s: int) -> list[Tensor]:
        return [x_BLX[i, :n] for i, n in enumerate(counts[s])]

    heard["logits"] = [out.logits_BLV.flatten(0, 1)]
    rows = {name: x[0].unflatten(0, (len(documents), -1)) for name, x in heard.items()}
    layers = {name: cut(x, _stage(name, model.config)) for name, x in rows.items()}
    return Trace(layers, *([cut(x, s) for s, x in enumerate(xs)] for xs in (out.probabilities, out.boundaries)))


def trace_steps(model: HNetInference, documents: Sequence[bytes]) -> Trace:
    """Runs all documents one byte at a time, in one batch."""
    S, B, device = model.config.num_stages, len(documents), next(model.parameters()).device
    cache, layers = model.new_cache(B), {}
    p, b = ([[[] for _ in range(B)] for _ in range(S)] for _ in "pb")
    for t in range(max(map(len, documents))):
        active = [t < len(d) for d in documents]
        heard: dict[str, list[Tensor]] = {}
        with _listening(model, heard):
            out = model.step(torch.tensor([d[min(t, len(d) - 1)] for d in documents], device=device), cache, active)
        heard["logits"] = [out.logits_BV]
        for i in (i for i in range(B) if active[i]):
            reached = [True, *out.starts[i]]
            for name, x in heard.items():
                if reached[_stage(name, model.config)]:
                    layers.setdefault(name, [[] for _ in range(B)])[i].append(x[0][i].flatten())
            for s in (s for s in range(S) if reached[s]):
                p[s][i].append(out.probabilities[s][i])
                b[s][i].append(torch.tensor(reached[s + 1], device=device))

    def stacked(documents: list[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(rows) if rows else torch.zeros(0, device=device) for rows in documents]

    layers = {name: stacked(rows) for name, rows in layers.items()}
    return Trace(layers, *(list(map(stacked, part)) for part in (p, b)))


# ----------------------------------------------------------------------------------------------------------- comparing


@dataclasses.dataclass
class Comparable:
    """The number of tokens of each document that can be compared, [stage][document], given the changed boundaries.

    `before` the inner stage (encoder), in the `router`, up to the first boundary that differs (`agree`), and `after`
    the inner stage (decoder).
    """

    before: list[list[int]]
    router: list[list[int]]
    agree: list[list[int]]
    after: list[list[int]]

    @classmethod
    def of(cls, a: Trace, b: Trace) -> Comparable:
        before, router, agree = [[len(x) for x in a.logits]], [], []
        for s, (masks_a, masks_b) in enumerate(zip(a.b, b.b)):
            agree.append([_first_difference(x, y, n) for x, y, n in zip(masks_a, masks_b, before[-1])])
            router.append([n if s == 0 else min(first + 1, n) for first, n in zip(agree[-1], before[-1])])
            before.append([int(mask[:first].sum()) for mask, first in zip(masks_a, agree[-1])])
        after = [before[-1]]
        for masks, firsts in reversed(list(zip(a.b, agree))):
            opens = [mask[:first].nonzero().flatten().tolist() for mask, first in zip(masks, firsts)]
            ends = [o[inside] if inside < len(o) else first for o, inside, first in zip(opens, after[0], firsts)]
            after.insert(0, ends)
        return cls(before, router, agree, after)


def _turned(a: Trace, b: Trace, extent: Comparable, s: int) -> list[float]:
    """|p - 0.5| in `a` for the boundaries of stage s that differ, as far as they can be compared."""
    found = []
    for p, mask_a, mask_b, n in zip(a.p[s], a.b[s], b.b[s], extent.router[s]):
        found += (p[:n] - 0.5).abs()[mask_a[:n] != mask_b[:n]].tolist()
    return found


def _first_difference(a: Tensor, b: Tensor, n: int) -> int:
    n = min(n, len(a), len(b))
    return next(iter((a[:n] != b[:n]).nonzero().flatten().tolist()), n)


def _difference(ours: list[Tensor], theirs: list[Tensor], lengths: list[int], scale: float) -> float:
    """The largest |x - y| of a token among the first `lengths` of each document, divided by `scale`."""
    worst = 0.0
    for x, y, n in zip(ours, theirs, lengths):
        if len(x) < n:
            return float("inf")
        if n:
            token_T = (x[:n].double() - y[:n].double()).reshape(n, -1).norm(dim=1)
            worst = max(worst, token_T.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() / scale)
    return worst


def _size(documents: list[Tensor]) -> float:
    return max(torch.cat(documents).double().square().sum(1).mean().sqrt().item(), 1e-30)


def lovely_summary() -> Any:
    """lovely-tensors' function from a tensor to its summary; None if it isn't installed (the `debug` extra)."""
    try:
        from lovely_tensors import lovely
    except ImportError:
        return None
    return lovely


def check(
    training: HNetLM,
    inference: HNetInference,
    documents: Sequence[bytes] = DOCUMENTS,
    new_bytes: int = 24,
    seed: int = 0,
) -> Report:
    """Compares an unsharded training model with an inference model of the same config, dtype and device.

    documents: texts, to which BOS is added. Each is continued by `new_bytes`, greedily and sampled, by `generate`, on a
    GPU as CUDA graphs. The bytes must be those that the training forward, a prefill and plain steps of the complete
    text choose at each position with the same random numbers. In bfloat16 a continuation may differ where two bytes are
    about equally likely; it is counted.
    """
    dtype = next(inference.parameters()).dtype
    documents = [bytes([BOS]) + d for d in documents]
    reference = trace_training(training, documents)
    others = [trace_prefill(inference, documents), trace_steps(inference, documents)]
    extents = [Comparable.of(reference, other) for other in others]
    exact = exact_extent = None
    if dtype == torch.bfloat16:
        exact = trace_training(copy.deepcopy(training).float(), documents)
        exact_extent = Comparable.of(reference, exact)
    config, rows, S = training.config, [], training.config.num_stages
    for name, theirs in reference.layers.items():
        s, is_after = (
            _stage(name, config),
            "decoder." in name or name.endswith("dechunk") or name in ("lm_head", "logits"),
        )
        lengths = [(extent.after if is_after else extent.before)[s] for extent in extents]
        size, limit = _size(theirs), TOLERANCE[dtype]
        found = [_difference(o.layers[name], theirs, n, size) for o, n in zip(others, lengths)]
        if exact and any(same := (exact_extent.after if is_after else exact_extent.before)[s]):
            limit = min(limit, ROUNDINGS * _difference(exact.layers[name], theirs, same, size))
        rows.append(Row(name, s, min(map(sum, lengths)), *found, limit, theirs))
        if name.endswith("encoder.rmsnorm"):  # the router comes next
            p, lengths = reference.p[s], [extent.router[s] for extent in extents]
            found = [_difference(o.p[s], p, n, 1.0) for o, n in zip(others, lengths)]
            router = name.replace("encoder.rmsnorm", "routing_module")
            rows.append(Row(router, s, min(map(sum, lengths)), *found, P_TOLERANCE[dtype], p))
    return Report(
        rows,
        [sum(map(len, reference.p[s])) for s in range(S)],
        [max((_turned(reference, o, e, s) for o, e in zip(others, extents)), key=len) for s in range(S)],
        [(torch.cat(reference.p[s]) - 0.5).abs().min().item() for s in range(S)],
        _continuations(training, inference, documents, new_bytes, seed),
        exact_continuations=dtype != torch.bfloat16,
        exact_boundaries=dtype == torch.float64,
    )


def _continuations(training, inference, documents, new_bytes: int, seed: int) -> dict[str, tuple[int, int]]:
    counts = {}
    for kind, sampling in (("greedy", Sampling(temperature=0)), ("sampled", Sampling())):
        options: dict[str, Any] = {"max_bytes": new_bytes, "sampling": sampling, "seed": seed, "stop_at_eos": False}
        made = [g.continuation for g in generate(inference, [d[1:] for d in documents], **options)]
        whole = [d + m[:-1] for d, m in zip(documents, made)]
        differ = total = 0
        traces = trace_training(training, whole), trace_prefill(inference, whole), trace_steps(inference, whole)
        for logits in (trace.logits for trace in traces):
            noise = Noise([seed + i for i in range(len(whole))], logits[0].device)
            for n in range(new_bytes):
                now = torch.stack([x[len(d) - 1 + n] for x, d in zip(logits, documents)])
                chosen = sampling.draw(now, noise.next()).tolist()
                differ += sum(byte != m[n] for byte, m in zip(chosen, made))
                total += len(made)
        counts[kind] = differ, total
    return counts


# ------------------------------------------------------------------------------------------------------------- command


@torch.no_grad()
def random_model(config: HNetConfig, seed: int, device: str | torch.device, dtype: torch.dtype) -> HNetLM:
    """A model with random weights that make the check meaningful, drawn from (seed, name).

    The initial weights of training are unsuitable: the routers' projections are the identity and all p are close to
    0.5, where rounding decides. Here they map to four dimensions, so that angles between tokens are spread out. Biases,
    residual_proj and pad_dimension, which start at zero, are random too.
    """
    model = init_weights(HNetLM(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn, leaf = torch.randn(parameter.shape, generator=generator), name.rsplit(".", 1)[-1]
        if "norm" in name or leaf == "D":
            parameter.copy_(1 + 0.1 * drawn)
        elif parameter.ndim == 1 and leaf not in ("A_log", "dt_bias"):
            parameter.copy_(0.3 * drawn)
        elif "conv1d" in name or (name == "embeddings.weight" and not config.tie_embeddings):
            parameter.copy_(drawn)
        elif parameter.ndim > 1:
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
    for module in (m for m in model.modules() if isinstance(m, RoutingModule)):
        width = len(module.q_proj_layer.weight)
        few = torch.randn(width, min(4, width), generator=generator)
        onto = torch.linalg.qr(torch.randn(few.shape, generator=generator))[0] @ few.T
        module.q_proj_layer.weight.copy_(onto)
        module.k_proj_layer.weight.copy_(onto)
    model.load_state_dict(weights.cast(model.state_dict(), dtype), assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embeddings.weight
    return model.to(device)


def run(
    config: HNetConfig | None,
    checkpoint: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    length: int = 0,
    console: Console | None = None,
) -> bool:
    """Runs and prints the full check; True if all agrees. A checkpoint is loaded once for each of the two models.

    Without one, the weights are random and the inference model shares them. `length` adds a document of that many
    random bytes, to exceed a window. Raises UserError if a checkpoint can't be read or has another config, ValueError
    without config and checkpoint.
    """
    if checkpoint:
        training = weights.load_training(checkpoint, config, device, dtype)
        inference = weights.load_inference(checkpoint, config, device, dtype)
    elif config is None:
        raise ValueError("equivalence: expected a config or a checkpoint")
    else:
        training = random_model(config, seed, device, dtype)
        inference = HNetInference.from_training(training)
    training.eval(), inference.eval()  # generation has no dropout
    generator = torch.Generator().manual_seed(seed)
    long = [bytes(torch.randint(256, (length,), generator=generator).tolist())] * bool(length)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 exceeds the tolerance of float32
    try:
        report = check(training, inference, (*DOCUMENTS, *long), seed=seed)
    finally:
        torch.set_float32_matmul_precision(precision)
    report.print(console)
    return report.ok
