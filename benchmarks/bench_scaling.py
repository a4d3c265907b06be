"""Measures how training scales from one GPU to several, with bench_train.py and train.py.

    python benchmarks/bench_scaling.py --data DIR --out results.json           # on a machine with two GPUs
    python benchmarks/bench_scaling.py --data data/stdlib --configs configs/hnet_1stage_tiny.json --device cpu \
        --boundaries forced:0.2 --mbs 512 --steps 6 --warmup 2 --loss-steps 4 --memory-config none  # tried on a CPU

For each config it runs one process in the fastest way (graphs on a GPU), then --processes of them in each of --ways:
`copies` (replicated weights, graphs, gradients averaged during the backward), `sharded` (FSDP2) and `kept` (the same
without freeing gathered weights). Every process has --mbs bytes. Each is timed twice: by bench_train with --boundaries,
so that all have the same work, and by train.py, with learned boundaries and the cost of saving. Then it compares the
losses of one process that accumulates with those of several on the same slices, and measures the memory with --ac
block. Runs of one process run in parallel, each on its own GPU, before those of several. Prints a line after each run
and one JSON object at the end; a failed run is reported and the others continue.
"""

import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from ledger import append  # noqa: E402

from hnet_runtime import UserError, commands  # noqa: E402 (run from anywhere)
from hnet_runtime.pages.reports import write_atomically  # noqa: E402
from hnet_runtime.runs.metrics import read_metrics  # noqa: E402


@dataclass
class Benchmark:
    """What to run."""

    data: str = "data/stdlib"
    """Folder made by fineweb.py prepare."""
    configs: str = "configs/hnet_1stage_small.json,configs/hnet_2stage_XL.json"
    """Model configs, separated by commas."""
    boundaries: str = "forced:0.18 forced:0.36,0.31"
    """The --boundaries of bench_train.py for each config, separated by spaces."""
    ways: str = "copies,sharded"
    """How several processes share the work, separated by commas: copies, sharded, kept."""
    processes: int = 2
    """Number of processes to compare with one; each has its own GPU."""
    mbs: int = 32768
    """Bytes per process."""
    warmup: int = 60
    """Steps before the measured ones: kernels are compiled and boundaries settle."""
    steps: int = 40
    """Measured steps."""
    loss_steps: int = 200
    """Steps over which losses are compared."""
    memory_config: str = "configs/hnet_2stage_XL.json"
    """Model whose peak memory with --ac block is measured on one process; none: of no model."""
    memory_mbs: int = 131072
    """Bytes of that measurement."""
    device: str = "cuda"
    """cuda or cpu."""
    limit: int = 400
    """Seconds after which a run is stopped."""
    out: str = ""
    """File for the result."""
    ledger: str = ""
    """Record of measurements to add each config and way to: benchmarks/ledger.jsonl."""

    def flags(self, way: str, processes: int) -> list[str]:
        """The flags of train.py and bench_train.py for this way to share the work."""
        return [*WAYS[way], *(["--replicate", str(processes)] if way == "copies" else [])]


MEMORY = ("peak_gib", "reserved_gib")
WAYS = {
    "copies": ["--compile", "graph"],
    "sharded": ["--compile", "eager"],
    "kept": ["--compile", "eager", "--no-reshard"],
}


