"""Measures each fast kernel at the sizes of hnet_1stage_small, and its share of the device's limits.

    python benchmarks/bench_kernels.py [--only attention] [--sweep] --out FILE

Prints a table: median milliseconds, bytes (each input read once, each output written once) or FLOPs, and the share of
the device's copy bandwidth or bf16 matrix rate, both measured first. Inputs are random; chunk lengths are those of
text. Small inputs may come from the cache.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from ledger import append
from torch import Tensor

try:
    from triton.testing import do_bench
except ModuleNotFoundError:
    sys.exit("bench_kernels.py: triton is not installed; it comes with torch for CUDA")

from hnet_kernels import attention as torch_attention
from hnet_kernels import attention_triton, conv_triton, ema_triton, norm, norm_triton, pointwise, router, ssd_triton
from hnet_kernels.gradients import PartialSums
from hnet_runtime import UserError
from hnet_runtime.commands import parse, run
from hnet_runtime.pages.reports import write_atomically

HALF, WIDE = torch.bfloat16, torch.float32


class Always(norm_triton.Walk):
    """The same way to walk through rows for every width."""

    def __call__(self, D: int) -> norm_triton.Walk:
        return self


_ROWS = [Always(*row) for row in itertools.product((512, 1024, 2048, 4096), (1, 2, 3, 4, 6), (4, 8))]
_RUNS = [(32, 128, 1), (64, 128, 1), (64, 128, 2), (64, 256, 2), (32, 256, 1), (64, 64, 1), (128, 128, 1)]
_PROGRAMS = [(16, 128, 1), (32, 128, 1), (14, 128, 2), (8, 256, 2), (8, 256, 1), (32, 64, 1)]
SWEEP = [  # (name, module, values of its constants); tune.py has those of the scan and of attention
    (f"{name} backward", norm_triton, [{f"_walk_{name.partition(' ')[0]}": row} for row in _ROWS])
    for name in ("add_norm 0", "gated_norm")
]
SWEEP += [
    ("conv", conv_triton, [{"FORWARD": walk} for walk in _RUNS]),
    ("conv backward", conv_triton, [{"BACKWARD": walk} for walk in _PROGRAMS]),
]


@dataclass
class Benchmark:
    """What to measure."""

    only: str = ""
    """Kernels whose name holds this."""
    tokens: int = 32768
    """Tokens of the outer stage (T)."""
    chunk: float = 5.55
    """Tokens a chunk."""
    sweep: bool = False
    """Also with other sizes of tiles and launch options."""
    out: str = ""
    """File for the numbers."""
    ledger: str = ""
    """Record of measurements to add the kernels' times to: benchmarks/ledger.jsonl."""


