"""How training scales from one GPU to several: train.py itself, run on each number of processes.

    python benchmarks/bench_scaling.py --data DIR --out results.json           # on a machine with two GPUs
    python benchmarks/bench_scaling.py --data data/stdlib --configs configs/hnet_1stage_tiny.json --device cpu \
        --mbs 512 --steps 6 --warmup 2 --loss-steps 4 --memory-config ""       # the same, tried on a CPU

For each config: one process as train.py runs it by itself, then --processes of them, sharded with compiled blocks, the
same without freeing gathered weights, and with whole weights on each as graphs. Every process has --mbs bytes. Then the
losses of one process that accumulates against those of several on the same slices, how long saving stalls training,
and the peak memory of --ac block. Prints a line as each run ends and one JSON object; a run that fails is reported as
such and the others go on.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from hnet_runtime.metrics import read_metrics  # noqa: E402 (run from anywhere)


@dataclass
class Benchmark:
    """What to run."""

    data: str = "data/stdlib"
    """Folder made by fineweb.py prepare."""
    configs: str = "configs/hnet_1stage_small.json,configs/hnet_2stage_XL.json"
    """Model configs, with commas between."""
    processes: int = 2
    """Processes beside one; on a GPU each has its own."""
    mbs: int = 32768
    """Bytes a process."""
    warmup: int = 60
    """Steps before those that count: kernels are compiled and boundaries settle."""
    steps: int = 40
    """Steps that count."""
    loss_steps: int = 200
    """Steps over which losses are compared."""
    memory_config: str = "configs/hnet_2stage_XL.json"
    """Model whose peak memory with --ac block is measured on one process; empty: none."""
    memory_mbs: int = 131072
    """Its bytes."""
    device: str = "cuda"
    """cuda or cpu."""
    limit: int = 400
    """Seconds after which a run is given up."""
    out: str = ""
    """File for the result."""


def run(args: Benchmark, config: str, processes: int, steps: int, *flags: str) -> list[dict[str, Any]] | str:
    """The records of a training run, or why it failed."""
    folder = Path(tempfile.mkdtemp(prefix="bench_scaling_"))
    alone = [sys.executable]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    common = f"-c {config} --data {args.data} --device {args.device} --steps {steps} --schedule constant --lr 3e-4"
    common += f" --warmup 0.1 --decay 0 --sample-bytes 0 --val-slices {processes} --save-dir {folder}"
    command = [*(launch if processes > 1 else alone), str(ROOT / "train.py"), *common.split(), *flags]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=args.limit)
        if done.returncode:
            return f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1]}"
        return read_metrics(folder / "metrics.jsonl")
    except subprocess.TimeoutExpired:
        return f"not done after {args.limit} s"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def speed(args: Benchmark, config: str, processes: int, *flags: str) -> dict[str, Any]:
    """Median of the last `steps` steps, and the longest that a save kept training waiting."""
    sizes = ["--mbs", str(args.mbs), "--global-slices", str(processes), "--keep", "1"]
    rows = run(args, config, processes, args.warmup + args.steps, *sizes, "--save-every", str(args.warmup), *flags)
    if isinstance(rows, str):
        return {"failed": rows}
    counted = rows[args.warmup + 1 : -1]  # the first and the last also hold a save and a validation
    step_ms = statistics.median(row["step_ms"] for row in counted)
    found = {"step_ms": step_ms, "bytes_per_s": processes * args.mbs / step_ms * 1000}
    found |= {"save_ms": max((row["save_ms"] for row in rows if "save_ms" in row), default=None)}
    return found | {key: rows[-1][key] for key in ("peak_gib", "stage0_imbalance") if key in rows[-1]}


def losses(args: Benchmark, config: str) -> dict[str, Any]:
    """One process that accumulates as many slices as several processes share."""
    sizes = ["--mbs", str(args.mbs), "--global-slices", str(args.processes), "-C", "eager"]
    one, many = (run(args, config, n, args.loss_steps, *sizes) for n in (1, args.processes))
    if isinstance(one, str) or isinstance(many, str):
        return {"failed": one if isinstance(one, str) else many}
    gaps = [abs(a["ce"] - b["ce"]) for a, b in zip(one, many)]
    return {"largest_gap_ce": max(gaps), "last_ce": [one[-1]["ce"], many[-1]["ce"]], "steps": len(gaps)}


def main(args: Benchmark) -> None:
    P, result = str(args.processes), {"arguments": vars(args), "gpu": gpu_name(args), "configs": {}}
    ways = {"sharded": ["-C", "block"], "sharded, kept": ["-C", "block", "--no-reshard"]}
    ways |= {"copies": ["--replicate", P, "-C", "graph"]}
    for config in args.configs.split(","):
        table = result["configs"][Path(config).stem] = {"1": speed(args, config, 1)}
        print(config, "1 process:", table["1"], flush=True)
        for way, flags in ways.items():
            table[way] = speed(args, config, args.processes, *flags)
            if "bytes_per_s" in table["1"] and "bytes_per_s" in table[way]:
                table[way]["times_one"] = table[way]["bytes_per_s"] / table["1"]["bytes_per_s"]
            print(config, f"{P} processes, {way}:", table[way], flush=True)
        table["losses"] = losses(args, config)
        print(config, "losses:", table["losses"], flush=True)
    if args.memory_config:
        sizes = ["--mbs", str(args.memory_mbs), "--ac", "block"]
        rows = run(args, args.memory_config, 1, 5, *sizes)
        result["ac_block"] = {"failed": rows} if isinstance(rows, str) else {"peak_gib": rows[-1].get("peak_gib")}
        print(args.memory_config, "--ac block:", result["ac_block"], flush=True)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


def gpu_name(args: Benchmark) -> str | None:
    import torch

    return torch.cuda.get_device_name() if args.device == "cuda" and torch.cuda.is_available() else None


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
