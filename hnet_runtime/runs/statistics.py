"""What a router does and how fast weights change, as tensors on the device: nothing here waits for it.

Every `--stats-every` steps a training step computes these from values that it has anyway: the boundary probabilities of
its last slice, and gradients and optimizer states after the update. They are read together with its loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hnet_runtime.distributed import World
from hnet_runtime.sharded import is_sharded, local_shard
from hnet_runtime.steps.flat_adamw import ADAMW, FlatAdamW, as_tensor, rule_of
from hnet_trainable import StageOutput

BINS = 10  # of the histogram of boundary probabilities
BATCH_ELEMENTS = 1 << 26  # elements of weights per launch

# kinds of bytes: letters, digits and first bytes of characters beyond ASCII; whitespace; punctuation and other ASCII;
# bytes inside a UTF-8 character; BOS
_KINDS = [1 if chr(b).isspace() else 0 if chr(b).isalnum() else 2 for b in range(128)]
_KINDS += [3 if b < 0xC0 else 4 if b == 0xFE else 0 for b in range(128, 256)]
_ROUTER = ("chunk_mean", "chunk_cv", "chunk_max", "at_whitespace", "at_punctuation", "at_inside", "cosine_std")
_WEIGHTS = ("grad_norm", "weight_norm", "update_ratio")


def names(stages: int) -> list[str]:
    """The names of the elements of `router_statistics`, then of `weight_statistics`, for S chunking stages."""
    per_stage = [*_ROUTER, *(f"p_{i / BINS:.1f}" for i in range(BINS))]
    found = [f"stage{s}_{name}" for s in range(stages) for name in per_stage]
    return found + [f"stage{s}_{name}" for s in range(stages + 1) for name in _WEIGHTS]


class StepNumbers(NamedTuple):
    """What a training step measured, float32: means over its G slices, for S chunking stages."""

    ce: Tensor  # scalar, nats per label
    text_bytes: Tensor  # scalar, of a slice
    rows: Tensor  # scalar, of a slice
    ratio_S: Tensor  # ratio losses
    F_S: Tensor
    G_S: Tensor
    imbalance_S: Tensor  # see `distributed.imbalance`
    grad_norm: Tensor  # scalar, before clipping
    more: Tensor  # `router_statistics` and `weight_statistics`, see `names`; empty in most steps

    def flat(self) -> Tensor:
        """All in one tensor, which is one copy to the host."""
        return torch.cat([x.reshape(-1) for x in self])

    @classmethod
    def of(cls, flat: Tensor, stages: int) -> StepNumbers:
        """What `flat` made one tensor of."""
        ce, text_bytes, rows = flat[:3]
        *of_stages, rest = flat[3:].split([stages] * 4 + [len(flat) - 3 - 4 * stages])
        return cls(ce, text_bytes, rows, *of_stages, rest[0], rest[1:])


@torch.no_grad()
def router_statistics(iids: Tensor, stages: Sequence[StageOutput]) -> Tensor:
    """Statistics of one slice, float32 (S * (7 + BINS),). For each stage:

    - mean, coefficient of variation and maximum of its chunks' lengths in bytes;
    - the share of its boundaries at a whitespace byte, at punctuation, inside a UTF-8 character (without rows' first
      bytes, where a chunk must begin);
    - the standard deviation of the router's cosine (without those first bytes);
    - the share of its tokens in each of BINS equal ranges of boundary probability.
    """
    byte_T, offsets = iids.values(), iids.offsets()
    T, device = len(byte_T), byte_T.device
    kind_T = torch.tensor(_KINDS).to(device, non_blocking=True)[byte_T]
    first_T = torch.zeros(T, dtype=torch.bool, device=device).index_fill_(0, offsets[:-1], True)
    index_T = torch.arange(T, device=device)
    at_C = index_T  # the first byte of each token of the stage
    found: list[Tensor] = []
    for s, stage in enumerate(stages):
        p_C, b_C = stage.p_T.float(), stage.b_T
        starts_T = torch.zeros(T, dtype=torch.bool, device=device).index_copy_(0, at_C, b_C)
        # a byte's distance to the start of its chunk; summed over a chunk of L bytes it is L (L - 1) / 2
        away_T = index_T - torch.where(starts_T, index_T, 0).cummax(0).values
        n = starts_T.sum()
        mean, square = T / n, (2 * away_T.sum() + T) / n
        free_T, free_C = starts_T & ~first_T, ~first_T[at_C]
        kinds = torch.zeros(5, device=device).index_add_(0, kind_T, free_T.float()) / free_T.sum().clamp_min(1)
        cos_C, count = 1 - 2 * p_C, free_C.sum().clamp_min(1)
        middle = (cos_C * free_C).sum() / count
        spread = ((cos_C - middle).square() * free_C).sum() / count
        bin_C = (p_C * BINS).long().clamp(0, BINS - 1)
        shares = torch.zeros(BINS, device=device).index_add_(0, bin_C, torch.ones_like(p_C)) / len(p_C)
        lengths = [mean, (square / mean**2 - 1).clamp_min(0).sqrt(), away_T.max() + 1]
        found += [torch.stack([x.float() for x in lengths]), kinds[1:4], spread.sqrt()[None], shares]
        if s + 1 < len(stages):  # how many tokens the next stage has is known from its shape
            at_C = torch.nonzero_static(starts_T, size=len(stages[s + 1].b_T)).squeeze(1)
    return torch.cat(found) if found else torch.zeros(0, device=device)


@torch.no_grad()
def weight_statistics(optimizer: torch.optim.Optimizer, stages: int, world: World) -> Tensor:
    """Per stage, innermost last: the norms of its gradients and its weights, and the update's norm over the weights'.

    float32 ((S + 1) * 3,). Call it after `optimizer.step()` and before gradients are cleared; gradients are clipped.
    The update is computed from AdamW's state, so the old weights are not needed. With another optimizer it is nan.
    """
    rule = rule_of(optimizer)
    sharded, whole = torch.zeros(2, stages + 1, 3, device=world.device).unbind(0)
    shards_updates = isinstance(optimizer, FlatAdamW) and optimizer.shards_updates
    owned = optimizer.owned if shards_updates else frozenset()
    for group in optimizer.param_groups:
        is_adamw = type(rule) in ADAMW and not (group["amsgrad"] or group["maximize"])
        found = [(p, optimizer.state.get(p)) for p in group["params"] if p.grad is not None]
        found = [(p, state) for p, state in found if state or not is_adamw]
        for (apart, _), batch in _batches(found, lambda p: (is_sharded(p) or p in owned, str(p.grad.dtype))):
            into = sharded if apart else whole
            ws = [local_shard(_weight(optimizer, p)) for p, _ in batch]
            grads = [local_shard(p.grad) for p, _ in batch]
            kinds = [grads, ws]
            if is_adamw:
                ms, vs = ([local_shard(state[key]) for _, state in batch] for key in ("exp_avg", "exp_avg_sq"))
                kinds.append(_updates(ws, ms, vs, batch[0][1]["step"].to(world.device), group))
            wide = [torch._foreach_norm(ts, dtype=ws[0].dtype) for ts in kinds]
            squares = [torch.stack(norms).float().square().sum() for norms in wide]
            squares += [torch.full_like(squares[0], math.nan)] * (not is_adamw)
            squares[2] = squares[2] * group["lr"] ** 2
            into[group["stage"]] += torch.stack(squares)
    if shards_updates:
        dist.all_reduce(sharded)
    elif world.shards > 1:  # over one replica: with HSDP, other ranks have the same shards
        dist.all_reduce(sharded, group=world.mesh.get_group("shard"))
    norms = (sharded + whole).sqrt()
    norms[:, 2] /= norms[:, 1].clamp_min(1e-12)
    return norms.flatten()


def _weight(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    return as_tensor(optimizer.master_weight(p)) if isinstance(optimizer, FlatAdamW) else p


def _batches(
    found: list[tuple[Tensor, dict[str, Tensor]]], kind: Callable[[Tensor], Any]
) -> Iterator[tuple[Any, list[tuple[Tensor, dict[str, Tensor]]]]]:
    """(kind, parameters with their state) in batches of about BATCH_ELEMENTS elements of one kind.

    A batch is one launch, and updates take the memory of one batch.
    """
    key_of = lambda pair: kind(pair[0])  # noqa: E731
    for key, group in itertools.groupby(sorted(found, key=key_of), key_of):
        batch, size = [], 0
        for p, state in group:
            if batch and size + p.numel() > BATCH_ELEMENTS:
                yield key, batch
                batch, size = [], 0
            batch.append((p, state))
            size += p.numel()
        yield key, batch


def _updates(ws: list[Tensor], ms: list[Tensor], vs: list[Tensor], step: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """The update that AdamW subtracts from the weights, divided by the learning rate."""
    beta1, beta2 = group["betas"]
    updates = torch._foreach_sqrt(vs)
    torch._foreach_div_(updates, (1 - beta2**step).sqrt())
    torch._foreach_add_(updates, group["eps"])
    updates = torch._foreach_div(ms, updates)
    torch._foreach_div_(updates, 1 - beta1**step)
    torch._foreach_add_(updates, ws, alpha=group["weight_decay"])
    return updates
