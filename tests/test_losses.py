"""The ratio loss's options: formulas, steps as graphs against eager ones, and runs that resume with a schedule."""

import shutil
from pathlib import Path

import pytest
import torch
from test_graphs import ALPHA, BATCHES, DEVICE, LAYOUTS, batch, build, distance, spoil
from test_train import MODEL, corpus, records, refused, succeed, timeless  # noqa: F401 (a fixture)

import hnet_trainable as H
from hnet_runtime import UserError, losses
from hnet_runtime.checks import agreement
from hnet_runtime.runs.flags import TrainConfig
from hnet_runtime.steps.graphs import GraphedModel

WIDE = torch.float64
HNET = H.HNetConfig.load(MODEL | {"N_compress": [1, 6]})
TWO = H.HNetConfig.load(LAYOUTS[2] | {"N_compress": [1, 3, 9]})


def loss_of(hnet: H.HNetConfig = HNET, **flags) -> losses.AddedLoss:
    return losses.ratio(TrainConfig(**flags), hnet, torch.device(DEVICE), WIDE)


def stage_of(F: float, G: float) -> H.StageOutput:
    return H.StageOutput(None, None, torch.tensor(F, dtype=WIDE), torch.tensor(G, dtype=WIDE, requires_grad=True), None)


@pytest.mark.parametrize("N", [1.5, 3, 6.0, torch.tensor(6.0, dtype=WIDE)])
@pytest.mark.parametrize("F, G", [(0.1, 0.3), (0.9, 0.2), (0.5, 0.5), (1.0, 1.0), (0.0, 0.7)])
def test_the_hinge_is_eq_10_where_there_are_too_many_chunks(N, F, G):
    """Eq. 10 in float64, written as the paper has it, and 1 without a gradient where there are too few chunks."""
    hinge, both = stage_of(F, G), stage_of(F, G)
    found, n = H.ratio_hinge(hinge, N), float(N)
    paper = n / (n - 1) * ((n - 1) * F * G + (1 - F) * (1 - G))
    wanted, slope = (paper, n / (n - 1) * ((n - 1) * F - (1 - F))) if n * F > 1 else (1.0, 0.0)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.grad(found, hinge.G)[0].item() == pytest.approx(slope, abs=1e-12)
    assert H.ratio_loss(both, N).item() == pytest.approx(paper, rel=1e-12)


def test_the_target_rises_over_a_share_of_the_run_and_then_stays():
    loss = loss_of(TWO, ratio_from="1-1.5-6", ratio_rise=0.5)
    found = [loss.targets_at(step, 20) for step in range(20)]
    for step, (outer, inner) in enumerate(found):
        share = min(step / 10, 1)
        assert outer == pytest.approx(1.5 + share * (3 - 1.5)) and inner == pytest.approx(4 + share * (3 - 4))
    assert found[10:] == [[3.0, 3.0]] * 10, "exactly the target of -N"
    for step in (7, 3, 19):
        loss.set(step, 20)
        assert [target.item() for target in loss.targets] == found[step]
    constant = loss_of(TWO)
    assert constant.targets == [3, 3] and constant.weight == TrainConfig.alpha, "without a schedule no tensor"
    rising = losses.AddedLoss("teacher", losses.Ramp(0, 1, 0.25), [], torch.device(DEVICE), WIDE)
    rising.set(1, 8)
    assert rising.weight.item() == 0.5, "a weight can change, too"


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("form", ["both", "hinge"])
def test_graphs_follow_the_schedule_and_the_form(stages, form):
    """In float64 only the order of sums differs. The second round replays what the first captured on a GPU."""
    model = build(LAYOUTS[stages] | {"N_compress": [1, 9, 81][: stages + 1]}, WIDE)
    start = {1: "1-1.2", 2: "1-1.2-1.5"}[stages]
    loss = loss_of(model.config, ratio_form=form, ratio_from=start, ratio_rise=1.0, alpha=ALPHA)
    graphed = GraphedModel(model, WIDE, loss.weight)
    losses.attach(loss, graphed.masters, graphed.model)
    seen = []
    for step, lengths in enumerate([*BATCHES[:2], *BATCHES[:2]]):
        pair = batch(lengths, step)
        loss.set(step, 4)
        spoil(graphed)
        found = graphed.forward_backward([pair]).ratio[0].tolist()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        out = model(*pair)
        wanted = []
        for stage, N in zip(out.stages, loss.targets_at(step, 4)):
            both = 1 + N / (N - 1) * (N * stage.F - 1) * (stage.G - 1 / N)
            wanted.append(both if form == "both" or N * stage.F > 1 else 0 * stage.G + 1)
        total = out.ce + ALPHA * sum(wanted)
        assert found == pytest.approx([x.item() for x in wanted], rel=1e-9)
        eager = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
        wrong = {n: d for (n, g), w in zip(gradients.items(), eager) if not (d := distance(g, w)) < 1e-9}
        assert not wrong, (step, wrong)
        seen.append(found)
    assert len({row[0] for row in seen if row[0] != 1}) > 1, "the hinge acts, and targets differ from step to step"


