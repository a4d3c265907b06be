"""Measures a training step of train.py: forward, backward, clipping and AdamW, on real packed text.

    python benchmarks/bench_train.py --config configs/hnet_1stage_small.json --data DIR --boundaries forced:0.18
    torchrun --nproc-per-node 2 benchmarks/bench_train.py --replicate 2 ...        # --mbs bytes per process

Prints one JSON object (and writes it with --out): median step time after a warm-up, bytes per second, MFU (6 x matmul
parameters x tokens at each stage, over the data sheet's dense bf16 peak), peak memory allocated and memory reserved
(only the latter includes the memory of graphs), time to the first step, kernel launches per step and the share of time
that the GPU was busy. With --profile FOLDER also a trace, the slowest kernels and a profile of the CPU.
"""

import cProfile
import gc
import io
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from ledger import append

import fineweb
import train
from hnet_kernels import kernel_report
from hnet_routers import Router
from hnet_runtime import UserError, distributed
from hnet_runtime.commands import parse, run
from hnet_runtime.distributed import World
from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs.statistics import StepNumbers
from hnet_runtime.steps import activations
from hnet_runtime.steps.flat_adamw import clipped_step
from hnet_runtime.steps.graphs import GraphedModel
from hnet_runtime.steps.plain import PlainModel
from hnet_trainable import (
    HNetConfig,
    HNetLM,
    parameter_groups,
)


@dataclass
class Benchmark:
    """What to measure."""

    config: str = "configs/hnet_1stage_small.json"
    """Model config."""
    data: str = "data/stdlib"
    """Folder made by fineweb.py prepare."""
    mbs: int = 32768
    """Bytes per step and process."""
    max_doc: int = 8192
    """Longest row."""
    boundaries: str = "learned"
    """learned, or forced:RATE[,RATE]: open chunks at random at this rate per stage."""
    warmup: int = 10
    """Steps before the measured ones."""
    steps: int = 20
    """Number of timed steps, and of timed steps without waiting for each, as in training (step_ms_overlapped)."""
    compile: str = "eager"
    """eager or graph (whole steps as CUDA graphs)."""
    ac: str = "none"
    """Activation checkpointing, as in train.py: none, block or selective."""
    device: str = "auto"
    """auto, cpu or cuda."""
    replicate: int = 1
    """Replicas of the weights, as in train.py."""
    reshard: bool = True
    """Free sharded weights after the forward, as in train.py."""
    profile: str = ""
    """Folder for a trace and a table of kernels."""
    out: str = ""
    """File for the result."""
    ledger: str = ""
    """Record of measurements to add the result to: benchmarks/ledger.jsonl."""


