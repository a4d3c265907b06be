"""Where backwards write the gradients of weights: autograd takes them, or the memory that an optimizer reads.

A backward that writes a weight's gradient to its destination neither allocates nor copies it. The destination is looked
up in the forward and stored on ctx, because a backward only has detached weights.

The gradient of a small weight, such as a norm's, is a sum over all tokens. Each thread block of a kernel computes a
partial sum. Reducing those of many layers in one launch takes hardly longer than reducing those of one. So inside
`writing_to` partial sums are reduced once, for all layers of the same kind.

Legend: L layers, N partial sums of a layer, W elements of its weights.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

Reduce = Callable[[Tensor, torch.dtype], Tensor]  # parts_LNW -> sums_LW in a dtype


class Destination:
    """Where the gradient of a weight or input goes: a contiguous tensor of its shape, in its dtype or float32.

    adds: the gradient is added to what others have written there.
    """

    def __init__(self, tensor: Tensor, adds: bool = False):
        self.tensor, self.adds, self.written = tensor, adds, False


class PartialSums:
    """Partial sums of the gradients of small weights of several layers of one kind, one `Slot` per layer.

    Memory is allocated by the first backward that needs it and freed by `total`: some 165 MB for the norms of 27 blocks
    of 2,048 channels.
    """

    def __init__(self):
        self.slots: list[Slot] = []
        self.parts_LNW: Tensor | None = None
        self.reduce: Reduce

    def slot(self, *weights: Tensor) -> "Slot":
        """A slot for one more layer. weights: of one dtype, in the order in which a row stores their sums."""
        self.slots.append(Slot(self, len(self.slots), weights))
        return self.slots[-1]

    def total(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, gradient) of the layers whose slots were filled."""
        parts_LNW, self.parts_LNW = self.parts_LNW, None
        filled, self.slots = [slot for slot in self.slots if slot.filled], []
        if not filled:
            return []
        first = filled[0].weights
        columns = self.reduce(parts_LNW, first[0].dtype).split([weight.numel() for weight in first], 1)
        return [
            (weight, column[slot.layer].view_as(weight))
            for slot in filled
            for weight, column in zip(slot.weights, columns)
        ]


class Slot:
    """Where the partial sums of one layer go."""

    def __init__(self, sums: PartialSums, layer: int, weights: Sequence[Tensor]):
        self.sums, self.layer, self.weights, self.filled = sums, layer, weights, False
        self.alone = True  # no other layer shares the sums, so the backward returns the gradients itself

    def rows(self, N: int, reduce: Reduce) -> Tensor:
        """Memory for N partial sums, (N, W) in at least float32. N and `reduce` are the same for all layers."""
        sums = self.sums
        other_tokens = sums.parts_LNW is not None and sums.parts_LNW.shape[1] != N
        if other_tokens or self not in sums.slots:  # or a second backward, after the first was reduced
            with contextlib.suppress(ValueError):
                sums.slots.remove(self)
            self.sums = sums = PartialSums()
            self.layer, self.alone = 0, True
            sums.slots.append(self)
        if sums.parts_LNW is None:
            dtype = torch.promote_types(self.weights[0].dtype, torch.float32)
            shape = len(sums.slots), N, sum(weight.numel() for weight in self.weights)
            sums.parts_LNW, sums.reduce = self.weights[0].new_empty(shape, dtype=dtype), reduce
        self.filled = True
        return sums.parts_LNW[self.layer]

    def fill(self, *gradients: Tensor) -> None:
        """Stores complete sums, as one partial sum."""
        row_W = self.rows(1, lambda parts_LNW, dtype: parts_LNW[:, 0].to(dtype))[0]
        torch.cat([x.flatten() for x in gradients], out=row_W)

    def gradients(self) -> list[Tensor | None]:
        """What a backward returns for the weights after filling the slot.

        None for each where `PartialSums` reduces them later.
        """
        if not self.alone:
            return [None] * len(self.weights)
        return [gradient for _, gradient in self.sums.total()]


