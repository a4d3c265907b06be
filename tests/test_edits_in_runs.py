"""Edits of the model beyond formulas, in a run: ties, hooks, groups of the optimizer, buffers, and what is drawn.

Each takes effect, or one sentence says that it does not.
"""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from processes import ROOT
from small_models import ONE_STAGE
from test_edits import set_, world  # noqa: F401 (fixtures)

import hnet_trainable as H
import train
from hnet_runtime import UserError, distributed, flops, losses
from hnet_runtime.checks import agreement
from hnet_runtime.runs import checkpoint, progress, run_folder
from hnet_runtime.runs.flags import TrainConfig
from hnet_runtime.steps.graphs import GraphedModel
from hnet_simple import HNetInference
from hnet_trainable import HNetConfig, parameter_groups

CPU = torch.device("cpu")
CONFIG = HNetConfig.load(ONE_STAGE)
WORLD = SimpleNamespace(rank=0, size=1, shards=1, device=CPU, is_main=True)


def built(config: HNetConfig = CONFIG, world=WORLD) -> H.HNetLM:  # noqa: F811
    return distributed.build_model(config, world, torch.float32, 0)


def state_of(how: str = "plain", groups=None, **flags) -> train.TrainState:
    config = TrainConfig(global_slices=1, steps=4, warmup=0, **flags)
    model = built()
    groups = parameter_groups(model, config.lr, 0.1) if groups is None else groups(model, config.lr, 0.1)
    return train.TrainState(model, groups, how, torch.float32, CONFIG, config, WORLD)


def step(state: train.TrainState, done: int = 0) -> float:
    """The cross entropy of a step."""
    pair = agreement._batch(agreement.BATCHES[0], CPU)
    slice_ = SimpleNamespace(nested=lambda device: pair, text_bytes=95, row_lengths=[37, 1, 58])
    return state.step(done, [slice_], False, lambda: None).ce.item()


def after_init(set_, owner: type, change) -> None:  # noqa: F811
    init = owner.__init__

    def __init__(self, *args):
        init(self, *args)
        change(self)

    set_(owner, "__init__", __init__)


# ---------------------------------------------------------------------------------------------------------- parameters


def tie_router(router) -> None:
    router.k_proj_layer.weight = router.q_proj_layer.weight


def tie_ends(hnet) -> None:
    if not hnet.is_innermost:
        hnet.decoder.layers[0].mixer.in_proj.weight = hnet.encoder.layers[0].mixer.in_proj.weight


@pytest.mark.parametrize("owner, change", [("RoutingModule", tie_router), ("HNet", tie_ends)])
@pytest.mark.parametrize("how", ["plain", "graph"])
def test_a_weight_in_two_places_stays_one_weight(set_, owner, change, how):  # noqa: F811
    before = sum(p.numel() for p in built().parameters())
    after_init(set_, getattr(H, owner), change)
    state = state_of(how)
    pairs = [
        (level.decoder.layers[0].mixer.in_proj.weight, level.encoder.layers[0].mixer.in_proj.weight)
        if owner == "HNet"
        else (level.routing_module.k_proj_layer.weight, level.routing_module.q_proj_layer.weight)
        for level in (state.model.backbone,)
    ]
    assert all(one is other for one, other in pairs)
    assert sum(p.numel() for p in state.parameters) == before - pairs[0][0].numel()
    start = pairs[0][0].detach().clone()
    step(state)
    with state.steps.full_precision():
        assert not torch.equal(pairs[0][0], start)
    with pytest.raises(UserError, match="are one weight, of which FSDP2 would make two"):
        built(world=SimpleNamespace(shards=2, device=CPU, mesh=None))


def test_tied_weights_have_the_same_steps_as_graphs(set_):  # noqa: F811
    after_init(set_, H.RoutingModule, tie_router)
    after_init(set_, H.HNet, tie_ends)
    assert agreement.steps_as_graphs(CONFIG) is None


