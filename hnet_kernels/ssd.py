"""The Mamba-2 recurrence (state-space duality, arXiv 2405.21060) over packed documents.

Legend: T tokens of all documents together, H heads, P channels per head, N state size, Q tokens per chunk, C chunks.

This file has the definition and the operation; the Triton kernels for GPUs are in ssd_triton.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from hnet_kernels import cards
from hnet_kernels.dispatch import dispatched, has_triton, takes_kernels, use_fast
from hnet_kernels.gradients import Slot

MIN_CHUNK = 32  # tokens; longer chunks mean more work inside chunks and less between them
MAX_CHUNKS = 256  # more than these are avoided by longer chunks: states pass from chunk to chunk one at a time


def document_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The document that each of `total` flat rows belongs to: int64 `(total,)`. Rows past the last document get B."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


class Decays(NamedTuple):
    """All decays for the scan of a batch; zero across documents."""

    sum_HCQ: Tensor  # float64: log decays summed from before a chunk to each of its tokens
    hidden_CQQ: Tensor  # bool: token j of a chunk is after token i or in another document
    to_end_CQH1: Tensor  # from a token to the end of its chunk; its own decay acts before its input is added
    from_start_CQH1: Tensor  # from before a chunk to a token
    across_CH1: Tensor  # from before a chunk to its end

    def within(self, h: int, dtype: torch.dtype) -> Tensor:
        """Head h's decays from token j to token i of each chunk, (C, Q, Q)."""
        sum_CQ = self.sum_HCQ[h]
        return _decay(sum_CQ[:, :, None] - sum_CQ[:, None, :], self.hidden_CQQ, dtype)


