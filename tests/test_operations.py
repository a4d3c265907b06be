"""The operations of hnet_kernels: each fast implementation against its definition, outputs and every gradient by name,
and the destinations of gradients. The kernels alone are tested in test_fused_triton.py and the files beside it.

Without a GPU a fast implementation runs its own backward on the kernels' definitions, so float64 shows whether its
formulas are right. A few sizes run the kernels under Triton's interpreter in a separate process: this file, run as a
script, prints the result of `interpreted`.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_fused_triton import AWKWARD, TOLERANCE, check, exact  # noqa: E402

from hnet_kernels import (  # noqa: E402
    Chunks,
    boundary_probability,
    cards,  # noqa: E402
    cross_entropy,
    cut,
    embed,
    linear,
    mamba2_inner,
    residual_stream,
    rms_norm,
    rotary_attention,
    smooth,
    swiglu,
    take_rows,
    upsample,
    wide_linear,
    widen,
)
from hnet_kernels.dispatch import OPERATIONS, KernelError, forcing  # noqa: E402
from hnet_kernels.gradients import Destinations, PartialSums, writing_to  # noqa: E402

EPS = 1e-5
EXACT = 1e-9  # float64: sums in another order, of some hundred terms, differ by 1e-13; a wrong formula by far more


class Case(NamedTuple):
    """An operation's inputs by name; those of `leaves` have gradients. call(**leaves, **others) is called."""

    leaves: dict[str, Tensor]
    others: dict[str, Any]
    call: Callable[..., Any]