@pytest.mark.parametrize("how", ["plain", "eager", "graph"])
def test_a_weight_that_gets_no_gradient_keeps_no_run_from_resuming(set_, world, tmp_path, how):  # noqa: F811
    after_init(set_, H.HNetLM, lambda self: setattr(self, "unused", torch.nn.Parameter(torch.ones(3))))
    state = state_of("plain")
    step(state)
    folder = checkpoint.save(tmp_path, 1, state.model, state.optimizer, {}, 0)
    resumed = state_of(how)
    resumed.load(folder)
    assert step(resumed, 1) == pytest.approx(step(state, 1), rel=1e-6)
    if how == "plain":
        assert all(map(torch.equal, resumed.model.state_dict().values(), state.model.state_dict().values()))


@pytest.mark.parametrize("name", ["lm_head", "unembed"])
def test_a_head_of_several_layers_under_any_name_trains_and_generates(set_, name):  # noqa: F811
    elements, _ = flops._parts.__wrapped__(CONFIG)

    def two_layers(self) -> None:
        del self.lm_head
        setattr(self, name, torch.nn.Sequential(H.Linear(64, 32), torch.nn.GELU(), H.Linear(32, 256)))

    after_init(set_, H.HNetLM, two_layers)
    set_(H.HNetLM, "head", lambda self, x_TD: getattr(self, name)(x_TD))
    assert agreement.steps_as_graphs(CONFIG) is None and agreement.generation(CONFIG) is None
    of_stage_0 = elements[0] - 64 * 256 + 64 * 32 + 32 * 256
    assert flops._parts.__wrapped__(CONFIG)[0] == [of_stage_0, *elements[1:]]


def test_embeddings_under_another_name_start_at_random(set_):  # noqa: F811
    def renamed(self) -> None:
        self.bytes = self.embeddings
        del self.embeddings

    after_init(set_, H.HNetLM, renamed)
    set_(H.HNetLM, "embed", lambda self, iids_T: self.bytes(iids_T))
    assert 0.9 < built().bytes.weight.std() < 1.1
    assert agreement.steps_as_graphs(CONFIG) is None and agreement.generation(CONFIG) is None


def test_the_bias_of_a_layer_norm_starts_at_zero(set_):  # noqa: F811
    after_init(set_, H.Block, lambda self: setattr(self, "norm1", torch.nn.LayerNorm(64)))
    norm = built().backbone.encoder.layers[0].norm1
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


def test_a_layer_in_two_stages_counts_in_both(set_):  # noqa: F811
    elements, _ = flops._parts.__wrapped__(CONFIG)

    def share(hnet) -> None:
        if not hnet.is_innermost:
            hnet.encoder.layers[0].mixer.out_proj = hnet.main_network.main_network.layers[0].mixer.out_proj

    before = built().backbone.encoder.layers[0].mixer.out_proj.weight.numel()
    after_init(set_, H.HNet, share)
    assert flops._parts.__wrapped__(CONFIG)[0] == [elements[0] - before + 64 * 64, elements[1]]


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_parameter_is_refused(set_, kind):  # noqa: F811
    after_init(set_, H.HNetLM, lambda self: getattr(self.embeddings.weight, kind)(lambda gradient: None))
    with pytest.raises(UserError, match="embeddings.weight: a hook of a parameter does not run in training"):
        built()


def test_a_parameter_of_another_dtype_is_refused(set_):  # noqa: F811
    after_init(set_, H.SwiGLU, lambda self: setattr(self, "gain", torch.nn.Parameter(torch.ones(2).double())))
    with pytest.raises(UserError, match="mlp.gain: is torch.float64; expected parameters in float32"):
        built()


def test_a_letter_that_is_no_lower_case_letter_is_named(monkeypatch):
    monkeypatch.setitem(H.MIXERS, "W", H.Attention)
    with pytest.raises(H.ConfigError, match="MIXERS: 'W'; expected one lower-case letter: its capital adds an MLP"):
        HNetConfig.load(ONE_STAGE)


# -------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("how", ["plain", "graph"])
def test_the_rate_of_a_group_is_the_one_that_it_says(how):
    def groups(model, lr, weight_decay):
        return [
            {"params": [p], "stage": 0, "lr": 0.0 if name.startswith("embeddings") else lr, "weight_decay": 0.0}
            for name, p in model.named_parameters()
        ]

    state = state_of(how, groups)
    start = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    step(state)
    with state.steps.full_precision():
        moved = {name for name, p in state.model.named_parameters() if not torch.equal(p, start[name])}
    assert "embeddings.weight" not in moved and "lm_head.weight" in moved


