"""Where chunks begin, and the tensors that follow from it, in one pass over all tokens.

Legend: T tokens, at most C chunks, B documents. Tokens after the last document are padding, which opens no chunk.

This file has the definitions and the dispatch; the Triton kernels for GPUs are in boundaries_triton.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import operation, use_fast, why_unsupported


class Chunks(NamedTuple):
    """Where chunks begin, written by `cut`. All tensors but `shares` are contiguous."""

    p_T: Tensor  # (T + 1,): p, then a zero
    b_T: Tensor  # bool: which tokens open a chunk
    chunk_T: Tensor  # int64: each token's chunk
    start_C: Tensor  # int64: each chunk's first token, T where there is no chunk
    cu_seqlens: Tensor  # int32 (B + 1,): the documents, in chunks
    position_C: Tensor  # int32: each chunk's position in its document; unused entries count as one document
    counts: Tensor  # int64 (2,): all chunks, and those of the document with most
    shares: Tensor  # (2,), p's dtype: F, the share of real tokens that open a chunk; G, their mean p

    @classmethod
    def empty(cls, p_T: Tensor, documents: int) -> "Chunks":
        """Memory for the results of `cut` on T tokens."""
        T, device = len(p_T), p_T.device
        return cls(
            p_T.new_empty(T + 1),
            torch.empty(T, dtype=torch.bool, device=device),
            *(torch.empty(T, dtype=torch.int64, device=device) for _ in "ts"),
            torch.empty(documents + 1, dtype=torch.int32, device=device),
            torch.empty(T, dtype=torch.int32, device=device),
            torch.empty(2, dtype=torch.int64, device=device),
            p_T.new_empty(2),
        )


@operation
def cut(
    p_T: Tensor, b_T: Tensor, position_T: Tensor, cu_seqlens: Tensor, to: Chunks | None = None
) -> tuple[Tensor, Tensor, Chunks]:
    """Opens a chunk where b_T (bool) says so, and where a document begins. Returns (p_T, G, chunks).

    p_T: float32 or float64; returned as it is stored in `chunks`. G: the mean of p over real tokens. Both have
    gradients. position_T: each token's position in its document. cu_seqlens: int32 (B + 1,), the documents. to: where
    to write the results, with space for C >= T chunks.
    """
    to = to or Chunks.empty(p_T, len(cu_seqlens) - 1)
    find_chunks(p_T.detach(), b_T, position_T, cu_seqlens, to)
    real_T = torch.arange(len(p_T), device=p_T.device) < cu_seqlens[-1]
    return p_T, (p_T * real_T).sum() / cu_seqlens[-1], to


class Cut(torch.autograd.Function):
    """Gradient: of p."""

    @staticmethod
    def forward(ctx, p_T: Tensor, b_T: Tensor, position_T: Tensor, cu_seqlens: Tensor, to: Chunks):
        find_chunks(p_T, b_T, position_T, cu_seqlens, to)
        ctx.save_for_backward(cu_seqlens)
        return to.p_T[:-1].detach(), to.shares[1].detach()

    @staticmethod
    def backward(ctx, dp_T: Tensor, dmean: Tensor):
        return add_mean_gradient(dp_T, dmean, *ctx.saved_tensors), None, None, None, None


@cut.fast
def _(p_T: Tensor, b_T: Tensor, position_T: Tensor, cu_seqlens: Tensor, to: Chunks | None = None):
    to = to or Chunks.empty(p_T, len(cu_seqlens) - 1)
    return *Cut.apply(p_T, b_T, position_T, cu_seqlens, to), to


def _fast(p_T: Tensor) -> bool:
    return use_fast("boundaries", p_T.device.type, p_T.dtype, why_unsupported(p_T))


def find_chunks(p_T: Tensor, b_T: Tensor, position_T: Tensor, cu_seqlens: Tensor, to: Chunks) -> None:
    """`cut` without gradients. The kernels sum p in their own order, so G may differ in its last bits."""
    if _fast(p_T):
        from hnet_kernels import boundaries_triton  # not above: triton is not everywhere

        return boundaries_triton.find_chunks(p_T, b_T, position_T, cu_seqlens, to)
    T, C, tokens = len(p_T), len(to.start_C), cu_seqlens[-1]
    real_T = torch.arange(T, device=p_T.device) < tokens
    b_T = real_T & (b_T | (position_T == 0))
    to.p_T.copy_(F.pad(p_T, (0, 1)))
    to.b_T.copy_(b_T)
    until_T = b_T.cumsum(0)
    to.chunk_T.copy_(until_T - 1)
    to.start_C.copy_(torch.nonzero_static(b_T, size=C, fill_value=T).squeeze(1))
    inside, k = F.pad(until_T, (1, 0))[cu_seqlens], torch.arange(C, device=p_T.device)
    to.cu_seqlens.copy_(inside)
    to.position_C.copy_(k - inside[torch.bucketize(k, inside[1:], right=True)])
    to.counts.copy_(torch.stack([inside[-1], inside.diff().max()]))
    to.shares.copy_(torch.stack([b_T.to(p_T.dtype).sum() / tokens, (p_T * real_T).sum() / tokens]))


def add_mean_gradient(dp_T: Tensor, dmean: Tensor, cu_seqlens: Tensor) -> Tensor:
    """dp_T plus the gradient of p through its mean over real tokens."""
    if _fast(dp_T):
        from hnet_kernels import boundaries_triton

        return boundaries_triton.add_mean_gradient(dp_T, dmean, cu_seqlens)
    real_T = torch.arange(len(dp_T), device=dp_T.device) < cu_seqlens[-1]
    return dp_T + real_T * (dmean / cu_seqlens[-1])
