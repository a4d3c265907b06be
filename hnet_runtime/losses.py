"""The losses that training adds to the cross entropy: a name, a weight, and numbers that may change over a run.

The formulas are in hnet_trainable.py: `ratio_loss`, `ratio_hinge`, `training_loss`. Here is what varies between runs
and steps. A number that changes from step to step is a tensor on the device, which `set` writes before the step. Steps
as graphs read it there, while a Python number would be captured with the value of the first step. A number that never
changes stays a Python number. Values depend on the step alone, so a resumed run gets the same ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hnet_config import ConfigError, HNetConfig
from hnet_runtime import UserError
from hnet_runtime.runs.flags import TrainConfig
from hnet_trainable import HNetLM


class Ramp(NamedTuple):
    """A number that changes linearly from `first` to `last` over the first `share` of a run's steps, and then stays."""

    first: float
    last: float
    share: float = 0.0

    @classmethod
    def constant(cls, value: float) -> "Ramp":
        return cls(value, value)

    def at(self, step: int, steps: int) -> float:
        """The value at step 0, 1, ..., steps - 1."""
        reached = self.share * steps
        return self.last if step >= reached else self.first + (self.last - self.first) * step / reached

    @property
    def changes(self) -> bool:
        return self.first != self.last and self.share > 0


class AddedLoss:
    """A loss beside the cross entropy, with its numbers as steps read them: floats, or tensors where they change."""

    def __init__(
        self,
        name: str,
        weight: Ramp,
        targets: Sequence[Ramp | None],
        device: torch.device,
        dtype: torch.dtype,
        form: str = "",
    ):
        """targets: a number for each stage, or None for one without.

        form: which formula. dtype: of the loss, at least float32.
        """
        self.name, self.form, self._ramps = name, form, (weight, *targets)
        self._values = [
            torch.full((), ramp.first, dtype=dtype, device=device) if ramp and ramp.changes else ramp and ramp.last
            for ramp in self._ramps
        ]

    @property
    def weight(self) -> float | Tensor:
        return self._values[0]

    @property
    def targets(self) -> list[float | Tensor | None]:
        return self._values[1:]

    def set(self, step: int, steps: int) -> None:
        """Writes the values of a step, without waiting for the device."""
        for ramp, value in zip(self._ramps, self._values):
            if isinstance(value, Tensor):
                value.fill_(ramp.at(step, steps))

    def targets_at(self, step: int, steps: int) -> list[float | None]:
        """The targets of a step, on the host."""
        return [ramp and ramp.at(step, steps) for ramp in self._ramps[1:]]


# ------------------------------------------------------------------------------------------------------ the ratio loss


def ratio(config: TrainConfig, hnet: HNetConfig, device: torch.device, dtype: torch.dtype) -> AddedLoss:
    """The ratio loss as the flags say: weight --alpha, form --ratio-form, targets that rise as --ratio-from says.

    Raises UserError for a --ratio-from that does not fit the model.
    """
    first = first_ratios(config, hnet)
    targets = [N and Ramp(start, N, config.ratio_rise) for start, N in zip(first, hnet.learned_ratios)]
    return AddedLoss("ratio", Ramp.constant(config.alpha), targets, device, dtype, config.ratio_form)


def first_ratios(config: TrainConfig, hnet: HNetConfig) -> tuple[float, ...]:
    """The targets at the first step: tokens per chunk of each stage."""
    if not config.ratio_from:
        return hnet.target_ratios
    numbers = compression(config.ratio_from, "--ratio-from")
    try:
        return HNetConfig.load(hnet.to_dict(), N_compress=numbers).target_ratios
    except ConfigError as error:
        raise UserError(f"--ratio-from {config.ratio_from}: {error}") from None


def compression(text: str, flag: str) -> list[float]:
    """The numbers of a flag such as -N 1-3-9: bytes per token at each stage."""
    try:
        numbers = [float(n) for n in text.split("-")]
    except ValueError:
        raise UserError(f"{flag} {text}: expected numbers joined by dashes, like 1-3-9") from None
    return [int(n) if n.is_integer() else n for n in numbers]


def attach(loss: AddedLoss, *models: HNetLM) -> None:
    """Makes the models compute their ratio losses with this loss's form and targets.

    Raises UserError where hnet_trainable.py was edited to set others, which this would undo.
    """
    for model in dict.fromkeys(models):
        if (model.ratio_form, model.ratio_targets) != (TrainConfig.ratio_form, model.config.learned_ratios):
            raise UserError(
                "HNetLM sets ratio_form or ratio_targets itself, which a run sets by --ratio-form, --ratio-from and "
                "-N: give these flags, or edit HNetLM.ratio_loss"
            )
        model.ratio_form, model.ratio_targets = loss.form, loss.targets


def check(config: TrainConfig, hnet: HNetConfig) -> None:
    """Raises UserError for flags of the ratio loss and the router that this model cannot use."""
    first_ratios(config, hnet)
    for name in ("ratio_from", "ratio_form", "router_lr"):
        flag, value = f"--{name.replace('_', '-')}", getattr(config, name)
        if value != getattr(TrainConfig, name) and not any(hnet.is_learned):
            raise UserError(f"{flag} {value}: the model has no router that learns; expected a config with one")
    if config.ratio_from:
        numbers = compression(config.ratio_from, "--ratio-from")
        if any(first > last for first, last in zip(numbers, hnet.N_compress)):
            last = "-".join(f"{N:g}" for N in hnet.N_compress)
            raise UserError(f"--ratio-from {config.ratio_from}: expected at most {last}, to which the target rises")