@pytest.mark.parametrize("how", ["plain", "graph"])
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda group: {"params": group["params"][1:]}, "embeddings.weight is in 0 groups; expected one"),
        (lambda group: {"params": group["params"] + group["params"][:1]}, "embeddings.weight is in 2 groups"),
        (lambda group: {"stage": None}, "a group has no `stage`"),
    ],
)
def test_groups_that_lack_a_weight_or_a_stage_are_refused(how, change, said):
    def groups(model, lr, weight_decay):
        first, *others = parameter_groups(model, lr, weight_decay)
        return [first | change(first), *others]

    with pytest.raises(UserError, match=said):
        state_of(how, groups)


@pytest.mark.parametrize("key, value", [("betas", (0.0, 0.5)), ("eps", 1.0), ("amsgrad", True), ("maximize", True)])
@pytest.mark.parametrize("everywhere", [False, True])
def test_options_of_adamw_in_a_group_have_one_effect(key, value, everywhere):
    def groups(model, lr, weight_decay):
        first, *others = parameter_groups(model, lr, weight_decay)
        change = {key: value}
        return [first | change, *(group | change if everywhere else group for group in others)]

    found, start = [], torch.cat([p.detach().flatten() for p in built().parameters()])
    for how, changed in (("plain", groups), ("eager", groups), ("graph", groups), ("plain", None)):
        state = state_of(how, changed)
        for done in range(3):
            step(state, done)
        with state.steps.full_precision():
            found.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]) - start)
    of_plain, *same, without = ((x - found[0]).norm() / found[0].norm() for x in found)
    assert of_plain == 0 and max(same) < 1e-2  # Adam's first steps are near the sign of a gradient
    assert without > 5e-2 or key == "amsgrad"  # which has no effect while gradients grow


# ------------------------------------------------------------------------------------------------------------- buffers


def with_running_mean(set_, anew: bool) -> None:  # noqa: F811
    after_init(set_, H.SwiGLU, lambda self: self.register_buffer("mean", torch.zeros(self.fc2.weight.shape[0])))
    forward = H.SwiGLU.forward

    def changed(self, x_TD):
        y_TD = forward(self, x_TD)
        if self.training:
            mean = 0.5 * self.mean + 0.5 * y_TD.detach().mean(0).to(self.mean.dtype)
            if anew:
                self.mean = mean
            else:
                self.mean.copy_(mean)
        return y_TD

    set_(H.SwiGLU, "forward", changed)


@pytest.mark.parametrize("anew", [False, True])
def test_buffers_that_change_in_training_keep_steps_out_of_graphs(set_, anew):  # noqa: F811
    with_running_mean(set_, anew)
    said = agreement.steps_as_graphs(CONFIG)
    assert "the buffer" in said and "changes in a forward, which in graphs has padding in it" in said
    eager = GraphedModel(built(), torch.float32, 0.3, captures=False)  # as on a GPU
    eager.forward_backward([agreement._batch(agreement.BATCHES[0], CPU)])
    eager.finish_step()
    saved = {name: x for name, x in eager.masters.state_dict().items() if name.endswith("mlp.mean")}
    assert saved and all(x.norm() > 0 for x in saved.values())


@pytest.mark.parametrize("anew", [False, True])
def test_a_sample_leaves_training_as_it_was(set_, anew):  # noqa: F811
    with_running_mean(set_, anew)
    model = built().train()
    inference = HNetInference.from_training(model)
    written = progress.sample(inference, TrainConfig(sample_bytes=5, prompt="ab"), WORLD)
    assert len(written.data) > 0
    assert all(module.training for module in model.modules())
    assert all(x.norm() == 0 for name, x in model.named_buffers() if name.endswith("mlp.mean"))


def test_a_constant_may_be_no_number(set_):  # noqa: F811
    after_init(set_, H.SwiGLU, lambda self: setattr(self, "unset", torch.full((2,), torch.nan)))
    weights = built().state_dict()
    again = distributed.build_model(CONFIG, WORLD, torch.float32, 0, weights)
    found = [module.unset for module in again.modules() if isinstance(module, H.SwiGLU)]
    assert found and all(x.isnan().all() for x in found)


