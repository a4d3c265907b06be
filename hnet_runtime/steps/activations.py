"""Activation checkpointing of eager steps: a block's backward recomputes what it needs instead of saving it.

It wraps the block's computation inside FSDP's hooks, so that the order of collective operations does not change. Fast
implementations of operations do this themselves (hnet_kernels/recompute.py). Where definitions run, torch's
checkpointing does.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hnet_kernels import Residual
from hnet_kernels.recompute import recomputing
from hnet_routers import Router
from hnet_runtime.distributed import World
from hnet_trainable import Block, HNet, HNetLM


def _operations(*names: str) -> set[Any]:
    found = set()
    for name in names:
        space, _, operation = name.partition("::")
        packet = getattr(getattr(torch.ops, space), operation, None)
        if packet is not None:  # some releases of torch lack one
            found |= {getattr(packet, overload) for overload in packet.overloads()}
    return found


@functools.cache
def saved_operations() -> set[Any]:
    """The operations whose results `selective` saves: matrix products, attention and the scan. Others are cheap."""
    import torch.nn.attention.varlen  # noqa: F401 (defines torch_attn::_varlen_attn)

    products = _operations("aten::mm", "aten::addmm", "hnet::ssd", "hnet::attention_definition")
    return products | _operations("torch_attn::_varlen_attn")


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in saved_operations() else CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputing:
    """A block's forward with checkpointing: that of `mode`, or `block` while `switched_on`."""

    def __init__(self, forward: Callable[..., Tensor], mode: str):
        self.forward, self.mode, self.switched_on = forward, mode, False

    def __call__(self, *args: Any) -> Tensor:
        mode = "block" if self.switched_on else self.mode
        if not torch.is_grad_enabled() or mode == "none":
            return self.forward(*args)
        if isinstance(args[0], Residual):
            with recomputing(mode):
                return self.forward(*args)
        more = {}
        if mode == "selective":
            more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=True, **more)


def recompute(model: HNetLM, mode: str) -> None:
    """Makes every block's backward recompute what it needs. Gradients do not change.

    mode: `none`; `block` saves only a block's input; `selective` also the results of `saved_operations`.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = _Recomputing(module.forward, mode)


class ChunkGuard:
    """Turns on `block` checkpointing inside a stage, on all ranks, if any rank's router opens more than `limit` chunks.

    A router that suddenly opens many chunks can make the inner stages of its rank larger than memory. A MAX all-reduce,
    which runs during the residual projection, finds the largest count. So every rank decides the same for this
    micro-batch. Create it after `recompute`. `count`: the micro-batches that were checkpointed this way.
    """

    def __init__(self, model: HNetLM, limit: int, world: World):
        self.limit, self.world, self.count = limit, world, 0
        for module in model.modules():
            if isinstance(module, HNet) and not module.is_innermost:
                self._watch(module)

    def _watch(self, stage: HNet) -> None:
        inside = [m.forward for m in stage.main_network.modules() if isinstance(m, Block)]
        pending: list[tuple[Tensor, Any]] = []

        def ask(module: Router, inputs: Any, p_T: Tensor) -> None:
            if torch.is_grad_enabled():
                chunks = module.opens(p_T).sum()
                alone = self.world.size == 1
                pending.append((chunks, None if alone else dist.all_reduce(chunks, dist.ReduceOp.MAX, async_op=True)))

        def decide(module: nn.Module, inputs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            chunks, work = pending.pop()
            if work is not None:
                work.wait()
            too_many = chunks.item() > self.limit
            self.count += too_many and not (inside and inside[0].switched_on)
            for block in inside:
                block.switched_on |= too_many

        def release(module: nn.Module, inputs: Any, output: Any) -> None:
            for block in inside:
                block.switched_on = False

        stage.routing_module.register_forward_hook(ask)
        stage.main_network.register_forward_pre_hook(decide)
        stage.main_network.register_forward_hook(release)
