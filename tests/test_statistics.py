"""Statistics of routers and weights against their definitions, byte by byte; and the health of routers."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_io import pack
from small_models import TWO_STAGES, build

import hnet_trainable
from hnet_runtime.runs import statistics
from hnet_runtime.runs.metrics import RouterHealth
from hnet_trainable import parameter_groups

WORLD = SimpleNamespace(size=1, shards=1, device=torch.device("cpu"))
TEXTS = ["Grüße, Welt! 日本語\n" * 9, "x", "a b\tc. d-e\u00a0f" * 12]


@pytest.fixture(scope="module")
def run():
    model = build(hnet_trainable, TWO_STAGES)
    documents = [np.frombuffer(b"\xfe" + text.encode(), np.uint8) for text in TEXTS]
    iids, labels = pack(documents)
    return model, iids, labels, model(iids, labels)


def by_hand(iids, stages, s):
    """Chunk lengths in bytes and kinds of the bytes they begin at, in plain Python, row by row."""
    bounds, data = iids.offsets().tolist(), iids.values().tolist()
    lengths, kinds = [], []
    at = list(range(len(data)))
    for stage in stages[: s + 1]:
        at = [t for t, b in zip(at, stage.boundary_mask.values().tolist()) if b]
    for first, stop in zip(bounds, bounds[1:]):
        mine = [t for t in at if first <= t < stop]
        lengths += [b - a for a, b in zip(mine, [*mine[1:], stop])]
        for t in mine[1:]:
            b = data[t]
            inside, space = 0x80 <= b < 0xC0, b < 128 and chr(b).isspace()
            kinds.append(
                "inside" if inside else "space" if space else "mark" if b < 128 and not chr(b).isalnum() else ""
            )
    return lengths, kinds


def test_router_statistics_are_their_definitions(run):
    _, iids, _, out = run
    names = statistics.names(2)
    found = dict(zip(names, statistics.router_statistics(iids, out.stages).tolist()))
    assert len(found) == 2 * (7 + statistics.BINS)
    for s, stage in enumerate(out.stages):
        lengths, kinds = by_hand(iids, out.stages, s)
        assert found[f"stage{s}_chunk_mean"] == pytest.approx(np.mean(lengths))
        assert found[f"stage{s}_chunk_cv"] == pytest.approx(np.std(lengths) / np.mean(lengths), abs=1e-5)
        assert found[f"stage{s}_chunk_max"] == max(lengths)
        for name, kind in (("whitespace", "space"), ("punctuation", "mark"), ("inside", "inside")):
            assert found[f"stage{s}_at_{name}"] == pytest.approx(kinds.count(kind) / len(kinds)), (s, name)
        p = stage.boundary_prob.values().detach().double().numpy()
        first = np.zeros(len(p), bool)
        first[stage.boundary_prob.offsets()[:-1]] = True
        assert found[f"stage{s}_cosine_std"] == pytest.approx(np.std(1 - 2 * p[~first]), abs=1e-6)
        shares = np.histogram(p.astype("f4"), bins=statistics.BINS, range=(0, 1))[0] / len(p)
        assert [found[f"stage{s}_p_{i / 10:.1f}"] for i in range(10)] == pytest.approx(shares.tolist(), abs=1e-6)
    assert len(statistics.router_statistics(iids, [])) == 0


def test_weight_statistics_are_what_the_weights_did(run):
    """Norms and the update's share, against copies from before; at the third step, so that the state matters."""
    model = build(hnet_trainable, TWO_STAGES)
    _, iids, labels, _ = run
    groups = parameter_groups(model, 1e-3, 0.1)
    optimizer = torch.optim.AdamW([{k: v for k, v in g.items() if k != "names"} for g in groups], betas=(0.9, 0.95))
    for _ in range(3):
        optimizer.zero_grad()
        out = model(iids, labels)
        (out.ce + out.ratio_losses.sum()).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    found = dict(zip(statistics.names(2)[-9:], statistics.weight_statistics(optimizer, 2, WORLD).tolist()))
    moved = {id(p): p.detach() - old for p, old in zip(model.parameters(), before)}
    for s in range(3):
        mine = [p for group in groups if group["stage"] == s for p in group["params"]]
        norm = lambda tensors: torch.stack([t.norm() for t in tensors]).norm().item()  # noqa: E731
        assert found[f"stage{s}_grad_norm"] == pytest.approx(norm([p.grad for p in mine]), rel=1e-5)
        assert found[f"stage{s}_weight_norm"] == pytest.approx(norm(mine), rel=1e-5)
        # decay is taken of the weights after the step, where AdamW takes it of those before: 1e-3 of it
        wanted = norm([moved[id(p)] for p in mine]) / norm(mine)
        assert found[f"stage{s}_update_ratio"] == pytest.approx(wanted, rel=1e-3)


