"""Another optimizer in `make_optimizer` of train.py: it makes the weights, is clipped, saved and resumed."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_changing import BLOCKS, execute
from test_edits import set_, world  # noqa: F401 (fixtures)
from test_edits_in_runs import CONFIG, WORLD, built, state_of, step

import train
from hnet_kernels.adamw import split_float32
from hnet_runtime import UserError, distributed
from hnet_runtime.checks import agreement
from hnet_runtime.runs import checkpoint, statistics
from hnet_runtime.runs.run_folder import CheckpointError
from hnet_runtime.steps.flat_adamw import FlatAdamW, adamw, clipped_step
from hnet_runtime.steps.graphs import GraphedModel
from hnet_trainable import parameter_groups

pytestmark = pytest.mark.usefixtures("world")
LION, MUON = (block for block in BLOCKS if "make_optimizer" in block)


def momentum(groups):
    return torch.optim.SGD(groups, momentum=0.9)


def amsgrad(groups):
    return torch.optim.AdamW(groups, betas=(0.8, 0.9), amsgrad=True)


def lion(groups):
    return execute(LION).make_optimizer(groups)


def betas_of_groups(groups):
    return torch.optim.AdamW([group | {"betas": (0.5, 0.9 - 0.1 * i)} for i, group in enumerate(groups)])


def adagrad(groups):
    return torch.optim.Adagrad(
        groups, eps=1e-3
    )  # with less, a gradient of 0 and one of 1e-17 would make different steps


def tensor_rates(groups):
    return torch.optim.Adam([group | {"lr": torch.tensor(group["lr"])} for group in groups])


def muon_and_adamw(groups):
    return execute(MUON).make_optimizer(groups)


class Odd(torch.optim.Optimizer):
    """Its step has no closure; its state is bfloat16, and begins in part before and in part after the first step."""

    def __init__(self, groups):
        super().__init__(groups, {})
        for p in weights_of(groups):
            self.state[p]["steps"] = torch.zeros(())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["steps"] += 1
                if "mean" not in state:
                    state["mean"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["mean"].lerp_(p.grad.bfloat16(), 0.5)
                p.sub_(group["lr"] * state["mean"])
                if state["steps"] == 2:
                    state["old"] = p.clone()
                if "old" in state:
                    p.lerp_(state["old"], 0.1)


class NoDefaults(torch.optim.Optimizer):
    def __init__(self, groups):
        super().__init__([{k: v for k, v in group.items() if k != "lr"} for group in groups], {})


def weights_of(groups):
    return [p for group in groups for p in group["params"]]


OTHERS = [momentum, adagrad, amsgrad, lion, muon_and_adamw, betas_of_groups]
HOWS = ["plain", "eager", "graph"]


def weights(state: train.TrainState) -> dict[str, torch.Tensor]:
    with state.steps.full_precision():
        return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def gaps(ours, theirs) -> float:
    return max((ours[name] - x).norm().item() / x.norm().clamp_min(1e-6).item() for name, x in theirs.items())


def in_float64(how: str) -> train.TrainState:
    config = train.TrainConfig(global_slices=1, steps=4, warmup=0, lr=1e-2, clip=0.5)
    model = built().double()
    groups = parameter_groups(model, config.lr, 0.1)
    return train.TrainState(model, groups, how, torch.float64, CONFIG, config, WORLD)


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("how", HOWS)
def test_the_weights_are_those_that_the_optimizer_makes(set_, make, how):  # noqa: F811
    """Against the same optimizer over a model by autograd, with torch's clipping, in float64."""
    set_(train, "make_optimizer", make)
    state, alone = in_float64(how), in_float64("plain")
    groups = distributed.optimizer_groups(parameter_groups(alone.model, 1e-2, 0.1))
    optimizer, parameters = make(groups), list(alone.model.parameters())
    for done in range(3):
        for group, peak in zip(optimizer.param_groups, state.peaks):
            group["lr"] = peak * train.lr_scale(done, state.config)
        alone.ratio.set(done, 4)
        alone.steps.forward_backward([step_batch()])
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        step(state, done)
    assert gaps(weights(state), weights(alone)) < 1e-9  # sums in another order


