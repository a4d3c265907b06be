"""hnet_runtime/steps/compile_ahead.py: which kernels are foreseen, and that a launch waits for what is compiled ahead.

No GPU is needed. This file, run as a script, compiles for a GPU that is not there and prints what it found.
"""

import json
import multiprocessing
import os
import re
import signal
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


def work(config, **more):
    from hnet_runtime.steps.compile_ahead import Work

    return Work(config, torch.bfloat16, **({"mbs": 2048} | more))


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
    found = names(compile_ahead.foresee_steps(work(config)))
    assert wanted - found == RECOMPUTED
    assert "adamw._adamw" in found
    assert names(compile_ahead.foresee_steps(work(config, ac="selective"))) >= RECOMPUTED


@pytest.mark.parametrize("texts", [1, 64])
def test_all_kernels_of_generation_are_foreseen(compile_ahead, texts):
    from hnet_trainable import HNetConfig

    wanted = set()
    for module in ("generation", "sampling"):
        text = (ROOT / "hnet_kernels" / f"{module}_triton.py").read_text()
        wanted |= {f"{module}.{kernel}" for kernel in re.findall(r"^ +(_\w+)\[\(?\w", text, re.MULTILINE)}
    launches = compile_ahead.foresee_generation(work(HNetConfig.load("hnet_2stage_tiny"), mbs=0, texts=texts))
    found = names(launches)
    assert wanted - found == {"generation._combine"}  # of rings of attention that have grown
    assert ("linear._few_rows" in found) == (texts == 1)
    assert found > {"ssd._outputs", "conv._forward"}  # of a prefill
    attend = {one.options["OVERLAPS"] for one in launches if one.kernel.__name__ == "_attend"}
    assert attend == {True, False}  # graphs are compared with launches that wait for each other


def test_a_model_that_reads_a_value_ends_the_list_and_not_the_run(compile_ahead, monkeypatch):
    from hnet_kernels import launch
    from hnet_trainable import HNetConfig, HNetLM

    whole = names(compile_ahead.foresee_steps(work(HNetConfig.load("hnet_1stage_tiny"))))
    head = HNetLM.head
    monkeypatch.setattr(HNetLM, "head", lambda self, x_TD: head(self, x_TD) * x_TD.detach().sum().item())
    found = names(compile_ahead.foresee_steps(work(HNetConfig.load("hnet_1stage_tiny"))))
    assert "ssd._outputs" in found and found <= whole
    assert launch._noted is None  # launches are made again


def test_a_launch_waits_for_what_is_compiled_ahead(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=100)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["kernels"] == found["cubins"] == 2  # of three launches, two of which need the same
    assert found["cached"] == [True, True] and found["launched"] == 1
    assert found["note"] and not found["note_before"]
    assert found["of_all"] == [2, None]  # one that does not compile is not passed over in silence


def test_the_end_of_a_run_is_the_end_of_its_compiler(compile_ahead):
    code = """
import os
from hnet_runtime.steps import compile_ahead
compiler = compile_ahead.Compiler()
print(compiler.process, flush=True)
os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == -9, run.stderr
    until = time.time() + 20
    while Path(f"/proc/{int(run.stdout)}").exists():
        assert time.time() < until, "the compiler waits for a run that has ended"
        time.sleep(0.05)


def _compile_in_a_worker(answers):
    from hnet_kernels import cards
    from hnet_runtime.steps import compile_ahead
    from hnet_trainable import HNetConfig

    compile_ahead.foresee_steps = lambda work: []  # in the fork, too
    compiler = compile_ahead.Compiler()
    compiler.begin(work(HNetConfig.load("hnet_1stage_tiny")), cards.Properties((9, 0), 132))
    answers.put(compiler.wait())


def test_runs_in_a_worker_of_multiprocessing_have_a_compiler(compile_ahead):
    """benchmarks/study.py trains in workers, which may not start processes by multiprocessing."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_compile_in_a_worker, args=(answers,), daemon=True)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0 and answers.get(timeout=5) == 0


