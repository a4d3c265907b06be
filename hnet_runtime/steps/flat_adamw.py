"""AdamW over flat memory in one kernel, for unsharded weights; and other optimizers over the same memory.

With several processes, each process updates one shard of the weights (ZeRO stage 1, arXiv 1910.02054). A process
receives the reduced gradients of its own shard, keeps the moments of that shard, and sends the updated weights to all.

Legend: P parameters, G groups; K blocks of B elements.
"""

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hnet_kernels.adamw import BLOCK, adamw_, join_float32, norms, split_float32
from hnet_runtime import UserError
from hnet_runtime.sharded import is_sharded, local_shard

BETAS = (0.9, 0.95)  # of AdamW in training
ParameterSpan = Sequence[Sequence[nn.Parameter]]
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class SplitFloat32(NamedTuple):
    """A float32 weight as its high and low 16 bits, see `split_float32`."""

    high: Tensor
    low: Tensor

    dtype = torch.float32
    shape = property(lambda self: self.high.shape)
    nbytes = property(lambda self: self.high.nbytes + self.low.nbytes)

    def clone(self) -> "SplitFloat32":
        return SplitFloat32(self.high.clone(), self.low.clone())

    def set_(self, weight: Tensor) -> None:
        for old, new in zip(self, split_float32(weight)):
            old.copy_(new)


def as_tensor(weight: Tensor | SplitFloat32, scratch: Tensor | None = None) -> Tensor:
    """The weight as one tensor. scratch: float32 memory of at least its size, used for the result of joining."""
    if not isinstance(weight, SplitFloat32):
        return weight
    return join_float32(*weight, None if scratch is None else scratch[: weight.high.numel()].view(weight.shape))


class EagerAdamW(torch.optim.AdamW):
    """torch.optim.AdamW without its decorators for torch.compile, which import torch._dynamo: that takes a second.

    In torch 2.11 and 2.13 (torch/_compile.py, `_disable_dynamo`). To be removed when they no longer import it.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        inspect.unwrap(torch.optim.AdamW.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        inspect.unwrap(torch.optim.AdamW.step)(self)


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The AdamW of a training run."""
    return EagerAdamW(groups, betas=BETAS, fused=True)


def clipped_step(optimizer: torch.optim.Optimizer) -> None:
    """A step with `grad_scale` and `found_inf` as torch's fused optimizers read them, for an optimizer of any kind.

    For one that does not read them, gradients are divided here, and the host waits to know whether they are finite.
    Raises UserError where a weight gets other memory: graphs and FSDP2 would not see it.
    """
    if isinstance(optimizer, FlatAdamW):
        return optimizer.step()
    parameters = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
    is_torchs = type(optimizer) in ADAMW or type(optimizer).__module__.startswith("torch.optim.")
    if not (is_torchs and getattr(optimizer, "_step_supports_amp_scaling", False)) or _has_hooks(optimizer):
        scale, found_inf = optimizer.grad_scale, optimizer.found_inf
        optimizer.grad_scale = optimizer.found_inf = None  # torch's optimizers refuse what they don't read
        if found_inf.item():
            return
        for p in parameters:
            if p.grad is not None:
                local_shard(p.grad).div_(scale)
    unsharded = [p for p in parameters if not is_sharded(p)]
    before = [p.data_ptr() for p in unsharded]
    optimizer.step()
    if before != [p.data_ptr() for p in unsharded]:
        raise UserError(
            f"make_optimizer: a step of {type(optimizer).__name__} gives a weight other memory (p.data = ...); "
            "expected it to change weights in place"
        )


def rule_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that `make_optimizer` returned, or a FlatAdamW that took its place."""
    return getattr(optimizer, "rule", None) or optimizer


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


@torch.no_grad()
def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimizer allocate its state by a step with zero gradients and rates. It ends without gradients.

    Call it inside `full_precision`, before its state and the weights are loaded.
    """
    flat = optimizer if isinstance(optimizer, FlatAdamW) else None
    rule = flat.rule if flat else optimizer
    if not rule:
        return
    rates = [group["lr"] for group in rule.param_groups]
    for group in rule.param_groups:
        group["lr"] = group["lr"] * 0
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    rule.step()
    for group, rate in zip(rule.param_groups, rates):
        group["lr"] = rate
    flat._restore_gradients() if flat else rule.zero_grad()


