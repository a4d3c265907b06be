"""benchmarks/tune.py: which launch options it tries, and which it keeps. Times here are made up."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tune  # noqa: E402
from hnet_kernels.launch_options import ATTENTION, SCAN, Attention, Options  # noqa: E402

TABLE = ATTENTION["hopper"][0]


def test_neighbours_differ_in_one_option_and_fit_into_the_registers():
    for table in (*ATTENTION["registers"], SCAN["registers"][torch.bfloat16]):
        for name, options in table._asdict().items():
            for other in tune.neighbours(name, options) if isinstance(options, Options) else ():
                differing = [field for field in Options._fields if getattr(options, field) != getattr(other, field)]
                assert differing and set(differing) <= {"registers", differing[0]}, (options, other)
                assert (other.registers or 0) * 32 * other.warps <= 65536


def test_what_is_faster_and_right_is_kept():
    def measure(table: Attention) -> float | None:
        if table.keys.warps == 8:
            return None  # wrong, however fast
        return 10 - 3 * (table.forward.stages == 3) - 1 * (table.queries.tokens == 32) + 0.01 * table.keys.stages

    said = []
    found, tried = tune.improve(TABLE, measure, lambda: True, said.append)
    assert found == TABLE._replace(forward=TABLE.forward._replace(stages=3), queries=TABLE.queries._replace(tokens=32))
    assert len(tried) == len(said) + 1 and sum("taken" in line for line in said) == 2
    assert any("wrong" in line for line in said)


def test_a_table_that_does_not_run_here_is_replaced():
    found, _ = tune.improve(
        TABLE, lambda table: 5.0 if table.forward.stages == 1 else None, lambda: True, lambda _: None
    )
    assert found.forward == TABLE.forward._replace(stages=1)


def test_it_stops_when_there_is_no_time_left():
    found, tried = tune.improve(TABLE, lambda table: 1.0, lambda: False, lambda _: None)
    assert found == TABLE and len(tried) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / "tune.py"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == "error: benchmarks/tune.py: needs a GPU, and torch finds none\n"


@pytest.mark.gpu
def test_every_operation_is_right_at_the_sizes_of_a_model():
    from benchmarks import tune_cases

    found = tune_cases.gaps(torch.device("cuda"))
    assert {name: gap for name, gap in found.items() if not gap <= tune_cases.ALLOWED} == {}
