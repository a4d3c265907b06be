"""hnet_kernels/cards.py: what is decided about a GPU, and GPUs that another one imitates. No GPU is needed."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hnet_kernels import KernelError, cards, launch_options
from hnet_runtime.flops import peak_flops
from hnet_runtime.steps import graphs
from hnet_trainable import HNetConfig

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch believe in a GPU of some capability and memory, and cards.py decide anew; HNET_GPU is not set."""
    fractions = []

    def pretend(capability: tuple[int, int], gib: float = 80, imitated: str = "") -> list[float]:
        decided = (cards.imitated, cards.capability, cards.why_unsupported, cards.has_descriptors, cards.can_overlap)
        for function in (*decided, cards.properties, cards.start, launch_options.scan, launch_options.attention):
            function.cache_clear()
        monkeypatch.setenv("HNET_GPU", imitated)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        major, minor = capability
        found = SimpleNamespace(total_memory=int(gib * GIB), major=major, minor=minor, multi_processor_count=100)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found.total_memory, found.total_memory))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)

        def limit(share: float, device: int) -> None:  # torch's raises an error for torch.device("cuda")
            assert device == 0
            fractions.append(share)

        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
        return fractions

    pretend((9, 0))
    yield pretend
    monkeypatch.undo()
    pretend((9, 0), imitated=os.environ.get("HNET_GPU", ""))  # clears the caches
    monkeypatch.undo()


@pytest.mark.parametrize("capability", cards.SHARED)
def test_steps_run_as_graphs_on_every_gpu_since_ampere(gpu, capability):
    gpu(capability)
    config = HNetConfig.load("hnet_1stage_tiny")
    reason = graphs.why_unsupported(config, CUDA, torch.bfloat16)
    assert reason is None or reason == "triton is not installed"


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (11, 0)])
def test_others_are_told_which_gpus_have_kernels(gpu, capability):
    gpu(capability)
    reason = graphs.why_unsupported(HNetConfig.load("hnet_1stage_tiny"), CUDA, torch.bfloat16)
    assert reason == (
        f"Some GPU has compute capability {capability[0]}.{capability[1]}, not one of 8.0, 8.6, 8.9, 9.0, 10.0, 12.0"
    )


def test_an_untried_gpu_is_announced_once(gpu, caplog):
    with caplog.at_level(logging.WARNING, "hnet_kernels"):
        cards.start(CUDA)
        assert not caplog.messages  # an H200 has run everything
        gpu((8, 6), 24)
        cards.start(CUDA)
        cards.start(CUDA)
    (said,) = caplog.messages
    assert said.startswith("Some GPU (compute capability 8.6)") and "benchmarks/tune.py" in said


@pytest.mark.parametrize("device", [CUDA, torch.device("cuda")])
def test_an_imitated_card_has_its_options_and_memory(gpu, caplog, device):
    fractions = gpu((9, 0), 140, "RTX4090")
    with caplog.at_level(logging.WARNING, "hnet_kernels"):
        cards.start(device)
    assert fractions == [23 / 140]
    assert "no test of the machine code" in caplog.text and "no estimate" in caplog.text
    assert cards.memory(CUDA) == (20 * GIB, 23 * GIB)
    assert not cards.has_descriptors(CUDA, torch.bfloat16) and not cards.can_overlap(CUDA)
    assert launch_options.scan(CUDA, torch.bfloat16) == launch_options.SCAN["registers"][torch.bfloat16]
    gpu((9, 0), 140)
    assert cards.memory(CUDA) == (140 * GIB, 140 * GIB)
    assert cards.has_descriptors(CUDA, torch.bfloat16) and cards.can_overlap(CUDA)
    assert launch_options.scan(CUDA, torch.bfloat16) == launch_options.SCAN["hopper"][torch.bfloat16]


def test_a_card_with_more_memory_cannot_be_imitated(gpu):
    gpu((9, 0), 80, "b200")
    with pytest.raises(KernelError, match="HNET_GPU=b200: the Some GPU here has less memory than the B200"):
        cards.start(CUDA)


def test_an_unknown_card_ends_a_run_with_the_names():
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", "--device", "cpu", "--steps", "1"],
        env=os.environ | {"HNET_GPU": "voodoo2"}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == (
        "error: HNET_GPU=voodoo2: expected one of a100, rtx3090, rtx4090, l4, l40s, h100, h200, b200, rtx5090\n"
    )


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", None),
    ],
)
def test_a_card_is_known_by_the_name_that_cuda_gives_it(monkeypatch, name, card):
    found = cards.named(name)
    assert (found and found.name) == card
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(CUDA)
    assert peak == found.tflops * 1e12 if found else math.isnan(peak)
