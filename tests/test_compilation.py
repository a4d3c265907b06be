"""Every Triton kernel compiles for its GPUs, with sizes of the configs, and fits into their shared memory. This test
needs no GPU. The results of the kernels are tested elsewhere.

This file, run as a script with a compute capability, prints the shared memory of each kernel that it has compiled.
"""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HOPPER = {"attention_triton", "ssd_triton"}  # they run nowhere else, see the `_why_unsupported`s beside the definitions
OTHERS = {
    "adamw_triton", "boundaries_triton", "conv_triton", "cross_entropy_triton", "ema_triton", "norm_triton",
    "pointwise_triton", "router_triton",
}  # fmt: skip
LARGEST = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # shared memory of a thread block (CUDA programming guide)
HALF, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("capability", LARGEST)
def test_kernels_compile(capability):
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, __file__, str(capability)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    wanted = set()
    for module in OTHERS | (HOPPER if capability >= 90 else set()):
        text = (ROOT / "hnet_kernels" / f"{module}.py").read_text()
        wanted |= {f"{module}.{kernel}" for kernel in re.findall(r"^ +(_\w+)\[\(?\w", text, re.MULTILINE)}
    assert set(found) == wanted
    assert {name: size for name, size in found.items() if size > LARGEST[capability]} == {}