# -------------------------------------------------------------------------------------------------------------- health


def said(shares: list, N: float = 6.0, rows: float = 4.0) -> list[tuple[int, str]]:
    health, found = RouterHealth([N], 1000), []
    for step, F in enumerate(shares, 1):
        found += [(step, line) for line in health.look(step, {"stage0_F": F, "rows": rows})]
    return found


def test_a_router_that_is_well_is_let_be():
    """Noise of a fifth around the target, and a start far from it."""
    draw = random.Random(0)
    assert said([0.6] * 40 + [draw.gauss(1 / 6, 1 / 30) for _ in range(2000)]) == []


def test_documents_that_fill_several_batches_are_no_oscillation():
    """As in the default run, where some documents have other chunks for four steps."""
    draw = random.Random(0)
    shares = [draw.gauss(1 / 6, 1 / 36) for _ in range(500)]
    assert said([F for F in shares for _ in range(4)]) == []


@pytest.mark.parametrize(
    "F, words", [(0.999, "collapsed: 100% of its tokens"), (0.01, "collapsed: 1 in 100"), (0.004, "is dead")]
)
def test_what_is_stuck_is_named_once_when_it_starts(F, words):
    lines = said([1 / 6] * 10 + [F] * 500)
    assert len(lines) == 1 and lines[0][0] == 60 and words in lines[0][1] and "\n" not in lines[0][1]
    again = said([F] * 60 + [1 / 6] * 10 + [F] * 60)
    assert [step for step, _ in again] == [50, 120]


def test_oscillation_is_named():
    slow = [(1.6 if step // 20 % 2 else 0.5) / 6 for step in range(400)]
    lines = said(slow)
    assert len(lines) == 1 and "oscillates" in lines[0][1] and 80 <= lines[0][0] <= 110
    assert said([(1.6 if step > 100 else 0.5) / 6 for step in range(400)]) == []


def test_the_inner_stage_is_looked_at_on_its_own():
    """Its chunks are counted in the tokens that reach it."""
    health = RouterHealth([3.0, 3.0], 900)
    lines = [health.look(step, {"stage0_F": 1 / 3, "stage1_F": 0.01, "rows": 3}) for step in range(1, 60)]
    assert [line for found in lines for line in found] == [
        "stage 1 is dead: no chunk begins except at the beginning of a row (for 50 steps)"
    ]
    assert health.stuck


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    device = torch.device("cuda")
    model = build(hnet_trainable, TWO_STAGES, dtype=torch.float32).to(device)
    documents = [np.frombuffer(b"\xfe" + text.encode(), np.uint8) for text in TEXTS]
    iids, labels = pack(documents, device)
    groups = [{k: v for k, v in g.items() if k != "names"} for g in parameter_groups(model, 1e-3, 0.1)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    out = model(iids, labels)
    out.ce.backward()
    optimizer.step()
    for mode in ("default", "error"):  # the first call may set things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            router = statistics.router_statistics(iids, out.stages)
            weights = statistics.weight_statistics(optimizer, 2, SimpleNamespace(size=1, shards=1, device=device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = dict(zip(statistics.names(2), torch.cat([router, weights]).tolist()))
    assert found["stage0_chunk_mean"] >= 1 and found["stage2_update_ratio"] > 0
