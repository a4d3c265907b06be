"""The kernels of generation_triton.py, sampling_triton.py and linear_triton.py against the definitions.

Without a GPU they run under Triton's interpreter, in a process of its own: this file, run as a script, prints what
`CASES` find. See test_ssd_triton.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hnet_kernels import generation, sampling  # noqa: E402
from hnet_trainable import rotary_tables  # noqa: E402

# sums of some hundred float32 terms; bf16 rounds inputs of sums and every output by up to 2^-9
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


class Inputs:
    def __init__(self, dtype: torch.dtype, device: str):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device

    def __call__(self, *shape: int, wide: bool = False, around: float = 0.0, scale: float = 1.0) -> Tensor:
        values = around + scale * torch.randn(*shape, generator=self.generator)
        return values.to(self.device, torch.float32 if wide else self.dtype)

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def span(self, starts: list[int], active: list[bool], R: int, M: int = 512) -> generation.Span:
        start_B, active_B1 = torch.tensor(starts, device=self.device), torch.tensor(active, device=self.device)[:, None]
        tables = rotary_tables(M, 2 * R, torch.float32, torch.device(self.device))
        return generation.Span(start_B, active_B1[:, 0].long(), active_B1, max(starts), *tables)


Pairs = dict[str, tuple[Tensor, Tensor]]


def mamba(new: Inputs, B: int, H: int, P: int, N: int, taps: int, optional: bool) -> Pairs:
    from hnet_kernels import generation_triton

    D, C = H * P, H * P + 2 * N
    weights = generation.MambaWeights(
        new(C, 1, taps, scale=0.5), new(C, scale=0.3), new(H, wide=True, around=-2) if optional else None,
        new(H, wide=True), new(H, wide=True, around=1) if optional else None, new(D, around=1, scale=0.1),
    )  # fmt: skip
    projected, span = new(B, D + C + H), new.span([5] * B, [b != 1 for b in range(B)], 0)
    state = generation.MambaState(new(B, taps - 1, C), new(B, H, P, N, wide=True))
    conv, ssm = state.conv_BWC.clone(), state.ssm_BHPN.clone()
    before = conv.clone(), ssm.clone()
    y = generation_triton.mamba2_step(projected, weights, conv, ssm, span.valid_BL, 1e-5)
    wanted = generation._mamba2_step(projected, weights, state, span, 1e-5)
    if B > 1:
        assert torch.equal(conv[1], before[0][1]) and torch.equal(ssm[1], before[1][1]) and not y[1].any()
        wanted[1] = 0
    return {"y": (y, wanted), "conv": (conv, state.conv_BWC), "ssm": (ssm, state.ssm_BHPN)}


def attend(new: Inputs, starts: list[int], H: int, P: int, R: int, W: int) -> Pairs:
    from hnet_kernels import generation_triton

    B = len(starts)
    qkv, span = new(B, 3 * H * P), new.span(starts, [b != 1 for b in range(B)], R)
    state = generation.KVState(new(B, W, H, P), new(B, W, H, P), W - 1)
    k, v = state.k_BWHP.clone(), state.v_BWHP.clone()
    before = k.clone()
    tables = span.cos_MR, span.sin_MR
    o = generation_triton.attention_step(qkv, k, v, span.start_B, span.valid_BL, *tables)
    wanted = generation._attention_step(qkv, H, state, span)
    if B > 1:
        assert torch.equal(k[1], before[1]) and not o[1].any()
        wanted[1], state.k_BWHP[1], state.v_BWHP[1] = 0, k[1], v[1]
    return {"o": (o, wanted), "k": (k, state.k_BWHP), "v": (v, state.v_BWHP)}


def few_rows(new: Inputs, T: int, inputs: int, outputs: int) -> Pairs:
    from hnet_kernels import linear_triton

    x, weight, bias = new(T, inputs), new(outputs, inputs, scale=0.1), new(outputs)
    wanted = x.double() @ weight.double().T
    found = linear_triton.few_rows(x, weight)
    with_bias = linear_triton.few_rows(x, weight, bias)
    return {"y": (found, wanted), "y with bias": (with_bias, wanted + bias.double())}


def draws(new: Inputs, steps: int) -> Pairs:
    """Rows of all kinds of options, some of them not active, over some steps: the same bytes and states."""
    from hnet_kernels import sampling_triton

    options = [(0, 0, 1, 0), (1, 0, 1, 0), (0.7, 5, 1, 0), (1.3, 0, 0.6, 0), (1, 0, 1, 0.1), (2, 40, 0.9, 0.02)] * 2
    B = len(options) + 2
    columns = [torch.tensor(column, device=new.device) for column in zip(*options, *[(1, 0, 1, 0)] * 2)]
    pair = []
    for _ in range(2):
        rows = sampling.SamplingRows.new(B, 8, torch.device(new.device))
        for name, column in zip(("temperature_B", "top_k_B", "top_p_B", "min_p_B"), columns):
            getattr(rows, name).copy_(column)
        rows.noise_BN.copy_(torch.rand(B, 8, generator=torch.Generator().manual_seed(1)).double())
        rows.left_B += steps
        rows.utf8_B[B // 2 :] = sampling.ANY_BYTES
        rows.stops_B[::3] = True
        rows.active_B[: B - 1] = True
        pair.append(rows)
    names = ("byte_B", "drawn_B", "left_B", "utf8_B", "log_probability_B")
    found = {name: ([], []) for name in names}
    for _ in range(steps):
        logits = new(B, 256, scale=3)
        sampling_triton.draw_rows(logits, pair[0])
        sampling.draw_rows(logits.cpu(), pair[1]) if new.device == "cpu" else _definition(logits, pair[1])
        for name in names:
            for rows, values in zip(pair, found[name]):
                values.append(getattr(rows, name).clone())
    return {name: tuple(torch.stack(values).double() for values in both) for name, both in found.items()}


def _definition(logits: Tensor, rows: sampling.SamplingRows) -> None:
    copies = sampling.SamplingRows(*(x.cpu() for x in vars(rows).values()))
    sampling.draw_rows(logits.cpu(), copies)
    for name, x in vars(copies).items():
        getattr(rows, name).copy_(x)


def bookkeeping(new: Inputs, B: int, S: int) -> Pairs:
    """Three steps of rows that end one after the other."""
    from hnet_kernels import sampling_triton

    both = []
    for device in (torch.device("cpu"), torch.device(new.device)):  # the definition, the kernels
        rows = sampling.SamplingRows.new(B, 8, device)
        rows.left_B += torch.arange(B, device=device)
        rows.active_B |= True
        rows.stops_B[::2] = True
        both.append((sampling.Events.new(4, B, S, torch.float32, device), rows))
    for _ in range(3):
        byte_B, p_B2S = new.whole(2, B) + sampling.EOS - 1, new(B, 2, S, wide=True)
        for kernels, (events, rows) in zip((sampling, sampling_triton), both):
            device = rows.left_B.device
            rows.byte_B.copy_(byte_B)
            rows.left_B -= 1
            new_B1 = rows.active_B[:, None].clone()
            for s in range(S):
                p_B1 = p_B2S.to(device)[:, 1, s, None]
                opens_B1 = ((p_B1 > 0) & new_B1).clone()
                kernels.note_starts(events, s, p_B1, opens_B1, new_B1, *([rows] * (kernels is sampling)))
                new_B1 = opens_B1
            kernels.record(events, rows)
    (events, rows), (our_events, our_rows) = both
    found = {name: (x.cpu().double(), vars(events)[name].double()) for name, x in vars(our_events).items()}
    return found | {"active": (our_rows.active_B.cpu().double(), rows.active_B.double())}


CASES = {
    "mamba": (mamba, 3, 4, 16, 16, 4, True),
    "mamba, one row": (mamba, 1, 2, 16, 8, 2, False),
    "mamba, many blocks": (mamba, 2, 2, 8, 12, 4, True),
    "attention": (attend, [0, 3, 7, 70], 2, 16, 4, 128),
    "attention, turned rings": (attend, [200, 3, 99, 100, 101], 2, 24, 8, 100),
    "attention without rotary": (attend, [9], 3, 16, 0, 16),
    "attention in parts": (attend, [0, 5, 100, 300, 511], 1, 16, 4, 512),
    "few rows": (few_rows, 1, 96, 40),
    "two rows": (few_rows, 2, 1100, 7),
    "draws": (draws, 6),
    "bookkeeping": (bookkeeping, 5, 2),
    "bookkeeping of one row": (bookkeeping, 1, 1),
}
LARGE = {
    "mamba as in hnet_1stage_L": (mamba, 4, 32, 64, 128, 4, True),
    "mamba of 64 rows": (mamba, 64, 16, 64, 128, 4, True),
    "attention as in hnet_1stage_L": (attend, [500, 3, 17, 256], 16, 96, 24, 512),
    "attention in parts as in hnet_1stage_L": (attend, [500], 16, 96, 24, 512),
    "rows as in hnet_1stage_L": (few_rows, 1, 1536, 8192),
    "rows as in hnet_2stage_XL": (few_rows, 2, 5504, 2048),
}


def distances(case: tuple, dtype: torch.dtype, device: str) -> dict[str, float]:
    build, *args = case
    found = {}
    for name, (ours, wanted) in build(Inputs(dtype, device), *args).items():
        gap = (ours.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9)
        found[name] = gap.nan_to_num(nan=torch.inf).item()
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels(interpreted, name):
    for what, distance in interpreted[name].items():
        assert distance < TOLERANCE[torch.float32], (what, distance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_kernels(name, dtype):
    for what, distance in distances((CASES | LARGE)[name], dtype, "cuda").items():
        assert distance < TOLERANCE[dtype], (what, distance)


if __name__ == "__main__":
    print(json.dumps({name: distances(case, torch.float32, "cpu") for name, case in CASES.items()}))