def test_the_check_before_graphs_uses_the_form():
    loss = loss_of(ratio_form="hinge", ratio_from="1-2", ratio_rise=0.5)
    prepared = []

    def prepare(model: H.HNetLM) -> None:
        losses.attach(loss, model)
        prepared.append(model)

    assert agreement.steps_as_graphs(HNET, "none", prepare) is None
    assert prepared[0].ratio_form == "hinge" and isinstance(prepared[0].ratio_targets[0], torch.Tensor)


def test_the_routers_rate_is_a_factor_on_eq_11():
    model = H.HNetLM(TWO)
    plain = {name: group for group in H.parameter_groups(model, 1.0, 0.1) for name in group["names"]}
    groups = H.parameter_groups(model, 1.0, 0.1, 0.25)
    found = {name: group for group in groups for name in group["names"]}
    assert found.keys() == plain.keys()
    for name, group in found.items():
        factor = 0.25 if "routing_module" in name else 1
        assert group["lr"] == pytest.approx(plain[name]["lr"] * factor), name
        assert (group["stage"], group["weight_decay"]) == (plain[name]["stage"], plain[name]["weight_decay"])
    assert len(groups) == len(H.parameter_groups(model, 1.0, 0.1)) + 2, "one more for each router"


FLAGS = ["--ratio-form", "hinge", "--ratio-from", "1-2", "--ratio-rise", "0.8", "--router-lr", "0.5"]


def test_a_run_with_a_schedule_resumes_to_the_same_bits(corpus, tmp_path):  # noqa: F811
    common = [*FLAGS, "-C", "graph", "--steps", "6", "--save-every", "3", "--sample-bytes", "0", "--val-every", "2"]
    whole, folder = tmp_path / "whole", tmp_path / "resumed"
    succeed(corpus, *common, "--save-dir", str(whole))
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    again = ["--save-dir", str(folder), "--resume", "auto"]
    said = succeed(corpus, *again)
    assert "resuming from" in said and timeless(folder) == timeless(whole)
    targets = [row["stage0_target"] for row in records(folder)]
    assert targets == pytest.approx([2 + min(step / 4.8, 1) * 4 for step in range(6)])
    assert {"val_stage0_moved", "val_stage0_enrichment"} <= records(folder)[-1].keys()
    flags = (Path(whole) / "train.yaml").read_text()
    assert all(line in flags for line in ("ratio_form: hinge", "ratio_from: 1-2", "ratio_rise: 0.8", "router_lr: 0.5"))


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"ratio_from": "1-2"}, "--ratio-from 1-2: expected also --ratio-rise"),
        ({"ratio_rise": 0.5}, "--ratio-rise 0.5: expected also --ratio-from"),
        ({"ratio_from": "1-2", "ratio_rise": 1.5}, "--ratio-rise 1.5: expected a share from 0 to 1"),
        ({"router_lr": 0.0}, "--router-lr 0.0: expected more than 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**flags, val_every=0).check()


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"ratio_from": "1-2-4"}, "--ratio-from 1-2-4: N_compress: 3 numbers"),
        ({"ratio_from": "2-3"}, "--ratio-from 2-3: N_compress"),
        ({"ratio_from": "1-20"}, "--ratio-from 1-20: expected at most 1-6, to which the target rises"),
        ({"ratio_from": "1-x"}, "--ratio-from 1-x: expected numbers joined by dashes"),
    ],
)
def test_a_schedule_that_does_not_fit_the_model_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        losses.check(TrainConfig(**flags, ratio_rise=0.5), HNET)


def test_a_model_without_routers_refuses_their_flags(corpus):  # noqa: F811
    flat = H.HNetConfig.load("isotropic_tiny")
    for flags in ({"ratio_form": "hinge"}, {"router_lr": 2.0}, {"ratio_from": "1", "ratio_rise": 0.1}):
        with pytest.raises(UserError, match="the model has no router that learns"):
            losses.check(TrainConfig(**flags), flat)
    assert "the model has no router that learns" in refused(corpus, "-c", "isotropic_tiny", "--router-lr", "2")
