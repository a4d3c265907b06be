"""Gradients of small weights, such as a norm's: sums over all tokens, of which each program of a kernel finds a part.
To add up those of many layers takes hardly longer than those of one, so this waits for all of them.

Legend: L layers, N parts of a layer's sums, W numbers: those of its weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

AddUp = Callable[[Tensor, torch.dtype], Tensor]  # parts_LNW -> sums_LW in a dtype


class Sums:
    """Gradients of weights that L layers have alike. Their parts lie in a slot for each layer, whose memory there is
    from the first backward that asks for it to `total`: some 165 MB for the norms of 27 blocks of 2,048 channels."""

    parts_LNW: Tensor | None = None
    add_up: AddUp

    def __init__(self, layers: Sequence[Sequence[Tensor]]):
        """layers: the weights of each, all of one dtype, in the order in which their sums lie in a row."""
        self.layers = layers

    def slots(self) -> list["Slot"]:
        return [Slot(self, i, weights) for i, weights in enumerate(self.layers)]

    def total(self) -> list[Tensor]:
        """The gradients of one layer's weights after the other's. All slots have been filled."""
        parts_LNW, self.parts_LNW = self.parts_LNW, None
        first = self.layers[0]
        columns = self.add_up(parts_LNW, first[0].dtype).split([weight.numel() for weight in first], 1)
        return [x.view_as(weight) for rows in zip(*columns) for x, weight in zip(rows, first)]


class Slot(NamedTuple):
    """Where the parts of a layer's sums go."""

    sums: Sums
    layer: int
    weights: Sequence[Tensor]

    def rows(self, N: int, add_up: AddUp) -> Tensor:
        """Memory for N parts, (N, W) in at least float32. N, and what adds them up, are the same for all layers."""
        if self.sums.parts_LNW is None:
            dtype = torch.promote_types(self.weights[0].dtype, torch.float32)
            shape = len(self.sums.layers), N, sum(weight.numel() for weight in self.weights)
            self.sums.parts_LNW, self.sums.add_up = self.weights[0].new_empty(shape, dtype=dtype), add_up
        assert self.sums.parts_LNW.shape[1] == N
        return self.sums.parts_LNW[self.layer]

    def fill(self, *gradients: Tensor) -> None:
        """With the sums as they are, one part."""
        row_W = self.rows(1, lambda parts_LNW, dtype: parts_LNW[:, 0].to(dtype))[0]
        torch.cat([x.flatten() for x in gradients], out=row_W)
