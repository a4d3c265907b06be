"""Drawing the next byte of each sequence, which bytes keep a text valid UTF-8, and writing down what rows did.

Legend: B sequences, V = 256 bytes, N random numbers, S chunking stages, E steps. This file has the definitions and the
choice; the Triton kernels that run on a GPU are in sampling_triton.py.
"""

import dataclasses

import torch
from torch import Tensor

from hnet_kernels.dispatch import use_fast, why_unsupported

BYTES = 256
EOS = 0xFF  # which never occurs in UTF-8


def draw(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float | Tensor, top_k: int | Tensor, top_p: float | Tensor,
    min_p: float | Tensor, allowed_BV: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One byte for each row, int64 (B,), drawn from softmax(logits / temperature) through filters.

    temperature, top_k, top_p, min_p: see `Sampling` in hnet_simple.py; each one number, or a tensor (B, 1).
    uniform_B: float64 in [0, 1 - 2^-24]. allowed_BV: bool, what may be drawn.

    Inverts the cumulative distribution in the order of the bytes, so a draw depends on its own row alone.
    """
    logits_BV = logits_BV[:, :BYTES].double()
    if allowed_BV is not None:
        logits_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
    for_each = isinstance(temperature, Tensor)
    if not for_each and temperature == 0:
        return logits_BV.argmax(-1)
    heat = torch.where(temperature > 0, temperature, 1.0) if for_each else temperature
    prob_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / heat).softmax(-1)
    if for_each or top_k or top_p < 1 or min_p > 0:
        sorted_BV, order_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(BYTES, device=logits_BV.device)
        keep_BV = sorted_BV >= min_p * sorted_BV[:, :1]
        keep_BV &= (sorted_BV.cumsum(-1) - sorted_BV < top_p) | (rank_V == 0)
        if for_each or top_k:
            keep_BV &= (rank_V < top_k) | (rank_V < 1) if not for_each else (rank_V < top_k) | (top_k == 0)
        prob_BV = torch.zeros_like(prob_BV).scatter_(1, order_BV, sorted_BV * keep_BV)
    sum_BV = prob_BV.cumsum(-1)
    drawn_B = (sum_BV <= uniform_B[:, None] * sum_BV[:, -1:]).sum(-1)
    return torch.where(temperature[:, 0] > 0, drawn_B, logits_BV.argmax(-1)) if for_each else drawn_B


# -------------------------------------------------------------------------------------------------------------- UTF-8
#
# An automaton over bytes (the table of well-formed sequences in the Unicode standard, section 3.9): state 0 is between
# characters, 1 to 3 wait for that many continuation bytes, 4 to 7 for those after E0, ED, F0 and F4, which rule out
# overlong forms, surrogates and what lies past U+10FFFF. State 8 allows any bytes.

UTF8_MISSING = torch.tensor([0, 1, 2, 3, 2, 2, 3, 3])  # bytes to the end of the character
ANY_BYTES = 8


def _utf8_next() -> Tensor:
    """int64 (8, 256): the state after a byte, -1 where the byte cannot come."""
    table = torch.full((8, 256), -1)
    leads = [(0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEF, 2), (0xED, 0xED, 5)]
    leads += [(0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7)]
    continuations = {1: (0x80, 0xBF, 0), 2: (0x80, 0xBF, 1), 3: (0x80, 0xBF, 2), 4: (0xA0, 0xBF, 1)}
    continuations |= {5: (0x80, 0x9F, 1), 6: (0x90, 0xBF, 2), 7: (0x80, 0x8F, 2)}
    for state, first, last, then in [(0, *lead) for lead in leads] + [(s, *row) for s, row in continuations.items()]:
        table[state, first : last + 1] = then
    return table


UTF8_NEXT = _utf8_next()


def utf8_state(data: bytes) -> int:
    """The automaton's state after `data`; what is not UTF-8 is skipped, a character cut off at the end is awaited."""
    state = 0
    for byte in data[-3:]:  # a character that is cut off has at most three
        state = int(UTF8_NEXT[state, byte])
        state = max(int(UTF8_NEXT[0, byte]), 0) if state < 0 else state
    return state


def guard_tables() -> tuple[Tensor, Tensor]:
    """allowed: bool (5, 9, 256), by the bytes left, this one included (4 is plenty), and the automaton's state: does
    the text decode if it is cut then? EOS may come between characters. next: int64 (9, 256), the state after a byte."""
    missing = torch.where(UTF8_NEXT >= 0, UTF8_MISSING[UTF8_NEXT], 9)
    allowed = torch.stack([missing < left for left in range(5)])
    allowed[1:, 0, EOS] = True
    anything = torch.ones(5, 1, BYTES, dtype=torch.bool)
    after = torch.cat([UTF8_NEXT.clamp_min(0), torch.full((1, BYTES), ANY_BYTES)])
    return torch.cat([allowed, anything], 1), after


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass
class SamplingRows:
    """How each row of a batch draws its next bytes, on the device; `draw_rows` brings it up to date."""

    temperature_B: Tensor  # float64; the next three as well, but for top_k: int64
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    noise_BN: Tensor  # float64: number n of a row is in column n mod N
    drawn_B: Tensor  # int64: numbers used
    left_B: Tensor  # int64: bytes that the text may still get
    utf8_B: Tensor  # int64: the automaton's state
    stops_B: Tensor  # bool: does EOS end the text?
    active_B: Tensor  # bool: has the row a text?
    byte_B: Tensor  # int64: what was drawn last
    log_probability_B: Tensor  # float32: of that byte, in nats, by the model's logits as they are
    allowed_LXV: Tensor
    next_XV: Tensor
    scratch_BV: Tensor  # float64

    @classmethod
    def new(cls, B: int, numbers: int, device: torch.device) -> "SamplingRows":
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(B, dtype=dtype, device=device)

        f64, i64 = torch.float64, torch.int64
        noise_BN = torch.zeros(B, numbers, dtype=f64, device=device)
        allowed, after = (table.to(device) for table in guard_tables())
        return cls(
            *(zeros(dtype) for dtype in (f64, i64, f64, f64)), noise_BN, *(zeros(i64) for _ in range(3)),
            zeros(torch.bool), zeros(torch.bool), zeros(i64), zeros(torch.float32), allowed, after,
            torch.empty(B, BYTES, dtype=f64, device=device),
        )  # fmt: skip


def _fast(operation: str, rows: SamplingRows) -> bool:
    like = rows.log_probability_B  # whatever the dtype of the model
    return use_fast(operation, like.device.type, like.dtype, why_unsupported(like))


def draw_rows(logits_BV: Tensor, rows: SamplingRows, sampling: tuple | None = None) -> None:
    """Draw a byte for each active row. Rows that are not active keep everything.

    sampling: temperature, top_k, top_p and min_p where the caller knows that all rows share them.
    """
    dtype = logits_BV.dtype
    if _fast("draw_rows", rows):
        from hnet_kernels import sampling_triton  # not above: triton is not everywhere

        return sampling_triton.draw_rows(logits_BV, rows)
    uniform_B = rows.noise_BN.gather(1, (rows.drawn_B % rows.noise_BN.shape[1])[:, None])[:, 0]
    allowed_BV = rows.allowed_LXV[rows.left_B.clamp_max(4), rows.utf8_B]
    allowed_BV[:, EOS].logical_and_(rows.stops_B | (rows.utf8_B == ANY_BYTES))
    options = sampling or [x[:, None] for x in (rows.temperature_B, rows.top_k_B, rows.top_p_B, rows.min_p_B)]
    byte_B = draw(logits_BV, uniform_B, *options, allowed_BV)
    chosen_B1 = byte_B.clamp_max(BYTES - 1)[:, None]
    log_probability_BV = logits_BV[:, :BYTES].to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
    log_probability_B = log_probability_BV.gather(1, chosen_B1)[:, 0].float()
    torch.where(rows.active_B, log_probability_B, rows.log_probability_B, out=rows.log_probability_B)
    torch.where(rows.active_B, chosen_B1[:, 0], rows.byte_B, out=rows.byte_B)
    torch.where(rows.active_B, rows.next_XV[rows.utf8_B, rows.byte_B], rows.utf8_B, out=rows.utf8_B)
    rows.drawn_B += rows.active_B
    rows.left_B -= rows.active_B.to(rows.left_B.dtype)


# -------------------------------------------------------------------------------------------------------------- events


@dataclasses.dataclass
class Events:
    """What each row did in each of the last steps, and in the present one, on the device."""

    starts_BS: Tensor  # bool: does the byte of this step open a chunk of stage s?
    p_BS: Tensor  # its p, zero in stages that it does not reach
    begins_S: Tensor  # bool: does a chunk begin in any row?
    past_EBX: Tensor  # by step: the byte, -1 in a row that is not active; its log-probability; starts; p
    written: Tensor  # int64 (1,): steps in past_EBX

    @classmethod
    def new(cls, E: int, B: int, S: int, dtype: torch.dtype, device: torch.device) -> "Events":
        return cls(
            torch.zeros(B, S, dtype=torch.bool, device=device),
            torch.zeros(B, S, dtype=dtype, device=device),
            torch.zeros(S, dtype=torch.bool, device=device),
            torch.zeros(E, B, 2 + 2 * S, dtype=dtype, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )


def note_starts(events: Events, s: int, p_B1: Tensor, opens_B1: Tensor, new_B1: Tensor, rows: SamplingRows) -> None:
    """What the router of stage s has decided on the rows in new_B1, those that have a new token."""
    if _fast("note_starts", rows):
        from hnet_kernels import sampling_triton

        return sampling_triton.note_starts(events, s, p_B1, opens_B1, new_B1)
    if s == 0:
        events.starts_BS.zero_()
        events.p_BS.zero_()
    events.starts_BS[:, s] = opens_B1[:, 0]
    events.p_BS[:, s] = torch.where(new_B1, p_B1, 0)[:, 0]
    events.begins_S[s] = opens_B1.any()


def record(events: Events, rows: SamplingRows) -> None:
    """The step is done: writes it down, and ends rows that have drawn EOS or their last byte."""
    if _fast("record", rows):
        from hnet_kernels import sampling_triton

        return sampling_triton.record(events, rows)
    byte_B = torch.where(rows.active_B, rows.byte_B, -1)
    columns = [byte_B[:, None], rows.log_probability_B[:, None], events.starts_BS, events.p_BS]
    events.past_EBX.index_copy_(0, events.written, torch.cat(columns, dim=1)[None])
    events.written += 1
    rows.active_B &= (rows.left_B > 0) & ~((byte_B == EOS) & rows.stops_B)
