"""Where gradients of weights go: to autograd as ever, or straight to where an optimizer reads them.

A backward that writes a weight's gradient to its place need not allocate it, nor have it copied. The place is looked
up in the forward and kept on ctx, since a backward only has detached weights.

Gradients of small weights, such as a norm's, are sums over all tokens, of which each thread block of a kernel finds a
partial sum. Adding those up for many layers at once takes hardly longer than for one, so inside `writing_to` they wait
for the other layers of their kind.

Legend: L layers, N partial sums of a layer, W elements: those of its weights.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

Reduce = Callable[[Tensor, torch.dtype], Tensor]  # parts_LNW -> sums_LW in a dtype


class Place:
    """Where the gradient of a weight or input goes: a contiguous tensor of its shape, in its dtype or float32.

    adds: to what is there already, as others have written it.
    """

    def __init__(self, tensor: Tensor, adds: bool = False):
        self.tensor, self.adds, self.written = tensor, adds, False


class PartialSums:
    """Partial sums of the gradients of weights that several layers have alike, a `Slot` for each layer.

    They have memory from the first backward that asks for it until `total`: some 165 MB for the norms of 27 blocks of
    2,048 channels.
    """

    def __init__(self):
        self.slots: list[Slot] = []
        self.parts_LNW: Tensor | None = None
        self.reduce: Reduce

    def slot(self, *weights: Tensor) -> "Slot":
        """A slot for one more layer. weights: of one dtype, in the order in which their sums are stored in a row."""
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
        self.alone = True  # no other layer shares the sums, so the backward itself returns the gradients

    def rows(self, N: int, reduce: Reduce) -> Tensor:
        """Memory for N partial sums, (N, W) in at least float32. N and `reduce` are the same for all layers."""
        sums = self.sums
        other_tokens = sums.parts_LNW is not None and sums.parts_LNW.shape[1] != N
        if other_tokens or self not in sums.slots:  # or it is a second backward, and the first has been added up
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
        """With the sums as they are, as one partial sum."""
        row_W = self.rows(1, lambda parts_LNW, dtype: parts_LNW[:, 0].to(dtype))[0]
        torch.cat([x.flatten() for x in gradients], out=row_W)

    def gradients(self) -> list[Tensor | None]:
        """What a backward returns for the weights once it has filled the slot: None where `PartialSums` waits."""
        if not self.alone:
            return [None] * len(self.weights)
        return [gradient for _, gradient in self.sums.total()]


class Destinations:
    """Places of weights' gradients, each for the first use of its weight; later uses have gradients as ever."""

    def __init__(self, tensors: dict[Tensor, Tensor]):
        """tensors: for each weight where its gradient goes."""
        self.places = {weight: Place(tensor) for weight, tensor in tensors.items()}
        self.free = set(self.places)
        self.sums: dict[tuple, PartialSums] = {}

    def add(self, x: Tensor, tensor: Tensor, adds: bool = False) -> None:
        """A place for the gradient of x, see `Place`."""
        self.places[x] = Place(tensor, adds)
        self.free.add(x)

    def take(self, *weights: Tensor) -> list[Place] | None:
        """The places of all these weights, or None where one has none left."""
        if not self.free.issuperset(weights):
            return None
        self.free.difference_update(weights)
        return [self.places[weight] for weight in weights]

    def finish(self) -> None:
        """Adds up the partial sums and writes them to their places."""
        found = [pair for sums in self.sums.values() for pair in sums.total()]
        self.sums.clear()
        places = [self.places[weight] for weight, _ in found]
        for dtype in dict.fromkeys(place.tensor.dtype for place in places):  # a launch for each
            same = [(p.tensor, g) for p, (_, g) in zip(places, found) if p.tensor.dtype == dtype]
            torch._foreach_copy_(*map(list, zip(*same)))
        for place in places:
            place.written = True


def settle(destinations: Destinations, found: dict[Tensor, Tensor | None], shared: dict[Tensor, Tensor]) -> None:
    """Brings all gradients of a backward to their places.

    found: what autograd has returned for each tensor with a place, beside what backwards have written themselves: it is
    added to that, or copied; a place that nobody has written is zeroed. shared: places to which others add as well.
    """
    destinations.finish()
    copied, added = [], []
    for x, place in destinations.places.items():
        if found[x] is not None:
            (added if place.written or place.adds else copied).append((place.tensor, found[x]))
        elif not place.written and not place.adds:
            place.tensor.zero_()
    added += [(place, found[x]) for x, place in shared.items() if found[x] is not None]
    for call, pairs in ((torch._foreach_copy_, copied), (torch._foreach_add_, added)):
        for dtypes in dict.fromkeys((place.dtype, x.dtype) for place, x in pairs):  # a launch for each
            same = [(place, x) for place, x in pairs if (place.dtype, x.dtype) == dtypes]
            call(*map(list, zip(*same)))


_DESTINATIONS: ContextVar[Destinations | None] = ContextVar("destinations", default=None)


@contextlib.contextmanager
def writing_to(destinations: Destinations | None) -> Iterator[None]:
    """Backwards of forwards inside write weights' gradients to their places in `destinations`."""
    token = _DESTINATIONS.set(destinations)
    try:
        yield
    finally:
        _DESTINATIONS.reset(token)


def switch_to(destinations: Destinations) -> None:
    """From here on in the forward at hand, other destinations; until the end of `writing_to` around it."""
    _DESTINATIONS.set(destinations)


def place_of(x: Tensor, adds: bool = False) -> Place | None:
    """Where the backward of the forward at hand writes the gradient of a matrix; None: it returns it.

    adds: whether the backward adds to what is there, or writes over it.
    """
    destinations = _DESTINATIONS.get()
    if destinations is None or x not in destinations.free or destinations.places[x].adds != adds:
        return None
    return destinations.take(x)[0]


def slot_of(kind: str, *weights: Tensor) -> Slot:
    """The slot for the gradients of small weights that the forward at hand reads."""
    destinations = _DESTINATIONS.get()
    if destinations is None or not destinations.take(*weights):
        return PartialSums().slot(*weights)
    key = kind, weights[0].dtype, *(weight.shape for weight in weights)
    slot = destinations.sums.setdefault(key, PartialSums()).slot(*weights)
    slot.alone = False
    return slot


def write_product(dy_TO: Tensor, x_TI: Tensor, weight: Tensor, place: Place | None) -> Tensor | None:
    """The gradient dy^T x of a matrix in its dtype; None where it has been written to its place.

    Sums are rounded once, to the dtype of where they go.
    """
    out = None if place is None else place.tensor
    dtype = weight.dtype if out is None else out.dtype
    dy_OT = dy_TO.T
    if dtype == x_TI.dtype:
        found = torch.mm(dy_OT, x_TI, out=out) if out is not None else dy_OT @ x_TI
    elif x_TI.is_cuda:
        found = torch.mm(dy_OT, x_TI, out_dtype=dtype, **({} if out is None else {"out": out}))
    else:
        found = torch.mm(dy_OT.to(dtype), x_TI.to(dtype), **({} if out is None else {"out": out}))
    if place is None:
        return found
    place.written = True
    return None
