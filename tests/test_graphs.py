"""CUDA graphs of the stacks of blocks change nothing but speed. On a CPU the same path runs without capture."""

import pytest
import torch
import torch.distributed as dist

from hnet_runtime import distributed
from hnet_runtime.graphs import DOCUMENTS, TOKENS, GraphedStack, Sizes, graph_stacks
from hnet_trainable import HNetConfig, Isotropic, Packing, compile_blocks, nested_like

LAYOUT = {
    "arch_layout": ["m1", ["T1m1", ["T1"], "m1"], "m1"],
    "d_model": [64, 64, 128],
    "d_intermediate": [0, 128, 128],
    "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [16, 16, 16], "window_size": [-1, 63, -1]},
}
BATCHES = [[600, 1, 423], [2] * 40 + [944], [512, 512], [1024]]  # 1024 bytes each, as in training


@pytest.fixture
def world():
    started = not dist.is_initialized()
    yield distributed.start("cuda" if torch.cuda.is_available() else "cpu")
    if started:
        distributed.stop()


def batch(lengths: list[int], seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    docs = [torch.randint(4, (n,), generator=generator).to(device) for n in lengths]
    iids = torch.nested.nested_tensor(docs, layout=torch.jagged)
    return iids, nested_like(iids.values().roll(-1), iids)


def steps(world, dtype: torch.dtype, fast: bool, micro_batches: int) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and all gradients of a few steps of SGD on micro-batches whose sizes vary."""
    model = distributed.build_model(HNetConfig.load(LAYOUT), world, dtype, seed=0)
    if dtype == torch.float32:  # which build_model leaves whole in a single process
        distributed.shard_model(model, world.mesh, dtype)
    if fast:
        if world.device.type == "cuda":
            compile_blocks(model)
        graph_stacks(model)
    found, gradients = [], []
    for step, lengths in enumerate(BATCHES):
        for i in range(micro_batches):
            model.set_requires_gradient_sync(i == micro_batches - 1)
            out = model(*batch(lengths, 10 * step + i, world.device))
            (out.ce + out.ratio_losses.sum()).backward()
            found.append(out.ce.item())
        whole = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        gradients.append(torch.cat([g.flatten() for g in whole]))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    with torch.no_grad():
        found.append(model(*batch(BATCHES[0], 0, world.device)).ce.item())  # a validation uses no graphs
    return found, gradients


def check_equal(world, dtype: torch.dtype, micro_batches: int, loss: float, gradient: float) -> None:
    (eager, eager_gradients), (graphed, gradients) = (
        steps(world, dtype, fast, micro_batches) for fast in (False, True)
    )
    assert eager[0] - eager[-1] > 0.01, "nothing was learned"
    assert graphed == pytest.approx(eager, rel=loss)
    distances = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients, eager_gradients)]
    assert max(distances) < gradient, distances


def test_training_is_the_same(world):
    """Two micro-batches a step: gradients of the first must survive the second. Sums in another order differ."""
    check_equal(world, torch.float32, 2, loss=1e-4, gradient=1e-3)


@pytest.mark.gpu
def test_training_is_the_same_in_bfloat16(world):
    """Compiled blocks round to 16 bits at fewer places; a boundary that flips changes the gradient more."""
    check_equal(world, torch.bfloat16, 1, loss=1e-2, gradient=0.2)


def test_sizes_leave_room_for_a_document_of_zeros():
    tables = torch.empty(1000, 0)
    for B in (1, DOCUMENTS - 1, DOCUMENTS, DOCUMENTS + 1):
        packing = Packing(torch.empty(B + 1), torch.empty(0), tables, tables)
        needed = Sizes.of(torch.empty(TOKENS + 1, 2), packing)
        sizes = needed.rounded()
        assert sizes.hold(needed) and sizes.B > B and sizes.T == 2 * TOKENS and sizes.M == 1024
    assert Sizes(16384, 64, 2048).hold(Sizes(15400, 64, 2048)) and not Sizes(16384, 64, 2048).hold(Sizes(15300, 2, 2))
    assert not Sizes(512, 64, 1024).hold(Sizes(513, 2, 2)) and not Sizes(512, 64, 1024).hold(Sizes(512, 65, 2))
    assert not Sizes(65536, 64, 1024).hold(Sizes(64000, 64, 2)), "the document of zeros would be too long"


def test_batches_of_about_one_size_share_a_graph(world):
    model = distributed.build_model(HNetConfig.load(LAYOUT), world, torch.float32, seed=0)
    graph_stacks(model)
    for lengths in BATCHES:
        model(*batch(lengths, 0, world.device))
    assert len(model.backbone.encoder.forward.captured) == 1


@pytest.mark.gpu
def test_a_step_waits_for_the_device_once_a_stage(world, monkeypatch):
    """torch's sync debug mode raises at any wait; the copy of a stage's lengths, in SelectChunks, is let through."""
    model = distributed.build_model(HNetConfig.load(LAYOUT), world, torch.bfloat16, seed=0)
    compile_blocks(model)
    graph_stacks(model)
    batches = [batch(lengths, i, world.device) for i, lengths in enumerate(BATCHES)]
    allowed, to_list = [], torch.Tensor.tolist

    def counted(tensor):
        torch.cuda.set_sync_debug_mode("default")
        allowed.append(tensor.shape)
        found = to_list(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return found

    def step(iids, labels):
        out = model(iids, labels)
        (out.ce + out.ratio_losses.sum()).backward()
        model.zero_grad()

    for pair in batches:
        step(*pair)
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pair in batches:
            step(*pair)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert allowed == [torch.Size([3])] * 2 * len(batches)


def test_only_steps_with_gradients_are_graphed(world):
    model = distributed.build_model(HNetConfig.load(LAYOUT), world, torch.float32, seed=0)
    graph_stacks(model)
    with torch.no_grad():
        model(*batch(BATCHES[0], 0, world.device))
    stacks = [module.forward for module in model.modules() if isinstance(module, Isotropic)]
    assert len(stacks) == 5 and all(isinstance(s, GraphedStack) and not s.captured for s in stacks)