# ------------------------------------------------------------------------------------------------------------- numbers


def test_dropout_follows_the_seed_and_the_step(set_):  # noqa: F811
    forward = H.SwiGLU.forward
    set_(H.SwiGLU, "forward", lambda self, x_TD: F.dropout(forward(self, x_TD), 0.5, self.training))

    def run(seed: int, *steps: int) -> list[float]:
        state = state_of(seed=seed, lr=1e-9)
        return [step(state, done) for done in steps]

    first = run(1, 0, 1, 2)
    torch.rand(7)  # another state of torch's generator
    assert run(1, 0, 1, 2) == first
    assert len({*first, *run(2, 0)}) == 4
    assert run(1, 2) == pytest.approx(first[2:], rel=1e-6)  # as after a resume


@pytest.mark.parametrize("draw", [random.random, lambda: __import__("numpy").random.rand()])
def test_random_numbers_of_python_and_numpy_keep_steps_out_of_graphs(set_, draw):  # noqa: F811
    forward = H.SwiGLU.forward
    set_(H.SwiGLU, "forward", lambda self, x_TD: forward(self, x_TD) if draw() >= 0 else x_TD)
    assert "draws random numbers" in agreement.steps_as_graphs(CONFIG)


@pytest.mark.parametrize("how", ["plain", "eager"])
def test_one_ratio_loss_too_many_is_named(set_, how):  # noqa: F811
    forward = H.HNetLM.forward

    def changed(self, *args):
        out = forward(self, *args)
        return out._replace(ratio_losses=torch.cat([out.ratio_losses, out.ce[None]]))

    set_(H.HNetLM, "forward", changed)
    with pytest.raises(UserError, match="returns 2 ratio losses for 1 chunking stages; expected one for each"):
        step(state_of(how))


def test_a_ratio_loss_that_the_flags_would_undo_is_refused(set_):  # noqa: F811
    after_init(set_, H.HNetLM, lambda self: setattr(self, "ratio_form", "hinge"))
    with pytest.raises(UserError, match="HNetLM sets ratio_form or ratio_targets itself"):
        losses.attach(losses.ratio(TrainConfig(), CONFIG, CPU, torch.float32), built())


# ------------------------------------------------------------------------------------------------ what a run warns of


def first_value(set_) -> None:  # noqa: F811
    after_init(set_, H.RMSNorm, lambda self: setattr(self, "weight", torch.nn.Parameter(torch.zeros(64))))


def small_head(set_) -> None:  # noqa: F811
    after_init(set_, H.HNetLM, lambda self: torch.nn.init.normal_(self.lm_head.weight, std=1e-3))


def later_bytes(set_) -> None:  # noqa: F811
    router = H.RoutingModule.forward
    set_(H.RoutingModule, "forward", lambda self, x_TD, packing: router(self, x_TD, packing).roll(-1))


def other_documents(set_) -> None:  # noqa: F811
    set_(H.HNetLM, "embed", lambda self, iids_T: self.embeddings(iids_T) + self.embeddings(iids_T).roll(1, 0))


def counter_in_the_loss(set_) -> None:  # noqa: F811
    calls = itertools.count(1)
    set_(H, "training_loss", lambda ce, ratio_losses, alpha: ce / next(calls) + alpha * ratio_losses.sum())


def counter_in_the_model(set_) -> None:  # noqa: F811
    calls, head = itertools.count(1), H.HNetLM.head
    set_(H.HNetLM, "head", lambda self, x_TD: head(self, x_TD) / next(calls))


def loss_of_the_logits(set_) -> None:  # noqa: F811
    forward = H.HNetLM.forward

    def with_another_loss(self, *args):
        out = forward(self, *args)
        return out._replace(ce=out.ce and out.ce + 0.01 * out.logits._values.logsumexp(-1).square().mean())

    set_(H.HNetLM, "forward", with_another_loss)