def step_batch(device: str = "cpu"):
    return agreement._batch(agreement.BATCHES[0], torch.device(device))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compute_weights_follow_float32_weights_in_bfloat16(device):
    """Of three steps, captured on a GPU."""
    masters = built(world=SimpleNamespace(**vars(WORLD) | {"device": torch.device(device)}))
    groups = distributed.optimizer_groups(parameter_groups(masters, 1e-2, 0.0))
    graphed = GraphedModel(masters, torch.bfloat16, 0.3, None, groups, make_optimizer=torch.optim.SGD)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    for _ in range(3):
        with graphed.full_precision():
            before = {name: p.detach().clone() for name, p in masters.named_parameters()}
        graphed.forward_backward([step_batch(device)])
        distributed.clip_in_optimizer(graphed.optimizer, list(masters.parameters()), 0.1, WORLD)
        clipped_step(graphed.optimizer)
        gradients = {name: p.grad for name, p in masters.named_parameters()}  # clipped
        assert {g.dtype for g in gradients.values()} == {torch.float32}, "an optimizer may mix them with its state"
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        assert norm.item() == pytest.approx(0.1, rel=1e-4)
        with graphed.full_precision():
            for name, p in masters.named_parameters():
                assert torch.equal(p, before[name].add(gradients[name], alpha=-rates[p])), name
            now = {name: p.detach().clone() for name, p in masters.named_parameters()}
        for name, p in graphed.model.named_parameters():
            assert torch.equal(p, split_float32(now[name])[0] if p.dtype == torch.bfloat16 else now[name]), name
        more = now["lm_head.weight"] != before["lm_head.weight"]
        same_in_bfloat16 = now["lm_head.weight"].bfloat16() == before["lm_head.weight"].bfloat16()
        assert (more & same_in_bfloat16).any(), "small steps count"


@pytest.mark.parametrize("how", HOWS)
def test_a_loss_that_is_not_finite_changes_nothing(set_, how):  # noqa: F811
    set_(train, "make_optimizer", momentum)
    state = state_of(how)
    step(state)
    before, state_before = weights(state), [x["momentum_buffer"].clone() for x in state.optimizer.state.values()]
    state.steps.forward_backward([step_batch()])
    distributed.clip_in_optimizer(state.optimizer, state.parameters, 1.0, WORLD, torch.tensor(math.nan))
    clipped_step(state.optimizer)
    assert all(torch.equal(x, before[name]) for name, x in weights(state).items())
    assert all(map(torch.equal, state_before, (x["momentum_buffer"] for x in state.optimizer.state.values())))