class Inputs:
    """Random tensors on a device, in the compute dtype or at least float32 (`wide`)."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device

    def __call__(self, *shape: int, wide: bool = False, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * scale
        return values.to(self.device, torch.promote_types(self.dtype, torch.float32) if wide else self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def share(self, T: int) -> Tensor:
        """T values in (0, 1), in at least float32."""
        return self(T, wide=True).sigmoid()

    def documents(self, lengths: list[int], filler: int = 0) -> dict[str, Tensor]:
        """cu_seqlens, and position_T with that of `filler` tokens behind them."""
        position = torch.cat([torch.arange(n, dtype=torch.int32) for n in (*lengths, filler)])
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return {"position_T": position.to(self.device), "cu_seqlens": cu.to(self.device)}


# ---------------------------------------------------------------------------------------------------------- the cases


def embed_case(new: Inputs, *shape: int) -> Case:
    return Case({"weight": new(11, 16)}, {"iids": new.integers(11, *shape)}, lambda iids, weight: embed(iids, weight))


def linear_case(new: Inputs, *shape: int, is_saved: bool = False) -> Case:
    leaves = {"x": new(*shape, 24), "weight": new(40, 24, scale=0.2)}
    return Case(leaves, {}, lambda x, weight: linear(x, weight, is_saved))


def wide_linear_case(new: Inputs, T: int) -> Case:
    leaves = {"x": new(T, 24), "weight": new(40, 24, wide=True, scale=0.2), "bias": new(40, wide=True)}
    return Case(leaves, {}, lambda x, weight, bias: wide_linear(x, weight, bias))


def widen_case(new: Inputs, *shape: int) -> Case:
    return Case({"x": new(*shape, 24), "pad": new(8)}, {}, lambda x, pad: widen(x, pad))


def stream_case(new: Inputs, stack: Callable[..., list[Tensor]], T: int = 70, D: int = 24) -> Case:
    """stack(residual, norm, block) returns the values read from a residual stream. Each call of `norm` and `block` has
    its own weights; block(x) stands for a mixer."""
    names = [f"{kind}{i}" for i in range(4) for kind in ("norm", "block")]
    leaves = {n: 1 + new(D, scale=0.3) if n.startswith("norm") else new(D, D, scale=0.3) for n in names}

    def call(x: Tensor, **weights: Tensor) -> list[Tensor]:
        norms, blocks = ([w for n, w in weights.items() if n.startswith(kind)] for kind in ("norm", "block"))
        norms, blocks = iter(norms), iter(blocks)
        found = stack(
            residual_stream(x), lambda r: rms_norm(r, next(norms), EPS), lambda x: torch.tanh(x @ next(blocks))
        )
        for unused in (*norms, *blocks):  # has a gradient, too: zero
            found.append(unused.sum() * 0)
        return found

    return Case({"x": new(T, D)} | leaves, {}, call)


def plain(r, norm, block):
    """As in Isotropic.forward."""
    for _ in range(3):
        r = r + block(norm(r))
    return [norm(r)]


def read_between(r, norm, block):
    r = r + block(norm(r))
    seen = r * 1  # before what was added is part of the sum
    x = norm(r)
    return [seen, (r * 1).tanh(), norm(r + block(x))]


def two_norms(r, norm, block):
    """Two readers of one residual, as in a parallel block, and a third after another addition."""
    r = r + block(norm(r))
    a, b = norm(r), norm(r)
    r = r + (block(a) + block(b))
    return [norm(r)]


def two_streams(r, norm, block):
    """Two streams that continue from one sum."""
    x = norm(r)
    left, right = r + block(x), r + block(x)
    return [norm(left), norm(right), r * 2]


def scaled(r, norm, block):
    r = r + block(norm(r))
    r = r * 0.5 + block(norm(r))
    r = r + block(norm(r))
    return [norm(r)]


def skipped(r, norm, block):
    """A block that returns its input, and one whose result is not used."""
    r = r + block(norm(r))
    norm(r)
    return [norm(r)]


def added_twice(r, norm, block):
    x = norm(r)
    r = r + block(x) + block(x)
    return [norm(r + block(norm(r)))]


def turned_round(r, norm, block):
    r = block(norm(r)) + r
    r = torch.add(block(norm(r)), r)
    return [norm(r)]


def torch_functions(r, norm, block):
    r = r + block(norm(r))
    return [torch.tanh(r), r.mean(), torch.cat([r, r * 2]).sum(0), r[3:], -r / 2, r.float().norm(dim=-1), norm(r)]


def without_a_block(r, norm, block):
    return [norm(r), r * 1]


STREAMS = (
    plain,
    read_between,
    two_norms,
    two_streams,
    scaled,
    skipped,
    added_twice,
    turned_round,
    torch_functions,
    without_a_block,
)


def swiglu_case(new: Inputs, *shape: int) -> Case:
    return Case({"both": new(*shape, 96, scale=2)}, {}, lambda both: swiglu(both))


def attention_case(new: Inputs, lengths: list[int], window: int = -1, H: int = 2, P: int = 16, R: int = 4) -> Case:
    """qkv is the result of another operation, such as a projection: attention may overwrite it."""
    angles = torch.arange(max(lengths))[:, None] * 10000.0 ** (-torch.arange(R) / max(R, 1))
    wide = torch.promote_types(new.dtype, torch.float32)
    tables = {"cos": angles.cos().to(new.device, wide), "sin": angles.sin().to(new.device, wide)}

    def call(qkv, cos, sin, position_T, cu_seqlens):
        return rotary_attention(qkv.clone(), H, window, cos, sin, position_T, cu_seqlens)

    return Case({"qkv": new(sum(lengths), 3 * H * P)}, tables | new.documents(lengths), call)


def mamba_case(new: Inputs, lengths: list[int], H: int = 2, N: int = 16, K: int = 4, without: str = "") -> Case:
    """without: names of weights that are None."""
    D, P = 64 * H, 64
    leaves = {
        "projected": new(sum(lengths), 2 * D + 2 * N + H), "conv": new(D + 2 * N, 1, K, scale=0.5),
        "conv_bias": new(D + 2 * N), "dt_bias": new(H, wide=True) - 2, "A_log": new(H, wide=True),
        "D": new(H, wide=True), "norm": new(H * P),
    }  # fmt: skip

    def call(projected, conv, conv_bias, A_log, norm, position_T, cu_seqlens, dt_bias=None, D=None):
        return mamba2_inner(projected, conv, conv_bias, dt_bias, A_log, D, norm, position_T, cu_seqlens, EPS)

    leaves = {name: x for name, x in leaves.items() if name not in without.split()}
    return Case(leaves, new.documents(lengths), call)


def router_case(new: Inputs, lengths: list[int]) -> Case:
    leaves = {"q": new(sum(lengths), 24), "k": new(sum(lengths), 24)}
    leaves["k"][-1] = 3 * leaves["q"][-2 % sum(lengths)]  # one direction, so that rounding may leave [0, 1]
    position = {"position_T": new.documents(lengths)["position_T"]}
    return Case(leaves, position, lambda q, k, position_T: boundary_probability(q, k, position_T))


def rows_case(new: Inputs, T: int, *width: int, share: float = 0.3) -> Case:
    place = (new.share(T) < share).nonzero().squeeze(1) if 0 < share < 1 else torch.arange(round(share * (T - 1)) + 1)
    return Case({"x": new(T, *width)}, {"place": place.to(new.device)}, lambda x, place: take_rows(x, place))


def cut_case(new: Inputs, lengths: list[int], opens: float, filler: int = 0, room: bool = False) -> Case:
    """opens: the share of tokens that open a chunk within documents. room: space for more chunks than tokens."""
    T = sum(lengths) + filler
    to = {"to": Chunks.empty(new(T + 9, wide=True), len(lengths))} if room else {}
    if room:
        to["to"] = to["to"]._replace(**{n: getattr(to["to"], n)[: T + (n == "p_T")] for n in ("p_T", "b_T", "chunk_T")})

    def call(p, b, position_T, cu_seqlens, to=None):
        p, G, chunks = cut(p, b, position_T, cu_seqlens, to)
        return {"p": p, "G": G} | {f"chunks.{name}": x.clone() for name, x in chunks._asdict().items()}

    others = {"b": new.share(T) < opens} | new.documents(lengths, filler) | to
    return Case({"p": new.share(T)}, others, call)


def smooth_case(new: Inputs, lengths: list[int], low: float = 1e-4, high: float = 1 - 1e-4) -> Case:
    leaves = {"y": new(sum(lengths), 24), "p": low + (high - low) * new.share(sum(lengths))}
    cu = {"cu_seqlens": new.documents(lengths)["cu_seqlens"]}
    return Case(leaves, cu, lambda y, p, cu_seqlens: smooth(y, p, cu_seqlens))


def upsample_case(new: Inputs, T: int, C: int, spare: int = 0) -> Case:
    """With `spare` rows of z that no token reads."""
    start = torch.randperm(T - 1, generator=new.generator)[: C - 1].sort().values + 1
    start = F.pad(start, (1, 0)).to(new.device)
    chunk = torch.bucketize(torch.arange(T, device=new.device), start, right=True) - 1
    leaves = {"z": new(C + spare, 24, wide=True), "scale": new(T, wide=True), "residual": new(T, 24, wide=True)}
    others = {"chunk": chunk, "start": F.pad(start, (0, spare), value=T), "dtype": new.dtype}

    def call(z, scale, residual, chunk, start, dtype):
        return upsample(z, scale, chunk, start, residual, dtype)

    return Case(leaves, others, call)


def cross_entropy_case(new: Inputs, T: int, V: int) -> Case:
    others = {"labels": new.integers(V, T)}
    return Case({"logits": new(T, V, scale=5)}, others, lambda logits, labels: cross_entropy(logits, labels))


CASES: dict[str, Callable[[Inputs], Case]] = {
    "embed": lambda new: embed_case(new, 70),
    "embed, one": lambda new: embed_case(new, 1),
    "embed, rows": lambda new: embed_case(new, 3, 5),
    "linear": lambda new: linear_case(new, 70),
    "linear, saved": lambda new: linear_case(new, 70, is_saved=True),
    "linear, one token": lambda new: linear_case(new, 1),
    "linear, rows": lambda new: linear_case(new, 3, 5, is_saved=True),
    "wide_linear": lambda new: wide_linear_case(new, 70),
    "wide_linear, one token": lambda new: wide_linear_case(new, 1),
    "widen": lambda new: widen_case(new, 70),
    "widen, one token": lambda new: widen_case(new, 1),
    "widen, rows": lambda new: widen_case(new, 3, 5),
    **{f"residual_stream, {s.__name__}": lambda new, s=s: stream_case(new, s) for s in STREAMS},
    "residual_stream, one token": lambda new: stream_case(new, plain, T=1),
    "swiglu": lambda new: swiglu_case(new, 70),
    "swiglu, one token": lambda new: swiglu_case(new, 1),
    "swiglu, rows": lambda new: swiglu_case(new, 3, 5),
    "rotary_attention": lambda new: attention_case(new, AWKWARD),
    "rotary_attention, in a window": lambda new: attention_case(new, AWKWARD, window=7),
    "rotary_attention, one token": lambda new: attention_case(new, [1]),
    "rotary_attention, of tokens": lambda new: attention_case(new, [1] * 9, window=0),
    "rotary_attention, not turned": lambda new: attention_case(new, [9, 5], R=0),
    "rotary_attention, whole heads turned": lambda new: attention_case(new, [70, 2], R=8),
    "mamba2_inner": lambda new: mamba_case(new, AWKWARD),
    "mamba2_inner, one token": lambda new: mamba_case(new, [1]),
    "mamba2_inner, of tokens": lambda new: mamba_case(new, [1] * 9),
    "mamba2_inner, without dt_bias": lambda new: mamba_case(new, [65, 9], without="dt_bias"),
    "mamba2_inner, without D": lambda new: mamba_case(new, [65, 9], without="D"),
    "mamba2_inner, without both": lambda new: mamba_case(new, [65, 9], without="dt_bias D"),
    "mamba2_inner, two taps and three heads": lambda new: mamba_case(new, [65, 9], H=3, N=32, K=2),
    "boundary_probability": lambda new: router_case(new, AWKWARD),
    "boundary_probability, one token": lambda new: router_case(new, [1]),
    "boundary_probability, of tokens": lambda new: router_case(new, [1] * 9),
    "take_rows": lambda new: rows_case(new, 70, 24),
    "take_rows, numbers": lambda new: rows_case(new, 70),
    "take_rows, of heads": lambda new: rows_case(new, 70, 3, 8),
    "take_rows, the first": lambda new: rows_case(new, 70, 24, share=0),
    "take_rows, all": lambda new: rows_case(new, 70, 24, share=1),
    "cut": lambda new: cut_case(new, AWKWARD, 0.3),
    "cut, one boundary each": lambda new: cut_case(new, AWKWARD, 0),
    "cut, all boundaries": lambda new: cut_case(new, AWKWARD, 1),
    "cut, one token": lambda new: cut_case(new, [1], 0),
    "cut, filled up": lambda new: cut_case(new, [*AWKWARD, 0, 0], 0.3, filler=60),
    "cut, filled up with boundaries": lambda new: cut_case(new, [65, 0, 3], 1, filler=60, room=True),
    "smooth": lambda new: smooth_case(new, AWKWARD),
    "smooth, one chunk each": lambda new: smooth_case(new, [1] * 9),
    "smooth, empty documents": lambda new: smooth_case(new, [0, 33, 0, 2, 0]),
    "smooth, long memory": lambda new: smooth_case(new, [130], 1e-4, 1e-3),
    "upsample": lambda new: upsample_case(new, 130, 40),
    "upsample, one boundary": lambda new: upsample_case(new, 130, 1),
    "upsample, all boundaries": lambda new: upsample_case(new, 130, 130),
    "upsample, filled up": lambda new: upsample_case(new, 130, 40, spare=9),
    "upsample, one token": lambda new: upsample_case(new, 1, 1),
    "cross_entropy": lambda new: cross_entropy_case(new, 70, 256),
    "cross_entropy, other classes": lambda new: cross_entropy_case(new, 9, 77),
    "cross_entropy, one token": lambda new: cross_entropy_case(new, 1, 256),
}


# ------------------------------------------------------------------------------------------------- fast and definition

LAYOUTS = "dense", "strided"
ACTIVATIONS = "x", "both", "qkv", "projected", "q", "k", "y", "z", "residual", "logits"


def apart(x: Any) -> Any:
    """A tensor's values in every third place of its memory, whose other places hold what no kernel may use."""
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    unused = torch.nan if x.is_floating_point() else -(10**6) if x.dtype in (torch.int32, torch.int64) else 1
    memory = x.new_full((*x.shape, 3), unused)
    memory[..., 0] = x
    return memory[..., 0]


