"""What a command imports before its first result: a package that takes a second or two delays every start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import ONE_STAGE

import fineweb
from hnet_runtime.checks import agreement
from hnet_runtime.runs import weights
from hnet_trainable import HNetConfig, HNetLM, init_weights

ROOT = Path(__file__).parent.parent
SLOW = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "matplotlib", "triton", "pyarrow")

# runs in a process of its own, and ends with a line of the modules of SLOW that have been imported
TRAIN = """
import sys
import train
from hnet_runtime.runs.flags import read_config

train.train(read_config(sys.argv[1:]), then=lambda run: None)
"""
GENERATE = """
import sys
from scripts import generate

generate.main(sys.argv[1:])
"""
TELL = f"print('imported:', *(name for name in {SLOW!r} if name in sys.modules))"


def imported(program: str, *flags: str) -> list[str]:
    """The modules of SLOW that a program has imported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program + TELL, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1].removeprefix("imported:").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text in data/, a config in config.json, and weights for it in model.safetensors."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "texts").mkdir()
    for i in range(20):
        (folder / "texts" / f"{i}.txt").write_text(f"the text of file {i} " * 20)
    fineweb.prepare(str(folder / "texts"), str(folder / "data"), holdout=0.2)
    config = HNetConfig.load(ONE_STAGE)
    weights.export(init_weights(HNetLM(config), seed=0), folder, "safetensors", torch.float32)
    return folder


@pytest.mark.parametrize("how", ["graph", "eager"])
def test_training_imports_nothing_slow(folder, how):
    """Checks, steps, validation and a sample. graph: the steps of a GPU, without capture."""
    flags = f"-c {folder}/config.json --data {folder}/data --mbs 256 --steps 2 --val-slices 1 --sample-bytes 4"
    more = f"--save-every 0 --stats-every 1 --device cpu -C {how} --save-dir {folder}/{how}"
    assert imported(TRAIN, *flags.split(), *more.split()) == []
    records = [json.loads(line) for line in (folder / how / "metrics.jsonl").read_text().splitlines()]
    assert "val_bpb" in records[-1] and "sample" in records[-1]


def test_generation_imports_nothing_slow(folder):
    assert imported(GENERATE, str(folder), "--prompt", "the", "--max-bytes", "4", "--device", "cpu") == []


def test_small_models_are_checked_on_one_thread():
    """On 2 cores beside a busy program, two threads took 15 s for what one does in a second."""
    threads, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        prepare = lambda model: threads.append(torch.get_num_threads())  # noqa: E731
        assert agreement.steps_as_graphs(HNetConfig.load(ONE_STAGE), prepare=prepare) is None
        assert (*threads, torch.get_num_threads()) == (1, 3)
    finally:
        torch.set_num_threads(before)
