"""hnet_kernels/launch.py: later launches of a kernel take the variant that Triton has compiled for such arguments.

No GPU here: a driver that compiles for one, and a launcher that notes what it is given. This file, run as a script,
prints what the launches of a kernel in many ways were given, twice: as `kernel` and as `triton.jit` launches it.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def ways_to_call() -> list[tuple[tuple, dict]]:
    """Arguments (x, y, rate, n, m, SIZE) that Triton specialises alike and otherwise, each more than once."""
    from hnet_kernels.launch import descriptor

    aligned, shifted = torch.zeros(64), torch.zeros(65)[1:]
    half, whole = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64)
    tensors = [aligned, shifted, half, half[1:], whole, None, torch.zeros(64)]
    integers = [1, 2, 5, 16, 32, 0, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40 + 1, 2**63, True]
    ways = [(x, aligned, 0.5, 3, 5) for x in tensors]
    ways += [(aligned, x, 0.5, 3, 5) for x in tensors]
    ways += [(aligned, aligned, 0.5, n, 5) for n in integers]
    ways += [(aligned, aligned, 0.5, 3, m) for m in integers]
    ways += [(aligned, aligned, rate, 3, 5) for rate in (0.25, 1.0, 2, 16, None)]
    matrices = [torch.zeros(8, 64), torch.zeros(40, 64), torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(8, 128)]
    ways += [(descriptor(x, rows, 64), aligned, 0.5, 3, 5) for x in matrices for rows in (8, 16)]
    options = [{}, {"num_warps": 8}, {"num_warps": 4}, {"num_stages": 2}, {"num_warps": 8, "maxnreg": 128}]
    found = [(way, {"SIZE": size, **more}) for way in ways for size in (16, 32) for more in options[:1]]
    found += [(ways[0], {"SIZE": 16, **more}) for more in options]
    found += [((*ways[0], 16), {}), ((*ways[0], 32), {}), ((*ways[0][:4],), {"m": 5, "SIZE": 16})]
    return [*found, *reversed(found), *found]


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from hnet_kernels import launch

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 7)

    given, compiled, runs = [], {}, []

    class Launcher:
        def __init__(self, variant):
            self.variant = variant

        def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            shown = [f"{a.base.data_ptr()} {a.shape} {a.strides}" if hasattr(a, "base") else a for a in arguments]
            shown = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in shown]
            given.append(repr((self.variant.number, (x, y, z), stream, metadata, shown)))

    def compile_(source, target, options):
        """Something that stands for what Triton compiles: one number for each text and options."""
        parts = source.signature, source.constants, source.attrs, sorted(options.items(), key=str)
        variant = CompiledKernel.__new__(CompiledKernel)
        variant.number = compiled.setdefault(repr(parts), len(compiled))
        variant.packed_metadata, variant.function = ("metadata", variant.number), None
        variant._run, variant.module = Launcher(variant), "loaded"
        variant.launch_metadata = lambda *args: None
        return variant

    run = JITFunction.run

    def counted(self, *args, **options):
        runs.append(None)
        return run(self, *args, **options)

    create_binder = JITFunction.create_binder

    def with_our_compiler(self):
        found = create_binder(self)
        self.compile = compile_
        return found

    JITFunction.run, JITFunction.create_binder = counted, with_our_compiler
    driver.set_active(Driver())
    results, ways = [], ways_to_call()
    for make in (launch.kernel, triton.jit):
        kernel = make(_nothing, do_not_specialize=["n"])
        given.clear()
        runs.clear()
        for i, (args, options) in enumerate(ways):
            grid = [(3,), (3, 4), (3, 4, 5), lambda found: (found["SIZE"], found["n"])][i % 4]
            kernel[grid](*args, **options)
        results.append({"given": list(given), "runs": len(runs)})
    kernel = launch.kernel(_nothing)
    calls = {}
    for name in ("new", "again", "watched", "after"):
        runs.clear()
        if name == "watched":
            triton.knobs.runtime.launch_enter_hook.add(print)
        kernel[(1,)](torch.zeros(64), None, 0.5, 3, 5, SIZE=16)
        triton.knobs.runtime.launch_enter_hook.remove(print)
        calls[name] = len(runs)
    print(json.dumps({"results": results, "runs": calls}))


def _nothing(x, y, rate, n, m, SIZE: "tl.constexpr"):  # noqa: F821
    pass


def test_launches_are_triton_s_own():
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    ours, theirs = found["results"]
    assert ours["given"] == theirs["given"]
    assert len(set(ours["given"])) > 40
    assert ours["runs"] < theirs["runs"] / 2
    assert found["runs"] == {"new": 1, "again": 0, "watched": 1, "after": 0}


def test_another_triton_launches_itself(monkeypatch, caplog):
    triton = pytest.importorskip("triton")
    from hnet_kernels import launch

    monkeypatch.setattr(triton, "__version__", "4.1.0")
    with caplog.at_level(logging.INFO, "hnet_kernels"):
        kernels = [launch.kernel(_nothing) for _ in range(2)]
    assert [type(kernel) for kernel in kernels] == [triton.JITFunction] * 2
    assert ["4.1.0" in record.getMessage() for record in caplog.records] == [True]


def test_descriptors_are_those_that_triton_checks():
    pytest.importorskip("triton")
    from triton.tools.tensor_descriptor import TensorDescriptor

    from hnet_kernels.launch import descriptor

    x = torch.zeros(50, 3, 64)
    for part in (x[:20], x[:40], x[8:], x[:, 0], x[:, 1:], x[:, :, :32].contiguous()):
        for _ in range(2):
            width = part[0].numel()
            assert descriptor(part, 16, 32) == TensorDescriptor(part, [len(part), width], [part.stride(0), 1], [16, 32])
    for bad in (x[:, :, :32], x[:0], torch.zeros(50 * 192 + 1)[1:].view(50, 3, 64), torch.zeros(50, 3)):
        for _ in range(2):
            with pytest.raises(AssertionError):
                descriptor(bad, 16, 32)


def test_sizes():
    triton = pytest.importorskip("triton")
    from hnet_kernels.launch import cdiv, next_power_of_2

    for n in range(1, 70):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n - 1, size) for size in (1, 3, 64)] == [triton.cdiv(n - 1, size) for size in (1, 3, 64)]


if __name__ == "__main__":
    main()
