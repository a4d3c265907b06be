"""Compiles every Triton kernel for six compute capabilities, without a GPU, and shows what each takes of a chip.

python benchmarks/audit.py                 # all, about ten minutes; writes the table of docs/CARDS.md
python benchmarks/audit.py 8.6 --quick     # one, in bfloat16 and a few sizes

It fails (status 1) where a kernel does not compile, does not fit into a thread block's shared memory and registers, or
spills more than 512 bytes a thread (in the scan in float32 on Hopper: 6 KiB).
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hnet_runtime import UserError  # noqa: E402 (run from anywhere)
from hnet_runtime.commands import parse, run  # noqa: E402

# one card of each capability
CARDS = {"8.0": "a100", "8.6": "rtx3090", "8.9": "rtx4090", "9.0": "h100", "10.0": "b200", "12.0": "rtx5090"}
SPILLED = 512  # bytes per thread at most: a few reads from the first-level cache per loop
# On Hopper float32 keeps the options, and so the bits, of runs before this limit. Graphs do not compute in float32
KNOWN = {("9.0", f"ssd.{kernel} float32"): 6144 for kernel in ("_outputs", "_gradients", "_finish")}
REGISTERS = 65536  # of an SM, and so of a thread block, on all of these
DOCS = ROOT / "docs" / "CARDS.md"
BEGIN, END = "<!-- written by benchmarks/audit.py -->", "<!-- end -->"


class Found(NamedTuple):
    """What a kernel takes: bytes of a thread block, bytes per thread, registers of a thread block."""

    shared: int
    spilled: int
    registers: int
    error: str = ""

    def worst(self, other: "Found") -> "Found":
        return Found(*(max(pair) for pair in zip(self, other)))


def troubles(found: dict[str, Found], capability: str) -> list[str]:
    """Sentences about kernels that do not compile, do not fit, or spill too much."""
    from hnet_kernels.cards import SHARED

    said, shared_kib = [], SHARED[tuple(map(int, capability.split(".")))]
    for name, (shared, spilled, registers, error) in found.items():
        if error:
            said.append(f"{name} does not compile: {error}")
        if shared > shared_kib * 1024:
            said.append(f"{name} takes {shared:,} bytes of shared memory, of which a block has {shared_kib * 1024:,}")
        if registers > REGISTERS:
            said.append(f"{name} takes {registers:,} registers, of which a block has {REGISTERS:,}")
        if spilled > (limit := KNOWN.get((capability, name), SPILLED)):
            said.append(f"{name} spills {spilled:,} bytes per thread, more than {limit:,}")
    return said


def audit(capability: str, quick: bool = False) -> dict[str, Found]:
    """What each kernel takes at most over dtypes and sizes, from a process of its own. quick: fewer of these."""
    command = [sys.executable, __file__, "--compile", capability, *(["--quick"] if quick else [])]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HNET_GPU": CARDS[capability]})
    if run.returncode:
        raise SystemExit(run.stderr)
    return {name: Found(*values) for name, values in json.loads(run.stdout).items()}


# -------------------------------------------------------------------------------- in the process that compiles for one


def compile_all(capability: str, quick: bool) -> dict[str, Found]:
    """With a driver that compiles and launches nothing."""
    import torch
    import triton
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from hnet_kernels.cards import Properties
    from hnet_runtime.steps.compile_ahead import compiles_for

    major, minor = map(int, capability.split("."))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    found: dict[str, Found] = {}
    measured: dict[str, tuple[int, int]] = {}
    run = JITFunction.run

    def resources(cubin: bytes, key: str) -> tuple[int, int]:
        """(bytes of the stack, registers) of a thread."""
        if key not in measured:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            numbers = dict(re.findall(r"(REG|STACK):(\d+)", said))
            measured[key] = int(numbers["STACK"]), int(numbers["REG"])
        return measured[key]

    def compile_only(kernel, *args, grid, warmup, **options):
        dtype = "float32" if options.pop("_wide", state["wide"]) else "bfloat16"
        name = f"{kernel.__module__.rpartition('.')[2].removesuffix('_triton')}.{kernel.__name__} {dtype}"
        try:
            with silent_stderr():
                variant = run(kernel, *args, grid=grid, warmup=True, **options)
            spilled, registers = resources(variant.asm["cubin"], variant.hash)
            new = Found(variant.metadata.shared, spilled, registers * 32 * variant.metadata.num_warps)
        except Exception as error:  # of Triton's compiler, anything
            new = Found(0, 0, 0, f"{type(error).__name__} {str(error).strip().splitlines()[0]}")
        found[name] = new.worst(found[name]) if name in found else new

    state = {"wide": False}
    knobs.runtime.override_arch = None  # for imitated cards; here the target is the card's own
    compiles_for(Properties((major, minor), 132))
    JITFunction.run = compile_only
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        state["wide"] = dtype == torch.float32
        of_rows(dtype, quick)
        of_scan(dtype, quick)
        of_generation(dtype, quick)
    state["wide"] = False
    of_attention(quick)
    return found


@contextlib.contextmanager
def silent_stderr():
    """Without the pages of intermediate code that the compiler's C++ prints where it fails."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def of_rows(half, quick: bool) -> None:
    """All kernels but scan and attention, with the widths of the configs."""
    import torch

    from hnet_kernels import (
        adamw_triton,
        boundaries_triton,
        conv_triton,
        cross_entropy_triton,
        ema_triton,
        linear_triton,
        norm_triton,
        pointwise_triton,
        router_triton,
    )
    from hnet_kernels.boundaries import Chunks
    from hnet_kernels.gradients import PartialSums

    wide = torch.float32

    def new(*shape: int, dtype=half):
        return torch.zeros(*shape, dtype=dtype)

    T, C, N = 512, 100, 128
    split = half == torch.bfloat16
    position_T, start_C, chunk_T = new(T, dtype=torch.int32), torch.arange(C), new(T, dtype=torch.int64)
    ends = torch.tensor([0, C], dtype=torch.int32)
    for D, inner in ((512, 2688), (1536, 4096), (2048, 5504))[slice(1, 2) if quick else slice(None)]:
        residual, delta, weight, z_CD = new(T, D, dtype=wide), new(T, D), new(D), new(C, D, dtype=wide)
        linear_triton.few_rows(delta[:2], new(D, D), weight)
        sums = PartialSums()
        slots = [sums.slot(weight) for _ in range(2)]
        for before, slot in zip(((None, None), (delta, new(T, D, dtype=torch.int8) if split else None)), slots):
            *total, _, scale = norm_triton.add_norm_forward(*before, delta, weight, 1e-5)
            norm_triton.add_norm_backward(delta, *before, *total, scale, weight, slot)
            norm_triton.recompute_norm(*total, scale, weight)
        sums.total()
        p_T = router_triton.boundary_forward(delta, delta, position_T)
        router_triton.boundary_backward(p_T, delta, delta, position_T)
        router_triton.upsample_forward(z_CD, p_T, chunk_T, residual, half)
        router_triton.upsample_backward(delta, z_CD, p_T, chunk_T, start_C, None)
        router_triton.add_rows_(delta, start_C, new(C, D))
        for pad in (None, new(512)):
            router_triton.gather_rows(delta, start_C, pad)
        ema_triton.ema_backward(ema_triton.ema_forward(z_CD.to(half), p_T[:C], ends), z_CD, p_T[:C], z_CD, ends)
        both = new(T, 2 * inner)
        pointwise_triton.swiglu_backward(pointwise_triton.swiglu_forward(both), both)
        H = 2 * D // 64
        projected = new(T, 4 * D + 2 * N + H)
        z, xBC, _ = projected.split([2 * D, 2 * D + 2 * N, H], -1)
        taps, bias, gate = new(2 * D + 2 * N, 1, 4), new(2 * D + 2 * N), new(2 * D)
        after = conv_triton.conv_silu_forward(xBC, taps, bias, position_T)
        sums = PartialSums()
        slot = sums.slot(taps, bias)
        conv_triton.conv_silu_backward(after, xBC, taps, bias, position_T, slot, torch.empty_like(xBC))
        sums.total()
        y_TD = after[:, : 2 * D].contiguous()
        _, scale = norm_triton.gated_norm_forward(y_TD, z, gate, 1e-5)
        for recompute_x in (True, False):
            slot = PartialSums().slot(gate)
            norm_triton.gated_norm_backward(y_TD, y_TD, z, scale, gate, torch.empty_like(z), slot, recompute_x)
    ema_triton.sum_chunks(residual, start_C)
    router_triton.add_rows_(p_T[:, None], start_C, router_triton.gather_rows(p_T[:, None], start_C, None))
    found = Chunks.empty(p_T, documents=1)
    boundaries_triton.find_chunks(p_T, found.b_T, position_T, ends, found)
    boundaries_triton.add_mean_gradient(p_T, found.shares[1], ends)
    qkv, table = new(T, 3, 16, 64), new(T, 16, dtype=wide)
    for back in (False, True):
        pointwise_triton.rotate_(qkv, table, table, position_T, back)
    pointwise_triton.to_float32(delta)
    logits, labels, dloss = new(T, 256), new(T, dtype=torch.int64), torch.ones(())
    _, lse = cross_entropy_triton.cross_entropy_forward(logits, labels)
    cross_entropy_triton.cross_entropy_backward(dloss, logits, labels, lse)
    w, g, group = new(8, 1024, dtype=wide), new(8, 1024), new(8, dtype=torch.int32)
    adamw_triton.norms(g, torch.tensor([0, 8], dtype=torch.int32))
    rates, bias = new(2, 2, dtype=torch.float64), new(2, dtype=torch.float64)
    weights = ((w, None, None), (w, g, None), (None, g, g.to(torch.int16))) if split else ((w, None, None),)
    for held in weights:
        adamw_triton.adamw_(*held, g, w, w, group, rates, bias, dloss, dloss, (0.9, 0.95), 1e-8)


