"""Cross entropy over few classes, such as bytes, and its gradient, each in one pass over the logits.

Legend: T tokens, V classes.

This file has the definition and the dispatch; the Triton kernels for GPUs are in cross_entropy_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import operation, use_fast, why_unsupported

MOST = 4096  # classes: a row must fit into the registers of one thread block


def _fast(logits_TV: Tensor) -> bool:
    return use_fast("cross_entropy", logits_TV.device.type, logits_TV.dtype, why_unsupported(logits_TV, MOST))


@operation
def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """The mean over tokens of -log softmax of the label: a scalar in at least float32. labels_T: int64, 0 to V - 1."""
    return F.cross_entropy(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), labels_T)


class CrossEntropy(torch.autograd.Function):
    """Gradient: of the logits."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        loss_T, lse_T = cross_entropy_forward(logits_TV.contiguous(), labels_T)
        ctx.save_for_backward(logits_TV, labels_T, lse_T)
        return loss_T.mean()

    @staticmethod
    def backward(ctx, dloss: Tensor):
        logits_TV, labels_T, lse_T = ctx.saved_tensors
        return cross_entropy_backward(dloss / len(labels_T), logits_TV.contiguous(), labels_T, lse_T), None


@cross_entropy.fast
def _(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return CrossEntropy.apply(logits_TV, labels_T.contiguous())


def cross_entropy_forward(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(loss_T, lse_T): -log softmax of the label, and the log of the sum of exponentials; in float32 at least.

    logits_TV: contiguous. labels_T: int64, 0 to V - 1.
    """
    if _fast(logits_TV):
        from hnet_kernels import cross_entropy_triton  # not above: triton is not everywhere

        return cross_entropy_triton.cross_entropy_forward(logits_TV, labels_T)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    lse_T = logits_TV.logsumexp(-1)
    return lse_T - logits_TV.gather(1, labels_T[:, None]).squeeze(1), lse_T


def cross_entropy_backward(dloss: Tensor, logits_TV: Tensor, labels_T: Tensor, lse_T: Tensor) -> Tensor:
    """dlogits_TV in the logits' dtype, for the gradient dloss of each token's loss: one element of lse_T's dtype."""
    if _fast(logits_TV):
        from hnet_kernels import cross_entropy_triton

        return cross_entropy_triton.cross_entropy_backward(dloss, logits_TV, labels_T, lse_T)
    p_TV, label_T1 = (logits_TV.to(lse_T.dtype) - lse_T[:, None]).exp_(), labels_T[:, None]
    p_TV.scatter_add_(1, label_T1, p_TV.new_full((), -1).expand_as(label_T1))
    return p_TV.mul_(dloss).to(logits_TV.dtype)