class Compared:
    """A case, run fast and then by the definition in float64, along the same directions of its outputs' gradients.

    strided: rows of activations are parts of longer ones, elements of other inputs are not adjacent in memory, and the
    gradients of outputs are those of their sums, tensors whose elements have one address.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: str, layout: str):
        self.case, self.strided = CASES[name](Inputs(dtype, device)), layout == "strided"
        self.generator, self.directions = torch.Generator().manual_seed(1), {}
        self.longer = self.strided

    def direction(self, name: str, x: Tensor) -> Tensor:
        if name not in self.directions:
            drawn = torch.randn(() if self.strided else x.shape, generator=self.generator)
            self.directions[name] = drawn.to(x.device, x.dtype).expand(x.shape)
        return self.directions[name].to(x.dtype)

    def run(self, fast: bool, is_exact: bool) -> dict[str, Tensor]:
        """Outputs and gradients. is_exact: all in float64."""

        def given(x: Any) -> Any:
            if isinstance(x, Chunks):
                return Chunks(*map(given, x))
            if isinstance(x, Tensor) and x.is_floating_point():
                return exact(x) if is_exact else x.detach().clone()
            return torch.float64 if is_exact and isinstance(x, torch.dtype) else x

        leaves = {name: given(x).requires_grad_() for name, x in self.case.leaves.items()}
        inputs = {name: given(x) for name, x in self.case.others.items()} | leaves
        for name in inputs if self.longer else ():
            if name in ACTIVATIONS and inputs[name].ndim == 2:
                inputs[name] = F.pad(inputs[name], (0, 8), value=torch.nan)[:, :-8]
            elif name not in leaves:
                inputs[name] = apart(inputs[name])
        with forcing(fast):
            outputs = self.case.call(**inputs)
        if not isinstance(outputs, dict):
            outputs = {"": outputs} if isinstance(outputs, Tensor) else {str(i): x for i, x in enumerate(outputs)}
        wanted = {name: x for name, x in outputs.items() if x.requires_grad}
        directions = [self.direction(name, x) for name, x in wanted.items()]
        gradients = torch.autograd.grad(
            list(wanted.values()), list(leaves.values()), directions, materialize_grads=True
        )
        found = {f"output {name}".strip(): x.detach() for name, x in outputs.items()}
        return found | {f"gradient of {name}": x for name, x in zip(leaves, gradients)}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN inside."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*args, **options):
            out = make(*args, **options)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return new

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
            patch.setattr(owner, name, filling(getattr(owner, name)))
        yield


def distances(name: str, dtype: torch.dtype, device: str, layout: str = "dense") -> dict[str, float]:
    """The difference of a fast operation from its definition in float64, relative to its norm; for integers the number
    of differing elements."""
    compared, result = Compared(name, dtype, device, layout), {}
    with poisoned():
        found = compared.run(fast=True, is_exact=False)
    wanted = compared.run(fast=False, is_exact=True)
    assert list(found) == list(wanted)
    for key, x in wanted.items():
        assert found[key].shape == x.shape, key
        if x.is_floating_point():
            result[key] = (exact(found[key]) - x).norm().item() / (x.norm().item() or 1)
        else:
            result[key] = float((found[key] != x).sum())
    return result


def test_every_operation_has_a_case():
    assert {name.partition(",")[0] for name in CASES} == set(OPERATIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_fast_is_the_definition_in_float64(name, layout):
    check(distances(name, torch.float64, "cpu", layout), EXACT)


@pytest.mark.parametrize("name", CASES)
def test_fast_has_the_definitions_dtypes(name):
    compared = Compared(name, torch.bfloat16, "cpu", "dense")
    found, wanted = (compared.run(fast=fast, is_exact=False) for fast in (True, False))
    assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in wanted.items()}


# Most round once to bfloat16 on the way to a result, see TOLERANCE. Errors add up where many do, one after another: in
# four norms with three blocks, and in the mixer, some of whose gradients are sums of few terms that cancel. Measured on
# a CPU: up to 1.1e-2 and 4.3e-2. A_log's gradient cancels in float32 as well, as test_ssd_triton.py explains.
LOOSER = {
    (torch.bfloat16, "residual_stream"): 2e-2, (torch.bfloat16, "mamba2_inner"): 6e-2,
    (torch.float32, "mamba2_inner"): 5e-5,
}  # fmt: skip


def tolerance(name: str, dtype: torch.dtype) -> float:
    return LOOSER.get((dtype, name.partition(",")[0]), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fast_is_close_to_the_definition(name, dtype):
    check(distances(name, dtype, "cpu"), tolerance(name, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, dtype, layout):
    check(distances(name, dtype, "cuda", layout), tolerance(name, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if name != "embed, rows"])  # which is torch's own
def test_nothing_waits_for_the_device(name):
    """Neither does a backward, so all can be captured."""
    if reason := cards.why_unsupported(torch.device("cuda")):
        pytest.skip(reason)
    compared = Compared(name, torch.bfloat16, "cuda", "dense")
    compared.run(fast=True, is_exact=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compared.run(fast=True, is_exact=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------------------------------- interpreter


KERNELS = "attention", "boundaries", "conv", "cross_entropy", "ema", "norm", "pointwise", "router", "ssd"
# The scan and the smoothing take seconds there, and test_ssd_triton.py and test_ema_triton.py show them at length
SLOW = {name for name in CASES if name.startswith(("mamba2_inner", "smooth"))} - {"mamba2_inner, of tokens"}
INTERPRETED = [name for name in CASES if name not in SLOW] + ["smooth, empty documents"]


def interpreted() -> dict[str, dict[str, float]]:
    """The differences of kernels under Triton's interpreter, in float32, in which attention has no kernel."""
    for name in KERNELS:
        importlib.import_module(f"hnet_kernels.{name}").use_fast = lambda operation, device, dtype, reason: (
            dtype != torch.float64 and "attention" not in operation
        )
    return {name: distances(name, torch.float32, "cpu", "strided") for name in INTERPRETED}


