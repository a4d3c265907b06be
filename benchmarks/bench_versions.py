"""Compares the speed of two versions of the code on one card, which take turns.

    python benchmarks/bench_versions.py OLD NEW --config configs/hnet_1stage_small.json --boundaries forced:0.18

OLD and NEW are checkouts. Each runs in its own process, which builds the model, warms up and then waits. Rounds of
overlapped training steps alternate between the two. Prints a JSON object for each version: median and range of its
milliseconds per step over the rounds, memory reserved, CPU milliseconds and launches per step, and NEW's time over
OLD's.
"""

import argparse
import gc
import inspect
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def work(args: argparse.Namespace) -> None:
    """The process of one version: answers each line on standard input with a line of JSON."""
    began = time.perf_counter()
    root = Path(args.checkouts[0]).resolve()
    sys.path[:0] = [str(root), str(root / "benchmarks")]
    import torch
    from bench_train import force_boundaries

    import fineweb
    import train
    from hnet_runtime import distributed
    from hnet_runtime.steps import activations
    from hnet_runtime.steps.graphs import GraphedModel
    from hnet_trainable import HNetConfig, parameter_groups

    assert Path(train.__file__).parent == root, train.__file__
    hnet, world = HNetConfig.load(root / args.config), distributed.start("auto", 1)
    config = train.TrainConfig(config=args.config, data=args.data, mbs=args.mbs, global_slices=1)
    on_gpu, graphs = world.device.type == "cuda", args.compile == "graph"
    torch.set_float32_matmul_precision("high")
    half = torch.bfloat16 if on_gpu else torch.float32
    eager_too = "captures" in inspect.signature(GraphedModel.__init__).parameters  # earlier versions lack it
    unsharded = graphs or (eager_too and on_gpu)
    model = distributed.build_model(hnet, world, torch.float32 if unsharded else half, 0, None, True)
    parameters = list(model.parameters())
    groups = distributed.optimizer_groups(parameter_groups(model, 3e-4, 0.1))
    runner = model
    if unsharded:
        more = {} if graphs else {"captures": False}
        runner = GraphedModel(model, half, config.alpha, world, groups, args.ac, **more)
    if args.ac != "none" and not graphs:
        activations.recompute(runner.model if unsharded else model, args.ac)
    draw = lambda: None  # noqa: E731
    if args.boundaries != "learned":
        rates = [float(r) for r in args.boundaries.removeprefix("forced:").split(",")]
        draw = force_boundaries(runner, rates, args.mbs)
    optimizer = runner.optimizer if unsharded else torch.optim.AdamW(groups, betas=distributed.BETAS, fused=True)
    stream = fineweb.ByteStream(args.data, slice_bytes=args.mbs)

    def step(i: int) -> torch.Tensor:
        draw()
        stats = train.forward_backward(runner, list(stream.step(i, 1, 0, 1)), config, world)
        distributed.clip_in_optimizer(optimizer, parameters, 1.0, world)
        optimizer.step()
        if not unsharded:
            optimizer.zero_grad()
        return stats

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
    found = {"first_step_s": first_step_s, "ce_last": step(args.warmup)[0].item()}
    if on_gpu:
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(args.warmup)
            torch.cuda.synchronize()
        launches = {"cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch"}
        found["launches"] = sum(e.count for e in profile.key_averages() if e.key in launches)
    print(json.dumps(found), flush=True)
    distributed.stop()


def main(argv: list[str]) -> None:
    args = arguments().parse_args(argv)
    if args.worker:
        return work(args)
    flags = argv[len(args.checkouts) :]
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
    medians = []
    for checkout, worker, found in zip(args.checkouts, workers, rounds):
        times = [one["ms"] for one in found]
        medians.append(statistics.median(times))
        about = {"checkout": checkout, "config": args.config, "boundaries": args.boundaries, "ac": args.ac}
        about |= {"ms": round(medians[-1], 3), "ms_range": [round(min(times), 3), round(max(times), 3)]}
        about |= {"cpu_ms": round(statistics.median(one["cpu_ms"] for one in found), 2)}
        print(json.dumps(about | ask(worker, "end") | {"ratio": round(medians[-1] / medians[0], 4)}), flush=True)
        worker.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