class Destinations:
    """The destinations of gradients, each for the first use of its tensor. Later uses return gradients to autograd."""

    def __init__(self, tensors: dict[Tensor, Tensor]):
        """tensors: for each weight, where its gradient goes."""
        self.by_tensor = {weight: Destination(tensor) for weight, tensor in tensors.items()}
        self.free = set(self.by_tensor)
        self.sums: dict[tuple, PartialSums] = {}

    def add(self, x: Tensor, tensor: Tensor, adds: bool = False) -> None:
        """Adds a destination for the gradient of x, see `Destination`."""
        self.by_tensor[x] = Destination(tensor, adds)
        self.free.add(x)

    def take(self, *weights: Tensor) -> list[Destination] | None:
        """The destinations of these weights, or None if one of them has none or it is in use."""
        if not self.free.issuperset(weights):
            return None
        self.free.difference_update(weights)
        return [self.by_tensor[weight] for weight in weights]

    def finish(self) -> None:
        """Reduces the partial sums and writes them to their destinations."""
        found = [pair for sums in self.sums.values() for pair in sums.total()]
        self.sums.clear()
        destinations = [self.by_tensor[weight] for weight, _ in found]
        for dtype in dict.fromkeys(destination.tensor.dtype for destination in destinations):  # one launch each
            same = [(p.tensor, g) for p, (_, g) in zip(destinations, found) if p.tensor.dtype == dtype]
            torch._foreach_copy_(*map(list, zip(*same)))
        for destination in destinations:
            destination.written = True


def settle(destinations: Destinations, found: dict[Tensor, Tensor | None], shared: dict[Tensor, Tensor]) -> None:
    """Writes all gradients of a backward to their destinations.

    found: what autograd returned for each tensor with a destination. It is added to what backwards have written there,
    or copied; a destination that nobody has written is zeroed. shared: for tensors that other parts of the model read
    too, the memory to which all add their gradients.
    """
    destinations.finish()
    copied, added = [], []
    for x, destination in destinations.by_tensor.items():
        if found[x] is not None:
            (added if destination.written or destination.adds else copied).append((destination.tensor, found[x]))
        elif not destination.written and not destination.adds:
            destination.tensor.zero_()
    added += [(gradient, found[x]) for x, gradient in shared.items() if found[x] is not None]
    for call, pairs in ((torch._foreach_copy_, copied), (torch._foreach_add_, added)):
        for dtypes in dict.fromkeys((to.dtype, x.dtype) for to, x in pairs):  # one launch each
            same = [(to, x) for to, x in pairs if (to.dtype, x.dtype) == dtypes]
            call(*map(list, zip(*same)))


_DESTINATIONS: ContextVar[Destinations | None] = ContextVar("destinations", default=None)


@contextlib.contextmanager
def writing_to(destinations: Destinations | None) -> Iterator[None]:
    """Inside, forwards take the destinations of their gradients from `destinations`."""
    token = _DESTINATIONS.set(destinations)
    try:
        yield
    finally:
        _DESTINATIONS.reset(token)


def switch_to(destinations: Destinations) -> None:
    """Uses other destinations for the rest of the forward, until the end of `writing_to` around it."""
    _DESTINATIONS.set(destinations)


def destination_of(x: Tensor, adds: bool = False) -> Destination | None:
    """Where the backward of the current forward writes the gradient of a matrix; None: it returns the gradient.

    adds: whether that backward adds to the memory or overwrites it.
    """
    destinations = _DESTINATIONS.get()
    if destinations is None or x not in destinations.free or destinations.by_tensor[x].adds != adds:
        return None
    return destinations.take(x)[0]


def slot_of(kind: str, *weights: Tensor) -> Slot:
    """The slot for the gradients of the small weights that the current forward reads."""
    destinations = _DESTINATIONS.get()
    if destinations is None or not destinations.take(*weights):
        return PartialSums().slot(*weights)
    key = kind, weights[0].dtype, *(weight.shape for weight in weights)
    slot = destinations.sums.setdefault(key, PartialSums()).slot(*weights)
    slot.alone = False
    return slot


def write_product(dy_TO: Tensor, x_TI: Tensor, weight: Tensor, destination: Destination | None) -> Tensor | None:
    """The gradient dy^T x of a matrix in its dtype; None where it has been written to its destination.

    The sums are rounded once, to the dtype of the result.
    """
    out = None if destination is None else destination.tensor
    dtype = weight.dtype if out is None else out.dtype
    dy_OT = dy_TO.T
    if dtype == x_TI.dtype:
        found = torch.mm(dy_OT, x_TI, out=out) if out is not None else dy_OT @ x_TI
    elif x_TI.is_cuda:
        found = torch.mm(dy_OT, x_TI, out_dtype=dtype, **({} if out is None else {"out": out}))
    else:
        found = torch.mm(dy_OT.to(dtype), x_TI.to(dtype), **({} if out is None else {"out": out}))
    if destination is None:
        return found
    destination.written = True
    return None
