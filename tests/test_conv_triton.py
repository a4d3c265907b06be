"""The kernels in hnet_kernels/conv_triton.py against the definition in float64: outputs, and every gradient by name.

Without a GPU they run under Triton's interpreter, in a separate process: this file, run as a script, prints what
`distances` finds. See test_ssd_triton.py.
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

from hnet_kernels import causal_conv_silu, dispatch  # noqa: E402
from hnet_kernels.gradients import PartialSums  # noqa: E402

definition = importlib.import_module("hnet_kernels.conv")

NAMES = "y", "dx", "dweight", "dbias"
AWKWARD = [1, 2, 63, 64, 65, 257]


class Case(NamedTuple):
    lengths: list[int]
    D: int = 80
    K: int = 4
    shared: int = 16  # channels of other things in the same rows


SMALL = {
    "awkward": Case(AWKWARD),
    "tokens": Case([1] * 40),
    "one document": Case([150], D=64),
    "two taps": Case([3, 30], K=2, D=16),
    "three taps": Case([3, 30, 2, 2, 1], K=3),
    "one tap": Case([3, 9], K=1),
    "own rows": Case([40], shared=0),
    "odd rows": Case([5, 6], D=15, shared=2),
    "whole blocks": Case([30, 41], D=128),
}
PAIRS = "two taps", "whole blocks"  # bfloat16 under the interpreter too, which cuts its last bits off
LARGE = {"model": Case([*AWKWARD, 3000, 5], D=1280, shared=1040)}
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}  # see test_ssd_triton.py


def distances(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    from hnet_kernels import conv_triton

    T, generator = sum(case.lengths), torch.Generator().manual_seed(0)
    rows, dy = (torch.randn(T, n, generator=generator) for n in (case.shared + case.D, case.D))
    x = rows.to(device, dtype)[:, case.shared :]
    dy = dy.to(device, dtype)
    weight, bias = (torch.randn(*n, generator=generator).to(device, dtype) for n in ((case.D, 1, case.K), (case.D,)))
    position = torch.cat([torch.arange(n, dtype=torch.int32) for n in case.lengths]).to(device)
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **options):
        out = new_empty(*args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    torch.Tensor.new_empty = poisoned
    try:
        y = conv_triton.conv_silu_forward(x, weight, bias, position)
        sums = PartialSums()
        slots = [sums.slot(weight, bias) for _ in range(2)]  # two layers of the same weights
        first, _ = (conv_triton.conv_silu_backward(dy, x, weight, bias, position, slot) for slot in slots)
        dweight, dbias, *second = (gradient for _, gradient in sums.total())
        assert torch.equal(dweight, second[0]) and torch.equal(dbias, second[1])
        ours = y, first, dweight, dbias
    finally:
        torch.Tensor.new_empty = new_empty
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    wanted = causal_conv_silu(*leaves, position)
    wanted = (wanted, *torch.autograd.grad(wanted, leaves, dy.double()))
    for name, a, b in zip(NAMES, ours, wanted):
        assert a.shape == b.shape and a.dtype == dtype, name
    return {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(NAMES, ours, wanted)}


def check(found: dict[str, float], tolerance: float, case: str = "") -> None:
    assert set(found) == set(NAMES)
    wrong = {name: distance for name, distance in found.items() if not distance <= tolerance}  # NaN is wrong too
    assert not wrong, (case, found)


def test_interpreted_kernels_match_the_definition():
    """All cases in one test, so that one process runs the interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    interpreted, in_pairs = json.loads(run.stdout)
    assert set(interpreted) == set(SMALL) and set(in_pairs) == set(PAIRS)
    for name in SMALL:
        check(interpreted[name], TOLERANCE[torch.float32], name)
    for name in PAIRS:
        check(in_pairs[name], TOLERANCE[torch.bfloat16], name)


def test_the_reason_why_there_is_no_kernel():
    assert definition._why_unsupported(torch.empty(1, 1), 4) == "no CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_on_gpu(name, dtype):
    check(distances((SMALL | LARGE)[name], dtype, "cuda"), TOLERANCE[dtype])


@pytest.mark.gpu
def test_operation_runs_the_kernels_without_syncs():
    x = torch.randn(100, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(*n, device="cuda", dtype=torch.bfloat16) for n in ((32, 1, 4), (32,)))
    position = torch.arange(100, device="cuda", dtype=torch.int32)
    causal_conv_silu(x, weight, bias, position).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        causal_conv_silu(x, weight, bias, position).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dispatch.kernel_report()["causal_conv_silu cuda bfloat16"] == "fast"


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    interpreted = {name: distances(case, torch.float32, "cpu") for name, case in SMALL.items()}
    print(json.dumps([interpreted, {name: distances(SMALL[name], torch.bfloat16, "cpu") for name in PAIRS}]))
