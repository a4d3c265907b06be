"""The kernels in hnet_kernels/ema_triton.py against the definitions in float64: outputs, and every gradient by name.

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

definition = importlib.import_module("hnet_kernels.ema")

NAMES = "z", "dy", "dp", "sums"
AWKWARD = [1, 2, 63, 64, 65, 257]


class Case(NamedTuple):
    lengths: list[int]  # chunks of the documents
    D: int = 72
    p: tuple[float, float] = (1e-4, 1 - 1e-4)
    wider: int = 0  # channels of y that are cut off


SMALL = {
    "awkward": Case(AWKWARD),
    "one boundary each": Case([1] * 40),
    "empty documents": Case([0, 33, 0, 0, 3, 0], wider=8),
    "long memory": Case([130, 7], p=(1e-4, 1e-3)),
    "one document": Case([96], D=8),
}
LARGE = {"model": Case([*AWKWARD, 3000, 0, 5], D=512, wider=512), "long": Case([9000, 50], D=1024, p=(1e-4, 1e-3))}
# sums of hundreds of terms in float32; dp's terms, a row's, largely cancel
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


def distances(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    from hnet_kernels import ema_triton

    C, generator = sum(case.lengths), torch.Generator().manual_seed(0)
    low, high = case.p
    p = (low * (high / low) ** torch.rand(C, generator=generator)).to(device)
    y = torch.randn(C, case.D + case.wider, generator=generator).to(device, dtype)[:, : case.D]
    dz = torch.randn(C, case.D, generator=generator).to(device)
    cu = torch.tensor([0, *case.lengths]).cumsum(0).to(device, torch.int32)
    tokens = torch.randint(1, 12, (C,), generator=generator)
    x = torch.randn(int(tokens.sum()), case.D, generator=generator).to(device)
    start = (tokens.cumsum(0) - tokens).to(device)
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **options):
        out = new_empty(*args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    torch.Tensor.new_empty = poisoned
    try:
        z = ema_triton.ema_forward(y, p, cu)
        ours = (z, *ema_triton.ema_backward(dz, y, p, z, cu), ema_triton.sum_chunks(x, start))
    finally:
        torch.Tensor.new_empty = new_empty
    without_tokens = torch.cat([start, start.new_full((40,), len(x))])
    room = z.new_full((len(without_tokens), x.shape[1]), torch.nan)
    sums, zeros, nobodys = ema_triton.sum_chunks(x, without_tokens, room, spare=2).split([len(start), 2, 38])
    assert torch.equal(sums, ours[-1]) and not zeros.any() and nobodys[8:].isnan().all()  # but for a few beside them
    y, p, dz, x = y.double(), p.double(), dz.double(), x.double()
    z = definition.ema_forward(y, p, cu)
    wanted = (z, *definition.ema_backward(dz, y, p, z, cu), definition.sum_chunks(x, start))
    for name, a, b in zip(NAMES, ours, wanted):
        assert a.shape == b.shape and a.dtype == (dtype if name == "dy" else torch.float32), name
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
    interpreted = json.loads(run.stdout)
    assert set(interpreted) == set(SMALL)
    for name in SMALL:
        check(interpreted[name], TOLERANCE[torch.float32], name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_on_gpu(name, dtype):
    check(distances((SMALL | LARGE)[name], dtype, "cuda"), TOLERANCE[dtype])


def test_sum_chunks_by_hand():
    x = torch.arange(5.0)[:, None]
    assert definition.sum_chunks(x, torch.tensor([0, 1, 3])).flatten().tolist() == [0, 3, 7]
    out = torch.full((6, 1), 9.0)
    found = definition.sum_chunks(x, torch.tensor([0, 1, 3, 5, 5, 5]), out, spare=1)
    assert found is out and out.flatten().tolist() == [0, 3, 7, 0, 9, 9]


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    print(json.dumps({name: distances(case, torch.float32, "cpu") for name, case in SMALL.items()}))
