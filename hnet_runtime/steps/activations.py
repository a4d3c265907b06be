"""Activation checkpointing of steps that run eagerly: what a block's backward needs is recomputed instead of saved.

Around the block's computation and inside FSDP's hooks, so that the collective operations, and their order, are the same
with and without it. Fast implementations of operations do it themselves (hnet_kernels/recompute.py); where definitions
run, torch's checkpointing does.
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
from hnet_runtime.distributed import World
from hnet_trainable import Block, HNet, HNetLM, RoutingModule


def _operations(*names: str) -> set[Any]:
    found = set()
    for name in names:
        space, _, operation = name.partition("::")
        packet = getattr(getattr(torch.ops, space), operation, None)
        if packet is not None:  # a release of torch may lack one
            found |= {getattr(packet, overload) for overload in packet.overloads()}
    return found


@functools.cache
def saved_operations() -> set[Any]:
    """What `selective` keeps the results of: matrix products, attention and the scan. The rest is cheap to redo."""
    import torch.nn.attention.varlen  # noqa: F401 (defines torch_attn::_varlen_attn)

    products = _operations("aten::mm", "aten::addmm", "hnet::ssd", "hnet::attention_definition")
    return products | _operations("torch_attn::_varlen_attn")


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in saved_operations() else CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputing:
    """A block's forward that is checkpointed always, or while `switched_on`."""

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
    """Make every block's backward recompute what it needs. Gradients stay the same.

    mode: `none`; `block` saves a block's input alone; `selective` also what is costly to compute (`saved_operations`).
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = _Recomputing(module.forward, mode)


class ChunkGuard:
    """Turns on `block` checkpointing inside a stage, on all ranks, where any rank's router opens more than `limit`.

    A router that suddenly opens many chunks makes the inner stages of its rank larger than memory. The largest count is
    found by a MAX all-reduce that runs while the residual projection does; every rank takes the same decision, for this
    micro-batch. Call it after `recompute`. `count`: micro-batches so run.
    """

    def __init__(self, model: HNetLM, limit: int, world: World):
        self.limit, self.world, self.count = limit, world, 0
        for module in model.modules():
            if isinstance(module, HNet) and not module.is_innermost:
                self._watch(module)

    def _watch(self, stage: HNet) -> None:
        inside = [m.forward for m in stage.main_network.modules() if isinstance(m, Block)]
        pending: list[tuple[Tensor, Any]] = []

        def ask(module: RoutingModule, inputs: Any, p_T: Tensor) -> None:
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
