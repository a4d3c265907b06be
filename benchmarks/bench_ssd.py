"""Measures the Mamba-2 scan `hnet::ssd` on a GPU, forward and backward, against the bytes that it must move.

    python benchmarks/bench_ssd.py                                        T = 32,768, 16 heads, d_state 128, bfloat16
    python benchmarks/bench_ssd.py --tokens 32768 8192 --heads 16 32 --state 64 128 --dtype float32 --definition
    python benchmarks/bench_ssd.py --kernels                              also the time of every kernel

Every time is a median over CUDA-graph replays of one operation. The replays use several sets of inputs in turn, so that
none is cached. `floor` is the time to read every input and write every output once at the speed of a copy, which is
measured first. The inputs are as in a model: x, B and C are parts of one tensor, documents have random lengths up to
8,192 tokens, dt and A have the initial values of Mamba-2.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from ledger import append  # noqa: E402

from hnet_kernels import kernel_report, ssd  # noqa: E402
from hnet_runtime import UserError  # noqa: E402
from hnet_runtime.commands import Parser, run  # noqa: E402
from hnet_runtime.pages.reports import write_atomically  # noqa: E402

definition = importlib.import_module("hnet_kernels.ssd")

SETS = 3  # of inputs; one set is larger than the L2 cache at relevant sizes
ROUNDS = 30


def inputs_of(T: int, H: int, N: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Tensor]]:
    """dy and the arguments of `ssd`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = []
    while sum(lengths) < T:
        length = int(torch.randint(1, 8193, (), generator=generator))
        lengths.append(min(length, T - sum(lengths)))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = torch.cat([ends, ends[-1:].repeat(max(0, 65 - len(ends)))]).int().cuda()  # a fixed number of rows
    torch.manual_seed(seed)
    x, B, C = torch.randn(T, H * 64 + 2 * N, device="cuda", dtype=dtype).split([H * 64, N, N], dim=-1)
    dt = 1e-3 * 100 ** torch.rand(T, H, device="cuda")
    A = -torch.linspace(1, 16, H, device="cuda")
    return torch.randn(T, H, 64, device="cuda", dtype=dtype), [x.unflatten(-1, (H, 64)), dt, A, B, C, cu_seqlens]


def milliseconds(calls: list[Callable], rounds: int = ROUNDS) -> float:
    """The median time of one of `calls` over graph replays; each call is one graph."""
    graphs = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call()
    times = []
    for i in range(rounds + 3):
        graph = graphs[i % len(graphs)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def copy_bytes_per_s() -> float:
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):  # not in a graph, where this kind of copy is slower
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(times) * 1e3


def peak_mib(call: Callable) -> float:
    """The memory that a call allocates, with its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def least_bytes(dy: Tensor, arguments: list[Tensor]) -> tuple[int, int]:
    """Forward reads the arguments and writes y; backward reads them and dy and writes their gradients."""
    arguments = sum(t.nbytes for t in arguments[:-1])
    return arguments + dy.nbytes, 2 * arguments + dy.nbytes


def by_kernel(calls: list[Callable], rounds: int = 10) -> dict[str, float]:
    """Microseconds of each kernel in one of `calls`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    times = defaultdict(float)
    for event in profile.key_averages():
        times[event.key[:60]] += event.self_device_time_total / (rounds * len(calls))
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--heads", type=int, nargs="+", default=[16])
    parser.add_argument("--state", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--definition", action="store_true", help="time the plain-torch definition too")
    parser.add_argument("--kernels", action="store_true", help="time every kernel too")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--ledger", default="", help="record to add the times to: benchmarks/ledger.jsonl")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("benchmarks/bench_ssd.py: needs a GPU, and torch finds none")
    copy = copy_bytes_per_s()
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_tb_per_s": round(copy / 1e12, 2)}
    print(about)
    print("     T   H   N     dtype  direction      us   floor us  share of copy  peak MiB  definition us")
    results = []
    for T, H, N, name in [
        (T, H, N, name) for name in args.dtype for T in args.tokens for H in args.heads for N in args.state
    ]:
        sets = [inputs_of(T, H, N, getattr(torch, name), seed) for seed in range(SETS)]
        calls = {
            "forward": [lambda a=a: ssd(*a) for _, a in sets],
            "backward": [lambda dy=dy, a=a: definition.ssd_backward(dy, *a) for dy, a in sets],
        }
        slow = {
            "forward": [lambda a=a: definition.scan_forward(a[0], a[1], a[1] * a[2], *a[3:]) for _, a in sets[:1]],
            "backward": [
                lambda dy=dy, a=a: definition.scan_backward(dy, a[0], a[1], a[1] * a[2], *a[3:]) for dy, a in sets[:1]
            ],
        }
        for (direction, call), least in zip(calls.items(), least_bytes(sets[0][0], sets[0][1])):
            row = {"T": T, "H": H, "N": N, "dtype": name, "direction": direction}
            row |= {"us": 1e3 * milliseconds(call), "floor_us": 1e6 * least / copy, "least_bytes": least}
            row |= {"share_of_copy": row["floor_us"] / row["us"], "peak_mib": peak_mib(call[0])}
            if args.definition:
                row["definition_us"] = 1e3 * milliseconds(slow[direction], 5)
            if args.kernels:
                row["kernels_us"] = by_kernel(call)
            results.append(row)
            if args.ledger:
                numbers = {k: v for k, v in row.items() if k in ("us", "floor_us", "peak_mib", "definition_us")}
                numbers |= {"tokens_count": T, "heads_count": H, "state_count": N, "copy_tb_per_s": copy / 1e12}
                numbers["time_us"] = numbers.pop("us")
                append(args.ledger, f"scan/{direction}/{T}x{H}x{N}/{name}", numbers, what="Mamba-2 scan, median")
            print(
                f"{T:6} {H:3} {N:3} {name:>9}  {direction:9} {row['us']:7.1f} {row['floor_us']:10.1f} "
                f"{row['share_of_copy']:14.0%} {row['peak_mib']:9.0f} {row.get('definition_us', float('nan')):14.0f}",
                flush=True,
            )
            for kernel, us in row.get("kernels_us", {}).items():
                print(f"{'':34}{us:7.1f}  {kernel}")
    print(kernel_report())
    if args.json:
        text = json.dumps({**about, "command": " ".join(sys.argv), "results": results}, indent=1)
        write_atomically(args.json, lambda scratch: scratch.write_text(text))


if __name__ == "__main__":
    run(main)
