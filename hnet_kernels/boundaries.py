"""Where chunks begin, from the router's probabilities, and what follows from that: one pass over all tokens.

Legend: T tokens, C chunks that there could be, B documents. Tokens behind the last document fill up; they open nothing.

This file has the definitions and the choice; the Triton kernels that run on a GPU are in boundaries_triton.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import obstacle_anywhere, use_fast


class Boundaries(NamedTuple):
    """Where `find_boundaries` writes what it finds: contiguous, but for `losses`."""

    p_T: Tensor  # (T + 1,), p and a zero behind it
    b_T: Tensor  # bool: which tokens open a chunk
    chunk_T: Tensor  # int64: each token's chunk
    start_C: Tensor  # int64: each chunk's first token, T where there is no chunk
    cu_seqlens: Tensor  # int32 (B + 1,): the documents, in chunks
    position_C: Tensor  # int32: each chunk's place in its document; those that are no chunks count as one document
    counts: Tensor  # int64: of all chunks, and of the longest document's
    losses: Tensor  # (3,), p's dtype: the ratio loss, F and G as in hnet_trainable.py, of all but what fills up


def _fast(p_T: Tensor) -> bool:
    return use_fast("boundaries", p_T.device.type, p_T.dtype, obstacle_anywhere(p_T))


def find_boundaries(
    p_T: Tensor, position_T: Tensor, cu_seqlens: Tensor, N: float, to: Boundaries, forced_T: Tensor | None = None
) -> None:
    """Chunks open where p > 0.5, or where a document begins and where forced_T (bool) says so. C is T or more.

    p_T: float32 or float64, 1 where a document begins. position_T: each token's place in its document.
    cu_seqlens: int32 (B + 1,). N: of the ratio loss (arXiv 2507.07955, eq. 10).
    The kernels add p up in an order of their own, always the same: G has other last bits than the definition's.
    """
    if _fast(p_T):
        from hnet_kernels import boundaries_triton  # not above: triton is not everywhere

        return boundaries_triton.find_boundaries(p_T, position_T, cu_seqlens, N, to, forced_T)
    T, C, tokens = len(p_T), len(to.start_C), cu_seqlens[-1]
    real_T = torch.arange(T, device=p_T.device) < tokens
    b_T = real_T & (p_T > 0.5 if forced_T is None else forced_T | (position_T == 0))
    to.p_T.copy_(F.pad(p_T, (0, 1)))
    to.b_T.copy_(b_T)
    until_T = b_T.cumsum(0)
    to.chunk_T.copy_(until_T - 1)
    to.start_C.copy_(torch.nonzero_static(b_T, size=C, fill_value=T).squeeze(1))
    inside, k = F.pad(until_T, (1, 0))[cu_seqlens], torch.arange(C, device=p_T.device)
    to.cu_seqlens.copy_(inside)
    to.position_C.copy_(k - inside[torch.bucketize(k, inside[1:], right=True)])
    to.counts.copy_(torch.stack([inside[-1], inside.diff().max()]))
    share, mean = b_T.to(p_T.dtype).sum() / tokens, (p_T * real_T).sum() / tokens
    ratio = N / (N - 1) * ((N - 1) * share * mean + (1 - share) * (1 - mean))
    to.losses.copy_(torch.stack([ratio, share, mean]))


def add_ratio_gradient(dp_T: Tensor, dratio: Tensor, losses: Tensor, cu_seqlens: Tensor, N: float) -> Tensor:
    """dp_T + the ratio loss's gradient of p, which reaches p through G alone."""
    if _fast(dp_T):
        from hnet_kernels import boundaries_triton

        return boundaries_triton.add_ratio_gradient(dp_T, dratio, losses, cu_seqlens, N)
    _, share, _ = losses
    real_T = torch.arange(len(dp_T), device=dp_T.device) < cu_seqlens[-1]
    return dp_T + real_T * (dratio * (N / (N - 1)) * (N * share - 1) / cu_seqlens[-1])