def compiled(capability: int) -> dict[str, int]:
    """Bytes of shared memory of each kernel that is called below, with a driver that compiles and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)

    found, run = {}, JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        found[name] = max(found.get(name, 0), run(kernel, *args, grid=grid, warmup=True, **options).metadata.shared)

    driver.set_active(Driver())
    JITFunction.run = compile_only
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    for_any_gpu()
    if capability >= 90:
        for_hopper()
    return found


def new(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def for_any_gpu() -> None:
    from hnet_kernels import (
        adamw_triton,
        boundaries_triton,
        conv_triton,
        cross_entropy_triton,
        ema_triton,
        norm_triton,
        pointwise_triton,
        router_triton,
    )
    from hnet_kernels.boundaries import Chunks
    from hnet_kernels.gradients import PartialSums

    T, C, N = 512, 100, 128
    position_T, start_C, chunk_T = new(T, dtype=torch.int32), torch.arange(C), new(T, dtype=torch.int64)
    for D, inner in ((512, 2688), (1536, 4096), (2048, 5504)):
        residual, delta, weight, z_CD = new(T, D, dtype=WIDE), new(T, D), new(D), new(C, D, dtype=WIDE)
        sums = PartialSums()
        slots = [sums.slot(weight) for _ in range(2)]
        for before, slot in zip(((None, None), (delta, new(T, D, dtype=torch.int8))), slots):
            *total, _, scale = norm_triton.add_norm_forward(*before, delta, weight, 1e-5)
            norm_triton.add_norm_backward(delta, *before, *total, scale, weight, slot)
            norm_triton.recompute_norm(*total, scale, weight)
        sums.total()
        p_T = router_triton.boundary_forward(delta, delta, position_T)
        router_triton.boundary_backward(p_T, delta, delta, position_T)
        router_triton.upsample_forward(z_CD, p_T, chunk_T, residual, HALF)
        router_triton.upsample_backward(delta, z_CD, p_T, chunk_T, start_C, None)
        router_triton.add_rows_(delta, start_C, new(C, D))
        for pad in (None, new(512)):
            router_triton.gather_rows(delta, start_C, pad)
        ends = torch.tensor([0, C], dtype=torch.int32)
        ema_triton.ema_backward(ema_triton.ema_forward(z_CD.to(HALF), p_T[:C], ends), z_CD, p_T[:C], z_CD, ends)
        both = new(T, 2 * inner)
        pointwise_triton.swiglu_backward(pointwise_triton.swiglu_forward(both), both)
        H = 2 * D // 64
        projected = new(T, 4 * D + 2 * N + H)
        z, xBC, _ = projected.split([2 * D, 2 * D + 2 * N, H], -1)
        taps, bias, gate = new(2 * D + 2 * N, 1, 4), new(2 * D + 2 * N), new(2 * D)
        after = conv_triton.conv_silu_forward(xBC, taps, bias, position_T)
        sums = PartialSums()
        slot = sums.slot(taps, bias)
        conv_triton.conv_silu_backward(after, xBC, taps, bias, position_T, slot, torch.empty_like(xBC))
        sums.total()
        y_TD = after[:, : 2 * D].contiguous()
        _, scale = norm_triton.gated_norm_forward(y_TD, z, gate, 1e-5)
        for recompute_x in (True, False):
            slot = PartialSums().slot(gate)
            norm_triton.gated_norm_backward(y_TD, y_TD, z, scale, gate, torch.empty_like(z), slot, recompute_x)
    ema_triton.sum_chunks(residual, start_C)
    router_triton.add_rows_(p_T[:, None], start_C, router_triton.gather_rows(p_T[:, None], start_C, None))
    found = Chunks.empty(p_T, documents=1)
    boundaries_triton.find_chunks(p_T, found.b_T, position_T, ends, found)
    boundaries_triton.add_mean_gradient(p_T, found.shares[1], ends)
    qkv, table = new(T, 3, 16, 64), new(T, 16, dtype=WIDE)
    for back in (False, True):
        pointwise_triton.rotate_(qkv, table, table, position_T, back)
    pointwise_triton.to_float32(delta)
    logits, labels, dloss = new(T, 256), new(T, dtype=torch.int64), torch.ones(())
    _, lse = cross_entropy_triton.cross_entropy_forward(logits, labels)
    cross_entropy_triton.cross_entropy_backward(dloss, logits, labels, lse)
    w, g, group = new(8, 1024, dtype=WIDE), new(8, 1024), new(8, dtype=torch.int32)
    adamw_triton.norms(g, torch.tensor([0, 8], dtype=torch.int32))
    rates, bias = new(2, 2, dtype=torch.float64), new(2, dtype=torch.float64)
    for held in ((w, None, None), (w, g, None), (None, g, g.to(torch.int16))):
        adamw_triton.adamw_(*held, g, w, w, group, rates, bias, dloss, dloss, (0.9, 0.95), 1e-8)


def for_hopper() -> None:
    from hnet_kernels import attention_triton, ssd_triton
    from hnet_kernels.gradients import PartialSums

    T, N = 512, 128
    cu = torch.tensor([0, 100, T, T], dtype=torch.int32)
    for H, dtype in ((16, HALF), (48, HALF), (3, HALF), (16, WIDE)):
        x, B, C = new(T, H * 64 + 2 * N, dtype=dtype).split([H * 64, N, N], -1)
        x, dt, A = x.unflatten(-1, (H, 64)), new(T, H, dtype=WIDE), new(H, dtype=WIDE)
        y, kept = ssd_triton.scan_forward(x, dt, A, B, C, cu, A, save=True)
        ssd_triton.scan_backward(y, x, dt, A, B, C, cu, A, saved=kept)
        ssd_triton.scan_backward(y, x, dt, A, B, C, cu)
        raw = new(T, H + 8, dtype=dtype)[:, 8:]
        y, kept = ssd_triton.scan_forward(x, raw, A, B, C, cu, A, save=True, bias_H=A)
        slot = PartialSums().slot(A, A, A)
        ssd_triton.scan_backward(y, x, raw, A, B, C, cu, A, saved=kept, bias_H=A, dweights=slot)
    order = attention_triton.tile_order(T, cu)
    for P, window in ((64, -1), (64, 1023), (96, 1023), (128, -1)):
        qkv = new(T, 3, 16, P)
        o, lse = attention_triton.attention_forward(qkv, order, window)
        attention_triton.attention_backward(o, qkv, o, lse, order, window)


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]))))
