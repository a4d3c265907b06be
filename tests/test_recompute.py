"""Activation checkpointing inside operations: the same bits, fewer bytes, and each result is recomputed once."""

import contextlib
import importlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hnet_kernels import (
    boundary_probability,
    linear,
    mamba2,
    mamba2_inner,
    recompute,
    residual_stream,
    rms_norm,
    rotary_attention,
    swiglu,
    wide_linear,
)
from hnet_kernels.dispatch import forcing
from hnet_kernels.gradients import Destinations, writing_to
from hnet_kernels.recompute import MODES, Recomputed, recomputing

attention_file = importlib.import_module("hnet_kernels.attention")  # the package exports a function of that name
D, INNER, N, EPS = 64, 96, 16, 1e-5
LENGTHS = [1, 2, 63, 64, 65]
T, LAYERS = sum(LENGTHS), 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float32] + [torch.float64] * (DEVICE == "cpu")


def drawn(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    wide, H = torch.promote_types(dtype, torch.float32), 2 * D // 64
    weights = {"x": new(T, D), "q": new(D, D, scale=D**-0.5), "k": new(D, D, scale=D**-0.5), "last": new(D)}
    weights |= {"proj": new(D, D, scale=D**-0.5, dtype=wide), "bias": new(D, dtype=wide)}
    for i in range(LAYERS):
        of_layer = {f"norm{j}": 1 + new(D, scale=0.1) for j in range(3)} | {
            "in_proj": new(4 * D + 2 * N + H, D, scale=D**-0.5), "conv": new(2 * D + 2 * N, 1, 4, scale=0.5),
            "conv_bias": new(2 * D + 2 * N), "dt_bias": new(H, dtype=wide) - 2, "A_log": new(H, dtype=wide),
            "D": new(H, dtype=wide), "gated": new(2 * D), "out": new(D, 2 * D, scale=D**-0.5),
            "fc1": new(2 * INNER, D, scale=D**-0.5), "fc2": new(D, INNER, scale=INNER**-0.5),
            "qkv": new(3 * D, D, scale=D**-0.5), "out2": new(D, D, scale=D**-0.5),
        }  # fmt: skip
        weights |= {f"{name} {i}": x for name, x in of_layer.items()}
    return weights


def stack(w: dict[str, Tensor], edit: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Mamba-2, an MLP and attention with the operations around them, and a router. edit: applied between them."""
    lengths = torch.tensor(LENGTHS)
    position = torch.cat([torch.arange(n, dtype=torch.int32) for n in LENGTHS]).to(DEVICE)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    angle = torch.arange(max(LENGTHS))[:, None] * 10000.0 ** -(torch.arange(8) / 8)
    tables = [x.to(DEVICE, torch.promote_types(w["x"].dtype, torch.float32)) for x in (angle.cos(), angle.sin())]
    r = residual_stream(w["x"])
    for i in range(LAYERS):
        its = {name.split()[0]: x for name, x in w.items() if name.endswith(f" {i}")}
        projected = linear(edit(rms_norm(r, its["norm0"], EPS)), its["in_proj"], True)
        weights = [its[name] for name in ("conv", "conv_bias", "dt_bias", "A_log", "D", "gated")]
        r = r + linear(edit(mamba2_inner(edit(projected), *weights, position, cu, EPS)), its["out"])
        both = linear(edit(rms_norm(r, its["norm1"], EPS)), its["fc1"], True)
        r = r + linear(edit(swiglu(edit(both))), its["fc2"])
        qkv = linear(edit(rms_norm(r, its["norm2"], EPS)), its["qkv"], True)
        r = r + linear(edit(rotary_attention(edit(qkv), 4, 30, *tables, position, cu)), its["out2"])
    x = edit(rms_norm(r, w["last"], EPS))
    p = boundary_probability(linear(x, w["q"], True), linear(x, w["k"], True), position)  # three read x
    return torch.cat([wide_linear(x, w["proj"], w["bias"]), p[:, None]], 1)


class Held:
    """A tensor saved by autograd; it is alive as long as this object is."""

    def __init__(self, x: Tensor):
        self.x = x


class Saved:
    """The tensors that forwards save: by autograd, and for recomputation."""

    def __init__(self):
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()
        self.made: list[weakref.ref[Recomputed]] = []
        self.calls: dict[int, int] = {}

    def hold(self, x: Tensor) -> Held:
        held = Held(x.detach())  # an output would keep its own graph
        self.held.add(held)
        return held

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        saved = self

        class Counted(Recomputed):
            def __init__(self, compute: Callable[[], Any], version: int = 0):
                def counted() -> Any:
                    saved.calls[key] += 1
                    return compute()

                super().__init__(counted, version)
                key = len(saved.calls)
                saved.calls[key] = 0
                saved.made.append(weakref.ref(self))

        with pytest.MonkeyPatch.context() as patch:
            for module in (recompute, mamba2, attention_file):
                patch.setattr(module, "Recomputed", Counted)
            with torch.autograd.graph.saved_tensors_hooks(self.hold, lambda held: held.x):
                yield

    def alive(self) -> list[Recomputed]:
        return [x for reference in self.made if (x := reference()) is not None]

    def bytes(self) -> int:
        """The bytes of all storages."""
        storages, seen, left = {}, set(), [held.x for held in self.held] + self.alive()
        while left:
            x = left.pop()
            if id(x) in seen:
                continue
            seen.add(id(x))
            if isinstance(x, Tensor):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            elif isinstance(x, Recomputed):
                left += [x.compute, x.value]
            elif isinstance(x, types.FunctionType):
                left += [cell.cell_contents for cell in x.__closure__ or ()]
            elif isinstance(x, (tuple, list)):
                left += x
        return sum(storages.values())


class Ran:
    """A forward in a mode, with what it saved, and its backward."""

    def __init__(
        self, how: str, dtype: torch.dtype, edit: Callable[[Tensor], Tensor] = lambda x: x, places: bool = False
    ):
        self.saved, self.weights = Saved(), {n: x.clone().requires_grad_() for n, x in drawn(dtype).items()}
        self.places = {x: torch.full_like(x, torch.nan) for x in self.weights.values()} if places else {}
        self.destinations = Destinations(self.places)
        with forcing(True), recomputing(how), writing_to(self.destinations), self.saved.watching():
            self.output = stack(self.weights, edit)
        self.bytes = self.saved.bytes() - sum(x.untyped_storage().nbytes() for x in self.weights.values())

    def gradients(self, **options) -> dict[str, Tensor]:
        direction = torch.randn(self.output.shape, generator=torch.Generator().manual_seed(1))
        direction = direction.to(self.output.device, self.output.dtype)
        found = torch.autograd.grad(self.output, list(self.weights.values()), direction, **options)
        return dict(zip(self.weights, found))


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes_give_the_same_bits_and_save_less_and_less(dtype):
    ran = {how: Ran(how, dtype) for how in MODES}
    wanted = ran["none"].gradients()
    assert all(x.isfinite().all() for x in wanted.values())
    for how in MODES[1:]:
        assert torch.equal(ran[how].output, ran["none"].output) and same_bits(ran[how].gradients(), wanted), how
    of = {how: one.bytes for how, one in ran.items()}
    # selective does not save the results of norms, convolutions and SwiGLU; block also not those of projections
    assert of["none"] > 1.4 * of["selective"] and of["selective"] > 3 * of["block"], of


@pytest.mark.parametrize("how", MODES)
def test_each_result_is_recomputed_once_for_all_backwards(how):
    ran = Ran(how, torch.bfloat16)
    made, used = ran.saved.calls, [reference() is not None and reference().users > 0 for reference in ran.saved.made]
    assert len(made) == {"none": 0, "selective": 5 * LAYERS + 1, "block": 11 * LAYERS + 3}[how]
    if made:
        assert max(x.users for x in ran.saved.alive()) >= 3, "the last norm, which three read"
    ran.gradients()
    assert list(made.values()) == [int(is_used) for is_used in used]


@pytest.mark.parametrize("how", MODES)
def test_a_recomputed_result_is_freed_after_its_last_use(how):
    ran = Ran(how, torch.bfloat16)
    again = ran.saved.alive()
    ran.gradients()
    assert all(x.users == 0 and x.value is None for x in again)


@pytest.mark.parametrize("how", MODES)
def test_what_is_saved_goes_with_the_graph(how):
    ran = Ran(how, torch.bfloat16)
    assert len(ran.saved.held) > 10
    del ran.output
    assert not ran.saved.held and not ran.saved.alive()


def test_edits_between_operations_count():
    """Then their results are saved as usual, and recomputation ends there."""
    wanted = Ran("none", torch.float32).gradients()
    ran = {how: Ran(how, torch.float32, lambda x: 1.5 * x) for how in MODES}
    gradients = ran["none"].gradients()
    assert not torch.allclose(gradients["in_proj 0"], wanted["in_proj 0"])
    for how in MODES[1:]:
        assert same_bits(ran[how].gradients(), gradients), how


@pytest.mark.parametrize("how", MODES)
def test_gradients_in_places_are_the_same_bits(how):
    wanted, placed = Ran("none", torch.float32).gradients(), Ran(how, torch.float32, places=True)
    found = placed.gradients(allow_unused=True)
    placed.destinations.finish()
    for name, x in placed.weights.items():
        destination = placed.destinations.by_tensor[x]
        assert destination.written == (name != "x") == (found[name] is None), name
        assert torch.equal(destination.tensor if destination.written else found[name], wanted[name]), name


def test_without_gradients_nothing_is_saved():
    ran = Ran("none", torch.bfloat16)
    for how in MODES:
        saved = Saved()
        with torch.no_grad(), forcing(True), recomputing(how), saved.watching():
            assert torch.equal(stack(ran.weights), ran.output)
        assert not saved.calls and not saved.held


@pytest.mark.parametrize("how", MODES)
def test_a_second_backward_gives_the_same_bits(how):
    weights = {name: x.requires_grad_() for name, x in drawn(torch.float32).items()}
    with forcing(True), recomputing(how):
        x = rms_norm(residual_stream(weights["x"]), weights["norm1 0"], EPS)
        output = linear(swiglu(linear(x, weights["fc1 0"], True)), weights["fc2 0"]).square().sum()
    inputs = [weights[name] for name in ("x", "norm1 0", "fc1 0", "fc2 0")]
    first, second = (torch.autograd.grad(output, inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("how", MODES)
def test_what_somebody_changed_in_place_is_saved(how):
    both, weight = (torch.randn(5, 16, requires_grad=True) for _ in "bw")
    gradients = []
    for fast in (False, True):
        with forcing(fast), recomputing(how):
            h = swiglu(both)
            h *= 2
            gradients.append(torch.autograd.grad(linear(h, weight[:, :8]).sum(), weight)[0])
    assert torch.allclose(*gradients)


def test_modes_end_where_they_began():
    assert recompute.mode() == "none"
    with recomputing("selective"):
        with pytest.raises(ZeroDivisionError), recomputing("block"):
            assert recompute.mode() == "block"
            1 / 0  # noqa: B018
        assert recompute.mode() == "selective"
        with torch.no_grad():
            assert recompute.mode() == "block", "without a backward, nothing is worth saving"
    assert recompute.mode() == "none"