def of_scan(half, quick: bool) -> None:
    import torch

    from hnet_kernels import ssd_triton
    from hnet_kernels.gradients import PartialSums

    T, N, wide = 512, 128, torch.float32
    cu = torch.tensor([0, 100, T, T], dtype=torch.int32)
    for H in (48,) if quick else (16, 32, 48, 64, 3):
        x, B, C = torch.zeros(T, H * 64 + 2 * N, dtype=half).split([H * 64, N, N], -1)
        x, dt, A = x.unflatten(-1, (H, 64)), torch.zeros(T, H, dtype=wide), torch.zeros(H, dtype=wide)
        if not quick:
            y, saved = ssd_triton.scan_forward(x, dt, A, B, C, cu, A, save=True)
            ssd_triton.scan_backward(y, x, dt, A, B, C, cu, A, saved=saved)
            ssd_triton.scan_backward(y, x, dt, A, B, C, cu)
        raw = torch.zeros(T, H + 8, dtype=half)[:, 8:]
        y, saved = ssd_triton.scan_forward(x, raw, A, B, C, cu, A, save=True, bias_H=A)
        slot = PartialSums().slot(A, A, A)
        ssd_triton.scan_backward(y, x, raw, A, B, C, cu, A, saved=saved, bias_H=A, dweights=slot)


