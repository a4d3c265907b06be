"""The kernels in hnet_kernels/ssd_triton.py against the definition in float64: outputs, and every gradient by name.

Without a GPU they run under Triton's interpreter, only in float32 (its bfloat16 products are wrong) and in separate
processes, because `TRITON_INTERPRET` must be set before triton is imported: this file, run as a script, prints what
`distances`, `leaks` or `changed_by_saving` find.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hnet_kernels import dispatch, ssd  # noqa: E402

definition = importlib.import_module("hnet_kernels.ssd")

NAMES = "y", "dx", "ddt", "dA", "dB", "dC"
AWKWARD = [1, 2, 63, 64, 65, 257]


class Case(NamedTuple):
    lengths: list[int]
    padding: int = 0  # rows after the last document
    heads: int = 2
    N: int = 16
    dt: tuple[float, float] = (1e-3, 0.1)  # the initial range of Mamba-2, with A in [-16, -1]
    offset: int = 0  # of the inputs in memory, in elements
    zero_dy: bool = False


SMALL = {
    "awkward": Case(AWKWARD, padding=30),
    "whole chunks": Case([40, 0, 60, 28]),
    "one document": Case([200], heads=3, N=32),
    "segments of one chunk": Case([150, 42], heads=1),
    "tokens": Case([1] * 5, padding=1, heads=1, offset=1),
    "only padding": Case([0, 0], padding=70),
    "groups of heads": Case([33, 50], heads=4),
    "no decay": Case([130, 70], dt=(1e-7, 1e-6)),
    "strong decay": Case([130, 70], padding=9, dt=(1e-4, 3.0)),
    "zero dy": Case(AWKWARD[:4], padding=3, zero_dy=True),
}
LARGE = {
    "16": Case([*AWKWARD, 3000, 0, 5], padding=100, heads=16, N=16),
    "32": Case([*AWKWARD, 3000, 0, 5], padding=100, heads=24, N=32),
    "64": Case([*AWKWARD, 3000, 0, 5], heads=3, N=64),
    "128": Case([*AWKWARD, 3000, 0, 5], padding=100, heads=32, N=128),
    "long": Case([*AWKWARD, 20000, 12316], heads=16, N=128, dt=(1e-5, 0.1)),
}
# Sums of a few hundred terms in float32 are good to about 1e-6. Log decays are summed over a chunk in float32 and then
# subtracted: where they reach 1e3 ("strong decay") the difference is good to 1e3 * 2^-24 = 6e-5, as then is the decay.
FLOAT32 = {"strong decay": 1e-4}
FLOAT32_TOLERANCE = 5e-6
# bfloat16 keeps 8 bits: rounding an operand, a state or a result costs 2^-9 = 2e-3 at most, a few of which add up.
BFLOAT16_TOLERANCE = 1e-2


def inputs_of(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """dy, x, dt, A, B, C as in a model (x, B and C are parts of one tensor), and cu_seqlens with repeated ends."""
    T = sum(case.lengths) + case.padding
    generator = torch.Generator().manual_seed(T)
    width = case.heads * 64
    row = width + 2 * case.N
    xBC = torch.randn(T * row + case.offset, generator=generator).to(device, dtype)[case.offset :].view(T, row)
    x, B, C = xBC.split([width, case.N, case.N], dim=-1)
    dy = torch.randn(T, case.heads, 64, generator=generator).to(device, dtype)
    low, high = case.dt
    dt = low * (high / low) ** torch.rand(T, case.heads, generator=generator)
    A = -torch.linspace(1, 16, case.heads)
    ends = torch.tensor([0, *case.lengths]).cumsum(0)
    cu_seqlens = torch.cat([ends, ends[-1:].repeat(3)]).to(device, torch.int32)
    inputs = {"dy": dy * (not case.zero_dy), "x": x.unflatten(-1, (-1, 64)), "dt": dt, "A": A, "B": B, "C": C}
    return {name: t.to(device) for name, t in inputs.items()}, cu_seqlens


def defined(dy, x, dt, A, B, C, cu_seqlens) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
    """The results, and for each the size to which rounding errors are relative.

    It is the norm, except for dA: a token's term is the difference of the flows into and out of it, and the terms of
    all tokens cancel in their sum, while their errors may add up (long memory).
    """
    y = definition.scan_forward(x, dt, dt * A, B, C, cu_seqlens)
    dx, dgain, dlog_a, dB, dC = definition.scan_backward(dy, x, dt, dt * A, B, C, cu_seqlens)
    results = y, dx, dgain + dlog_a * A, (dlog_a * dt).sum(0), dB, dC
    sizes = [t.norm().item() for t in results]
    sizes[NAMES.index("dA")] = (dlog_a.abs() * dt + dgain.abs() * dt**2).sum(0).norm().item()
    return results, tuple(sizes)


def fast(dy, x, dt, A, B, C, cu_seqlens) -> tuple[torch.Tensor, ...]:
    """Runs the kernels in memory that is filled with NaN."""
    from hnet_kernels import ssd_triton

    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        out = new_empty(self, *size, **options)
        return out.fill_(torch.nan if out.is_floating_point() else -(2**31))

    torch.Tensor.new_empty = poisoned
    try:
        y, _ = ssd_triton.scan_forward(x, dt, A, B, C, cu_seqlens)
        return y, *ssd_triton.scan_backward(dy, x, dt, A, B, C, cu_seqlens)
    finally:
        torch.Tensor.new_empty = new_empty


def distances(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    inputs, cu_seqlens = inputs_of(case, dtype, device)
    ours = fast(**inputs, cu_seqlens=cu_seqlens)
    wanted, sizes = defined(**{name: t.double() for name, t in inputs.items()}, cu_seqlens=cu_seqlens)
    for name, a, b in zip(NAMES, ours, wanted):
        assert a.shape == b.shape and a.dtype == (torch.float32 if name in ("ddt", "dA") else dtype), name
    # where all is zero, all has to be
    return {n: (a.double() - b).norm().item() / (size or 1e-30) for n, a, b, size in zip(NAMES, ours, wanted, sizes)}


def leaks(device: str, dtype: torch.dtype) -> list[str]:
    """The results of other documents that change, even in the last bit, when one document's values change."""
    case = Case([30, 75, 40], padding=15)
    inputs, cu_seqlens = inputs_of(case, dtype, device)
    before = fast(**inputs, cu_seqlens=cu_seqlens)
    changed = {name: t.clone() for name, t in inputs.items()}
    for name in ("dy", "x", "dt", "B", "C"):
        changed[name][30:105] *= 3
    after = fast(**changed, cu_seqlens=cu_seqlens)
    others = torch.cat([torch.arange(30), torch.arange(105, 160)]).to(device)
    return [n for n, a, b in zip(NAMES, before, after) if n != "dA" and not torch.equal(a[others], b[others])]