class FlatAdamW(EagerAdamW):
    """torch.optim.AdamW(fused=True) with the same results, state and checkpoints; parameters move into flat memory.

    groups: parameter groups as torch's optimizers take them. Their lr and weight_decay may change between steps.
    spans: all parameters of the groups, in their order in memory; plain tensors of one floating dtype on one device.
    A span is one sequence of parameters, which every process updates, or one sequence per process of the default
    group, which that process alone updates. The shards of a span get equal sizes, so they should be about as large.
    compute_weights: pairs (compute weight, parameter) of one shape, all of one compute dtype, such as bfloat16; of all
    parameters of a span or of none. A step writes them.
    rank: this process.
    narrow: the spans whose gradients have the compute dtype; other gradients have the parameters' dtype.

    `weights`, `compute_weights`, `low_bits` and `gradients` have one tensor per span, or None. It holds the span's
    parameters one after the other, each padded with zeros to full blocks. `spans` has the offsets of the spans. The
    tensors that were passed in become views of this memory: `p.data`, `p.grad` (with its old values, or zeros) and the
    compute weights' `data`. So create the optimizer before anything that stores addresses, such as a CUDA graph, or
    that shares the old memory, such as `p.detach()`.

    A float32 weight with a bfloat16 compute weight is stored as that and its low 16 bits (`low_bits`), see
    `split_float32`. No bit is lost, and the weight takes two bytes less. `p.data` has the float32 values only inside
    `full_precision`, and nan outside. Everything but `step` reads and changes weights there. `master_weight` returns
    one parameter's.

    With several processes, a step also receives the shards of the other processes: their compute weights, or their
    weights if there are no compute weights. The low bits of those shards are then out of date. `shards_updates` says
    whether there are such shards. `owned` has the parameters that this process alone updates; `state` has those and the
    ones that all update. Before a step, call `reduce_gradients` for each span, then `wait_for_gradients`.

    `grad_scale` and `found_inf`, where set, are those of torch's fused optimizers: gradients are divided by the first
    in place; where the second is not 0, a step changes nothing. `step` does not wait for the device.

    rule: another optimizer of the same parameters, in one process. `step` calls it inside `full_precision`, with its
    groups and its state, and waits for the device.

    Raises ValueError where parameters or compute weights do not match this description.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        spans: Sequence[ParameterSpan],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        compute_weights: Sequence[tuple[Tensor, Tensor]] = (),
        rank: int = 0,
        narrow: Collection[int] = (),
        rule: torch.optim.Optimizer | None = None,
    ):
        super().__init__([dict(group) for group in groups], betas=betas, eps=eps, fused=True)
        if not rule and not self.replaces(self):
            raise ValueError("FlatAdamW: expected one betas and eps for all groups, and no amsgrad or maximize")
        self.rule = rule
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        parameters = [p for span in spans for part in span for p in part]
        if len(parameters) != len(group_of) or set(parameters) != set(group_of):
            raise ValueError("FlatAdamW: expected each parameter of the groups once in the spans")
        if len({(p.dtype, p.device) for p in parameters}) > 1 or any(map(is_sharded, parameters)):
            raise ValueError("FlatAdamW: the parameters are sharded, or not of one dtype on one device")
        if any(
            p not in group_of or (c.shape, c.dtype) != (p.shape, compute_weights[0][0].dtype)
            for c, p in compute_weights
        ):
            raise ValueError("FlatAdamW: expected compute weights of these parameters, with their shapes and one dtype")
        compute_of = {p: compute for compute, p in compute_weights}
        of_span = [[p for part in span for p in part] for span in spans]
        if any(len({p in compute_of for p in ps}) > 1 for ps in of_span):
            raise ValueError("FlatAdamW: some parameters of a span have compute weights and some have none")
        if any(p not in compute_of for i in narrow for p in of_span[i]):
            raise ValueError("FlatAdamW: a parameter of a narrow span has no compute weight")
        self._slices: dict[Tensor, slice] = {}
        self.spans: list[slice] = []
        self._own_shards: list[slice] = []  # of each span: the range that this process updates
        self.owned = frozenset(p for span in spans if len(span) > 1 for p in span[rank])
        self.shards_updates = any(len(span) > 1 for span in spans)
        end = 0
        for span in spans:
            begin, size = end, max(sum(map(_padded_size, part)) for part in span)
            for i, part in enumerate(span):
                at = begin + i * size
                for p in part:
                    self._slices[p] = slice(at, at := at + _padded_size(p))
            end = begin + len(span) * size
            own = begin + (rank * size if len(span) > 1 else 0)
            self.spans.append(slice(begin, end))
            self._own_shards.append(slice(own, own + size))
        like = {"dtype": parameters[0].dtype, "device": parameters[0].device}
        group_K = torch.zeros(end // BLOCK, dtype=torch.int32)
        for p, at in self._slices.items():
            group_K[at.start // BLOCK : at.stop // BLOCK] = group_of[p]
        self._group_K = group_K.to(like["device"])
        self._zero, self._one = torch.zeros((), **like), torch.ones((), **like)
        self._pending: list[dist.Work] = []

        self.weights: list[Tensor | None] = []
        self.compute_weights: list[Tensor | None] = []
        self.low_bits: list[Tensor | None] = []
        self.gradients: list[Tensor] = []
        self._grads: dict[Tensor, Tensor] = {}
        self._split: dict[Tensor, SplitFloat32] = {}
        self._in_full_precision = False
        for i, (at, ps) in enumerate(zip(self.spans, of_span)):
            dtype = compute_weights[0][0].dtype if ps and ps[0] in compute_of else None
            split = (like["dtype"], dtype) == (torch.float32, torch.bfloat16)
            dtypes = None if split else like["dtype"], dtype, torch.int16 if split else None
            dtypes = *dtypes, dtype if i in narrow else like["dtype"]
            flat = [kind and self._one.new_zeros(at.stop - at.start, dtype=kind) for kind in dtypes]
            for of_spans, x in zip((self.weights, self.compute_weights, self.low_bits, self.gradients), flat):
                of_spans.append(x)
            for p in ps:
                weight, compute, low, grad = (self._part(x, p, at.start) for x in flat)
                if p.grad is not None:
                    grad.copy_(p.grad)
                if split:
                    self._split[p] = SplitFloat32(compute, low)
                    self._split[p].set_(p.detach())
                    weight = p.new_full((), math.nan).expand(p.shape)
                else:
                    weight.copy_(p.detach())
                if compute is not None:
                    compute_of[p].data = compute
                p.data, p.grad, p.grad_dtype = weight, None, grad.dtype
                p.grad = self._grads[p] = grad
        self._refresh()
        updated = [[p for part in (span if len(span) == 1 else [span[rank]]) for p in part] for span in spans]
        self._firsts: list[Tensor] = []  # of each span: the first block of each parameter updated here
        for parts in updated:
            ends = itertools.accumulate((_padded_size(p) // BLOCK for p in parts), initial=0)
            self._firsts.append(torch.tensor(list(ends), dtype=torch.int32, device=like["device"]))
        # of each parameter updated here: its index among those of the groups; and whether its norm counts
        place_of = {p: i for i, p in enumerate(group_of)}
        places = [place_of[p] for parts in updated for p in parts]
        counts = [p in self.owned or rank == 0 for parts in updated for p in parts]
        self._index_P, self._counts_P = torch.tensor(places, dtype=torch.int64), torch.tensor(counts)
        self._index_P, self._counts_P = (x.to(like["device"]) for x in (self._index_P, self._counts_P))
        self._state_views: dict[Tensor, dict[str, Tensor]] = {}  # of each parameter
        if rule:
            self.state, self.param_groups = rule.state, rule.param_groups
            return
        self._moments = [[torch.zeros(own.stop - own.start, **like) for _ in "mv"] for own in self._own_shards]
        self._steps_P = torch.zeros(len(places), device=like["device"])  # float32, and equal
        steps = iter(self._steps_P.unbind())  # one per parameter, as in torch
        for parts, own, moments in zip(updated, self._own_shards, self._moments):
            for p in parts:
                m, v = (self._part(flat, p, own.start) for flat in moments)
                self._state_views[p] = {"step": next(steps), "exp_avg": m, "exp_avg_sq": v}
                self.state[p] = dict(self._state_views[p])

    @staticmethod
    def replaces(optimizer: torch.optim.Optimizer) -> bool:
        """Whether a FlatAdamW without a rule computes the same as this optimizer."""
        if type(optimizer) not in ADAMW or _has_hooks(optimizer):
            return False
        kinds = {
            tuple(group[key] for key in ("betas", "eps", "amsgrad", "maximize")) for group in optimizer.param_groups
        }
        return len(kinds) == 1 and not any(next(iter(kinds))[2:])

    def _part(self, flat: Tensor | None, p: Tensor, start: int) -> Tensor | None:
        """The parameter's view of a flat tensor. start: the offset of that tensor in the flat memory."""
        begin = self._slices[p].start - start
        return None if flat is None else flat[begin : begin + p.numel()].view(p.shape)

    def _own_shard(self, flat: Tensor, span: int) -> Tensor:
        """The shard of a span's flat tensor that this process updates."""
        begin, own = self.spans[span].start, self._own_shards[span]
        return flat[own.start - begin : own.stop - begin]

    def _refresh(self) -> None:
        """Copies the unsplit weights to their compute weights."""
        for weights, compute_weights in zip(self.weights, self.compute_weights):
            if weights is not None and compute_weights is not None:
                compute_weights.copy_(weights)

    def master_weight(self, p: nn.Parameter) -> Tensor | SplitFloat32:
        """The master weight of a parameter."""
        return self._split.get(p, p.detach())

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, `p.data` has the master weights, which may be changed in the same way on all processes.

        Raises RuntimeError where contexts are nested.
        """
        if self._in_full_precision:
            raise RuntimeError("FlatAdamW.full_precision: already inside it")
        self._in_full_precision, made = True, []
        try:
            for p, split in self._split.items():
                p.data = as_tensor(split)
                made.append(p)
            yield
        finally:
            with torch.no_grad():
                for p in made:
                    self._split[p].set_(p.data)
                    p.data = p.new_full((), math.nan).expand(p.shape)
                self._refresh()
            self._in_full_precision = False

    def reduce_gradients(self, span: int) -> None:
        """Starts to sum the gradients of a span over all processes. Each process gets the sums of its own shard.

        The gradients of the other shards are overwritten.
        """
        flat, own = self.gradients[span], self._own_shard(self.gradients[span], span)
        if len(own) < len(flat):
            work = dist.reduce_scatter_tensor(own, flat, async_op=True)
        elif not self.shards_updates or not len(flat):
            return
        else:
            work = dist.all_reduce(flat, async_op=True)
        self._pending.append(work)

    def wait_for_gradients(self) -> None:
        """Waits for all communication that was started. On a GPU the kernels launched afterwards wait, not the host."""
        for work in self._pending:
            work.wait()
        self._pending.clear()

    def all_gather(self, parts: Sequence[Tensor]) -> None:
        """Sends this process's shard of each span's tensor, such as `gradients`, to all and receives theirs."""
        for span, flat in enumerate(parts):
            self._start_gather(span, flat)
        self.wait_for_gradients()

    def _start_gather(self, span: int, flat: Tensor) -> None:
        own = self._own_shard(flat, span)
        if len(own) < len(flat):
            self._pending.append(dist.all_gather_into_tensor(flat, own, async_op=True))

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global norm of all gradients, on the device. Its bits do not depend on which process updates what."""
        norms_P = self._one.new_zeros(len(self._grads))
        found = []
        for span, (gradient, first_P) in enumerate(zip(self.gradients, self._firsts)):
            found.append(norms(self._own_shard(gradient, span).view(-1, BLOCK), first_P, norms_P.dtype))
        norms_P.index_copy_(0, self._index_P, torch.cat(found) * self._counts_P)
        if self.shards_updates:
            dist.all_reduce(norms_P)
        return norms_P.square().sum().sqrt()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step with `gradients` and the first group's betas and eps.

        Raises RuntimeError where a `p.grad` is no longer the view that this optimizer set.
        """
        if any(p.grad is not grad for p, grad in self._grads.items()):
            raise RuntimeError("FlatAdamW: a parameter's grad is no longer the view of the flat gradients")
        if self.rule:
            self.rule.grad_scale, self.rule.found_inf = self.grad_scale, self.found_inf
            with self.full_precision():
                clipped_step(self.rule)
            return self._restore_gradients()
        betas, eps = self.param_groups[0]["betas"], self.param_groups[0]["eps"]
        rates = [(group["lr"], group["lr"] * group["weight_decay"]) for group in self.param_groups]
        # new pinned memory each time: torch's allocator reuses it only when the copy has finished
        table = torch.tensor([betas, *rates], dtype=torch.float64, pin_memory=self._one.is_cuda)
        table = table.to(self._one.device, non_blocking=True)
        scale = self._one if self.grad_scale is None else self.grad_scale
        found_inf = self._zero if self.found_inf is None else self.found_inf
        self._steps_P += 1 - found_inf
        bias_2 = 1 - table[0] ** self._steps_P[0] if self._state_views else None
        for span, (own, moments) in enumerate(zip(self._own_shards, self._moments)):
            of_span = [x[span] for x in (self.weights, self.compute_weights, self.low_bits, self.gradients)]
            if self._state_views and own.start < own.stop:  # this process may own nothing
                w, compute, low, g = (None if x is None else self._own_shard(x, span) for x in of_span)
                flat = (x if x is None else x.view(-1, BLOCK) for x in (w, compute, low, g, *moments))
                group_K = self._group_K[own.start // BLOCK : own.stop // BLOCK]
                adamw_(*flat, group_K, table[1:], bias_2, scale, found_inf, betas, eps)
            if self.shards_updates:  # while the next span is updated
                weights, compute_weights, *_ = of_span
                self._start_gather(span, weights if compute_weights is None else compute_weights)
        self.wait_for_gradients()

    def _restore_gradients(self) -> None:
        """Makes each `p.grad` a view of `gradients` again, where a rule has called its `zero_grad`."""
        for p, grad in self._grads.items():
            p.grad = grad

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Sets the gradients to zero in place, whatever `set_to_none` says."""
        for gradient in self.gradients:
            gradient.zero_()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, without a rule; also loads the state of torch.optim.AdamW.

        Raises ValueError where the parameters have made different numbers of steps.
        """
        super().load_state_dict(state_dict)  # it replaces the tensors of the state
        steps = max((found["step"] for found in self.state.values() if found), default=0)
        for p, place in self._state_views.items():
            loaded = self.state[p]  # empty where torch has made no step, as without a gradient
            for key, into in place.items():
                into.copy_(loaded[key]) if loaded else into.fill_(steps if key == "step" else 0)
            self.state[p] = dict(place)
        if len(set(self._steps_P.tolist())) > 1:
            raise ValueError("FlatAdamW: the parameters of this state have made different numbers of steps")


ADAMW = (torch.optim.AdamW, EagerAdamW, FlatAdamW)  # types whose step is AdamW's


def _padded_size(p: Tensor) -> int:
    """Elements of the blocks that a parameter takes."""
    return -(-p.numel() // BLOCK) * BLOCK
