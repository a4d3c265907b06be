"""Compares the speed of two versions of the code on one card, which take turns.

    python benchmarks/bench_versions.py OLD NEW --config configs/hnet_1stage_small.json --boundaries forced:0.18

OLD and NEW are checkouts. Each runs in its own process, which builds the model, warms up and then waits. Rounds of
overlapped training steps alternate between the two. Prints a JSON object for each version: median and range of its
milliseconds per step over the rounds, memory reserved, CPU milliseconds and launches per step, and NEW's time over
OLD's.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def arguments(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = kind(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", metavar="CHECKOUT", help="folders of the two versions")
    parser.add_argument("--config", default="configs/hnet_1stage_small.json", help="model config, below each checkout")
    parser.add_argument("--data", default="data/stdlib", help="folder made by fineweb.py prepare")
    parser.add_argument("--boundaries", default="forced:0.18", help="learned, or forced:RATE[,RATE]")
    parser.add_argument("--mbs", type=int, default=32768, help="bytes a step")
    parser.add_argument("--ac", default="none", help="activation checkpointing: none, selective or block")
    parser.add_argument("--compile", default="graph", choices=("graph", "eager"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--warmup", type=int, default=26, help="steps before the first round")
    parser.add_argument(
        "--ledger", default="", help="record to add the last version's result to: benchmarks/ledger.jsonl"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def work(args: argparse.Namespace) -> None:
    """The process of one version: answers each line on standard input with a line of JSON."""
    began = time.perf_counter()
    root = Path(args.checkouts[0]).resolve()
    sys.path[:0] = [str(root), str(root / "benchmarks")]
    import bench_train
    import torch

    assert Path(bench_train.__file__).parent.parent == root, bench_train.__file__
    names = ("data", "mbs", "boundaries", "ac", "compile")
    same = {name: getattr(args, name) for name in names}
    step, *_, world = bench_train.prepare(bench_train.Benchmark(config=str(root / args.config), **same))
    on_gpu = world.device.type == "cuda"

    def steps(first: int) -> dict[str, float]:
        torch.cuda.synchronize() if on_gpu else None
        clock, cpu = time.perf_counter(), time.process_time()
        for i in range(first, first + args.steps):
            step(i)
        cpu = time.process_time() - cpu
        torch.cuda.synchronize() if on_gpu else None
        seconds = time.perf_counter() - clock
        return {"ms": 1000 * seconds / args.steps, "cpu_ms": 1000 * cpu / args.steps}

    step(0)
    torch.cuda.synchronize() if on_gpu else None
    first_step_s = time.perf_counter() - began
    for i in range(1, args.warmup):
        step(i)
    gc.freeze()  # as in train.py after the first step
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print(json.dumps(steps(args.warmup)), flush=True)
    found = {"first_step_s": first_step_s, "ce_last": step(args.warmup).ce.item()}
    if on_gpu:
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(args.warmup)
            torch.cuda.synchronize()
        launches = {"cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch"}
        found["launches"] = sum(e.count for e in profile.key_averages() if e.key in launches)
    print(json.dumps(found), flush=True)
    bench_train.distributed.stop()


def main(argv: list[str]) -> None:
    from hnet_runtime.commands import Parser

    args = arguments(Parser).parse_args(argv)
    ledger, args.ledger = args.ledger, ""
    flags = [f"--{name}={value}" for name, value in vars(args).items() if name not in ("checkouts", "worker", "ledger")]
    workers = []
    for checkout in args.checkouts:
        command = [sys.executable, str(Path(__file__).resolve()), checkout, *flags, "--worker"]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    rounds: list[list[dict[str, float]]] = [[] for _ in workers]

    def ask(worker: subprocess.Popen, line: str) -> dict[str, float]:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        while True:
            answer = worker.stdout.readline()
            if not answer:
                raise SystemExit(f"bench_versions.py: {' '.join(worker.args)} ended with status {worker.wait()}")
            if answer.startswith("{"):
                return json.loads(answer)

    for _ in range(args.rounds):
        for worker, found in zip(workers, rounds):
            found.append(ask(worker, "steps"))
    medians, reports = [], []
    for checkout, worker, found in zip(args.checkouts, workers, rounds):
        times = [one["ms"] for one in found]
        medians.append(statistics.median(times))
        about = {"checkout": checkout, "config": args.config, "boundaries": args.boundaries, "ac": args.ac}
        about |= {"ms": round(medians[-1], 3), "ms_range": [round(min(times), 3), round(max(times), 3)]}
        about |= {"cpu_ms": round(statistics.median(one["cpu_ms"] for one in found), 2)}
        reports.append(about | ask(worker, "end") | {"ratio": round(medians[-1] / medians[0], 4)})
        print(json.dumps(reports[-1]), flush=True)
        worker.wait()
    if ledger:
        record_in(ledger, args, reports[0], reports[-1])


def record_in(file: str, args: argparse.Namespace, old: dict, new: dict) -> None:
    """Add the last version's result, with the first's times, to the record of measurements."""
    import torch  # noqa: F401 (for the card's name)
    from ledger import append, commit

    config = Path(args.config).stem
    numbers = {
        "gpus_count": 1, "step_bytes": args.mbs, "step_ms": new["ms"], "lowest_and_highest_ms": new["ms_range"],
        "bytes_per_s": 1000 * args.mbs / new["ms"], "reserved_gib": new.get("reserved_gib"), "cpu_ms": new["cpu_ms"],
        "launches_count": new.get("launches"), "first_step_s": new["first_step_s"], "old_step_ms": old["ms"],
        "old_reserved_gib": old.get("reserved_gib"), "new_over_old_ratio": new["ratio"],
    }  # fmt: skip
    what = f"two versions taking turns on one card; the old one is {commit(Path(old['checkout']).resolve())}"
    how = {"compile": args.compile, "ac": args.ac, "boundaries": args.boundaries}
    append(
        file,
        f"turns/{config}/{args.compile}",
        numbers,
        Path(new["checkout"]).resolve(),
        what=what,
        config=config,
        **how,
    )


if __name__ == "__main__":
    if "--worker" in sys.argv:  # imports the modules of its own checkout
        work(arguments().parse_args())
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from hnet_runtime.commands import run

        run(main)
