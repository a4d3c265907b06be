"""The Mamba-2 recurrence (state-space duality, arXiv 2405.21060) over packed documents.

Legend: T tokens of all documents together, H heads, P channels a head, N state size, Q tokens a chunk, C chunks.

This file has the definition and the operation; the Triton kernels that it runs on a GPU are in ssd_triton.py.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hnet_kernels.dispatch import use_fast

MIN_CHUNK = 32  # tokens; the work inside a chunk grows with it, the work between chunks shrinks
MAX_CHUNKS = 1024  # beyond this many the chunks get longer, so that the (C, C) matrix between them stays small


def document_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The document that each of `total` flat rows belongs to: int64 `(total,)`. Rows past the last document get B."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


class Decays(NamedTuple):
    """All decays that the scan of a batch needs, zero where they would cross from one document to another."""

    within_CHQQ: Tensor  # from token j to token i of a chunk; its own decay acts before a token's input is added
    to_end_CHQ: Tensor  # from a token to the end of its chunk
    from_start_CHQ: Tensor  # from before a chunk to a token
    carried_HCC: Tensor  # from the end of chunk m to before chunk n


def _decays(log_a_TH: Tensor, cu_seqlens: Tensor, Q: int) -> Decays:
    """Sums of log decays are kept in float64: only their differences are used, small ones among large ones."""

    def decay(log_decay: Tensor, allowed: Tensor) -> Tensor:
        # masked before exp, so that what is not allowed cannot overflow
        return log_decay.to(log_a_TH.dtype).masked_fill_(~allowed, -torch.inf).exp_()

    doc_CQ = document_ids(cu_seqlens, -(-len(log_a_TH) // Q) * Q).view(-1, Q)
    first_C, last_C = doc_CQ[:, 0], doc_CQ[:, -1]
    sum_CHQ = _chunks(log_a_TH.double(), Q).cumsum(1).transpose(1, 2)  # from before the chunk to each token
    total_HC = sum_CHQ[..., -1].T.cumsum(-1)  # from before everything to the end of each chunk
    same_CQQ = doc_CQ[:, :, None] == doc_CQ[:, None, :]
    follows_CC = (first_C[:, None] == last_C).tril(-1)
    return Decays(
        decay(sum_CHQ[..., :, None] - sum_CHQ[..., None, :], same_CQQ.tril()[:, None]),
        decay(sum_CHQ[..., -1:] - sum_CHQ, (doc_CQ == last_C[:, None])[:, None]),
        decay(sum_CHQ.clone(), (doc_CQ == first_C[:, None])[:, None]),
        decay(pad(total_HC, (1, -1))[:, :, None] - total_HC[:, None, :], follows_CC),
    )


def _chunks(x: Tensor, Q: int) -> Tensor:
    """(T, ...) -> (C, Q, ...), filled up with zeros."""
    extra = -len(x) % Q
    return pad(x, (0, 0) * (x.ndim - 1) + (0, extra)).unflatten(0, (-1, Q))


def _chunk_size(T: int) -> int:
    Q = MIN_CHUNK
    while T > Q * MAX_CHUNKS:
        Q *= 2
    return Q


def scan_forward(
    x_THP: Tensor, gain_TH: Tensor, log_a_TH: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """h_t = a_t h_{t-1} + gain_t x_t B_t^T and y_t = h_t C_t, with h = 0 before each document, as matrix products.

    Within a chunk of Q tokens y = (decay * (C B^T)) (gain * x); every chunk hands its last state on.
    x_THP, B_TN, C_TN: one floating dtype. gain_TH, log_a_TH (<= 0): float32 or float64, the dtype of the arithmetic.
    Returns y_THP in x's dtype.
    """
    Q, dtype = _chunk_size(len(x_THP)), gain_TH.dtype
    decays = _decays(log_a_TH, cu_seqlens, Q)
    x_CHQP = _chunks(x_THP.to(dtype) * gain_TH[..., None], Q).transpose(1, 2)
    B_C1QN, C_C1QN = (_chunks(t.to(dtype), Q)[:, None] for t in (B_TN, C_TN))
    y_CHQP = (decays.within_CHQQ * (C_C1QN @ B_C1QN.mT)) @ x_CHQP
    y_CHQP += (C_C1QN @ _states(decays, x_CHQP, B_C1QN)[1].mT) * decays.from_start_CHQ[..., None]
    return y_CHQP.transpose(1, 2).flatten(0, 1)[: len(x_THP)].to(x_THP.dtype)


def _states(decays: Decays, x_CHQP: Tensor, B_C1QN: Tensor) -> tuple[Tensor, Tensor]:
    """(what each chunk adds to the state, the state before each chunk), both (C, H, P, N)."""
    added_CHPN = (x_CHQP * decays.to_end_CHQ[..., None]).mT @ B_C1QN
    return added_CHPN, _carry(decays.carried_HCC, added_CHPN)


def _carry(carried_HCC: Tensor, state_CHPN: Tensor) -> Tensor:
    flat_HCX = state_CHPN.flatten(2).transpose(0, 1)
    return (carried_HCC @ flat_HCX).transpose(0, 1).view(state_CHPN.shape)


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
    T, Q, dtype = len(x_THP), _chunk_size(len(x_THP)), gain_TH.dtype
    decays = _decays(log_a_TH, cu_seqlens, Q)
    x_CHQP = _chunks(x_THP.to(dtype) * gain_TH[..., None], Q).transpose(1, 2)
    dy_CHQP = _chunks(dy_THP.to(dtype), Q).transpose(1, 2)
    B_C1QN, C_C1QN = (_chunks(t.to(dtype), Q)[:, None] for t in (B_TN, C_TN))
    added_CHPN, before_CHPN = _states(decays, x_CHQP, B_C1QN)

    # what reaches each chunk's state: from its own outputs, and from those of the chunks it is carried to
    dy_start_CHQP = dy_CHQP * decays.from_start_CHQ[..., None]
    dbefore_CHPN = dy_start_CHQP.mT @ C_C1QN
    dadded_CHPN = _carry(decays.carried_HCC.mT, dbefore_CHPN)

    weights_CHQQ = decays.within_CHQQ * (C_C1QN @ B_C1QN.mT)
    dweights_CHQQ = dy_CHQP @ x_CHQP.mT
    dscores_C1QQ = (decays.within_CHQQ * dweights_CHQQ).sum(1, keepdim=True)
    dx_end_CHQP = (B_C1QN @ dadded_CHPN.mT) * decays.to_end_CHQ[..., None]
    dx_CHQP = weights_CHQQ.mT @ dy_CHQP + dx_end_CHQP
    x_end_CHQP = x_CHQP * decays.to_end_CHQ[..., None]
    dC_C1QN = dscores_C1QQ @ B_C1QN + (dy_start_CHQP @ before_CHPN).sum(1, keepdim=True)
    dB_C1QN = dscores_C1QQ.mT @ C_C1QN + (x_end_CHQP @ dadded_CHPN).sum(1, keepdim=True)

    # log decays: each decay's gradient times the decay goes to the sum at its end and, negated, to the one at its start
    flow_CHQQ = (weights_CHQQ * dweights_CHQQ).double()
    dsum_CHQ = flow_CHQQ.sum(-1) - flow_CHQQ.sum(-2)
    to_end_CHQ = (x_CHQP * dx_end_CHQP).double().sum(-1)
    dsum_CHQ -= to_end_CHQ
    dsum_CHQ += (dy_start_CHQP * (C_C1QN @ before_CHPN.mT)).double().sum(-1)
    dsum_CHQ[..., -1] += to_end_CHQ.sum(-1)
    # a chunk's whole decay scales the state before it on its way to the state after it
    passed_CH = (dadded_CHPN * before_CHPN).double().sum((-1, -2)) * decays.from_start_CHQ[..., -1]
    dsum_CHQ[..., -1] += passed_CH
    dlog_a_TH = _sum_from_here(dsum_CHQ).transpose(1, 2).flatten(0, 1)[:T]

    dxg_THP = dx_CHQP.transpose(1, 2).flatten(0, 1)[:T]
    dgain_TH = (dxg_THP * x_THP.to(dtype)).sum(-1)
    dB_TN, dC_TN = (t.flatten(0, 2)[:T].to(B_TN.dtype) for t in (dB_C1QN, dC_C1QN))
    return (dxg_THP * gain_TH[..., None]).to(x_THP.dtype), dgain_TH, dlog_a_TH.to(dtype), dB_TN, dC_TN


def _sum_from_here(x: Tensor) -> Tensor:
    """Sums of each element and all after it along the last dimension."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _obstacle(x_THP: Tensor, B_TN: Tensor) -> str | None:
    """Why the kernels of ssd_triton.py cannot run on these, or None."""
    P, N = x_THP.shape[-1], B_TN.shape[-1]
    if x_THP.device.type != "cuda":
        return "no CUDA device"
    if x_THP.dtype not in (torch.bfloat16, torch.float32):
        return f"dtype {str(x_THP.dtype).removeprefix('torch.')}"
    if P != 64:
        return f"headdim {P}, not 64"
    if N not in (16, 32, 64, 128):
        return f"d_state {N}, not 16, 32, 64 or 128"
    capability = torch.cuda.get_device_capability(x_THP.device)
    if capability[0] != 9:  # elsewhere they need more registers or shared memory than there is, or nobody has tried
        return f"compute capability {capability[0]}.{capability[1]}, not 9.x"
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    return None