def _decay(log_decay: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """exp where not hidden, else 0; masked before exp, so that hidden values cannot overflow."""
    return log_decay.to(dtype, copy=True).masked_fill_(hidden, -torch.inf).exp_()


def _decays(log_a_TH: Tensor, cu_seqlens: Tensor, Q: int) -> Decays:
    """Sums of log decays are kept in float64: only their differences are used, small ones among large ones."""
    dtype = log_a_TH.dtype
    doc_CQ = document_ids(cu_seqlens, -(-len(log_a_TH) // Q) * Q).view(-1, Q)
    last_C1 = doc_CQ[:, -1:]
    before_C1 = pad(last_C1[:-1], (0, 0, 1, 0), value=-1)  # the document of the token before the chunk
    sum_CQH = _chunks(log_a_TH.double(), Q).cumsum(1)
    total_C1H = sum_CQH[:, -1:]
    return Decays(
        sum_CQH.permute(2, 0, 1).contiguous(),
        (doc_CQ[:, :, None] == doc_CQ[:, None, :]).tril_().logical_not_(),
        _decay(total_C1H - sum_CQH, (doc_CQ != last_C1)[..., None], dtype)[..., None],
        _decay(sum_CQH, (doc_CQ != before_C1)[..., None], dtype)[..., None],
        _decay(total_C1H[:, 0], last_C1 != before_C1, dtype)[..., None],
    )


def _chunks(x: Tensor, Q: int) -> Tensor:
    """(T, ...) -> (C, Q, ...), padded with zeros."""
    extra = -len(x) % Q
    return (pad(x, (0, 0) * (x.ndim - 1) + (0, extra)) if extra else x).unflatten(0, (-1, Q))


def _chunk_size(T: int) -> int:
    Q = MIN_CHUNK
    while T > Q * MAX_CHUNKS:
        Q *= 2
    return Q


def scan_forward(
    x_THP: Tensor, gain_TH: Tensor, log_a_TH: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """h_t = a_t h_{t-1} + gain_t x_t B_t^T and y_t = h_t C_t, with h = 0 before each document, as matrix products.

    Within a chunk of Q tokens y = (decay * (C B^T)) (gain * x); every chunk passes its last state on.
    x_THP, B_TN, C_TN: one floating dtype. gain_TH, log_a_TH (<= 0): float32 or float64, the dtype of the computation.
    Returns y_THP in x's dtype.
    """
    T, H, P = x_THP.shape
    Q, dtype = _chunk_size(T), gain_TH.dtype
    decays = _decays(log_a_TH, cu_seqlens, Q)
    x_CQHP = _chunks(x_THP * gain_TH[..., None], Q)
    B_CQN, C_CQN = (_chunks(t.to(dtype), Q) for t in (B_TN, C_TN))
    before_CNHP = _hand_on(_outer(B_CQN, x_CQHP * decays.to_end_CQH1), decays.across_CH1)
    y_CQHP = _inner(C_CQN, before_CNHP).mul_(decays.from_start_CQH1)
    scores_CQQ = C_CQN @ B_CQN.mT
    for h in range(H):  # one head at a time, whose (C, Q, Q) stays in a CPU's cache
        y_CQHP[:, :, h] += decays.within(h, dtype).mul_(scores_CQQ) @ x_CQHP[:, :, h]
    return y_CQHP.flatten(0, 1)[:T].to(x_THP.dtype)


# States are (C, N, H, P): all heads of a token are adjacent in memory, so one matrix product computes them all.


def _outer(v_CQN: Tensor, x_CQHP: Tensor) -> Tensor:
    """The sum over each chunk's tokens of v x^T, a state (C, N, H, P)."""
    return (v_CQN.mT @ x_CQHP.flatten(2)).unflatten(-1, x_CQHP.shape[2:])


def _inner(v_CQN: Tensor, state_CNHP: Tensor) -> Tensor:
    """Each token's v times its chunk's state, (C, Q, H, P)."""
    return (v_CQN @ state_CNHP.flatten(2)).unflatten(-1, state_CNHP.shape[2:])


def _inner_sum(x_CQHP: Tensor, state_CNHP: Tensor) -> Tensor:
    """The other side of `_inner`: each token's x times its chunk's state, summed over heads, (C, Q, N)."""
    return x_CQHP.flatten(2) @ state_CNHP.flatten(2).mT


def _hand_on(added_CNHP: Tensor, across_CH1: Tensor, backwards: bool = False) -> Tensor:
    """The state before each chunk, from what each chunk adds to the state and its decay across the chunk.

    Backwards: the gradient of the state after each chunk, from the gradients of the states before them.
    """
    state_CNHP = torch.empty_like(added_CNHP)
    added, across, state = added_CNHP.unbind(), across_CH1.unbind(), state_CNHP.unbind()
    order = range(len(state))[:: -1 if backwards else 1]
    state[order[0]].zero_()
    for c, following in zip(order, order[1:]):
        torch.addcmul(added[c], across[c], state[c], out=state[following])
    return state_CNHP


def scan_backward(
    dy_THP: Tensor,
    x_THP: Tensor,
    gain_TH: Tensor,
    log_a_TH: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scan_forward` for x, gain, log_a, B and C, each in its input's dtype; recomputes the states."""
    T, H, P = x_THP.shape
    Q, dtype = _chunk_size(T), gain_TH.dtype
    decays = _decays(log_a_TH, cu_seqlens, Q)
    x_CQHP, dy_CQHP = _chunks(x_THP * gain_TH[..., None], Q), _chunks(dy_THP.to(dtype), Q)
    B_CQN, C_CQN = (_chunks(t.to(dtype), Q) for t in (B_TN, C_TN))
    x_end_CQHP = x_CQHP * decays.to_end_CQH1
    before_CNHP = _hand_on(_outer(B_CQN, x_end_CQHP), decays.across_CH1)

    # the gradient of each chunk's state: from the chunk's own outputs and from those of later chunks
    dy_start_CQHP = dy_CQHP * decays.from_start_CQH1
    dafter_CNHP = _hand_on(_outer(C_CQN, dy_start_CQHP), decays.across_CH1, backwards=True)

    # log decays: each decay's gradient times the decay goes to the sum at its end and, negated, to the one at its start
    dx_CQHP = _inner(B_CQN, dafter_CNHP)
    to_end_CQH = (dx_CQHP * x_end_CQHP).sum(-1)
    from_start_CQH = _inner(C_CQN, before_CNHP).mul_(dy_start_CQHP).sum(-1)
    across_CH = (dafter_CNHP * before_CNHP).sum((1, 3)) * decays.across_CH1[..., 0]
    dsum_CQH = (from_start_CQH - to_end_CQH).double()
    dsum_CQH[:, -1] += to_end_CQH.sum(1) + across_CH

    dx_CQHP *= decays.to_end_CQH1
    scores_CQQ = C_CQN @ B_CQN.mT
    dscores_CQQ = torch.zeros_like(scores_CQQ)
    for h in range(H):
        within_CQQ = decays.within(h, dtype)
        dweights_CQQ = (dy_CQHP[:, :, h] @ x_CQHP[:, :, h].mT).mul_(within_CQQ)
        dscores_CQQ += dweights_CQQ
        dweights_CQQ *= scores_CQQ
        dsum_CQH[..., h] += dweights_CQQ.sum(-1) - dweights_CQQ.sum(-2)
        dx_CQHP[:, :, h] += within_CQQ.mul_(scores_CQQ).mT @ dy_CQHP[:, :, h]
    dC_CQN = dscores_CQQ @ B_CQN + _inner_sum(dy_start_CQHP, before_CNHP)
    dB_CQN = dscores_CQQ.mT @ C_CQN + _inner_sum(x_end_CQHP, dafter_CNHP)
    dlog_a_CQH = dsum_CQH.flip(1).cumsum(1).flip(1)  # a token's log decay is in the sums from it to the chunk's end

    dxg_THP = dx_CQHP.flatten(0, 1)[:T]
    dgain_TH = (dxg_THP * x_THP).sum(-1)
    dlog_a_TH, dB_TN, dC_TN = (t.flatten(0, 1)[:T] for t in (dlog_a_CQH, dB_CQN, dC_CQN))
    dx_THP = (dxg_THP * gain_TH[..., None]).to(x_THP.dtype)
    return dx_THP, dgain_TH, dlog_a_TH.to(dtype), dB_TN.to(B_TN.dtype), dC_TN.to(C_TN.dtype)


def _why_unsupported(x_THP: Tensor, B_TN: Tensor) -> str | None:
    """Why the kernels of ssd_triton.py cannot run on these, or None."""
    P, N = x_THP.shape[-1], B_TN.shape[-1]
    if not takes_kernels(x_THP.device.type):
        return "no CUDA device"
    if x_THP.dtype not in (torch.bfloat16, torch.float32):
        return f"dtype {str(x_THP.dtype).removeprefix('torch.')}"
    if P != 64:
        return f"headdim {P}, not 64"
    if N not in (16, 32, 64, 128):
        return f"d_state {N}, not 16, 32, 64 or 128"
    return cards.why_unsupported(x_THP.device) or (None if has_triton() else "no triton")


@dispatched
def ssd(x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mamba-2's scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t; h = 0 before each document.

    x_THP, B_TN, C_TN: one floating dtype, B and C shared by all heads. dt_TH (positive), A_H (negative): float32, or
    float64 with float64 inputs. cu_seqlens: int32 or int64 (B + 1,). Returns y_THP in x's dtype; the caller adds
    the skip D x and the gate. Saves only its inputs for the backward, which recomputes the states.
    """
    if use_fast("ssd", x_THP.device.type, x_THP.dtype, _why_unsupported(x_THP, B_TN)):
        from hnet_kernels import ssd_triton  # not above: triton is not everywhere

        return ssd_triton.scan_forward(x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens)[0]
    return scan_forward(x_THP, dt_TH, dt_TH * A_H, B_TN, C_TN, cu_seqlens).contiguous()


@torch.library.register_fake(ssd)
def _(x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens):
    return x_THP.new_empty(x_THP.shape)


@dispatched
def ssd_backward(
    dy_THP: Tensor, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `ssd` for x, dt, A, B and C, given the gradient dy_THP of its output."""
    if use_fast("ssd", x_THP.device.type, x_THP.dtype, _why_unsupported(x_THP, B_TN)):
        from hnet_kernels import ssd_triton

        return ssd_triton.scan_backward(dy_THP, x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens)[:5]
    dx_THP, dgain_TH, dlog_a_TH, dB_TN, dC_TN = scan_backward(dy_THP, x_THP, dt_TH, dt_TH * A_H, B_TN, C_TN, cu_seqlens)
    grads = (dx_THP, dgain_TH + dlog_a_TH * A_H, (dlog_a_TH * dt_TH).sum(0), dB_TN, dC_TN)
    return tuple(grad.contiguous() for grad in grads)


@torch.library.register_fake(ssd_backward)
def _(dy_THP, x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens):
    return tuple(t.new_empty(t.shape) for t in (x_THP, dt_TH, A_H, B_TN, C_TN))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


torch.library.register_autograd(
    ssd, lambda ctx, dy: (*ssd_backward(dy, *ctx.saved_tensors), None), setup_context=_setup
)


def mamba2_scan_forward(
    x_THP: Tensor,
    raw_TH: Tensor,
    bias_H: Tensor,
    A_log_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_H: Tensor,
    cu_seqlens: Tensor,
    save: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`ssd` as in Mamba-2, for callers that write their own backward: dt = softplus(raw + bias), A = -exp(A_log), and
    the result is y + D x.

    x_THP, raw_TH, B_TN, C_TN: one floating dtype; rows may be parts of longer rows. The others: at least float32.
    Returns y_THP and, where `save` is set, tensors that save `mamba2_scan_backward` the recomputation: mainly states,
    H P N elements per 64 tokens (32 in float32) in x's dtype. The definition returns none.
    """
    if use_fast("ssd", x_THP.device.type, x_THP.dtype, _why_unsupported(x_THP, B_TN)):
        from hnet_kernels import ssd_triton

        y_THP, saved = ssd_triton.scan_forward(x_THP, raw_TH, A_log_H, B_TN, C_TN, cu_seqlens, D_H, save, bias_H)
        return y_THP, tuple(saved or ())
    dt_TH = softplus(raw_TH.to(bias_H.dtype) + bias_H)
    y_THP = scan_forward(x_THP, dt_TH, -dt_TH * A_log_H.exp(), B_TN, C_TN, cu_seqlens)
    return (y_THP + D_H[:, None] * x_THP).to(x_THP.dtype), ()


def mamba2_scan_backward(
    dy_THP: Tensor,
    x_THP: Tensor,
    raw_TH: Tensor,
    bias_H: Tensor,
    A_log_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_H: Tensor,
    cu_seqlens: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    dweights: Slot,
    saved: Sequence[Tensor] = (),
) -> None:
    """Gradients of `mamba2_scan_forward`. Writes dx, dB, dC and draw to `out`, whose rows may be parts of longer rows,
    and fills the slot of the gradients of A_log, bias and D.

    `saved`: the tensors that the forward saved, or none; the bits are the same either way.
    """
    if use_fast("ssd", x_THP.device.type, x_THP.dtype, _why_unsupported(x_THP, B_TN)):
        from hnet_kernels import ssd_triton

        if ssd_triton.can_write(out[:3]):
            saved = ssd_triton.SavedScan(*saved) if saved else None
            ssd_triton.scan_backward(
                dy_THP, x_THP, raw_TH, A_log_H, B_TN, C_TN, cu_seqlens, D_H, out, saved, bias_H, dweights
            )
            return
    before_TH, A_H = raw_TH.to(bias_H.dtype) + bias_H, -A_log_H.exp()
    dx_THP, ddt_TH, dA_H, dB_TN, dC_TN = ssd_backward(dy_THP, x_THP, softplus(before_TH), A_H, B_TN, C_TN, cu_seqlens)
    draw_TH = ddt_TH * before_TH.sigmoid()
    for target, found in zip(out, (dx_THP + D_H[:, None] * dy_THP, dB_TN, dC_TN, draw_TH)):
        target.copy_(found)
    dweights.fill(dA_H * A_H, draw_TH.sum(0), (x_THP.to(D_H.dtype) * dy_THP).sum((0, 2)))
