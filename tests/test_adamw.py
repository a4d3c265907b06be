"""AdamW over flat memory (flat_adamw.py) against torch's, and its kernel against the definition.

Without a GPU the kernel runs under Triton's interpreter, in a process of its own: this file, run as a script, prints
what `gaps` finds. See test_ssd_triton.py.
"""

import contextlib
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from small_models import ONE_STAGE  # noqa: E402

from hnet_kernels import adamw  # noqa: E402
from hnet_kernels.adamw import BLOCK, adamw_, join_float32, norms, split_float32  # noqa: E402
from hnet_runtime import distributed  # noqa: E402
from hnet_runtime.runs import checkpoint  # noqa: E402
from hnet_runtime.runs.statistics import weight_statistics  # noqa: E402
from hnet_runtime.steps import flat_adamw  # noqa: E402
from hnet_runtime.steps.flat_adamw import EagerAdamW, FlatAdamW, as_tensor  # noqa: E402
from hnet_runtime.steps.graphs import GraphedModel  # noqa: E402
from hnet_trainable import HNetConfig, HNetLM, nested_like, parameter_groups  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS, EPS, RATE, DECAY = (0.9, 0.95), 1e-8, 1e-2, 0.1
# A weight near 1 is rounded to 6e-8 in each of some ten steps, whose sizes, 1e-2 at most, are good to 1e-6: 1e-6 of
# weights together. Where v is tiny, m / sqrt(v) is as good as both are.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


@pytest.fixture
def world():
    started = not dist.is_initialized()
    yield distributed.start(DEVICE)
    if started:
        distributed.stop()


def build(world, dtype: torch.dtype = torch.float32) -> HNetLM:
    return distributed.build_model(HNetConfig.load(ONE_STAGE), world, torch.float32, seed=0).to(dtype)