SAID = {
    loss_of_the_logits: "HNetLM.forward returns a ce that is not the cross entropy of its logits",
    first_value: "backbone.encoder.layers.0.norm1.weight: initial_weight draws its first value",
    small_head: "lm_head.weight: initial_weight draws its first value, so that of __init__ has no effect",
    later_bytes: "what the model knows at a byte depends on later bytes or on other documents",
    other_documents: "what the model knows at a byte depends on later bytes or on other documents",
    counter_in_the_loss: "the gradient of embeddings.weight is another when a batch comes again",
    counter_in_the_model: "the cross entropy is another when a batch comes again with the same weights, buffers and",
}


@pytest.mark.parametrize("change", SAID, ids=lambda change: change.__name__)
def test_what_a_run_would_not_show_is_a_warning(set_, change, caplog):  # noqa: F811
    change(set_)
    agreement.warn_of(CONFIG)
    (said,) = caplog.messages
    assert said.startswith(SAID[change])
    if "counter" in change.__name__:
        assert "a graph repeats what was captured" in agreement.steps_as_graphs(CONFIG)


def test_nothing_is_said_of_a_model_that_keeps_its_state(set_, caplog):  # noqa: F811
    """With dropout, a buffer that counts, a weight of its own, and a router that says that it looks ahead."""
    mlp, router = H.SwiGLU.forward, H.RoutingModule.forward
    after_init(set_, H.HNetLM, lambda self: self.register_buffer("calls", torch.zeros(())))
    after_init(set_, H.HNetLM, lambda self: setattr(self, "gain", torch.nn.Parameter(torch.ones(64))))
    set_(H.HNetLM, "embed", lambda self, iids_T: self.embeddings(iids_T) * self.gain / self.calls.add_(1))
    set_(H.SwiGLU, "forward", lambda self, x_TD: F.dropout(mlp(self, x_TD), 0.5, self.training))
    agreement.warn_of(CONFIG)
    set_(H.RoutingModule, "is_causal", False)
    set_(H.RoutingModule, "forward", lambda self, x_TD, packing: router(self, x_TD, packing).roll(-1))
    agreement.warn_of(CONFIG)
    assert caplog.messages == []


def test_nothing_is_said_of_the_model_as_it_is(caplog):
    for name in ("hnet_2stage_XL", "isotropic_tiny"):
        agreement.warn_of(HNetConfig.load(name))
    assert caplog.messages == []


def test_a_weight_without_dimensions_trains_where_fsdp_shards_others(set_, world):  # noqa: F811
    after_init(set_, H.HNetLM, lambda self: setattr(self, "scale", torch.nn.Parameter(torch.tensor(0.5))))
    embed = H.HNetLM.embed
    set_(H.HNetLM, "embed", lambda self, iids_T: embed(self, iids_T) * self.scale)
    model = distributed.build_model(CONFIG, distributed.start("cpu"), torch.bfloat16, 0)
    config = TrainConfig(global_slices=1, steps=4, warmup=0)
    state = train.TrainState(model, parameter_groups(model, 0.1, 0.1), "plain", torch.bfloat16, CONFIG, config, WORLD)
    step(state)
    assert model.scale.item() != 0.5 and model.scale.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- files


def test_the_files_that_the_model_imports_are_part_of_it(tmp_path, monkeypatch):
    for name in ("hnet_trainable.py", "hnet_config.py", "hnet_routers.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "hnet_kernels").symlink_to(ROOT / "hnet_kernels")
    known = run_folder.model_code()
    assert set(known) == {"hnet_trainable.py", "hnet_config.py", "hnet_routers.py", "hnet_kernels"}
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    assert run_folder.model_code() == known
    with open(tmp_path / "hnet_trainable.py", "a") as file:
        file.write("\nimport my_mixers\n")
    (tmp_path / "my_mixers.py").write_text("SCALE = 0.5\n")
    first = run_folder.model_code()
    (tmp_path / "my_mixers.py").write_text("SCALE = 7.0\n")
    said = run_folder.changed_model({"model_code": first})
    assert said.startswith("was written with another my_mixers.py (fingerprint ")
    run_folder.keep_model_files(tmp_path)
    assert (tmp_path / f"my_mixers-{run_folder.model_code()['my_mixers.py']}.py").read_text() == "SCALE = 7.0\n"
