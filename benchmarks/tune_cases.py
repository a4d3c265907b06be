"""What benchmarks/tune.py checks and times: the scan and attention at the sizes of hnet_1stage_small."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hnet_kernels import launch_options, ssd
from hnet_kernels.attention import attention_definition

definition = importlib.import_module("hnet_kernels.ssd")

CHECKED, TIMED = 4096, 32768  # tokens
HALF = torch.bfloat16
ALLOWED = 2e-2  # of a result's size; see hnet_runtime/checks/agreement.py


def _documents(T: int, device: torch.device) -> Tensor:
    generator, lengths = torch.Generator().manual_seed(T), [1, 2, 63, 64, 65]
    while sum(lengths) < T:
        lengths.append(min(int(torch.randint(1, 4096, (), generator=generator)), T - sum(lengths)))
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def _of_scan(T: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, dt, A, B, C as in a model, and dy."""
    torch.manual_seed(0)
    x, B, C = torch.randn(T, 16 * 64 + 256, device=device, dtype=HALF).split([1024, 128, 128], dim=-1)
    dt = 1e-3 * 100 ** torch.rand(T, 16, device=device)
    inputs = [x.unflatten(-1, (16, 64)), dt, -torch.linspace(1, 16, 16, device=device), B, C]
    return inputs, torch.randn(T, 16, 64, device=device, dtype=HALF)


def _of_attention(T: int, P: int, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    qkv, do = torch.randn(T, 3, 1024 // P, P, device=device), torch.randn(T, 1024 // P, P, device=device)
    return qkv.to(HALF), do.to(HALF)


def _gap(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def _scan_gaps(T: int, device: torch.device) -> dict[str, float]:
    inputs, dy = _of_scan(T, device)
    cu = _documents(T, device)
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = ssd(*leaves, cu)
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    x, dt, A, B, C = (leaf.detach().double() for leaf in leaves)
    wanted = definition.scan_forward(x, dt, dt * A, B, C, cu)
    dx, dgain, dlog_a, dB, dC = definition.scan_backward(dy.double(), x, dt, dt * A, B, C, cu)
    both = zip(("y", "dx", "ddt", "dB", "dC"), (*found[:3], *found[4:]), (wanted, dx, dgain + dlog_a * A, dB, dC))
    return {f"scan, {name}": _gap(a, b) for name, a, b in both}  # dA cancels: tests/test_ssd_triton.py has its bound


def _attention_gaps(T: int, P: int, device: torch.device) -> dict[str, float]:
    from hnet_kernels import attention_triton

    qkv, do = _of_attention(T, P, device)
    cu, found = _documents(T, device), {}
    order = attention_triton.tile_order(T, cu)
    for window in (-1, 1023):
        o, lse = attention_triton.attention_forward(qkv, order, window)
        dqkv = attention_triton.attention_backward(do, qkv, o, lse, order, window)
        leaves = [x.double().requires_grad_() for x in qkv.unbind(1)]
        wanted = attention_definition(*leaves, cu, window)
        gradients = torch.autograd.grad(wanted, leaves, do.double())
        found[f"attention, {P} channels, window {window}, o"] = _gap(o, wanted.detach())
        for name, a, b in zip(("dq", "dk", "dv"), dqkv.unbind(1), gradients):
            found[f"attention, {P} channels, window {window}, {name}"] = _gap(a, b)
    return found


def gaps(device: torch.device) -> dict[str, float]:
    """The distance of each result and gradient from the definition in float64, over its size."""
    return _scan_gaps(CHECKED, device) | _attention_gaps(CHECKED, 64, device) | _attention_gaps(CHECKED, 128, device)


class Case(NamedTuple):
    """A table to improve. use: makes kernels take another one. measure: its milliseconds; None if it is wrong."""

    table: Any
    use: Callable[[Any], None]
    measure: Callable[[Any], float | None]


def cases(device: torch.device) -> dict[str, Case]:
    """Forward and backward of the scan, and of attention with 64 and 128 channels, in bfloat16."""
    return {
        "scan": _case(launch_options.scan(device, HALF), "scan", device, _scan_gaps, _scan_steps(device)),
        **{
            f"attention, {P} channels": _case(
                launch_options.attention(device, P),
                "attention",
                device,
                lambda T, device, P=P: _attention_gaps(T, P, device),
                _attention_steps(P, device),
            )
            for P in (64, 128)
        },
    }


def _case(table: Any, name: str, device: torch.device, gaps_of: Callable, step: Callable[[], Any]) -> Case:
    from triton.testing import do_bench

    chosen = {}

    def use(new: Any) -> None:
        chosen["table"] = new
        setattr(launch_options, name, lambda *_: chosen["table"])

    def measure(new: Any) -> float | None:
        use(new)
        try:
            if not all(gap <= ALLOWED for gap in gaps_of(CHECKED, device).values()):
                return None
            return do_bench(step, warmup=20, rep=150, return_mode="median")
        except Exception as error:  # does not compile, or does not fit
            if "CUDA error" in str(error):  # nothing runs after that
                raise
            return None

    return Case(table, use, measure)


def _scan_steps(device: torch.device) -> Callable[[], Any]:
    from hnet_kernels import ssd_triton

    (x, dt, A, B, C), dy = _of_scan(TIMED, device)
    cu = _documents(TIMED, device)

    def step() -> None:
        _, saved = ssd_triton.scan_forward(x, dt, A, B, C, cu, A, save=True)
        ssd_triton.scan_backward(dy, x, dt, A, B, C, cu, A, saved=saved)

    return step


def _attention_steps(P: int, device: torch.device) -> Callable[[], Any]:
    from hnet_kernels import attention_triton

    qkv, do = _of_attention(TIMED, P, device)
    order = attention_triton.tile_order(TIMED, _documents(TIMED, device))

    def step() -> None:
        o, lse = attention_triton.attention_forward(qkv, order, -1)
        attention_triton.attention_backward(do, qkv, o, lse, order, -1)

    return step
