"""Clipping by a fused optimizer equals clipping before it, and a norm that isn't finite changes nothing."""

import pytest
import torch
import torch.distributed as dist
from small_models import ONE_STAGE

from hnet_runtime import distributed
from hnet_trainable import HNetConfig, parameter_groups


@pytest.fixture
def world():
    started = not dist.is_initialized()
    yield distributed.start("cuda" if torch.cuda.is_available() else "cpu")
    if started:
        distributed.stop()


def train(world, clip, scales: list[float]) -> tuple[torch.Tensor, list[float]]:
    """All weights after steps on random gradients of these sizes, clipped to 1 by `clip(optimizer, parameters)`."""
    model = distributed.build_model(HNetConfig.load(ONE_STAGE), world, torch.float32, seed=0)
    parameters = list(model.parameters())
    groups = distributed.optimizer_groups(parameter_groups(model, 1e-2, 0.1))
    optimizer, norms = torch.optim.AdamW(groups, fused=True), []
    for step, scale in enumerate(scales):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.empty_like(p)
            distributed.assign(p.grad, scale * torch.randn(p.shape, generator=generator))
        norms.append(clip(optimizer, parameters).item())
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return torch.cat([p.detach().flatten() for p in whole]), norms


def clip_before(parameters, max_norm: float, world) -> torch.Tensor:
    """Clipping as it is defined: all gradients times max_norm / norm, where that is less than 1."""
    norm = distributed.grad_norm(parameters, world)
    with torch.no_grad():
        for p in parameters:
            p.grad *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm


def test_the_optimizer_clips(world):
    scales = [1.0, 1e-5, 3.0]  # above, below and above the limit
    before, norms = train(world, lambda _, p: clip_before(p, 1.0, world), scales)
    inside, same_norms = train(world, lambda o, p: distributed.clip_in_optimizer(o, p, 1.0, world), scales)
    assert norms == same_norms and norms[0] > 1 > norms[1]
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_changes_nothing(world, bad):
    clip = lambda o, p: distributed.clip_in_optimizer(o, p, 1.0, world)  # noqa: E731
    once, _ = train(world, clip, [1.0])
    twice, _ = train(world, clip, [1.0, bad])
    assert torch.equal(once, twice)
    losses = iter([0.0, bad])
    twice, _ = train(
        world, lambda o, p: distributed.clip_in_optimizer(o, p, 1.0, world, torch.tensor(next(losses))), [1.0, 1.0]
    )
    assert torch.equal(once, twice), "a loss that is not finite"


def test_fetched_numbers_arrive():
    values = torch.randn(3, device="cuda" if torch.cuda.is_available() else "cpu")
    assert torch.equal(distributed.Fetched(values).numbers(), values.cpu())
