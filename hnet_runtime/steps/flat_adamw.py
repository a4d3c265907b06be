"""AdamW over flat memory, in one kernel: for whole parameters, as steps as CUDA graphs have them.

Several processes with the same parameters update a part each (ZeRO, arXiv 1910.02054, stage 1): a process gets the sums
of its own parts' gradients alone, has moments of these alone, and hands out what it has updated.

Legend: P parameters, G groups; K blocks of B elements.
"""

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hnet_kernels.adamw import BLOCK, adamw_, halve, join, norms

Span = Sequence[Sequence[nn.Parameter]]


class Halves(NamedTuple):
    """A float32 weight as `halve` gives it."""

    copy: Tensor
    rest: Tensor

    dtype = torch.float32
    shape = property(lambda self: self.copy.shape)
    nbytes = property(lambda self: self.copy.nbytes + self.rest.nbytes)

    def clone(self) -> "Halves":
        return Halves(self.copy.clone(), self.rest.clone())

    def set_(self, weight: Tensor) -> None:
        for old, new in zip(self, halve(weight)):
            old.copy_(new)


def as_tensor(weight: Tensor | Halves, scratch: Tensor | None = None) -> Tensor:
    """A weight as one tensor. scratch: float32 numbers, at least as many, in whose place those of halves come."""
    if not isinstance(weight, Halves):
        return weight
    return join(*weight, None if scratch is None else scratch[: weight.copy.numel()].view(weight.shape))


class FlatAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) with the same results, state and checkpoints; parameters move into flat memory.

    groups: as torch's optimizers take them, each with its lr and weight_decay, which may change from step to step.
    spans: all of the groups' parameters, as they are to lie in memory; plain tensors of one floating dtype on one
    device. A span is either one sequence of parameters, which every process updates, or a sequence for each process of
    the default group, which that process alone updates. They get equal room, so they should be about as large.
    rank: this process.
    copies: pairs (copy, parameter) of one shape, all copies of one dtype, such as bfloat16; of all of a span's
    parameters or of none. A step keeps them equal.
    narrow: which spans have gradients of the copies' dtype; the others have them of the weights'.

    `weights`, `copies`, `rests` and `gradients` have a tensor for each span, its parameters one after the other, each
    filled up with zeros to whole blocks; or None. `spans` has their places if all lay in a row. What was handed over
    becomes views of them: `p.data`, `p.grad` (with the gradient that was there, or zeros) and `copy.data`. So this must
    come before whatever keeps addresses, such as a CUDA graph, or shares the former memory, such as `p.detach()`.

    Float32 weights that have bfloat16 copies are kept as these and the 16 bits that they lack, in `rests`: see `halve`.
    No bit is lost, and a weight takes two bytes less, as does moving it. `p.data` has their numbers inside `whole`,
    where whatever else than a step reads or changes weights does so, and else nan; `held` gives one parameter's.

    With several processes, a step renews of what others update the copies alone, or the weights where there are none;
    so the other weights are of no use but where they were set. `cut` says that it is so. `owned` has the parameters
    that this process alone updates; `state` has no others but those that all do. Before a step, `add_up` each span and
    wait for `added_up`.

    `grad_scale` and `found_inf`, where set, are those of torch's fused optimizers: gradients are divided by the one, in
    place; where the other isn't 0, a step changes nothing. `step` doesn't wait for the device.

    Raises ValueError where parameters or copies are not as said here.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        spans: Sequence[Span],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        copies: Sequence[tuple[Tensor, Tensor]] = (),
        rank: int = 0,
        narrow: Collection[int] = (),
    ):
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        parameters = [p for span in spans for part in span for p in part]
        if len(parameters) != len(group_of) or set(parameters) != set(group_of):
            raise ValueError("FlatAdamW: the parameters are not those of the groups, each once")
        if len({(p.dtype, p.device) for p in parameters}) > 1 or any(isinstance(p, DTensor) for p in parameters):
            raise ValueError("FlatAdamW: the parameters are sharded, or not of one dtype on one device")
        if any(p not in group_of or (c.shape, c.dtype) != (p.shape, copies[0][0].dtype) for c, p in copies):
            raise ValueError("FlatAdamW: the copies are not of these parameters, of their shapes and of one dtype")
        copy_of = {p: copy for copy, p in copies}
        of_span = [[p for part in span for p in part] for span in spans]
        if any(len({p in copy_of for p in ps}) > 1 for ps in of_span):
            raise ValueError("FlatAdamW: some parameters of a span have copies and some have none")
        if any(p not in copy_of for i in narrow for p in of_span[i]):
            raise ValueError("FlatAdamW: a parameter of a narrow span has no copy")
        self._slices: dict[Tensor, slice] = {}
        self.spans: list[slice] = []
        self._own: list[slice] = []  # of each span, what this process updates
        self.owned = frozenset(p for span in spans if len(span) > 1 for p in span[rank])
        self.cut = any(len(span) > 1 for span in spans)
        end = 0
        for span in spans:
            begin, room = end, max(sum(map(_filled_up, part)) for part in span)
            for i, part in enumerate(span):
                at = begin + i * room
                for p in part:
                    self._slices[p] = slice(at, at := at + _filled_up(p))
            end = begin + len(span) * room
            own = begin + (rank * room if len(span) > 1 else 0)
            self.spans.append(slice(begin, end))
            self._own.append(slice(own, own + room))
        like = {"dtype": parameters[0].dtype, "device": parameters[0].device}
        group_K = torch.zeros(end // BLOCK, dtype=torch.int32)
        for p, at in self._slices.items():
            group_K[at.start // BLOCK : at.stop // BLOCK] = group_of[p]
        self._group_K = group_K.to(like["device"])
        self._no, self._one = torch.zeros((), **like), torch.ones((), **like)
        self._under_way: list[dist.Work] = []

        self.weights: list[Tensor | None] = []
        self.copies: list[Tensor | None] = []
        self.rests: list[Tensor | None] = []
        self.gradients: list[Tensor] = []
        self._grads: dict[Tensor, Tensor] = {}
        self._halves: dict[Tensor, Halves] = {}
        self._are_whole = False
        for i, (at, ps) in enumerate(zip(self.spans, of_span)):
            dtype = copies[0][0].dtype if ps and ps[0] in copy_of else None
            halved = (like["dtype"], dtype) == (torch.float32, torch.bfloat16)
            dtypes = None if halved else like["dtype"], dtype, torch.int16 if halved else None
            dtypes = *dtypes, dtype if i in narrow else like["dtype"]
            flat = [kind and self._one.new_zeros(at.stop - at.start, dtype=kind) for kind in dtypes]
            for of_spans, x in zip((self.weights, self.copies, self.rests, self.gradients), flat):
                of_spans.append(x)
            for p in ps:
                weight, copy, rest, grad = (self._part(x, p, at.start) for x in flat)
                if p.grad is not None:
                    grad.copy_(p.grad)
                if halved:
                    self._halves[p] = Halves(copy, rest)
                    self._halves[p].set_(p.detach())
                    weight = p.new_full((), math.nan).expand(p.shape)
                else:
                    weight.copy_(p.detach())
                if copy is not None:
                    copy_of[p].data = copy
                p.data, p.grad, p.grad_dtype = weight, None, grad.dtype
                p.grad = self._grads[p] = grad
        self._refresh()
        self._moments = [[torch.zeros(own.stop - own.start, **like) for _ in "mv"] for own in self._own]
        updated = [[p for part in (span if len(span) == 1 else [span[rank]]) for p in part] for span in spans]
        self._steps_P = torch.zeros(sum(map(len, updated)), device=like["device"])  # float32, and equal
        self._places: dict[Tensor, dict[str, Tensor]] = {}  # where each parameter's state lies
        self._firsts: list[Tensor] = []  # of each span, where the blocks of each parameter that is updated here begin
        steps = iter(self._steps_P.unbind())  # torch has one each
        for parts, own, moments in zip(updated, self._own, self._moments):
            ends = itertools.accumulate((_filled_up(p) // BLOCK for p in parts), initial=0)
            self._firsts.append(torch.tensor(list(ends), dtype=torch.int32, device=like["device"]))
            for p in parts:
                m, v = (self._part(flat, p, own.start) for flat in moments)
                self._places[p] = {"step": next(steps), "exp_avg": m, "exp_avg_sq": v}
                self.state[p] = dict(self._places[p])
        # of each parameter that is updated here, its place among those of the groups; and whether its norm counts
        place_of = {p: i for i, p in enumerate(group_of)}
        places = [place_of[p] for p in self._places]
        counts = [p in self.owned or rank == 0 for p in self._places]
        self._index_P, self._counts_P = torch.tensor(places, dtype=torch.int64), torch.tensor(counts)
        self._index_P, self._counts_P = (x.to(like["device"]) for x in (self._index_P, self._counts_P))

    def _part(self, flat: Tensor | None, p: Tensor, start: int) -> Tensor | None:
        """The parameter's part of flat memory that begins where flat memory as a whole has `start`."""
        begin = self._slices[p].start - start
        return None if flat is None else flat[begin : begin + p.numel()].view(p.shape)

    def _own_part(self, whole: Tensor, span: int) -> Tensor:
        """Of what belongs to a span, the part that this process updates."""
        begin, own = self.spans[span].start, self._own[span]
        return whole[own.start - begin : own.stop - begin]

    def _refresh(self) -> None:
        """Copies whole weights to their copies."""
        for weights, copies in zip(self.weights, self.copies):
            if weights is not None and copies is not None:
                copies.copy_(weights)

    def held(self, p: nn.Parameter) -> Tensor | Halves:
        """The weight of a parameter."""
        return self._halves.get(p, p.detach())

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, parameters have their weights, which may be changed, on all processes alike. Not to be nested."""
        if self._are_whole:
            raise RuntimeError("FlatAdamW.whole: weights are whole already")
        self._are_whole, made = True, []
        try:
            for p, halves in self._halves.items():
                p.data = as_tensor(halves)
                made.append(p)
            yield
        finally:
            with torch.no_grad():
                for p in made:
                    self._halves[p].set_(p.data)
                    p.data = p.new_full((), math.nan).expand(p.shape)
                self._refresh()
            self._are_whole = False

    def add_up(self, span: int) -> None:
        """Begins to add up the gradients of a span over all processes, each of which gets the sums of what it updates.

        Others' gradients are not what they were then.
        """
        whole, own = self.gradients[span], self._own_part(self.gradients[span], span)
        if len(own) < len(whole):
            work = dist.reduce_scatter_tensor(own, whole, async_op=True)
        elif not self.cut or not len(whole):
            return
        else:
            work = dist.all_reduce(whole, async_op=True)
        self._under_way.append(work)

    def added_up(self) -> None:
        """Waits until all that was begun is done: on a GPU what is launched from here on does, the host does not."""
        for work in self._under_way:
            work.wait()
        self._under_way.clear()

    def share(self, parts: Sequence[Tensor]) -> None:
        """Gives what this process updates of each span, such as of `gradients`, to all, and gets theirs."""
        for span, whole in enumerate(parts):
            own = self._own_part(whole, span)
            if len(own) < len(whole):
                self._under_way.append(dist.all_gather_into_tensor(whole, own, async_op=True))
        self.added_up()

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global norm of all gradients, on the device: the same bits whoever updates what."""
        norms_P = self._one.new_zeros(len(self._grads))
        found = []
        for span, (gradient, first_P) in enumerate(zip(self.gradients, self._firsts)):
            found.append(norms(self._own_part(gradient, span).view(-1, BLOCK), first_P, norms_P.dtype))
        norms_P.index_copy_(0, self._index_P, torch.cat(found) * self._counts_P)
        if self.cut:
            dist.all_reduce(norms_P)
        return norms_P.square().sum().sqrt()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """A step by `gradients`, with the first group's betas and eps. RuntimeError where a `p.grad` lies elsewhere."""
        if any(p.grad is not grad for p, grad in self._grads.items()):
            raise RuntimeError("FlatAdamW: a parameter's grad is no longer the view of the flat gradients that it was")
        betas, eps = self.param_groups[0]["betas"], self.param_groups[0]["eps"]
        rates = [(group["lr"], group["lr"] * group["weight_decay"]) for group in self.param_groups]
        # Fresh pinned memory each time, which torch's allocator gives to others once the copy has been made
        table = torch.tensor([betas, *rates], dtype=torch.float64, pin_memory=self._one.is_cuda)
        table = table.to(self._one.device, non_blocking=True)
        scale = self._one if self.grad_scale is None else self.grad_scale
        found_inf = self._no if self.found_inf is None else self.found_inf
        self._steps_P += 1 - found_inf
        bias_2 = 1 - table[0] ** self._steps_P[0] if self._places else None
        for span, (own, moments) in enumerate(zip(self._own, self._moments)):
            if not self._places or own.start == own.stop:  # a process may update nothing
                continue
            w, copy, rest, g = (
                None if x[span] is None else self._own_part(x[span], span)
                for x in (self.weights, self.copies, self.rests, self.gradients)
            )
            flat = (x if x is None else x.view(-1, BLOCK) for x in (w, copy, rest, g, *moments))
            group_K = self._group_K[own.start // BLOCK : own.stop // BLOCK]
            adamw_(*flat, group_K, table[1:], bias_2, scale, found_inf, betas, eps)
        if self.cut:
            self.share([w if copy is None else copy for w, copy in zip(self.weights, self.copies)])

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Gradients stay where they are: they become zero whatever `set_to_none` says."""
        for gradient in self.gradients:
            gradient.zero_()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, also for what torch.optim.AdamW has saved. Raises ValueError where parameters' steps differ."""
        super().load_state_dict(state_dict)  # which replaces the tensors of the state
        for p, place in self._places.items():
            loaded = self.state[p]  # empty where torch has made no step yet
            for key, into in place.items():
                into.copy_(loaded[key]) if loaded else into.zero_()
            self.state[p] = dict(place)
        if len(set(self._steps_P.tolist())) > 1:
            raise ValueError("FlatAdamW: the parameters of this state have made different numbers of steps")


def _filled_up(p: Tensor) -> int:
    """Elements of the blocks that a parameter takes."""
    return -(-p.numel() // BLOCK) * BLOCK