def test_a_kernel_has_one_name_in_the_cache(compile_ahead):
    """In whichever order kernels are compiled; and another one when a constant of a function that it calls changes."""
    text = """
import sys, importlib
sys.path.insert(0, {root!r})
conv = importlib.import_module("hnet_kernels.conv_triton")
if {constant} is not None:
    conv.C.value = {constant}
print(*[getattr(conv, name).cache_key for name in {names}])
"""

    def keys(names, constant=None):
        script = text.format(root=str(ROOT), names=names, constant=constant)
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return dict(zip(names, run.stdout.split(), strict=True))

    both = ["_forward", "_backward"]
    found = keys(both)
    assert keys(both[::-1]) == found
    changed = keys(both, constant=-1.5)
    assert changed["_forward"] != found["_forward"] and changed["_backward"] != found["_backward"]


def test_a_compiler_that_was_killed_is_not_waited_for(compile_ahead, monkeypatch):
    from hnet_kernels import cards
    from hnet_trainable import HNetConfig

    compiler = compile_ahead.Compiler()
    os.kill(compiler.process, signal.SIGKILL)
    os.waitpid(compiler.process, 0)
    compiler.begin(work(HNetConfig.load("hnet_1stage_tiny")), cards.Properties((9, 0), 132))
    assert compiler.wait() == 0


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
    run = work(tiny)
    note = compile_ahead.note_of(run, "H200")
    assert note.parent == tmp_path and note == compile_ahead.note_of(run, "H200")
    others = [{"config": HNetConfig.load(tiny.to_dict(), N_compress=[1, 4])}, {"mbs": 1024}, {"ac": "block"}]
    others += [{"dtype": torch.float32}, {"accumulates": True}, {"texts": 1}]
    notes = {compile_ahead.note_of(run._replace(**other), "H200") for other in others}
    notes.add(compile_ahead.note_of(run, "A100"))
    (tmp_path / "norm_triton.py").write_text("after")
    notes.add(compile_ahead.note_of(run, "H200"))
    (tmp_path / "norm_triton.py").write_text("before")
    monkeypatch.setenv("HNET_GPU", "a100")
    notes.add(compile_ahead.note_of(run, "H200"))
    monkeypatch.delenv("HNET_GPU")
    monkeypatch.setattr(triton, "__version__", "0.0")
    notes.add(compile_ahead.note_of(run, "H200"))
    assert len(notes) == len(others) + 4 and note not in notes


def main() -> None:
    from triton import knobs

    from hnet_kernels import cards, pointwise_triton
    from hnet_kernels.launch import noting
    from hnet_runtime.steps import compile_ahead
    from hnet_trainable import HNetConfig

    cache = Path(os.environ["TRITON_CACHE_DIR"])
    with noting() as found:
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            pointwise_triton.to_float32(torch.zeros(8, 64, dtype=dtype, device="meta"))
    compile_ahead.foresee_steps = lambda work: found  # before the fork
    answers, wait = [], compile_ahead.Compiler.wait
    compile_ahead.Compiler.wait = lambda self: answers.append(wait(self))
    compiler = compile_ahead.Compiler()
    gpu, note = cards.Properties((9, 0), 132), cache / "note"
    note_before = note.exists()
    compiler.begin(work(HNetConfig.load("hnet_1stage_tiny")), gpu, note)

    launched, cached = [], []
    kernel = found[0].kernel
    run, kernel.run = kernel.run, lambda *args, **options: launched.append(list(answers))
    compile_ahead.compiles_for(gpu)
    kernel[(1,)](*found[0].args, **found[0].options)
    kernel.run = run
    knobs.compilation.listener = lambda src, metadata, metadata_group, times, cache_hit: cached.append(cache_hit)
    for one in found[:2]:
        kernel.run(*one.args, grid=(1,), warmup=True, **one.options)
    wrong = found[0]._replace(options={**found[0].options, "num_warps": 3})  # not a power of two
    of_all = [compile_ahead.compile_all(launches, 2) for launches in (found, [*found, wrong])]
    result = {
        "kernels": launched[0][0],
        "of_all": of_all,
        "launched": len(launched),
        "cached": cached,
        "note_before": note_before,
    }
    print(json.dumps(result | {"note": note.exists(), "cubins": len(list(cache.rglob("*.cubin")))}))


if __name__ == "__main__":
    main()