def launch(args: Benchmark, processes: int, script: str, *flags: str, gpu: str) -> str:
    """Runs a script on a number of processes. Returns the reason of a failure, or "". gpu: for a single process."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if processes == 1 else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *start, str(ROOT / script), "--data", args.data, "--device", args.device, *flags]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=args.limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {args.limit} s"
    if not done.returncode:
        return ""
    lines = [line for line in done.stderr.strip().splitlines() if "ChildFailedError" not in line]
    errors = [line for line in lines if "Error" in line and "error: " not in line][:1]
    said = errors + [line for line in lines if "error: " in line][-1:]
    return f"exit status {done.returncode}: {'; '.join(said or lines[-1:])}"


def bench(args: Benchmark, config: str, processes: int, way: str, *flags: str, gpu: str = "0") -> dict[str, Any]:
    """The result of bench_train.py, with the same number of chunks for any number of processes."""
    boundaries = dict(zip(args.configs.split(","), args.boundaries.split())).get(config, "learned")
    with tempfile.TemporaryDirectory(prefix="bench_scaling_") as folder:
        out = Path(folder) / "out.json"
        common = ["--config", config, "--boundaries", boundaries, *args.flags(way, processes), "--out", str(out)]
        failed = launch(args, processes, "benchmarks/bench_train.py", *common, *flags, gpu=gpu)
        return {"failed": failed} if failed else json.loads(out.read_text())


def same_work(args: Benchmark, config: str, processes: int, way: str, gpu: str = "0") -> dict[str, Any]:
    """The time of a step as in training, and the memory."""
    sizes = ["--mbs", str(args.mbs), "--warmup", str(min(args.warmup, 12)), "--steps", str(min(args.steps, 20))]
    found = bench(args, config, processes, way, *sizes, gpu=gpu)
    if "failed" in found:
        return found
    step_ms = found["step_ms_overlapped"]
    return {
        "step_ms": step_ms, "bytes_per_s": processes * args.mbs / step_ms * 1000, "reserved_gib": found["reserved_gib"],
        "boundary_rates": found["boundary_rates"],
    }  # fmt: skip


def run(args: Benchmark, config: str, processes: int, steps: int, *flags: str, gpu: str = "0") -> list[dict] | str:
    """The records of a training run, or the reason of a failure. gpu: that of a single process."""
    folder = Path(tempfile.mkdtemp(prefix="bench_scaling_"))
    common = f"-c {config} --steps {steps} --schedule constant --lr 3e-4"
    common += f" --warmup 0.1 --decay 0 --alpha 0.03 --sample-bytes 0 --val-slices {processes} --save-dir {folder}"
    try:
        failed = launch(args, processes, "train.py", *common.split(), *flags, gpu=gpu)
        return failed or read_metrics(folder / "metrics.jsonl")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def speed(args: Benchmark, config: str, processes: int, *flags: str, gpu: str = "0") -> dict[str, Any]:
    """The median of the last `steps` steps, the time that training waited for a save, and the slowest steps.

    A save and its memory can also slow down steps that do not wait for it.
    """
    sizes = ["--mbs", str(args.mbs), "--global-slices", str(processes), "--keep", "1", "--stats-every", "0"]
    steps, save = args.warmup + args.steps, ["--save-every", str(args.warmup)]
    rows = run(args, config, processes, steps, *sizes, *save, *flags, gpu=gpu)
    if isinstance(rows, str):
        return {"failed": rows}
    counted = [row["step_ms"] for row in rows[args.warmup + 1 : -1]]  # without the steps that save or validate
    step_ms = statistics.median(counted)
    found = {"step_ms": step_ms, "bytes_per_s": processes * args.mbs / step_ms * 1000}
    found |= {"save_ms": max((row["save_ms"] for row in rows if "save_ms" in row), default=None)}
    found |= {"slowest_step_ms": max(counted)}
    found |= {"slowest_of_five_after_save_ms": max(row["step_ms"] for row in rows[args.warmup :][:5])}
    if "graphs_captured" in rows[-1]:
        found |= {"graphs_captured": sum(row["graphs_captured"] for row in rows[args.warmup + 1 : -1])}
    return found | {key: rows[-1][key] for key in (*MEMORY, "stage0_imbalance") if key in rows[-1]}


def losses(args: Benchmark, config: str, processes: int, gpu: str = "0") -> list[float] | str:
    """The cross entropies of the steps. A single process accumulates as many slices as several process together."""
    sizes = ["--mbs", str(args.mbs), "--global-slices", str(args.processes), "--stats-every", "0"]
    rows = run(args, config, processes, args.loss_steps, *sizes, *args.flags("copies", processes), gpu=gpu)
    return rows if isinstance(rows, str) else [row["ce"] for row in rows]


def compared(one: list[float] | str, many: list[float] | str) -> dict[str, Any]:
    if isinstance(one, str) or isinstance(many, str):
        return {"failed": one if isinstance(one, str) else many}
    gaps = [abs(a - b) for a, b in zip(one, many)]
    late = gaps[len(gaps) // 2 :]
    return {
        "steps": len(gaps), "largest_gap_ce": max(gaps), "mean_gap_ce_second_half": statistics.mean(late),
        "last_ce": [one[-1], many[-1]],
    }  # fmt: skip


def memory(args: Benchmark, gpu: str = "0") -> dict[str, Any]:
    sizes = ["--mbs", str(args.memory_mbs), "--ac", "block", "--warmup", "4", "--steps", "4"]
    found = bench(args, args.memory_config, 1, "copies", *sizes, gpu=gpu)
    return {key: found[key] for key in ("failed", *MEMORY, "step_ms_overlapped", "boundary_rates") if key in found}


def main(args: Benchmark) -> None:
    P, configs = args.processes, args.configs.split(",")
    if len(args.boundaries.split()) != len(configs):
        raise UserError(f"--boundaries {args.boundaries}: expected one for each of {len(configs)} configs")
    there = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(P)))).split(",")
    gpus: queue.Queue[str] = queue.Queue()
    for gpu in there[:P] if args.device == "cuda" else there[:1]:
        gpus.put(gpu)

    def alone(what: Callable[..., Any], *given: Any) -> Any:
        gpu = gpus.get()
        try:
            found = what(*given, gpu=gpu)
        finally:
            gpus.put(gpu)
        print("1 process:", *given[1:2], found if isinstance(found, dict) else "losses", flush=True)
        return found

    result: dict[str, Any] = {"arguments": vars(args), "gpu": gpu_name(args)}
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        fastest = 1, *args.flags("copies", 1)
        one = {c: pool.submit(alone, speed, args, c, *fastest) for c in reversed(configs)}  # the longest first
        same = {c: pool.submit(alone, same_work, args, c, 1, "copies") for c in reversed(configs)}
        if args.memory_config != "none":
            ac = pool.submit(alone, memory, args)
        accumulated = pool.submit(alone, losses, args, configs[0], 1)
    result["configs"] = {Path(c).stem: {"1": one[c].result() | {"same_work": same[c].result()}} for c in configs}
    if args.memory_config != "none":
        result["ac_block"] = ac.result()
    result["losses"] = compared(accumulated.result(), losses(args, configs[0], P))
    print("losses:", result["losses"], flush=True)
    for config in configs:
        table = result["configs"][Path(config).stem]
        for way in args.ways.split(","):
            table[way] = speed(args, config, P, *args.flags(way, P))
            table[way]["same_work"] = same_work(args, config, P, way)
            for a, b in ((table["1"], table[way]), (table["1"]["same_work"], table[way]["same_work"])):
                if "bytes_per_s" in a and "bytes_per_s" in b:
                    b["times_one"] = b["bytes_per_s"] / a["bytes_per_s"]
            print(config, f"{P} processes, {way}:", table[way], flush=True)
            if args.ledger:
                record_in(args, config, way, table["1"]["same_work"], table[way]["same_work"])
            if args.out:
                text = json.dumps(result, indent=1) + "\n"
                write_atomically(Path(args.out), lambda scratch, text=text: scratch.write_text(text))
    print(json.dumps(result, indent=1))


def record_in(args: Benchmark, config: str, way: str, one: dict[str, Any], many: dict[str, Any]) -> None:
    """Add the times of one process and of several, each with as many bytes, to the record of measurements."""
    import torch  # noqa: F401 (for the card's name)

    if "failed" in one or "failed" in many:
        return
    numbers = {
        "gpus_count": args.processes, "one_step_ms": one["step_ms"], "step_ms": many["step_ms"],
        "bytes_per_s": many["bytes_per_s"], "speedup_ratio": many["times_one"], "one_reserved_gib": one["reserved_gib"],
        "reserved_gib": many["reserved_gib"], "process_bytes": args.mbs,
    }  # fmt: skip
    name = f"scaling/{Path(config).stem}/{way}/{args.processes}-processes"
    append(args.ledger, name, numbers, what="the same work per process on one and on several", config=Path(config).stem)


def gpu_name(args: Benchmark) -> str | None:
    import torch

    return torch.cuda.get_device_name() if args.device == "cuda" and torch.cuda.is_available() else None


if __name__ == "__main__":
    commands.run(lambda argv: main(commands.parse(Benchmark, argv, __doc__)))
