"""Measures how long train.py takes from its start to the end of step 1, by parts, with empty and with warm caches.

python benchmarks/bench_start.py --data DATA                             # hnet_1stage_small on the GPU here
python benchmarks/bench_start.py --data DATA -c hnet_2stage_XL --rounds 2
python benchmarks/bench_start.py --data DATA --no-ahead                  # compile each kernel at its first launch

Each start is a process of its own. An empty start has an empty folder for Triton's cache; the warm start after it has
the same one. The CUDA driver has a cache of its own, which is emptied too. Python finds the byte code of all modules,
as pip writes it when it installs a package; --no-bytecode leaves that to the environment. Times are seconds on the wall
clock.
"""

import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hnet_runtime import UserError, commands  # noqa: E402
from hnet_runtime.pages.reports import write_atomically  # noqa: E402
from hnet_runtime.runs.flags import flag  # noqa: E402


@dataclass
class Start:
    data: str
    """Prepared text."""
    config: Annotated[str, flag("-c")] = "hnet_1stage_small"
    """Model config."""
    mbs: int = 32768
    """Bytes of a step."""
    rounds: int = 1
    """Pairs of an empty and a warm start."""
    ahead: bool = True
    """Start with train.py's --compile-ahead, as it does by itself."""
    bytecode: bool = True
    """Start with the byte code of all modules in a folder, as pip installs them."""
    device: str = "cuda"
    """cuda or cpu."""
    compile: Annotated[str, flag("-C")] = "auto"
    """train.py's --compile; graph with --device cpu runs the steps of a GPU without capture."""
    out: str = ""
    """File for the numbers, as JSON."""


PARTS = {  # what is timed: (module, name) of functions that train.py calls
    "fork the compiler": ("hnet_runtime.steps.compile_ahead", "prepare"),
    "processes and device": ("hnet_runtime.distributed", "start"),
    "tell the compiler": ("hnet_runtime.steps.compile_ahead", "begin"),
    "check operations": ("hnet_runtime.checks.agreement", "choose_implementations"),
    "of which wait for the compiler": ("hnet_runtime.steps.compile_ahead", "Compiler.wait"),
    "check steps": ("hnet_runtime.checks.agreement", "steps_as_graphs"),
    "check generation": ("hnet_runtime.checks.agreement", "generation"),
    "build and draw weights": ("hnet_runtime.distributed", "build_model"),
    "check captured steps": ("hnet_runtime.checks.agreement", "captured"),
}


def child(began: float, options: dict[str, Any]) -> dict[str, float]:
    """One start, in this process. began: the time at which it was created."""
    seconds: dict[str, float] = {}
    since = time.time()
    seconds["Python"] = since - began
    with commands.importing():
        import torch

        seconds["import torch"], since = time.time() - since, time.time()
        import train
        from hnet_runtime.runs.flags import read_config
    seconds["import the rest"] = time.time() - since

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            since = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                seconds[name] = seconds.get(name, 0.0) + time.time() - since

        return call

    for name, (module, path) in PARTS.items():
        *outer, attribute = path.split(".")
        place = functools.reduce(getattr, outer, sys.modules[module])
        setattr(place, attribute, timed(name, getattr(place, attribute)))
    first_step, ended = train.Run._step, {}

    class Done(Exception):
        """Ends the run after its first step."""

    def step(run, watch):
        first_step(run, watch)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        ended["at"], ended["run"] = time.time(), run
        raise Done

    train.Run._step = timed("first step", step)
    train.Run.__init__ = timed("open the run, with the check of generation", train.Run.__init__)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["-c", options["config"], "--data", options["data"], "--mbs", str(options["mbs"])]
        argv += ["--save-dir", f"{folder}/run", "--steps", "2", "--val-slices", "1", "--sample-bytes", "0"]
        argv += ["--device", options["device"], "--compile", options["compile"]]
        argv += ["--compile-ahead" if options["ahead"] else "--no-compile-ahead"]
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Done):
            raise SystemExit(train.main(read_config(argv)))
    run = ended["run"]
    seconds["of the first step: captures"] = run.state.steps.capture_seconds or 0.0
    seconds["of the first step: compiled there, kernels"] = run.compilations.new
    seconds["of the first step: compiled there, seconds"] = run.compilations.seconds
    seconds["everything, to the end of step 1"] = ended["at"] - began
    return seconds


def start(options: Start, cache: str) -> dict[str, float]:
    environment = os.environ | {"TRITON_CACHE_DIR": f"{cache}/triton", "CUDA_CACHE_PATH": f"{cache}/cuda"}
    if options.bytecode:
        environment |= {"PYTHONPYCACHEPREFIX": f"{cache}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, __file__, "--child", str(time.time()), json.dumps(vars(options))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if run.returncode:
        raise UserError(f"the run failed with status {run.returncode}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    options = commands.parse(Start, argv, __doc__)
    found: dict[str, list[dict[str, float]]] = {"empty": [], "warm": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            if options.bytecode:
                start(options, cache)
                shutil.rmtree(f"{cache}/triton", ignore_errors=True)
                shutil.rmtree(f"{cache}/cuda", ignore_errors=True)
            for state in found:
                found[state].append(start(options, cache))
    medians = {
        state: {name: statistics.median(one[name] for one in starts) for name in starts[0]}
        for state, starts in found.items()
    }
    print(f"{'':45} {'empty':>8} {'warm':>8}")
    for name in medians["empty"]:
        print(f"{name:45} {medians['empty'][name]:8.2f} {medians['warm'].get(name, 0.0):8.2f}")
    if options.out:
        text = json.dumps(vars(options) | {"starts": found}, indent=1) + "\n"
        write_atomically(Path(options.out), lambda scratch: scratch.write_text(text))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(float(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        commands.run(main)