def force_boundaries(model: HNetLM, rates: list[float], T: int, seed: int = 0) -> Callable[[], None]:
    """Replaces every router's decisions, not its probabilities, by random ones; documents still open a chunk.

    Returns a function that draws new decisions, in place, so that a CUDA graph reads them.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    if len(rates) != len(routers):
        raise UserError(f"--boundaries: {len(rates)} rates for {len(routers)} stages; expected one for each")
    device = next(model.parameters()).device
    generator, rate_S1 = torch.Generator(device).manual_seed(seed), torch.tensor(rates, device=device)[:, None]
    forced = torch.zeros(len(rates), T, dtype=torch.bool, device=device)
    for forced_T, router in zip(forced, routers):
        router.opens = lambda p_T, forced_T=forced_T: forced_T[: len(p_T)]
    return lambda: torch.lt(torch.rand(forced.shape, generator=generator, device=device), rate_S1, out=forced)


class Prepared(NamedTuple):
    """A model that is ready to train."""

    step: Callable[[int], StepNumbers]  # runs one training step, on the step's own data
    hnet: HNetConfig
    config: train.TrainConfig
    world: World


def prepare(args: Benchmark) -> Prepared:
    """Builds model, optimizer and data as train.py does."""
    hnet = HNetConfig.load(args.config)
    world = distributed.start(args.device, args.replicate)
    config = train.TrainConfig(
        config=args.config, data=args.data, mbs=args.mbs, global_slices=world.size, max_doc=args.max_doc,
        device=args.device,
    )  # fmt: skip
    on_gpu, graphs = world.device.type == "cuda", args.compile == "graph"
    torch.set_float32_matmul_precision("high")
    half = torch.bfloat16 if on_gpu else torch.float32
    unsharded = graphs or (on_gpu and world.shards == 1)
    model = distributed.build_model(hnet, world, torch.float32 if unsharded else half, 0, None, args.reshard)
    parameters = list(model.parameters())
    groups = distributed.optimizer_groups(parameter_groups(model, 3e-4, config.weight_decay))
    if unsharded:
        steps = GraphedModel(
            model, half, config.alpha, world, groups, args.ac, captures=graphs, make_optimizer=train.make_optimizer
        )
    else:
        steps = PlainModel(model, config.alpha, world, groups, train.make_optimizer)
    if args.ac != "none" and not graphs:
        activations.recompute(steps.model, args.ac)
    draw = lambda: None  # noqa: E731
    if args.boundaries != "learned":
        rates = [float(r) for r in args.boundaries.removeprefix("forced:").split(",")]
        draw = force_boundaries(steps.model, rates, args.mbs, world.rank)
    stream = fineweb.ByteStream(args.data, slice_bytes=args.mbs, max_doc=args.max_doc)

    def step(i: int) -> StepNumbers:
        draw()
        slices = list(stream.step(i, world.size, world.rank, world.size))
        numbers = train.forward_backward(steps, slices, world)
        distributed.clip_in_optimizer(steps.optimizer, parameters, 1.0, world)
        clipped_step(steps.optimizer)
        steps.finish_step()
        return numbers

    return Prepared(step, hnet, config, world)


def main(args: Benchmark) -> None:
    for name, least in (("mbs", 1), ("max_doc", 1), ("warmup", 0), ("steps", 1)):
        if (value := getattr(args, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    program_start = time.perf_counter()
    step, hnet, config, world = prepare(args)
    if args.profile and world.size > 1:
        raise UserError(f"--profile: expected one process, not {world.size}")
    on_gpu = world.device.type == "cuda"

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    built_s = time.perf_counter() - program_start
    step(0)
    synchronize()
    first_step_s = time.perf_counter() - program_start
    for i in range(1, args.warmup):
        step(i)
    gc.freeze()  # as in train.py after the first step
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    times, rates = [], []
    for i in range(args.warmup, args.warmup + args.steps):
        started = time.perf_counter()
        numbers = step(i)
        synchronize()
        times.append(time.perf_counter() - started)
        rates.append(numbers.F_S.tolist())
    began = time.perf_counter()  # once more without waiting for each step, as in training
    for i in range(args.warmup, args.warmup + args.steps):
        step(i)
    synchronize()
    overlapped = (time.perf_counter() - began) / args.steps
    mean_rates = [statistics.mean(column) for column in zip(*rates)]
    record = {f"stage{s}_F": F for s, F in enumerate(mean_rates)}
    result = {
        **{k: v for k, v in vars(args).items() if k not in ("out", "profile", "ledger")},
        "processes": world.size,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "kernels": kernel_report(),
        "boundary_rates": [round(r, 4) for r in mean_rates],
        "step_ms_median": 1000 * statistics.median(times),
        "step_ms_min": 1000 * min(times),
        "step_ms_overlapped": 1000 * overlapped,
        **{
            k: v
            for k, v in train.speed(record, overlapped, hnet, config, world).items()
            if k not in ("step_ms", "peak_gib", "reserved_gib")
        },
        "built_s": built_s,
        "first_step_s": first_step_s,
        "ce_last": numbers.ce.item(),
        "compilations": len(compilations()),
        "compile_s": sum(compilations()),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    }
    if args.profile:
        result |= profile(lambda: step(0), Path(args.profile), on_gpu)
    if world.is_main:
        print(json.dumps(result))
    if args.out and world.is_main:
        write_atomically(Path(args.out), lambda scratch: scratch.write_text(json.dumps(result) + "\n"))
    if args.ledger and world.is_main:
        record_in(args.ledger, result)
    distributed.stop()


def record_in(file: str, result: dict) -> None:
    """Add a result to the record of measurements."""
    config, world = Path(result["config"]).stem, result["processes"]
    name = [config, result["compile"]] + [result["ac"]] * (result["ac"] != "none")
    name += [f"{result['mbs']}-bytes"] * (result["mbs"] != 32768) + [f"{world}-gpus"] * (world > 1)
    name += ["learned"] * (result["boundaries"] == "learned")
    numbers = {
        "gpus_count": world, "step_bytes": result["mbs"] * world,
        "chunks_percent": [100 * rate for rate in result["boundary_rates"]],
        "step_ms": result["step_ms_overlapped"], "waited_step_ms": result["step_ms_median"],
        "bytes_per_s": result["bytes_per_s"], "mfu_percent": result["mfu"] and 100 * result["mfu"],
        "reserved_gib": result["reserved_gib"], "allocated_gib": result["peak_gib"],
        "launches_count": result.get("launches_per_step"), "gpu_busy_ms": result.get("gpu_busy_ms"),
        "first_step_s": result["first_step_s"],
    }  # fmt: skip
    how = {key: result[key] for key in ("compile", "ac", "boundaries")}
    append(file, "train/" + "/".join(name), numbers, what="training step", config=config, **how)


def compilations() -> list[float]:
    """Seconds of each compilation by dynamo so far; more than one per kind of block means recompilation."""
    return torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", [])


def profile(step, folder: Path, on_gpu: bool, steps: int = 3) -> dict[str, float]:
    """Launches and GPU-busy milliseconds per step; writes trace.json.gz, kernels.txt and python.txt into `folder`."""
    from torch.profiler import ProfilerActivity

    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as prof:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    averages = prof.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    (folder / "kernels.txt").write_text(averages.table(sort_by=key, row_limit=80, max_name_column_width=90))
    with cProfile.Profile() as calls:
        for _ in range(steps):
            step()
    report = io.StringIO()
    for order in ("tottime", "cumtime"):
        pstats.Stats(calls, stream=report).strip_dirs().sort_stats(order).print_stats(60)
    (folder / "python.txt").write_text(report.getvalue())
    prof.export_chrome_trace(str(folder / "trace.json.gz"))
    launches = sum(
        e.count
        for e in averages
        if e.key in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")
    )
    on_device = (e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    busy = sum(e.self_device_time_total for e in on_device if not e.is_user_annotation)
    return {"launches_per_step": launches / steps, "gpu_busy_ms": busy / steps / 1000}


if __name__ == "__main__":
    run(lambda argv: main(parse(Benchmark, argv, __doc__)))