@pytest.mark.parametrize("how", ["plain", "graph"])
def test_what_reads_gradients_before_or_after_a_fused_step_gets_clipped_ones(set_, how):  # noqa: F811
    """A hook, and a step that a class defines; and neither runs where the loss is not finite."""
    found = []

    class Own(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            found.append(torch.stack([p.grad.norm() for p in weights_of(self.param_groups)]).norm().item())

    def hooked(groups):
        optimizer = adamw(groups)
        optimizer.register_step_pre_hook(lambda *_: Own.step(optimizer))
        return optimizer

    for make in (hooked, lambda groups: Own(groups, fused=True)):
        set_(train, "make_optimizer", make)
        state = state_of(how, clip=1e-3)
        step(state)
        state.steps.forward_backward([step_batch()])
        distributed.clip_in_optimizer(state.optimizer, state.parameters, 1.0, WORLD, torch.tensor(math.nan))
        clipped_step(state.optimizer)
    assert found == pytest.approx([1e-3, 1e-3], rel=1e-2)


@pytest.mark.parametrize("how", ["plain", "graph"])
def test_a_step_may_free_gradients_and_may_not_move_weights(set_, how):  # noqa: F811
    class Frees(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.zero_grad()

    class Moves(torch.optim.SGD):
        def step(self, closure=None):
            for p in weights_of(self.param_groups):
                p.data = p.data - p.grad

    set_(train, "make_optimizer", Frees)
    state, start = state_of(how), weights(state_of(how))
    step(state, 0)
    once = weights(state)
    step(state, 1)
    assert gaps(once, start) > 0 and gaps(weights(state), once) > 0
    set_(train, "make_optimizer", Moves)
    with pytest.raises(UserError, match="a step of Moves gives a weight other memory .*; expected it to change w"):
        step(state_of(how))


@pytest.mark.parametrize("make", [*OTHERS, tensor_rates, Odd])
@pytest.mark.parametrize("how", ["plain", "graph"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not(set_, tmp_path, make, how):  # noqa: F811
    set_(train, "make_optimizer", make)
    state = state_of(how, decay=1.0)
    for done in range(2):
        step(state, done)
    checkpoint.require_tensors(state.optimizer)
    folder = checkpoint.save(tmp_path, 2, state.model, state.optimizer, {}, 0)
    resumed = state_of(how, decay=1.0)
    resumed.load(folder)
    for done in range(2, 4):
        step(state, done)
        step(resumed, done)
    theirs = weights(state)
    assert all(torch.equal(x, theirs[name]) for name, x in weights(resumed).items())
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [g["lr"] for g in state.optimizer.param_groups]


@pytest.mark.parametrize("how", ["plain", "graph"])
@pytest.mark.parametrize(
    "before, after, said",
    [
        (
            adamw,
            momentum,
            "saved exp_avg, exp_avg_sq, step of .*, that of make_optimizer in train.py has momentum_buffer",
        ),
        (
            adamw,
            torch.optim.SGD,
            "saved exp_avg, exp_avg_sq, step of .*, that of make_optimizer in train.py has nothing",
        ),
        (
            torch.optim.SGD,
            adamw,
            "saved nothing of .*, that of make_optimizer in train.py has exp_avg, exp_avg_sq, step",
        ),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused_by_name(set_, tmp_path, how, before, after, said):  # noqa: F811
    set_(train, "make_optimizer", before)
    state = state_of(how)
    step(state)
    folder = checkpoint.save(tmp_path, 1, state.model, state.optimizer, {}, 0)
    set_(train, "make_optimizer", after)
    with pytest.raises(CheckpointError, match=f"its optimizer {said}"):
        state_of(how).load(folder)


@pytest.mark.parametrize("how", HOWS)
def test_a_weight_that_the_optimizer_leaves_out_is_named(set_, how):  # noqa: F811
    set_(train, "make_optimizer", lambda groups: torch.optim.SGD(groups[1:]))
    with pytest.raises(UserError, match="make_optimizer: embeddings.weight is in 0 groups; expected one"):
        state_of(how)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda groups: [torch.optim.SGD(groups)], "returns a list; expected one torch.optim.Optimizer"),
        (lambda groups: None, "returns a NoneType; expected one"),
        (lambda groups: torch.optim.LBFGS([groups[0] | {"params": weights_of(groups)}]), "LBFGS needs a closure"),
        (lambda groups: torch.optim.SGD(groups, lr=0.1), "lr=0.1 of SGD has no effect, .*; expected it as --lr"),
        (lambda groups: torch.optim.AdamW(groups, weight_decay=0.5), "weight_decay=0.5 .* expected it as --weight-dec"),
        (lambda groups: NoDefaults([{**groups[0], "params": weights_of(groups)}]), "a group has no `lr`"),
    ],
)
def test_what_the_run_could_not_use_is_named(set_, make, said):  # noqa: F811
    set_(train, "make_optimizer", make)
    with pytest.raises(UserError, match=f"make_optimizer.* {said}"):
        state_of()


def test_groups_have_the_names_of_their_weights(set_):  # noqa: F811
    found = {}
    set_(train, "make_optimizer", lambda groups: found.update(groups=groups) or adamw(groups))
    names = {p: name for name, p in state_of().model.named_parameters()}
    assert [[names[p] for p in g["params"]] for g in found["groups"]] == [g["names"] for g in found["groups"]]


def test_an_argument_that_takes_effect_is_accepted(set_):  # noqa: F811
    without = lambda groups: [{k: v for k, v in g.items() if k != "lr"} for g in groups]  # noqa: E731
    set_(train, "make_optimizer", lambda groups: torch.optim.SGD(without(groups), lr=0.1))
    assert set(state_of().peaks) == {0.1}


class Counts(torch.optim.SGD):
    """Has what no checkpoint saves, as `where` says."""

    def __init__(self, groups, where):
        super().__init__(groups)
        self.where, self.inner, self.calls = where, [torch.optim.Adam(groups)], 0

    def step(self, closure=None):
        super().step()
        p = self.param_groups[0]["params"][0]
        if self.where == "int":
            self.state[p]["count"] = 3
        elif self.where == "all":
            self.state["all"] = {"count": torch.ones(())}
        elif self.where == "gradient":
            self.state[p]["last"] = p.grad
        elif self.where == "inner":
            self.inner[0].step()
        elif self.where == "calls":
            self.calls += 1
        elif self.where == "k":
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


@pytest.mark.parametrize(
    "where, said",
    [
        ("int", "the state count of Counts is of type int; expected tensors"),
        ("all", "the state all of Counts belongs to no weight; expected state of weights"),
        ("gradient", "the state last of Counts is the gradient, .*; expected a clone of it"),
        ("inner", "inner of Counts has a state of its own, which no checkpoint saves; expected it to"),
    ],
)
def test_a_state_that_no_checkpoint_has_is_named_at_the_first_step(set_, where, said):  # noqa: F811
    set_(train, "make_optimizer", lambda groups: Counts(groups, where))
    state = state_of("graph")
    step(state)
    with pytest.raises(UserError, match=f"make_optimizer: {said}"):
        checkpoint.require_tensors(state.optimizer)


@pytest.mark.parametrize("where", ["calls", "k", "lr"])
@pytest.mark.parametrize("how", ["plain", "graph"])
def test_a_count_outside_the_state_is_named_at_the_first_step(set_, tmp_path, caplog, how, where):  # noqa: F811
    set_(train, "make_optimizer", lambda groups: Counts(groups, where) if where != "lr" else adamw(groups))
    state = state_of(how)
    saver = checkpoint.Saver(tmp_path, state.model, state.optimizer)
    step(state)
    saver.check_state()
    said = f"make_optimizer: a step of Counts changes {where}, which no checkpoint saves"
    assert [said in record.message for record in caplog.records if record.name == "hnet"] == [True] * (where != "lr")


def test_several_processes_as_graphs_ask_for_eager_steps():
    masters, two = state_of("plain").model, SimpleNamespace(rank=0, size=2, shards=1, device=WORLD.device)
    with pytest.raises(UserError, match="SGD .* runs as graphs with one process alone; use --compile eager without"):
        GraphedModel(masters, torch.float32, 0.3, two, make_optimizer=torch.optim.SGD)


@pytest.mark.parametrize("how", HOWS)
def test_statistics_of_another_optimizer_leave_out_its_update(set_, how):  # noqa: F811
    found = {}
    for make in (adamw, momentum):
        set_(train, "make_optimizer", make)
        state = state_of(how)
        step(state)
        state.steps.forward_backward([step_batch()])
        found[make] = statistics.weight_statistics(state.optimizer, CONFIG.num_stages, WORLD).view(-1, 3)
    assert found[adamw].isfinite().all() and found[momentum][:, 2].isnan().all()
    assert found[momentum][:, :2].isfinite().all() and (found[momentum][:, :2] > 0).all()


def test_flat_memory_takes_the_place_of_plain_adamw_alone():
    p = torch.nn.Parameter(torch.ones(2))
    assert FlatAdamW.replaces(adamw([{"params": [p]}])) and FlatAdamW.replaces(torch.optim.AdamW([p], betas=(0.1, 0.2)))

    class Changed(torch.optim.AdamW):
        pass

    others = [Changed([p]), torch.optim.Adam([p]), torch.optim.AdamW([p], maximize=True), torch.optim.SGD([p])]
    assert not any(map(FlatAdamW.replaces, others))


@pytest.mark.parametrize("how", HOWS)
def test_betas_of_adamw_take_effect(set_, how):  # noqa: F811
    found = []
    for betas in ((0.9, 0.95), (0.0, 0.5)):
        set_(train, "make_optimizer", lambda groups, betas=betas: torch.optim.AdamW(groups, betas=betas, fused=True))
        state = state_of(how)
        assert how == "plain" or state.optimizer.rule is None
        step(state, 0)
        step(state, 1)
        found.append(weights(state))
    assert gaps(*found) > 1e-5