@torch.library.custom_op("hnet::ssd", mutates_args=())
def ssd(x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mamba-2's scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t; h = 0 before each document.

    x_THP, B_TN, C_TN: one floating dtype, B and C shared by all heads. dt_TH (positive), A_H (negative): float32, or
    float64 with float64 inputs. cu_seqlens: int32 or int64 (B + 1,). Returns y_THP in x's dtype; the skip D x and the
    gate are the caller's. Keeps only its inputs for the backward, which computes the states again.
    """
    if use_fast("ssd", x_THP.device.type, x_THP.dtype, _obstacle(x_THP, B_TN)):
        from hnet_kernels import ssd_triton  # not above: triton is not everywhere

        return ssd_triton.scan_forward(x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens)
    return scan_forward(x_THP, dt_TH, dt_TH * A_H, B_TN, C_TN, cu_seqlens).contiguous()


@ssd.register_fake
def _(x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens):
    return x_THP.new_empty(x_THP.shape)


@torch.library.custom_op("hnet::ssd_backward", mutates_args=())
def ssd_backward(
    dy_THP: Tensor, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `ssd` for x, dt, A, B and C, given the gradient dy_THP of its output."""
    if use_fast("ssd", x_THP.device.type, x_THP.dtype, _obstacle(x_THP, B_TN)):
        from hnet_kernels import ssd_triton

        return ssd_triton.scan_backward(dy_THP, x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens)
    dx_THP, dgain_TH, dlog_a_TH, dB_TN, dC_TN = scan_backward(dy_THP, x_THP, dt_TH, dt_TH * A_H, B_TN, C_TN, cu_seqlens)
    grads = (dx_THP, dgain_TH + dlog_a_TH * A_H, (dlog_a_TH * dt_TH).sum(0), dB_TN, dC_TN)
    return tuple(grad.contiguous() for grad in grads)


@ssd_backward.register_fake
def _(dy_THP, x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens):
    return tuple(t.new_empty(t.shape) for t in (x_THP, dt_TH, A_H, B_TN, C_TN))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


ssd.register_autograd(lambda ctx, dy: (*ssd_backward(dy, *ctx.saved_tensors), None), setup_context=_setup)
