"""AdamW over flat memory, in one kernel: for whole parameters on one device, as steps as CUDA graphs have them.

Legend: N elements, P parameters, G groups; K blocks of B elements.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hnet_kernels.adamw import BLOCK, adamw_


class FlatAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) with the same results, state and checkpoints; parameters move into flat memory.

    groups: as torch's optimizers take them, each with its lr and weight_decay, which may change from step to step.
    parameters: all of the groups', in their order in memory; plain tensors of one floating dtype on one device.
    copies: pairs (copy, parameter) of one shape, all copies of one dtype, such as bfloat16. A step keeps them equal.

    `weights`, `gradient` and `copies` (None without any) are (N,), the parameters one after the other, each filled up
    with zeros to whole blocks. What was handed over becomes views of them: `p.data`, `p.grad` (with the gradient that
    was there, or zeros) and `copy.data`. So this must come before whatever keeps addresses, such as a CUDA graph, or
    shares the former memory, such as `p.detach()`.

    `grad_scale` and `found_inf`, where set, are those of torch's fused optimizers: gradients are divided by the one, in
    place; where the other isn't 0, a step changes nothing. `step` doesn't wait for the device.

    Raises ValueError where parameters or copies are not as said here.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        parameters: Sequence[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        copies: Sequence[tuple[Tensor, Tensor]] = (),
    ):
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        if len(parameters) != len(group_of) or set(parameters) != set(group_of):
            raise ValueError("FlatAdamW: the parameters are not those of the groups, each once")
        if len({(p.dtype, p.device) for p in parameters}) > 1 or any(isinstance(p, DTensor) for p in parameters):
            raise ValueError("FlatAdamW: the parameters are sharded, or not of one dtype on one device")
        if any(p not in group_of or (c.shape, c.dtype) != (p.shape, copies[0][0].dtype) for c, p in copies):
            raise ValueError("FlatAdamW: the copies are not of these parameters, of their shapes and of one dtype")
        self._slices: dict[Tensor, slice] = {}
        end = 0
        for p in parameters:
            self._slices[p] = slice(end, end := end + -(-p.numel() // BLOCK) * BLOCK)
        like = {"dtype": parameters[0].dtype, "device": parameters[0].device}
        blocks = [(s.stop - s.start) // BLOCK for s in self._slices.values()]
        group_P = torch.tensor([group_of[p] for p in parameters], dtype=torch.int32)
        self._group_K = group_P.repeat_interleave(torch.tensor(blocks)).to(like["device"])
        self._no, self._one = torch.zeros((), **like), torch.ones((), **like)

        self.weights, self.gradient, self._m, self._v = (torch.zeros(end, **like) for _ in "wgmv")
        self._steps_P = torch.zeros(len(parameters), device=like["device"])  # float32, and equal: torch has one each
        self._grads: dict[Tensor, Tensor] = {}
        self._places: dict[Tensor, dict[str, Tensor]] = {}  # where each parameter's state lies
        for p, step in zip(parameters, self._steps_P.unbind()):
            weight, grad, m, v = (self._part(flat, p) for flat in (self.weights, self.gradient, self._m, self._v))
            weight.copy_(p.detach())
            if p.grad is not None:
                grad.copy_(p.grad)
            p.data = weight
            p.grad = self._grads[p] = grad
            self._places[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
            self.state[p] = dict(self._places[p])
        self.copies = torch.empty(end, dtype=copies[0][0].dtype, device=like["device"]) if copies else None
        self.refresh()
        for copy, p in copies:
            copy.data = self._part(self.copies, p)

    def _part(self, flat_N: Tensor, p: Tensor) -> Tensor:
        begin = self._slices[p].start
        return flat_N[begin : begin + p.numel()].view(p.shape)

    def slice_of(self, parameters: Iterable[Tensor]) -> slice:
        """Where these parameters lie in `weights`, `gradient` and `copies`; they must be neighbours, in any order."""
        slices = sorted((self._slices[p] for p in parameters), key=lambda s: (s.start, s.stop))
        assert slices and all(a.stop == b.start for a, b in zip(slices, slices[1:])), "others lie between these"
        return slice(slices[0].start, slices[-1].stop)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the weights to the copies. To be called when something else than a step has changed them."""
        if self.copies is not None:
            self.copies.copy_(self.weights)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """A step by `gradient`, with the first group's betas and eps. RuntimeError where a `p.grad` lies elsewhere."""
        if any(p.grad is not grad for p, grad in self._grads.items()):
            raise RuntimeError("FlatAdamW: a parameter's grad is no longer the view of the flat gradient that it was")
        betas, eps = self.param_groups[0]["betas"], self.param_groups[0]["eps"]
        rates = [(group["lr"], group["lr"] * group["weight_decay"]) for group in self.param_groups]
        # Fresh pinned memory each time, which torch's allocator gives to others once the copy has been made
        table = torch.tensor([betas, *rates], dtype=torch.float64, pin_memory=self.weights.is_cuda)
        table = table.to(self.weights.device, non_blocking=True)
        scale = self._one if self.grad_scale is None else self.grad_scale
        found_inf = self._no if self.found_inf is None else self.found_inf
        self._steps_P += 1 - found_inf
        flat = self.weights, self.gradient, self._m, self._v, self.copies
        adamw_(
            *(x if x is None else x.view(-1, BLOCK) for x in flat), self._group_K, table[1:],
            1 - table[0] ** self._steps_P[0], scale, found_inf, betas, eps,
        )  # fmt: skip

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Gradients stay where they are: they become zero whatever `set_to_none` says."""
        self.gradient.zero_()

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
