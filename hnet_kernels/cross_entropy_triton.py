"""The Triton kernels of cross_entropy.py, where the definitions are.

Legend: T tokens, V classes. The kernels are bound by memory: the forward reads the logits, the backward
reads them and writes their gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels.launch import cdiv, kernel, next_power_of_2, on_device_of
from hnet_kernels.triton_math import LOG2_E

TILE = 2048  # elements of rows per thread block


@triton.jit
def _logits(logits_ptr, t, v, T, V):
    inside = (t < T)[:, None] & (v < V)[None, :]
    at = t.to(tl.int64)[:, None] * V + v[None, :]
    return tl.load(logits_ptr + at, mask=inside, other=-float("inf")).to(tl.float32), at, inside


@kernel(do_not_specialize=["T"])
def _forward(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, T, V: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v = tl.arange(0, BLOCK_V)
    logits, _, _ = _logits(logits_ptr, t, v, T, V)
    label = tl.load(labels_ptr + t, mask=t < T, other=0)
    most = tl.maximum(tl.max(logits, 1), -1e30)  # rows past T have no logits
    lse = most + tl.log(tl.sum(tl.exp2((logits - most[:, None]) * LOG2_E), 1))
    of_label = tl.sum(tl.where(v[None, :] == label[:, None], logits, 0.0), 1)
    tl.store(loss_ptr + t, lse - of_label, mask=t < T)
    tl.store(lse_ptr + t, lse, mask=t < T)


@kernel(do_not_specialize=["T"])
def _backward(
    dloss_ptr, logits_ptr, labels_ptr, lse_ptr, dlogits_ptr, T,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v = tl.arange(0, BLOCK_V)
    logits, at, inside = _logits(logits_ptr, t, v, T, V)
    label, lse = tl.load(labels_ptr + t, mask=t < T, other=0), tl.load(lse_ptr + t, mask=t < T, other=0.0)
    p = tl.exp2((logits - lse[:, None]) * LOG2_E) - tl.where(v[None, :] == label[:, None], 1.0, 0.0)
    tl.store(dlogits_ptr + at, (p * tl.load(dloss_ptr)).to(dlogits_ptr.dtype.element_ty), mask=inside)


def _blocks(V: int) -> dict[str, int]:
    block = next_power_of_2(V)
    return {"V": V, "ROWS": max(1, TILE // block), "BLOCK_V": block}


def cross_entropy_forward(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """`cross_entropy_forward` of cross_entropy.py."""
    T, blocks = len(logits_TV), _blocks(logits_TV.shape[1])
    loss_T, lse_T = (logits_TV.new_empty(T, dtype=torch.float32) for _ in range(2))
    assert logits_TV.is_contiguous() and labels_T.is_contiguous()
    with on_device_of(logits_TV):
        _forward[(cdiv(T, blocks["ROWS"]),)](logits_TV, labels_T, loss_T, lse_T, T, **blocks)
    return loss_T, lse_T


def cross_entropy_backward(dloss: Tensor, logits_TV: Tensor, labels_T: Tensor, lse_T: Tensor) -> Tensor:
    """`cross_entropy_backward` of cross_entropy.py."""
    T, blocks = len(logits_TV), _blocks(logits_TV.shape[1])
    dlogits_TV = logits_TV.new_empty(logits_TV.shape)
    assert logits_TV.is_contiguous() and labels_T.is_contiguous()
    with on_device_of(logits_TV):
        _backward[(cdiv(T, blocks["ROWS"]),)](dloss, logits_TV, labels_T, lse_T, dlogits_TV, T, **blocks)
    return dlogits_TV