def changed_by_saving(case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """The results that differ, even in the last bit, when the backward uses what the forward saved: without and with
    skip and bias, where softplus(dt + bias) replaces dt and -exp(A) replaces A.

    In float32 on GPUs other than Hopper they may differ by rounding: the kernel that computes the states again and the
    one that saved them are compiled apart, and multiply and add in one instruction in other places. Seen with N = 32.
    """
    from hnet_kernels import cards, launch_options, ssd_triton

    chunk = launch_options.scan(torch.device(device), dtype).tokens
    rounds = dtype == torch.float32 and cards.capability(torch.device(device)) != (9, 0)

    def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
        if not rounds:
            return not torch.equal(a, b)
        return bool((a - b).norm() > 1e-6 * b.norm())  # measured: 2e-7, two roundings of float32

    inputs, cu_seqlens = inputs_of(case, dtype, device)
    dy = inputs.pop("dy")
    inputs = *inputs.values(), cu_seqlens
    changed = []
    some = torch.linspace(-1, 1, case.heads, device=device)
    # as Mamba-2 has it; the interpreter takes long, and does the other ways for short cases
    ways = [(some, some)] if device == "cpu" and len(inputs[0]) > 100 else [(None, None), (some, None), (some, some)]
    for skip, bias in ways:
        y, kept = ssd_triton.scan_forward(*inputs, skip, save=True, bias_H=bias)
        plain, nothing = ssd_triton.scan_forward(*inputs, skip, bias_H=bias)
        assert nothing is None and (kept.states_CHPN != 0).any() == (len(kept.document_T) > chunk)
        pairs = zip(
            ("y", *ssd_triton.Gradients._fields),
            (y, *ssd_triton.scan_backward(dy, *inputs, skip, saved=kept, bias_H=bias)),
            (plain, *ssd_triton.scan_backward(dy, *inputs, skip, bias_H=bias)),
        )
        changed += [name for name, a, b in pairs if a is not b and differ(a, b)]
    return changed


def check(name: str, found: dict[str, float], tolerance: float) -> None:
    assert list(found) == list(NAMES) and all(d <= tolerance for d in found.values()), (name, found)  # NaN fails too


# ---------------------------------------------------------------------------------------------------- the interpreter


def interpreted(what: str, **more: str):
    """The output `what` of this file, run as a script under the interpreter, with more environment variables."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", **more}
    run = subprocess.run([sys.executable, __file__, what], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_interpreted_kernels_match_the_definition():
    for name, found in interpreted("distances").items():
        check(name, found, FLOAT32.get(name, FLOAT32_TOLERANCE))


def test_kernels_match_the_definition_without_tensor_descriptors():
    """As on an A100, whose kernels compute addresses and take other sizes of chunks."""
    found = interpreted("distances of awkward", HNET_GPU="a100")
    check("awkward", found["awkward"], FLOAT32_TOLERANCE)


def test_interpreted_kernels_pass_nothing_between_documents():
    assert interpreted("leaks") == []


@pytest.mark.soak
def test_interpreted_kernels_give_the_same_with_saved_states():
    assert interpreted("changed_by_saving") == {name: [] for name in SMALL}


def test_the_reason_why_there_is_no_kernel():
    x, B = torch.empty(1, 1, 64), torch.empty(1, 16)
    assert definition._why_unsupported(x, B) == "no CUDA device"
    x = x.to("meta")
    assert definition._why_unsupported(x, B) == "no CUDA device"


# ----------------------------------------------------------------------------------------------------------- real GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_float32_on_gpu(name):
    check(name, distances((SMALL | LARGE)[name], torch.float32, "cuda"), FLOAT32.get(name, FLOAT32_TOLERANCE))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_bfloat16_on_gpu(name):
    check(name, distances((SMALL | LARGE)[name], torch.bfloat16, "cuda"), BFLOAT16_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_passes_nothing_between_documents(dtype):
    assert leaks("cuda", dtype) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_gpu_finds_the_same_with_what_the_forward_kept(name, dtype):
    assert changed_by_saving((SMALL | LARGE)[name], dtype, "cuda") == []


@pytest.mark.gpu
def test_operation_runs_the_kernels_without_syncs_in_a_graph_and_repeats_itself():
    inputs, cu_seqlens = inputs_of(LARGE["128"], torch.bfloat16, "cuda")
    dy = inputs.pop("dy")
    leaves = [t.requires_grad_() for t in inputs.values()]

    def step():
        y = ssd(*leaves, cu_seqlens)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    eager = step()
    torch.cuda.synchronize()
    assert dispatch.kernel_report()["ssd cuda bfloat16"] == "fast"
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    for name, a, b, c in zip(NAMES, eager, again, replayed):
        assert torch.equal(a, b) and torch.equal(a, c), name


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    if sys.argv[1] == "leaks":
        print(json.dumps(leaks("cpu", torch.float32)))
    elif sys.argv[1] == "changed_by_saving":
        print(json.dumps({name: changed_by_saving(case, torch.float32, "cpu") for name, case in SMALL.items()}))
    else:
        wanted = [sys.argv[1].removeprefix("distances of ")] if " of " in sys.argv[1] else SMALL
        print(json.dumps({name: distances(SMALL[name], torch.float32, "cpu") for name in wanted}))