def test_adamw_without_decorators_is_torchs():
    """Weights, moments and cleared gradients, over steps with other rates and one whose gradients are not finite."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 7), torch.randn(4, 5, 7)
    found = []
    for kind in (torch.optim.AdamW, EagerAdamW):
        weight = nn.Parameter(start.clone())
        optimizer = kind([{"params": [weight], "lr": RATE, "weight_decay": DECAY}], betas=BETAS, fused=True)
        for step, gradient in enumerate(gradients):
            weight.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = RATE / (step + 1)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(step == 2))
            optimizer.step()
            optimizer.zero_grad()
            assert weight.grad is None
        found.append([weight.detach(), *optimizer.state_dict()["state"][0].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def optimizer_of(model: HNetLM, flat: bool, compute_weights=(), narrow: bool = False) -> torch.optim.AdamW:
    """narrow: gradients of parameters with compute weights have their dtype."""
    groups = distributed.optimizer_groups(parameter_groups(model, RATE, DECAY))
    if flat:
        copied = {p for _, p in compute_weights}
        spans = [[[p for p in model.parameters() if (p in copied) == wanted]] for wanted in (True, False)]
        return FlatAdamW(
            groups, spans if copied else spans[1:], BETAS, EPS, compute_weights, narrow=[0] if narrow else []
        )
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)


def train(
    model: HNetLM, optimizer: torch.optim.AdamW, world, steps: range, bad: int | None = None, rounded: bool = False
) -> None:
    """Steps on random gradients, alternately clipped, with changing rates; the gradient of step `bad` is not finite.

    rounded: to bfloat16.
    """
    parameters = list(model.parameters())
    for step in steps:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = RATE * group["multiplier"] * (1 + math.sin(step + i)) / 2
        generator, size = torch.Generator().manual_seed(step), (1e-4, 1.0, 30.0)[step % 3]
        for p in parameters:
            grad = size * torch.randn(p.shape, generator=generator)
            grad = grad.bfloat16().float() if rounded else grad
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(grad)
        loss = torch.tensor(math.nan if step == bad else 1.0, device=world.device)
        distributed.clip_in_optimizer(optimizer, parameters, 1.0, world, loss)
        if not isinstance(optimizer, FlatAdamW):  # on a CPU torch's norm of a large tensor is off by up to 4e-6
            norm = torch.cat([p.grad.flatten().double() for p in parameters]).norm()
            optimizer.grad_scale = ((norm + 1e-6) / 1.0).clamp(min=1.0)
        optimizer.grad_scale = optimizer.grad_scale.float()  # torch takes no float64 one
        optimizer.step()


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest of b."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def weight(optimizer: torch.optim.AdamW, p: nn.Parameter) -> Tensor:
    return as_tensor(optimizer.master_weight(p)) if isinstance(optimizer, FlatAdamW) else p


def check_same(ours, optimizer, theirs, other, tolerance: float) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        found, wanted = optimizer.state[p], other.state[q]
        assert set(found) == set(wanted) and found["step"] == wanted["step"] and found["step"].dtype == torch.float32
        pairs = {"weight": (weight(optimizer, p), weight(other, q)), "grad": (p.grad, q.grad)}
        pairs |= {k: (found[k], wanted[k]) for k in wanted if k != "step"}
        far = {key: d for key, pair in pairs.items() if not (d := gap(*pair)) <= tolerance}
        assert not far, (name, far)


def check_flat(optimizer: FlatAdamW) -> None:
    """All tensors are views of the flat memory, and padding is zero."""
    of_spans = optimizer.weights, optimizer.compute_weights, optimizer.low_bits, optimizer.gradients, optimizer._moments
    filling = 0
    for at, *flat, gradients, moments in zip(optimizer.spans, *of_spans):
        inside = torch.zeros(at.stop - at.start, dtype=torch.bool)
        for p, state in optimizer.state.items():
            begin = optimizer._slices[p].start - at.start
            if not 0 <= begin < len(inside):
                continue
            inside[begin : begin + p.numel()] = True
            master = optimizer.master_weight(p)
            weights = list(zip(master, flat[1:])) if isinstance(master, tuple) else [(master, flat[0]), (p, flat[0])]
            moved = zip((state["exp_avg"], state["exp_avg_sq"]), moments)
            for view, whole in (*weights, (p.grad, gradients), *moved):
                assert view.data_ptr() == whole[begin:].data_ptr() and view.is_contiguous()
        assert len(inside) % BLOCK == 0
        filling += (~inside).sum()
        for whole in (*flat, gradients, *moments):
            assert whole is None or not whole[~inside].any()
    assert filling


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_are_those_of_torch(world, dtype):
    ours, theirs = build(world, dtype), build(world, dtype)
    optimizer, other = optimizer_of(ours, flat=True), optimizer_of(theirs, flat=False)
    for steps in (range(1), range(1, 20)):
        train(ours, optimizer, world, steps, bad=7)
        train(theirs, other, world, steps, bad=7)
        check_same(ours, optimizer, theirs, other, TOLERANCE[dtype])
    assert optimizer.state[ours.lm_head.weight]["step"] == 19
    check_flat(optimizer)
    statistics = [weight_statistics(o, 1, world) for o in (optimizer, other)]
    torch.testing.assert_close(*statistics, rtol=1e-5, atol=0)


def test_gradients_may_have_the_compute_dtype(world):
    """Steps equal those with the same values in float32; clipped gradients are rounded."""
    ours, theirs = build(world), build(world)
    order = list(ours.parameters())
    compute_weights = [(nn.Parameter(p.detach().to(torch.bfloat16)), p) for p in order[::2]]
    optimizer, other = optimizer_of(ours, True, compute_weights, narrow=True), optimizer_of(theirs, flat=False)
    for i, p in enumerate(order):
        assert p.grad.dtype == (torch.float32 if i % 2 else torch.bfloat16)
    for steps in (range(1), range(1, 20)):
        train(ours, optimizer, world, steps, bad=7, rounded=True)
        train(theirs, other, world, steps, bad=7, rounded=True)
        for p, q in zip(order, theirs.parameters()):
            assert gap(p.grad, q.grad) <= (2**-8 if p.grad.dtype == torch.bfloat16 else 2e-6)
            q.grad.copy_(p.grad)
        check_same(ours, optimizer, theirs, other, TOLERANCE[torch.float32])
        norms = [distributed.clip_in_optimizer(o, o.state, 0.0, world) for o in (optimizer, other)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    check_flat(optimizer)
    torch.testing.assert_close(*(weight_statistics(o, 1, world) for o in (optimizer, other)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("copied", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(world, copied):
    model = build(world)
    compute_weights = [
        (nn.Parameter(p.detach().to(torch.bfloat16)), p) for p in list(model.parameters())[::2] if copied
    ]
    optimizer = optimizer_of(model, True, compute_weights)
    for first in (0, 1):  # as the first step, and after one step
        train(model, optimizer, world, range(first))
        master = (*(x for x in (*optimizer.weights, *optimizer.compute_weights, *optimizer.low_bits) if x is not None),)
        master += *optimizer._moments[0], *optimizer._moments[-1]
        kept = [x.clone() for x in master]
        train(model, optimizer, world, range(5, 6), bad=5)
        assert all(torch.equal(before, now) for before, now in zip(kept, master))
        assert optimizer.state[model.lm_head.weight]["step"] == first


def test_gradients_and_copies_keep_their_places(world):
    model = build(world)
    order = list(model.parameters())
    masters = order[::2]
    used = [nn.Parameter(p.detach().to(torch.bfloat16)) for p in masters]
    order[0].grad = torch.full_like(order[0], 3.0)
    optimizer = optimizer_of(model, flat=True, compute_weights=list(zip(used, masters)))
    assert (order[0].grad == 3).all() and all((p.grad == 0).all() for p in order[1:])
    for steps in (range(0), range(3)):
        train(model, optimizer, world, steps)
        for x, p in zip(used, masters):
            assert torch.equal(x, split_float32(weight(optimizer, p))[0])
            assert x.data_ptr() == optimizer.compute_weights[0][optimizer._slices[p].start :].data_ptr()
            assert p.isnan().all()
    check_flat(optimizer)
    wanted = weight(optimizer, order[2]) + 1
    with optimizer.full_precision(), torch.no_grad():
        assert all(torch.equal(p, weight(optimizer, p)) for p in order)
        order[2] += 1
    assert order[2].isnan().all() and not order[1].isnan().any()
    assert torch.equal(weight(optimizer, order[2]), wanted) and torch.equal(used[1], split_float32(wanted)[0])
    check_flat(optimizer)
    with optimizer.full_precision(), pytest.raises(RuntimeError, match="already inside"), optimizer.full_precision():
        pass
    fails = mock.patch.object(flat_adamw, "as_tensor", side_effect=[weight(optimizer, order[0]), MemoryError])
    with pytest.raises(MemoryError), fails, optimizer.full_precision():
        pass
    assert all(p.isnan().all() and weight(optimizer, p).isfinite().all() for p in masters)
    optimizer.zero_grad()
    assert not order[0].grad.any()
    train(model, optimizer, world, range(3, 4))
    order[3].grad = None
    with pytest.raises(RuntimeError, match="no longer the view"):
        optimizer.step()


@given(st.integers(-(2**31), 2**31 - 1))
@example(0x3F808000)  # halfway between two bfloat16 numbers, of which the larger has an odd last bit
@example(-0x407E8000)  # likewise, below zero, and even
@example(0x7F7FFFFF)  # the largest
@example(0x7FFFFFFF)  # nan as GPUs write it
def test_splitting_float32_loses_no_bit_and_rounds_the_high_half(bits):
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    high, low = split_float32(x)
    if x.isnan():
        assert high.isnan() and join_float32(high, low).isnan()
        return
    assert torch.equal(join_float32(high, low).view(torch.int32), x.view(torch.int32))
    assert join_float32(high, low, out=torch.zeros(1)) == x
    rounded = x.to(torch.bfloat16)
    if rounded.isfinite() and high != rounded:
        assert (high.double() - x.double()).abs() == (rounded.double() - x.double()).abs() and high.abs() > x.abs()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_processes_that_update_a_shard_each_do_what_one_does(data):
    """To the bit, for any sharding; here the processes run one after the other, and communication is recorded."""
    size = data.draw(st.integers(2, 4), "processes")
    lengths = data.draw(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=8), "parameters")
    places = [(data.draw(st.integers(0, 2)), data.draw(st.integers(0, size - 1))) for _ in lengths]  # span, process
    everyones = [data.draw(st.booleans()) for _ in lengths]
    copied = data.draw(st.booleans())

    def build_one(rank: int | None) -> tuple[FlatAdamW, list[nn.Parameter]]:
        generator = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(n, generator=generator)) for n in lengths]
        groups = [{"params": ps[0::2], "weight_decay": DECAY}, {"params": ps[1::2], "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        cut = [[[] for _ in range(size)] for _ in range(3)]
        for p, (span, process), every in zip(ps, places, everyones):
            if not every:
                cut[span][process].append(p)
        spans = [*(span for span in cut if any(span)), [[p for p, every in zip(ps, everyones) if every]]]
        spans = [span for span in spans if any(span)]
        compute_weights = [(torch.empty_like(p, dtype=torch.bfloat16), p) for p in ps if copied]
        optimizer = FlatAdamW(groups, [[ps]] if rank is None else spans, BETAS, EPS, compute_weights, rank=rank or 0)
        for p in ps:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        return optimizer, ps

    one, wanted = build_one(None)
    norm = one.grad_norm()
    one.step()
    everything, sent = [build_one(rank) for rank in range(size)], []
    cut = everything[0][0].shards_updates
    shards: list[tuple[torch.Tensor, torch.Tensor]] = []  # of weights that were sent: their memory, and what it had

    def send(flat: torch.Tensor, own: torch.Tensor, async_op: bool) -> mock.Mock:
        shards.append((own, own.clone()))
        return mock.Mock()

    gather = mock.patch.object(flat_adamw.dist, "all_gather_into_tensor", send)
    with mock.patch.object(flat_adamw.dist, "all_reduce", sent.append), gather:
        norms = [optimizer.grad_norm() for optimizer, _ in everything]
        for optimizer, _ in everything:
            optimizer.step()
    assert all(torch.equal(own, before) for own, before in shards), "sent after they were updated"
    assert len(shards) == sum(len(own) < span.stop - span.start for span, own in sharded(everything))
    assert torch.equal(sum(sent).square().sum().sqrt() if cut else norms[0], norm)
    assert len({tuple(optimizer._slices[p].start for p in ps) for optimizer, ps in everything}) == 1
    for i, p in enumerate(wanted):
        for rank, (optimizer, ps) in enumerate(everything):
            mine = everyones[i] or places[i][1] == rank
            assert (ps[i] in optimizer.state, ps[i] in optimizer.owned) == (mine, mine and not everyones[i])
            if mine:
                assert torch.equal(weight(optimizer, ps[i]), weight(one, p))
                assert all(torch.equal(optimizer.state[ps[i]][key], one.state[p][key]) for key in one.state[p])
    for span, *own in zip(everything[0][0].spans, *(optimizer._own_shards for optimizer, _ in everything)):
        parts = [(part.start, part.stop) for part in own]
        if len(set(parts)) > 1:
            assert parts == list(zip([span.start, *(stop for _, stop in parts)], (stop for _, stop in parts)))
            assert parts[-1][1] == span.stop and len({stop - start for start, stop in parts}) == 1


def sharded(everything: list[tuple[FlatAdamW, list[nn.Parameter]]]) -> list[tuple[slice, range]]:
    """Each span of each process, and the range that this process updates."""
    owns = [zip(optimizer.spans, optimizer._own_shards) for optimizer, _ in everything]
    return [(span, range(own.start, own.stop)) for pairs in owns for span, own in pairs]


def test_mismatched_parameters_are_refused(world):
    model = build(world)
    order, groups = list(model.parameters()), parameter_groups(model, RATE, DECAY)
    with pytest.raises(ValueError, match="each parameter of the groups once"):
        FlatAdamW(groups, [[order[1:]]])
    with pytest.raises(ValueError, match="shapes"):
        FlatAdamW(groups, [[order]], compute_weights=[(order[0].detach()[1:], order[0])])
    compute_weights = [(order[0].detach().bfloat16(), order[0])]
    with pytest.raises(ValueError, match="some have none"):
        FlatAdamW(groups, [[order]], compute_weights=compute_weights)
    with pytest.raises(ValueError, match="narrow span"):
        FlatAdamW(groups, [[order[:1]], [order[1:]]], compute_weights=compute_weights, narrow=[1])
    order[0].data = order[0].data.double()
    with pytest.raises(ValueError, match="not of one dtype"):
        FlatAdamW(groups, [[order]])


@pytest.mark.parametrize("loads", ["torch", "flat"])
@pytest.mark.parametrize("saves", ["torch", "flat"])
def test_checkpoints_go_both_ways(world, tmp_path, saves, loads):
    """Three steps, a save, a load and three more steps equal six steps."""
    whole, before, after = build(world), build(world), build(world)
    reference = optimizer_of(whole, flat=False)
    train(whole, reference, world, range(6))
    optimizer = optimizer_of(before, flat=saves == "flat")
    train(before, optimizer, world, range(3))
    saver = checkpoint.Saver(tmp_path, before, optimizer)
    saver.start(3, {})
    saver.staged()
    train(before, optimizer, world, range(3, 4))  # does not change what is being written
    folder = saver.finish()
    elements = sum(p.numel() for p in before.parameters())
    written = sum(f.stat().st_size for f in folder.glob("*.distcp"))
    assert written < 12 * elements + 2000 * 4 * len(reference.state), "tensors with those beside them in memory"

    optimizer = optimizer_of(after, flat=loads == "flat")
    if loads == "flat":
        train(after, optimizer, world, range(20, 22))  # the old values do not matter
    checkpoint.load(folder, after, optimizer)
    train(after, optimizer, world, range(3, 6))
    check_same(after, optimizer, whole, reference, TOLERANCE[torch.float32])
    if loads == "flat":
        check_flat(optimizer)


@pytest.mark.parametrize("loads", ["torch", "flat"])
@pytest.mark.parametrize("saves", ["torch", "flat"])
def test_state_dicts_go_both_ways(world, saves, loads):
    whole, before = build(world), build(world)
    reference = optimizer_of(whole, flat=False)
    train(whole, reference, world, range(5))
    optimizer = optimizer_of(before, flat=saves == "flat")
    train(before, optimizer, world, range(3))
    after = build(world)
    after.load_state_dict(before.state_dict())
    other = optimizer_of(after, flat=loads == "flat")
    other.load_state_dict(optimizer.state_dict())
    train(after, other, world, range(3, 5))
    check_same(after, other, whole, reference, TOLERANCE[torch.float32])
    if loads == "flat":
        check_flat(other)


def test_loading_before_the_first_step_and_unequal_steps(world):
    model = build(world)
    optimizer, other = optimizer_of(model, flat=True), optimizer_of(build(world), flat=False)
    train(model, optimizer, world, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(other.state_dict())
    assert not any(x.any() for x in (*optimizer._moments[0], optimizer._steps_P))
    state["state"][0]["step"] += 1
    with pytest.raises(ValueError, match="different numbers of steps"):
        optimizer.load_state_dict(state)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU, graphs compute in 16 bits")
def test_steps_as_graphs_train_by_it(world):
    """Gradients arrive in the flat memory, and the compute weights that graphs read are those that a step writes."""
    iids = torch.nested.nested_tensor([torch.arange(n) % 7 for n in (40, 1, 23)], layout=torch.jagged)
    labels, losses = nested_like(iids.values().roll(-1), iids), {}
    for flat in (False, True):
        model = build(world, torch.float64)
        groups = distributed.optimizer_groups(parameter_groups(model, RATE, DECAY))
        runner = GraphedModel(model, torch.float32, 0.1, groups=groups, accumulates=True)
        optimizer = runner.optimizer if flat else torch.optim.AdamW(groups, betas=flat_adamw.BETAS, fused=True)
        compute_weights = [(x, model.get_parameter(name)) for name, x in runner.model.named_parameters()]
        compute_weights = [(x, p) for x, p in compute_weights if x is not p]
        found = losses.setdefault(flat, [])
        for _ in range(4):
            found.append(runner.forward_backward([(iids, labels)] * 2).ce.mean().item())
            with contextlib.nullcontext() if flat else runner.optimizer.full_precision():
                optimizer.step()
            assert compute_weights and all(torch.equal(x, p.float()) for x, p in compute_weights)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)  # float32 compute weights of float64 weights
    assert losses[True][-1] < losses[True][0] - 0.1
    check_flat(optimizer)


# --------------------------------------------------------------------------------------------------------- the kernel

CASES = {  # scale, found_inf, steps, dtypes of compute weights and of gradients; "split": weights are
    "scaled": (2.5, 0.0, 3, torch.bfloat16, torch.float32),
    "not scaled": (1.0, 0.0, 1, torch.float16, torch.float32),
    "not finite": (math.nan, 1.0, 3, torch.bfloat16, torch.float32),
    "not finite, at first": (2.0, 1.0, 0, torch.bfloat16, torch.float32),
    "no compute weights": (2.5, 0.0, 1000, None, torch.float32),
    "split": (4.0, 0.0, 3, torch.bfloat16, torch.bfloat16),
    "split, not finite": (math.nan, 1.0, 3, torch.bfloat16, torch.bfloat16),
    "narrow gradients": (4.0, 0.0, 3, torch.bfloat16, torch.bfloat16),  # scaled, and still not rounded
}


def gaps(name: str, device: str, K: int = 5) -> dict[str, float]:
    """Between a step, and norms, in float32 and float64; how many compute weights are not the weights rounded."""
    scale, found_inf, steps, compute_weights, gradients = CASES[name]
    generator = torch.Generator().manual_seed(0)
    w, g, m, v = torch.randn(4, K, BLOCK, generator=generator).to(device)
    v = 0.5 * v.square()
    v[0, :10], g[0, :10], m[0, :10] = 1e-20, 1e-10, 0.0  # sizes of eps
    for x in (w, g, m, v):
        x[-1, 100:] = 0  # padding
    g = g.to(gradients)
    used, low = None if compute_weights is None else w.to(compute_weights), None
    split, whole = name.startswith("split"), w
    if split:
        (used, low), w = split_float32(w), None
    group_K = (torch.arange(K, dtype=torch.int32) % 3).to(device)
    rates = torch.tensor([[1e-3, 1e-4], [1e-2, 0.0], [0.3, 0.03]], dtype=torch.float64, device=device)
    bias = 1 - torch.tensor(BETAS, dtype=torch.float64, device=device) ** steps
    scalars = [torch.tensor(x, device=device) for x in (scale, found_inf)]
    before = [whole.clone(), m.clone(), v.clone()]
    exact = [x.double() for x in (whole, g, m, v)]
    first = torch.tensor([0, 1, 4, K], dtype=torch.int32, device=device)
    lengths = norms(g, first, torch.float32), norms(exact[1], first, torch.float64)
    wanted = torch.stack([run.norm() for run in exact[1].split([1, 3, K - 4])])
    shifted = norms(torch.cat([whole, g.float()]).to(g.dtype), first + K, torch.float32)
    adamw_(exact[0], None, None, *exact[1:], group_K, rates, bias, *scalars, BETAS, EPS)
    same = [whole.clone(), None, None, g.clone(), m.clone(), v.clone()]
    adamw_(w, used, low, g, m, v, group_K, rates, bias, *scalars, BETAS, EPS)
    if split:
        w = join_float32(used, low)
        adamw_(*same, group_K, rates, bias, *scalars, BETAS, EPS)
    found = {key: gap(a, b) for key, a, b in zip("wgmv", (w, g, m, v), exact)}
    found["norms"] = max(gap(a, b) for a, b in zip([*lengths[0], *lengths[1]], [*wanted, *wanted]))
    found["norms that change where blocks lie elsewhere"] = float((shifted != lengths[0]).sum())
    found["step"] = gap(w.double() - before[0], exact[0] - before[0])
    if compute_weights is not None:
        units = (
            used.view(torch.int16).int()
            - (split_float32(same[0])[0] if split else w.to(compute_weights)).view(torch.int16).int()
        )
        cut = (
            not split and compute_weights == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
        )  # which cuts off
        found["copy"] = float((units.abs() > cut).sum())
    found["filling"] = float(sum(x[-1, 100:].count_nonzero() for x in (w, g, m, v)))
    if split:
        found["not as unsplit weights"] = float((w != same[0]).sum())
    if found_inf:
        found["changed"] = float(sum((a != b).sum() for a, b in zip(before, (w, m, v))))
    return found


# Each number comes from a few float32 operations: 6e-8 each, 1e-6 together. "step" is the change of a weight, relative
# to the largest, 0.3 times a few: 1e-6 too. Counts must be zero.
def check(found: dict[str, float]) -> None:
    assert found and all(value <= 1e-6 for value in found.values()), found


def test_interpreted_kernel_matches_the_definition():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for found in json.loads(run.stdout).values():
        check(found)


@pytest.mark.parametrize("name", CASES)
def test_definition_in_float32(name):
    check(gaps(name, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name):
    check(gaps(name, "cuda"))
    assert all(adamw._fast(operation, torch.device("cuda"), torch.float32) for operation in ("adamw", "norms"))


@pytest.mark.gpu
def test_large_and_without_waiting():
    """0.2 billion parameters, against torch's fused kernel; prints times. A step must not wait for the device."""
    sizes, generator = [(1536, 4096)] * 32 + [(1536,)] * 100 + [(24,)] * 40, torch.Generator("cuda").manual_seed(0)
    ours = [nn.Parameter(torch.randn(size, device="cuda", generator=generator)) for size in sizes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    used = [nn.Parameter(p.detach().to(torch.bfloat16)) for p in ours]
    grads = [torch.randn(p.shape, device="cuda", generator=generator) for p in ours]
    groups = [
        lambda ps: {"params": ps[0::2], "weight_decay": 0.1},
        lambda ps: {"params": ps[1::2], "weight_decay": 0.0},
    ]
    optimizer = FlatAdamW([group(ours) for group in groups], [[ours]], BETAS, EPS, list(zip(used, ours)))
    other = torch.optim.AdamW([group(theirs) for group in groups], betas=BETAS, eps=EPS, fused=True)
    for p, grad in zip(theirs, grads):
        p.grad = torch.empty_like(grad)
    times: dict[str, list[float]] = {"flat, scaled": [], "flat": [], "torch": []}
    for step in range(12):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        scale = 2.0 if step % 2 else 1.0
        for o, ps in ((optimizer, ours), (other, theirs)):
            torch._foreach_copy_([p.grad for p in ps], grads)
            o.grad_scale = torch.full((), scale, device="cuda")
            o.found_inf = torch.full((), float(step == 5), device="cuda")
            for i, group in enumerate(o.param_groups):
                group["lr"] = 1e-3 * (step + 1 + i)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first compiles
        try:
            events[0].record()
            optimizer.step()
            events[1].record()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        events[2].record()
        other.step()
        events[3].record()
        torch.cuda.synchronize()
        if step > 5:
            times["flat, scaled" if step % 2 else "flat"].append(events[0].elapsed_time(events[1]))
            times["torch"].append(events[2].elapsed_time(events[3]))
    print({name: f"{min(ms):.3f} ms" for name, ms in times.items()}, f"{sum(p.numel() for p in ours):,} parameters")
    for p, q, x in zip(ours, theirs, used):
        w = weight(optimizer, p)
        assert optimizer.state[p]["step"] == other.state[q]["step"] == 11
        for a, b in (
            (w, q),
            (p.grad, q.grad),
            *((optimizer.state[p][k], other.state[q][k]) for k in ("exp_avg", "exp_avg_sq")),
        ):
            assert gap(a, b) <= TOLERANCE[torch.float32]
        assert torch.equal(x, split_float32(w)[0])
    check_flat(optimizer)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    adamw.use_fast = lambda operation, device, dtype, reason: dtype != torch.float64
    print(json.dumps({name: gaps(name, "cpu") for name in CASES}))
