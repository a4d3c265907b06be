"""Triton kernels compile for GPUs that are not here, and fit into their shared memory and registers. No test here needs
a GPU. `make audit` compiles for all cards, dtypes and sizes. The results of the kernels are tested elsewhere."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import audit  # noqa: E402
from hnet_kernels.cards import CARDS, SHARED  # noqa: E402

MODULES = (
    "adamw", "attention", "boundaries", "conv", "cross_entropy", "ema", "generation", "linear", "norm", "pointwise",
    "router", "sampling", "ssd",
)  # fmt: skip


@pytest.mark.parametrize("capability", ["8.6", "9.0"])
def test_kernels_compile_and_fit(capability):
    pytest.importorskip("triton")
    found = audit.audit(capability, quick=True)
    wanted = set()
    for module in MODULES:
        text = (ROOT / "hnet_kernels" / f"{module}_triton.py").read_text()
        wanted |= {f"{module}.{kernel} bfloat16" for kernel in re.findall(r"^ +(_\w+)\[\(?\w", text, re.MULTILINE)}
    assert set(found) == wanted
    assert audit.troubles(found, capability) == []


def test_audit_names_each_kernel_that_does_not_fit():
    found = {
        "good": audit.Found(99 * 1024, 512, 65536),
        "large": audit.Found(99 * 1024 + 1, 0, 0),
        "wide": audit.Found(0, 0, 65537),
        "spills": audit.Found(0, 516, 0),
        "broken": audit.Found(0, 0, 0, "RuntimeError PassManager::run failed"),
    }
    said = audit.troubles(found, "8.6")
    assert [sentence.split()[0] for sentence in said] == ["large", "wide", "spills", "broken"]
    assert "101,377 bytes of shared memory, of which a block has 101,376" in said[0]
    assert "PassManager" in said[3]


def test_one_card_of_each_capability_is_compiled_for():
    assert {tuple(map(int, name.split("."))) for name in audit.CARDS} == set(SHARED)
    assert all(CARDS[card].capability == tuple(map(int, name.split("."))) for name, card in audit.CARDS.items())