def test_interpreted_kernels_take_what_autograd_gives():
    """Gradients of sums, whose elements have one address, and rows that are parts of longer ones."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert list(found) == INTERPRETED
    for name in INTERPRETED:
        check(found[name], tolerance(name, torch.float32), name)


# --------------------------------------------------------------------------------------------------------- destinations

# The inputs whose gradients have destinations, of cases that have any
PLACED = {
    "embed": ["weight"],
    "linear": ["weight"],
    "linear, saved": ["weight"],
    "wide_linear": ["x", "weight", "bias"],
    "widen": ["pad"],
    "residual_stream, plain": ["norm0", "norm1", "norm2", "norm3"],
    "residual_stream, two_streams": ["norm0", "norm1", "norm2"],
    "mamba2_inner": ["conv", "conv_bias", "dt_bias", "A_log", "D", "norm"],
    "mamba2_inner, without D": ["conv", "conv_bias", "norm"],
    "upsample": ["z"],
}


def test_every_operation_with_weights_has_a_case_of_places():
    weights = "weight", "bias", "pad", "norm0", "conv", "A_log"
    of_cases = {name.partition(",")[0]: CASES[name](Inputs(torch.float32, "cpu")).leaves for name in CASES}
    wanted = {operation for operation, leaves in of_cases.items() if any(name in leaves for name in weights)}
    assert wanted == {name.partition(",")[0] for name in PLACED} - {"upsample"}


class Used:
    """A case, run several times on the same inputs, with destinations for some gradients."""

    def __init__(self, name: str, times: int, placed: list[str]):
        case = CASES[name](Inputs(torch.float64, "cpu"))
        self.leaves = {key: x.clone().requires_grad_() for key, x in case.leaves.items()}
        self.tensors = {key: torch.full_like(self.leaves[key], torch.nan) for key in placed}
        self.destinations = Destinations({self.leaves[key]: x for key, x in self.tensors.items()})
        with forcing(True), writing_to(self.destinations if placed else None):
            outputs = [case.call(**self.leaves, **case.others) for _ in range(times)]
        outputs = [[x] if isinstance(x, Tensor) else x for x in outputs]
        generator = torch.Generator().manual_seed(2)
        losses = [
            sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in one) for one in outputs
        ]
        self.losses = losses

    def gradients(self, *losses: Tensor) -> dict[str, Tensor | None]:
        found = torch.autograd.grad(losses, list(self.leaves.values()), allow_unused=True)
        self.destinations.finish()
        return dict(zip(self.leaves, found))


@pytest.mark.parametrize("name", PLACED)
def test_gradients_go_to_their_places(name):
    plain, placed = Used(name, 1, []), Used(name, 1, PLACED[name])
    wanted, found = plain.gradients(*plain.losses), placed.gradients(*placed.losses)
    for key, x in wanted.items():
        if key in PLACED[name]:
            assert found[key] is None and placed.destinations.by_tensor[placed.leaves[key]].written, key
            assert torch.equal(placed.tensors[key], x), key
        else:
            assert torch.equal(found[key], x), key


@pytest.mark.parametrize("name", PLACED)
def test_only_the_first_use_of_a_weight_writes_to_its_place(name):
    plain, placed = Used(name, 2, []), Used(name, 2, PLACED[name])
    first, second = (plain.gradients(loss) for loss in plain.losses)
    found = placed.gradients(*placed.losses)
    for key in PLACED[name]:
        assert torch.equal(placed.tensors[key], first[key]) and torch.equal(found[key], second[key]), key


@pytest.mark.parametrize("name", PLACED)
def test_a_weight_without_a_gradient_leaves_its_destination_unchanged(name):
    placed = Used(name, 1, PLACED[name])
    found = placed.gradients(*[torch.zeros((), dtype=torch.float64, requires_grad=True) * 1])
    assert not any(destination.written for destination in placed.destinations.by_tensor.values())
    assert all(x is None for x in found.values()) and all(x.isnan().all() for x in placed.tensors.values())


def test_small_weights_without_all_destinations_return_their_gradients():
    """A_log, dt_bias and D have their sums in one row; without D it has no destination."""
    plain, placed = (Used("mamba2_inner, without D", 1, places) for places in ([], ["A_log", "dt_bias", "norm"]))
    wanted, found = plain.gradients(*plain.losses), placed.gradients(*placed.losses)
    written = {key: placed.destinations.by_tensor[placed.leaves[key]].written for key in placed.tensors}
    assert written == {"A_log": False, "dt_bias": False, "norm": True}
    assert torch.equal(found["A_log"], wanted["A_log"]) and torch.equal(found["dt_bias"], wanted["dt_bias"])


def test_rows_are_added_to_what_is_in_their_place():
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    there, rows = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 3, 8])
    destinations, wanted = Destinations({}), there.clone()
    wanted[rows] += 2
    destinations.add(x, there, adds=True)
    with forcing(True), writing_to(destinations):
        taken = take_rows(x, rows)
    assert torch.autograd.grad(2 * taken.sum(), x, allow_unused=True) == (None,)
    assert destinations.by_tensor[x].written and torch.equal(there, wanted)


def test_small_weights_of_several_layers_are_reduced_in_one_call_per_kind(monkeypatch):
    new, calls, total = Inputs(torch.float64, "cpu"), [], PartialSums.total
    cases = [mamba_case(new, [65, 9]) for _ in range(3)]
    weights = [{key: x.requires_grad_() for key, x in case.leaves.items()} for case in cases]
    norms = [new(290).requires_grad_() for _ in range(3)]
    small = norms + [x for layer in weights for key, x in layer.items() if key != "projected"]
    destinations = Destinations({x: torch.full_like(x, torch.nan) for x in small})

    def counted(sums):
        calls.append(len([slot for slot in sums.slots if slot.filled]))
        return total(sums)

    monkeypatch.setattr(PartialSums, "total", counted)
    with forcing(True), writing_to(destinations):
        outputs = []
        for layer, case, norm in zip(weights, cases, norms):
            projected = rms_norm(residual_stream(layer["projected"]), norm, EPS)
            outputs.append(case.call(**layer | {"projected": projected}, **case.others).sum())
    assert torch.autograd.grad(sum(outputs), small, allow_unused=True) == (None,) * len(small) and calls == []
    destinations.finish()
    assert calls == [3, 3, 3, 3], "norms; and of mixers: convolutions, heads, gated norms"
    assert all(
        destination.written and destination.tensor.isfinite().all() for destination in destinations.by_tensor.values()
    )
    assert not destinations.sums, "their memory is free again"


# ---------------------------------------------------------------------------------------------------------- the choice


def test_what_runs_fast():
    """Everything on a CUDA device but float64; elsewhere what a test forces."""
    x, on_cuda = torch.zeros(3), type("OnCuda", (), {"is_cuda": True, "dtype": torch.bfloat16})()
    assert not swiglu.runs_fast(x) and swiglu.runs_fast(on_cuda)
    on_cuda.dtype = torch.float64
    assert not swiglu.runs_fast(on_cuda)
    with forcing(True):
        assert swiglu.runs_fast(x) and swiglu.runs_fast(on_cuda)
        with forcing(False):
            assert not swiglu.runs_fast(on_cuda)
        assert swiglu.runs_fast(x)
    with pytest.raises(ZeroDivisionError), forcing(True):
        1 / 0  # noqa: B018
    assert not swiglu.runs_fast(x)


def test_an_operation_whose_check_failed_runs_its_definition(monkeypatch):
    monkeypatch.setattr(swiglu, "uses_definition", True)
    with forcing(True):
        assert not swiglu.runs_fast(torch.zeros(3))


@pytest.mark.parametrize("choice", ["auto", "reference", "triton"])
def test_the_environment_chooses(choice, monkeypatch):
    monkeypatch.setattr(importlib.import_module("hnet_kernels.dispatch"), "requested", lambda: choice)
    on_cuda = type("OnCuda", (), {"is_cuda": True, "dtype": torch.float32})()
    assert swiglu.runs_fast(on_cuda) == (choice != "reference")
    both = torch.zeros(3, 8)
    if choice == "triton":
        with pytest.raises(KernelError, match="no fast kernel for swiglu here .no CUDA device.; use auto"):
            swiglu(both)
    else:
        assert not swiglu(both).any()


def test_operations_say_what_they_compute():
    for name, operation in OPERATIONS.items():
        assert operation.__doc__ and operation.__name__ == operation.name == name
        assert callable(operation.implementation), "each has a fast implementation"


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    print(json.dumps(interpreted()))
