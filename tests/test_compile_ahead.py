"""hnet_runtime/steps/compile_ahead.py: which kernels are foreseen, and that a launch takes what was compiled ahead.

No GPU is needed. This file, run as a script, compiles with a driver that launches nothing and prints what it found.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OF_GRAPHS = {"attention", "boundaries", "conv", "cross_entropy", "ema", "norm", "pointwise", "router", "ssd"}
# launched only where activations are recomputed
RECOMPUTED = {"norm._recompute_norm"}


def names(launches) -> set[str]:
    return {f"{x.kernel.__module__.rpartition('.')[2].removesuffix('_triton')}.{x.kernel.__name__}" for x in launches}


@pytest.fixture(scope="module")
def compile_ahead():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under Triton's interpreter nothing is compiled")
    from hnet_runtime.steps import compile_ahead

    return compile_ahead


def test_all_kernels_of_a_step_are_foreseen(compile_ahead):
    from hnet_trainable import HNetConfig

    config = HNetConfig.load("hnet_2stage_tiny")
    wanted = set()
    for module in OF_GRAPHS:
        text = (ROOT / "hnet_kernels" / f"{module}_triton.py").read_text()
        wanted |= {f"{module}.{kernel}" for kernel in re.findall(r"^ +(_\w+)\[\(?\w", text, re.MULTILINE)}
    found = names(compile_ahead.foresee(config, 2048, "none", torch.bfloat16))
    assert wanted - found == RECOMPUTED
    assert "adamw._adamw" in found
    assert names(compile_ahead.foresee(config, 2048, "selective", torch.bfloat16)) >= RECOMPUTED


def test_a_model_that_reads_a_value_ends_the_list_and_not_the_run(compile_ahead, monkeypatch):
    from hnet_kernels import launch
    from hnet_trainable import HNetConfig, HNetLM

    whole = names(compile_ahead.foresee(HNetConfig.load("hnet_1stage_tiny"), 2048, "none", torch.bfloat16))
    head = HNetLM.head
    monkeypatch.setattr(HNetLM, "head", lambda self, x_TD: head(self, x_TD) * x_TD.detach().sum().item())
    found = names(compile_ahead.foresee(HNetConfig.load("hnet_1stage_tiny"), 2048, "none", torch.bfloat16))
    assert "ssd._outputs" in found and found <= whole
    assert launch._noted is None  # launches are made again


def test_a_launch_takes_what_was_compiled_ahead(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["submitted"] == found["compiled"] == 2 and found["again"] == 0 and found["waited"]


def test_a_note_is_for_one_kind_of_run_and_the_code_as_it_is(compile_ahead, tmp_path, monkeypatch):
    """An edited kernel, or another model, step, GPU or version of Triton, is foreseen anew."""
    import triton

    from hnet_kernels import cards
    from hnet_trainable import HNetConfig

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for file in ("cards.py", "norm_triton.py"):
        (tmp_path / file).write_text("before")
    monkeypatch.setattr(cards, "__file__", str(tmp_path / "cards.py"))
    tiny = HNetConfig.load("hnet_1stage_tiny")
    run = {"config": tiny, "mbs": 2048, "ac": "none", "dtype": torch.bfloat16, "accumulates": False, "gpu": "H200"}
    note = compile_ahead.note_of(**run)
    assert note.parent == tmp_path and note == compile_ahead.note_of(**run)
    others = [{"config": HNetConfig.load(tiny.to_dict(), N_compress=[1, 4])}, {"mbs": 1024}, {"ac": "block"}]
    others += [{"dtype": torch.float32}, {"accumulates": True}, {"gpu": "A100"}]
    notes = {compile_ahead.note_of(**run | other) for other in others}
    (tmp_path / "norm_triton.py").write_text("after")
    notes.add(compile_ahead.note_of(**run))
    (tmp_path / "norm_triton.py").write_text("before")
    monkeypatch.setenv("HNET_GPU", "a100")
    notes.add(compile_ahead.note_of(**run))
    monkeypatch.delenv("HNET_GPU")
    monkeypatch.setattr(triton, "__version__", "0.0")
    notes.add(compile_ahead.note_of(**run))
    assert len(notes) == len(others) + 3 and note not in notes


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)

    driver.set_active(Driver())
    from hnet_kernels import pointwise_triton
    from hnet_kernels.launch import noting
    from hnet_runtime.steps import compile_ahead

    kernel, compiled = pointwise_triton._to_float32, []
    kernel.device_caches[0]  # makes `compile`
    compile_ = kernel.compile

    def slowly(*args, **options):
        time.sleep(1)
        compiled.append(None)
        return compile_(*args, **options)

    kernel.compile = slowly
    with noting() as found:
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            pointwise_triton.to_float32(torch.zeros(8, 64, dtype=dtype, device="meta"))
    ahead = compile_ahead.Ahead(found, threads=2)
    one = found[0]
    variant = kernel.run(*one.args, grid=(1,), warmup=True, **one.options)
    waited = bool(variant.asm["cubin"]) and len(compiled) > 0
    ahead.wait()
    before = len(compiled)
    kernel.run(*one.args, grid=(1,), warmup=True, **one.options)
    again = len(compiled) - before
    print(json.dumps({"submitted": ahead.kernels, "compiled": before, "again": again, "waited": waited}))


if __name__ == "__main__":
    main()