def rand(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def documents(T: int, longest: int) -> tuple[Tensor, Tensor]:
    """(cu_seqlens, position_T) of documents as in packed text: most are long, some short."""
    ends, shares = [0], itertools.cycle((1.0, 0.35, 0.8, 1.0, 0.2, 0.55))
    while ends[-1] < T:
        ends.append(min(ends[-1] + int(longest * next(shares)), T))
    cu = torch.tensor(ends, dtype=torch.int32, device="cuda")
    lengths = cu.diff()
    start = cu[:-1].repeat_interleave(lengths)
    return cu, torch.arange(T, device="cuda", dtype=torch.int32) - start


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def cases(T: int, C: int) -> dict[str, tuple[Callable, float, float]]:
    """name -> (call, bytes, FLOPs)."""
    D, N, found = 512, 128, {}
    for stage, rows, width in (("0", T, D), ("1", C, 2 * D)):
        delta, weight = rand(rows, width), rand(width)
        residual = norm.split24(rand(rows, width, dtype=WIDE), delta.dtype)
        _, _, scale = norm.add_norm_forward(residual, delta, weight, 1e-5)
        moved, slot = 2 * size(*residual, delta), PartialSums().slot(weight)
        found[f"add_norm {stage}"] = lambda a=(residual, delta, weight, 1e-5): norm.add_norm_forward(*a), moved, 0
        found[f"add_norm {stage} backward"] = (
            lambda a=(delta, residual, residual, scale, weight, slot): norm.add_norm_backward(*a),
            3 * size(*residual) + 2 * size(delta),
            0,
        )
    parts = rand(33, 738, 2 * D, dtype=WIDE)  # of the norms of 16 blocks and the final one
    found["sums of a stack's norms"] = lambda: norm_triton.sum_rows(parts, HALF), size(parts), 0
    projected, y, gate = rand(T, 4 * D + 2 * N + 16), rand(T, 2 * D), rand(2 * D)
    z, xBC, raw = projected.split([2 * D, 2 * D + 2 * N, 16], dim=-1)
    _, scale = norm.gated_norm_forward(y, z, gate, 1e-5)
    dz = torch.empty_like(projected)[:, : 2 * D]
    found["gated_norm"] = lambda: norm.gated_norm_forward(y, z, gate, 1e-5), 3 * size(y), 0
    slot = PartialSums().slot(gate)
    found["gated_norm backward"] = lambda: norm.gated_norm_backward(y, y, z, scale, gate, dz, slot), 6 * size(y), 0
    cu, position = documents(T, 8192)
    weight, bias = rand(2 * D + 2 * N, 1, 4), rand(2 * D + 2 * N)
    found["conv"] = lambda: conv_triton.conv_silu_forward(xBC, weight, bias, position), 2 * size(xBC), 0
    out, taps = torch.empty_like(projected)[:, 2 * D : 4 * D + 2 * N], PartialSums().slot(weight, bias)
    found["conv backward"] = (
        lambda: conv_triton.conv_silu_backward(xBC, xBC, weight, bias, position, taps, out), 3 * size(xBC), 0,
    )  # fmt: skip
    x, B, Cs = rand(T, 2 * D + 2 * N).split([2 * D, N, N], dim=-1)
    x, dt, A, skip = x.unflatten(-1, (16, 64)), rand(T, 16, dtype=WIDE).exp() * 0.01, -rand(16, dtype=WIDE).exp(), gate
    skip = skip[:16].float()
    scan = 2 * 3 * x.numel() * N  # of the recurrence alone
    found["scan"] = lambda: ssd_triton.scan_forward(x, dt, A, B, Cs, cu, skip), 2 * size(x) + 2 * size(B), scan
    found["scan backward"] = (
        lambda: ssd_triton.scan_backward(y.view_as(x), x, dt, A, B, Cs, cu, skip), 3 * size(x) + 4 * size(B), 2 * scan,
    )  # fmt: skip
    both = rand(C, 2 * 2688)
    h = rand(C, 2688)
    found["swiglu"] = lambda: pointwise.swiglu_forward(both), size(both, h), 0
    found["swiglu backward"] = lambda: pointwise.swiglu_backward(h, both), 2 * size(both, h), 0
    inner_cu, inner_position = documents(C, 1475)
    qkv, do = rand(C, 3, 16, 64), rand(C, 16, 64)
    cos, sin = rand(2048, 16, dtype=WIDE), rand(2048, 16, dtype=WIDE)
    found["rotary"] = lambda: pointwise.rotate_(qkv, cos, sin, inner_position), size(qkv) * 2 / 3, 0
    order = attention_triton.tile_order(C, inner_cu)
    o, lse = attention_triton.attention_forward(qkv, order, -1)
    pairs = sum(n * (n + 1) / 2 for n in inner_cu.diff().tolist())
    flops = 4 * pairs * 16 * 64
    found["attention"] = lambda: attention_triton.attention_forward(qkv, order, -1), 4 * size(o), flops
    found["attention backward"] = (
        lambda: attention_triton.attention_backward(do, qkv, o, lse, order, -1), 8 * size(o), 2.5 * flops,
    )  # fmt: skip
    leaves = [t.detach().requires_grad_() for t in qkv.unbind(1)]
    by_torch = torch_attention(*leaves, inner_cu, 2048)
    found["attention, torch's flash"] = lambda: torch_attention(*leaves, inner_cu, 2048).detach(), 4 * size(o), flops
    found["attention, torch's flash backward"] = (
        lambda: torch.autograd.grad(by_torch, leaves, do, retain_graph=True), 8 * size(o), 2.5 * flops,
    )  # fmt: skip
    q, k, dp = rand(T, D), rand(T, D), rand(T, dtype=WIDE)
    found["router"] = lambda: router.boundary_forward(q, k, position), 2 * size(q), 0
    found["router backward"] = lambda: router.boundary_backward(dp, q, k, position), 4 * size(q), 0
    start = torch.linspace(0, T - 1, C, device="cuda").long()
    chunk = torch.bucketize(torch.arange(T, device="cuda"), start, right=True) - 1
    zs, residual, scale = rand(C, D, dtype=WIDE), rand(T, D, dtype=WIDE), rand(T, dtype=WIDE)
    found["upsample"] = lambda: router.upsample_forward(zs, scale, chunk, residual, HALF), size(zs, residual, q), 0
    found["upsample backward"] = (
        lambda: router.upsample_backward(q, zs, scale, chunk, start), 2 * size(q) + 2 * size(zs), 0,
    )  # fmt: skip
    ys, p = rand(C, D), torch.rand(C, device="cuda")
    found["smoothing"] = lambda: ema_triton.ema_forward(ys, p, inner_cu), 2 * size(ys) + size(zs), 0
    return found


def ceilings() -> tuple[float, float]:
    """Bytes per second of a large copy (read and written), and FLOP/s of a large matrix product."""
    a, b = torch.empty(2, 1 << 31, dtype=torch.uint8, device="cuda")
    m, n = rand(8192, 8192), rand(8192, 8192)
    return 2e3 * a.numel() / do_bench(lambda: b.copy_(a)), 2e3 * 8192**3 / do_bench(lambda: m @ n)


def main(args: Benchmark) -> None:
    if not torch.cuda.is_available():
        raise UserError("benchmarks/bench_kernels.py: needs a GPU, and torch finds none")
    bandwidth, rate = ceilings()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    rows, all_cases = [], cases(args.tokens, round(args.tokens / args.chunk))

    def time_(label: str, call: Callable, moved: float, flops: float) -> None:
        try:
            ms = do_bench(call, warmup=10, rep=40, return_mode="median")
        except Exception as error:  # some tile sizes need more shared memory than there is
            print(f"{label:45} {type(error).__name__}")
            return
        by_bytes, by_flops = moved / bandwidth / ms * 1e3, flops / rate / ms * 1e3
        rows.append({"kernel": label, "ms": ms, "bytes": moved, "flops": flops, "share": max(by_bytes, by_flops)})
        print(
            f"{label:45} {ms:7.3f} ms  {moved / 1e6:7.0f} MB {by_bytes:4.0%}  {flops / 1e9:7.1f} GFLOP {by_flops:4.0%}"
        )

    for label, case in all_cases.items():
        if args.only in label:
            time_(label, *case)
    for label, module, choices in SWEEP if args.sweep else ():
        for choice in choices:
            before = {constant: getattr(module, constant) for constant in choice}
            for constant, value in choice.items():
                setattr(module, constant, value)
            time_(
                f"{label}, {' '.join(f'{k}={v}' for k, v in choice.items())}",
                *all_cases[label],
            )
            for constant, value in before.items():
                setattr(module, constant, value)
    if args.ledger:
        times = {
            re.sub(r"\W+", "_", row["kernel"]) + "_us": 1000 * row["ms"] for row in rows if row["kernel"] in all_cases
        }
        numbers = {"matmul_tflop_per_s": rate / 1e12, "copy_tb_per_s": bandwidth / 1e12, "tokens_count": args.tokens}
        append(
            args.ledger, "kernels", numbers | times, what="single kernels at the sizes of hnet_1stage_small, medians"
        )
    if args.out:
        text = json.dumps({"device": name, "torch": torch.__version__, "kernels": rows}, indent=1)
        write_atomically(Path(args.out), lambda scratch: scratch.write_text(text))


if __name__ == "__main__":
    run(lambda argv: main(parse(Benchmark, argv, __doc__)))