def of_attention(quick: bool) -> None:
    import torch

    from hnet_kernels import attention_triton

    T = 512
    order = attention_triton.tile_order(T, torch.tensor([0, 100, T, T], dtype=torch.int32))
    ways = ((64, 1023), (96, 1023)) if quick else ((64, -1), (64, 1023), (96, 1023), (128, -1), (128, 1023))
    for P, window in ways:
        qkv = torch.zeros(T, 3, 16, P, dtype=torch.bfloat16)
        o, lse = attention_triton.attention_forward(qkv, order, window)
        attention_triton.attention_backward(o, qkv, o, lse, order, window)


def of_generation(half, quick: bool) -> None:
    """The kernels of a step, for one text and for many."""
    import torch

    from hnet_kernels import generation_triton, sampling_triton
    from hnet_kernels.generation import MambaWeights
    from hnet_kernels.sampling import Events, SamplingRows

    N, cpu, wide = 128, torch.device("cpu"), torch.float32
    for B in (1,) if quick else (1, 64):
        new_B1, start_B = torch.ones(B, 1, dtype=torch.bool), torch.zeros(B, dtype=torch.int64)
        for D, heads, W in ((1536, 16, 1024),) if quick else ((512, 8, 64), (1536, 16, 1024), (2048, 16, 4096)):
            H, C = 2 * D // 64, 2 * D + 2 * N
            of_heads = torch.zeros(H, dtype=wide)
            taps, bias, norm = (torch.zeros(*shape, dtype=half) for shape in ((C, 1, 4), (C,), (2 * D,)))
            weights = MambaWeights(taps, bias, of_heads, of_heads, of_heads, norm)
            projected_BX, past_BWC = torch.zeros(B, 2 * D + C + H, dtype=half), torch.zeros(B, 3, C, dtype=half)
            h_BHPN = torch.zeros(B, H, 64, N, dtype=wide)
            generation_triton.mamba2_step(projected_BX, weights, past_BWC, h_BHPN, new_B1, 1e-5)
            ring, table = torch.zeros(B, W, heads, D // heads, dtype=half), torch.zeros(W, 16, dtype=wide)
            qkv_BX = torch.zeros(B, 3 * D, dtype=half)
            generation_triton.attention_step(qkv_BX, ring, ring.clone(), start_B, new_B1, table, table)
        rows, events = SamplingRows.new(B, 8, cpu), Events.new(4, B, 2, wide, cpu)
        sampling_triton.draw_rows(torch.zeros(B, 256, dtype=half), rows)
        sampling_triton.note_starts(events, 0, torch.zeros(B, 1, dtype=wide), new_B1, new_B1)
        sampling_triton.record(events, rows)


# ------------------------------------------------------------------------------------------------------------ the page


def table(found: dict[str, dict[str, Found]]) -> str:
    """Markdown: shared memory in KiB and spilled bytes of each kernel on each capability."""
    names = list(dict.fromkeys(name for kernels in found.values() for name in kernels))
    heads = [f"{capability} ({CARDS[capability]})" for capability in found]
    lines = ["| kernel | " + " | ".join(heads) + " |", "|-" * (1 + len(heads)) + "|"]
    for name in names:
        cells = []
        for kernels in found.values():
            one = kernels.get(name)
            cells.append(
                "" if one is None else f"{one.shared / 1024:.1f}" + (f", {one.spilled} spilled" * bool(one.spilled))
            )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass
class Audit:
    """Which kernels to compile."""

    capabilities: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[CAPABILITY ...]")] = ()
    """Compute capabilities, such as 8.6. By default all six."""
    quick: bool = False
    """In bfloat16 and a few sizes; the table of docs/CARDS.md stays as it is."""


def main(argv: list[str]) -> int:
    options = parse(Audit, argv, __doc__)
    quick, wanted = options.quick, options.capabilities or tuple(CARDS)
    if unknown := [word for word in wanted if word not in CARDS]:
        raise UserError(f"{unknown[0]}: expected compute capabilities of {', '.join(CARDS)}")
    found, said = {}, []
    for capability in wanted:
        found[capability] = audit(capability, quick)
        troubled = [f"{capability}: {sentence}" for sentence in troubles(found[capability], capability)]
        print(f"{capability}: {len(found[capability])} kernels, {len(troubled)} do not fit", flush=True)
        said += troubled
    print(table(found))
    print("\n".join(said))
    if wanted == tuple(CARDS) and not quick:
        before, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")
    return bool(said)


if __name__ == "__main__":
    if "--compile" in sys.argv:
        print(json.dumps(compile_all(sys.argv[2], "--quick" in sys.argv)))
    else:
        run(main)
