"""Training steps of an HNetLM as it is, by autograd and torch's optimizers: for float32 and for sharded weights.

`PlainModel` and `graphs.GraphedModel` have the same interface, which train.py and the benchmarks use:

    model                 the HNetLM that computes
    masters               the HNetLM with the float32 weights, which may be the same
    optimizer             over the masters' weights
    begin_step            before a step of a run, with its number and a seed; benchmarks leave it out
    forward_backward      losses of some micro-batches, and the gradients of their mean
    stages                the routers' decisions in the last micro-batch
    finish_step           after the optimizer's step
    full_precision        a context in which the masters' weights may be read and changed
    free_memory           before validation, samples and saving
    retry_without_graphs  calls a function again if memory ran out
    captured              parts captured so far, None without graphs; capture_seconds: their time
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hnet_runtime import UserError, distributed
from hnet_runtime.distributed import World
from hnet_runtime.steps.flat_adamw import MakeOptimizer, adamw
from hnet_simple import gathers_weights
from hnet_trainable import HNetLM, HNetOutput, StageOutput, training_loss

Returned = TypeVar("Returned")


class Losses(NamedTuple):
    """The losses of n micro-batches, on the device: ce (n,), the others (n, S) for S chunking stages."""

    ce: Tensor
    ratio: Tensor
    F: Tensor
    G: Tensor

    @classmethod
    def stack(cls, outputs: Sequence[HNetOutput]) -> "Losses":
        """The losses of the outputs of some micro-batches, without gradients."""
        for out in outputs:
            check_losses(out)
        ce = torch.stack([out.ce.detach() for out in outputs])
        ratio = torch.stack([out.ratio_losses.detach() for out in outputs])
        shares = [[[getattr(stage, name).detach() for stage in out.stages] for out in outputs] for name in "FG"]
        return cls(ce, ratio, *(torch.stack([torch.stack(s) if s else ce[:0] for s in rows]) for rows in shares))


def check_losses(out: HNetOutput) -> None:
    """Raises UserError unless each stage has one ratio loss: columns of a table tell them apart from F and G."""
    if len(out.ratio_losses) != len(out.stages):
        raise UserError(
            f"HNetLM.forward returns {len(out.ratio_losses)} ratio losses for {len(out.stages)} chunking stages; "
            "expected one for each: add another loss to ce, or in training_loss"
        )


class PlainModel:
    """Runs training steps of `model`, sharded or not, in the dtype of its forward."""

    captured, capture_seconds = None, 0.0

    def __init__(
        self,
        model: HNetLM,
        alpha: float | Tensor,
        world: World,
        groups: list[dict[str, Any]],
        make_optimizer: MakeOptimizer = adamw,
    ):
        """alpha: the weight of the ratio losses. groups: those of `distributed.optimizer_groups`."""
        self.model = self.masters = model
        self.alpha, self.world = alpha, world
        self.parameters = list(model.parameters())  # before a forward, after which FSDP shows gathered ones
        self.optimizer = make_optimizer(groups)
        self._stages: list[StageOutput] = []

    def forward_backward(self, batches: Sequence[tuple[Tensor, ...]]) -> Losses:
        """Losses of the micro-batches; the gradient of the mean of ce + alpha * ratio losses, averaged over ranks.

        batches: n times what `HNetLM.forward` takes, (iids, labels) or with cuts; every rank has the same n.
        """
        outputs = []
        for i, batch in enumerate(batches):
            if gathers_weights(self.model):  # gradients are reduced once per step, with the last micro-batch
                self.model.set_requires_gradient_sync(i == len(batches) - 1)
                self.model.set_is_last_backward(i == len(batches) - 1)
            out = self.model(*batch)
            (training_loss(out.ce, out.ratio_losses, self.alpha) / len(batches)).backward()
            self._stages = [stage.detach() for stage in out.stages]
            outputs.append(HNetOutput(None, out.ce.detach(), out.ratio_losses.detach(), self._stages))
            del out  # frees the logits before the next forward
        distributed.reduce_plain_gradients(self.parameters, self.world)
        return Losses.stack(outputs)

    def stages(self) -> list[StageOutput]:
        """The routers' decisions in the last micro-batch."""
        return self._stages

    def begin_step(self, done: int, seed: int = 0) -> None:
        """Seeds what the model draws, such as dropout: a step that is made again after a resume draws the same."""
        torch.manual_seed(seed)

    def finish_step(self) -> None:
        """Frees the gradients."""
        self.optimizer.zero_grad()

    def full_precision(self) -> contextlib.AbstractContextManager[None]:
        """A context without effect: the weights are always in full precision."""
        return contextlib.nullcontext()

    def free_memory(self) -> None:
        """Does nothing: no memory is kept between steps."""

    def retry_without_graphs(self, call: Callable[[], Returned]) -> Returned:
        """The result of `call`."""
        return call()
