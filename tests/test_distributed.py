"""The same training on 1, 2 and 4 processes, sharded or replicated; and what happens when one of them dies."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from golden.golden_weights import golden_weight
from processes import ROOT, Job, made_once, program
from small_models import TWO_STAGES
from test_train import MODEL, records, timeless
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

import fineweb
import train
from hnet_runtime import distributed
from hnet_runtime.checks import agreement
from hnet_runtime.distributed import World
from hnet_runtime.runs import checkpoint
from hnet_runtime.runs.watchdog import Watchdog
from hnet_runtime.runs.weights import load_own_checkpoint
from hnet_runtime.steps import activations, graphs
from hnet_runtime.steps.flat_adamw import clipped_step
from hnet_runtime.steps.graphs import GraphedModel
from hnet_runtime.steps.plain import PlainModel
from hnet_trainable import (
    Block,
    HNet,
    HNetConfig,
    HNetLM,
    RoutingModule,
    SwiGLU,
    init_weights,
    parameter_groups,
    widen,
)

WORLDS = {
    "1": (1, 1),
    "2": (2, 1),
    "4": (4, 1),
    "2x2": (4, 2),
    "2 replicas": (2, 2),
}  # processes, replicas
G, STEPS = 4, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, worker_id) -> Path:
    """40 short documents and a model's config beside their shards."""
    return made_once(tmp_path_factory, worker_id, "scale_corpus", make_corpus)


def make_corpus(folder: Path) -> None:
    rng = random.Random(0)
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "bytes", "become", "chunks")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(60, 600))))
    fineweb.prepare(str(folder / "texts"), str(folder / "data"), holdout=0.2)
    (folder / "model.json").write_text(json.dumps(MODEL))


# ------------------------------------------------------------------------------------------- the same at any world size


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Run:
    """The steps that a rank of a scenario repeats."""

    def __init__(self, corpus: Path, size: int, replicate: int):
        self.world: World = distributed.start("cpu", replicate)
        self.config = train.TrainConfig(data=str(corpus / "data"), mbs=192, global_slices=G, alpha=0.1)
        self.hnet = HNetConfig.load(TWO_STAGES)
        self.stream = fineweb.ByteStream(self.config.data, "train", slice_bytes=self.config.mbs)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in HNetLM(self.hnet).named_parameters()}
        self.weights = {n: torch.from_numpy(golden_weight(f"0.{n}", tuple(s))).float() for n, s in shapes.items()}

    def model(self, dtype: torch.dtype = torch.float32, reshard: bool = True) -> HNetLM:
        return distributed.build_model(self.hnet, self.world, dtype, 0, self.weights, reshard)

    def gradients(self, model: HNetLM, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """The statistics of a step, and this rank's shard of every gradient."""
        slices = list(self.stream.step(step, G, self.world.rank, self.world.size))
        groups = distributed.optimizer_groups(parameter_groups(model, 1e-4, 0.1))
        steps = PlainModel(model, self.config.alpha, self.world, groups)
        stats = train.forward_backward(steps, slices, self.world).flat()[:-1]  # without the norm
        return stats, {name: p.grad for name, p in model.named_parameters()}


def scenario(corpus: Path, name: str, folder: Path) -> None:
    """Computes everything that is compared between worlds, in one job. Rank 0 writes it to a file."""
    run = Run(corpus, *WORLDS[name])
    model = run.model()
    with Collectives() as sent:
        stats, gradients = run.gradients(model)
    found = {"stats": stats, "gradients": {n: whole(g) for n, g in gradients.items()}}
    found["norm"] = distributed.grad_norm(model.parameters(), run.world)
    found["sent"] = sent.gathered, sent.scattered
    sharded = isinstance(model, FSDPModule)
    found["reductions"] = sent.reductions
    found["groups"] = 1 + len(list(distributed.groups_in_order(model.backbone))) if sharded else 0  # with the root

    found["differing"] = {}
    for how in ("block", "selective", "guard", "kept"):
        other = run.model(reshard=how != "kept")
        if how != "kept":
            activations.recompute(other, "none" if how == "guard" else how)
        guard = activations.ChunkGuard(other, 10, run.world) if how == "guard" else None
        _, theirs = run.gradients(other)
        found["differing"][how] = [n for n, g in gradients.items() if not torch.equal(whole(g), whole(theirs[n]))]
        if guard:
            found["guarded"] = guard.count

    if run.world.shards == 1:  # as train.py does with --compile graph: averaged while the backward goes on
        graphs.WEIGHTS_PER_PART = 10_000  # of weights: so that some backwards are cut
        graphed = GraphedModel(run.model(), torch.float32, run.config.alpha, run.world, accumulates=True)
        found["checked"] = [distributed.first_answer(run.world, agreement.captured(graphed, tokens=200))]
        doubles = run.world.rank == run.world.size - 1  # an edit of the forward, which graphs don't call, on one rank
        forward = graphed.model.forward
        graphed.model.forward = lambda *args: (out := forward(*args))._replace(ce=out.ce * (1 + doubles))
        answer = agreement.captured(graphed, tokens=200)
        del graphed.model.forward
        found["checked"].append(distributed.first_answer(run.world, answer))
        train.forward_backward(graphed, list(run.stream.step(0, G, run.world.rank, run.world.size)), run.world)
        found["graphed norm"] = graphed.optimizer.grad_norm().item()
        graphed.optimizer.all_gather(graphed.optimizer.gradients)  # each has the sums of its own shard
        found["graphed"] = {n: p.grad for n, p in graphed.masters.named_parameters()}
        found["spans"], found["owned"] = len(graphed.optimizer.spans), len(graphed.optimizer.owned)

    found["losses"] = []
    groups = parameter_groups(model, 1e-4, 0.1)
    optimizer = torch.optim.AdamW(distributed.optimizer_groups(groups), betas=(0.9, 0.95), fused=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        stats, _ = run.gradients(model, step)
        norm = distributed.clip_in_optimizer(optimizer, model.parameters(), 1.0, run.world, stats[0])
        optimizer.step()
        found["losses"].append([*stats.tolist(), norm.item()])
    if name != "4":
        other = run.model()
        optimizer = torch.optim.SGD(distributed.optimizer_groups(parameter_groups(other, 1e-2, 0.1)), momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            stats, _ = run.gradients(other, step)
            distributed.clip_in_optimizer(optimizer, other.parameters(), 0.1, run.world, stats[0])
            clipped_step(optimizer)
        found["moved"] = {n: whole(p) - run.weights[n] for n, p in other.named_parameters()}
    found["dtypes"] = dtypes_seen(run)
    if run.world.is_main:
        torch.save(found, folder / f"{name}.pt")
    distributed.stop()


# torch 2.13 renamed reduce_scatter_tensor and all_gather_into_tensor
SCATTER, GATHER = (
    ("reduce_scatter_single", "all_gather_single")
    if hasattr(dist, "all_gather_single")
    else ("reduce_scatter_tensor", "all_gather_into_tensor")
)


class Collectives:
    """Counts reduce-scatters, and the bytes of reduce-scatters and all-gathers by a ring."""

    def __enter__(self):
        self.reductions, self.gathered, self.scattered = 0, 0.0, 0.0
        self._real = getattr(dist, SCATTER), getattr(dist, GATHER)

        def scatter(output, input, *args, **kwargs):
            self.reductions += 1
            self.scattered += input.nbytes - output.nbytes
            return self._real[0](output, input, *args, **kwargs)

        def gather(output, input, *args, **kwargs):
            self.gathered += output.nbytes - input.nbytes
            return self._real[1](output, input, *args, **kwargs)

        setattr(dist, SCATTER, scatter)
        setattr(dist, GATHER, gather)
        return self

    def __exit__(self, *_):
        setattr(dist, SCATTER, self._real[0])
        setattr(dist, GATHER, self._real[1])


def dtypes_seen(run: Run) -> dict[str, set[str]]:
    """With bfloat16: the dtypes inside blocks while they compute, of their results, and of gradients."""
    model, seen = run.model(torch.bfloat16), {}

    def note(what: str, tensor: Tensor) -> None:
        seen.setdefault(what, set()).add(str(tensor.dtype).removeprefix("torch."))

    def enter(module, args):
        note("residual stream", args[0])
        for name, p in module.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            note(leaf if leaf in distributed.PLAIN_FLOAT32 else "other weights", p)

    for module in model.modules():
        if isinstance(module, Block):
            # registered after FSDP's own hook, so it sees the gathered weights; innermost stays outermost
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(lambda module, args, out: note("residual stream", out))
            module.mixer.register_forward_pre_hook(lambda module, args: note("mixer's input", args[0]))

    def leave(module, args, out):
        note("residual_proj", module.weight)
        note("residual_proj", out)

    for module in (model.backbone.residual_proj, model.backbone.main_network.residual_proj):
        module.register_forward_hook(leave)
    _, gradients = run.gradients(model)
    for gradient in gradients.values():
        note("gradients", gradient)
    return seen


@pytest.fixture(scope="module")
def worlds(corpus, tmp_path_factory, worker_id) -> dict[str, dict]:
    def make(folder: Path) -> None:
        jobs = [Job(folder / n, W, scenario, lambda _, n=n: (corpus, n, folder)) for n, (W, _) in WORLDS.items()]
        for job in jobs:
            job.succeed()

    folder = made_once(tmp_path_factory, worker_id, "scale_worlds", make)
    return {name: torch.load(folder / f"{name}.pt") for name in WORLDS}


@pytest.mark.parametrize("name", ["2", "4", "2x2", "2 replicas"])
def test_gradients_are_those_of_one_process(worlds, name):
    """In float32 the sums of G slices have another order: some roundings of 6e-8, which the network's depth amplifies.

    A gradient of a thousandth of the norm is a sum whose terms nearly cancel, and has their rounding errors.
    """
    one, many = worlds["1"]["gradients"], worlds[name]["gradients"]
    assert one.keys() == many.keys() and all(g.any() for g in one.values())
    for parameter, wanted in one.items():
        gap = (many[parameter] - wanted).norm() / wanted.norm().clamp_min(1e-3 * worlds["1"]["norm"])
        assert gap < 1e-5, (parameter, gap)
    assert worlds[name]["norm"].item() == pytest.approx(worlds["1"]["norm"].item(), rel=1e-5)
    exact = torch.cat([g.flatten() for g in one.values()]).double().norm().item()
    assert worlds["1"]["norm"].item() == pytest.approx(exact, rel=1e-5)


def test_graphs_average_gradients_over_replicas(worlds):
    """As above, against graphs on one process; test_graphs.py shows in float64 that those are right."""
    one, many = worlds["1"]["graphed"], worlds["2 replicas"]["graphed"]
    assert one.keys() == worlds["1"]["gradients"].keys()
    for parameter, wanted in one.items():
        gap = (many[parameter] - wanted).norm() / wanted.norm()
        assert gap < 1e-5, (parameter, gap)
    assert worlds["2 replicas"]["graphed norm"] == pytest.approx(worlds["1"]["graphed norm"], rel=1e-5)
    assert worlds["2 replicas"]["spans"] > 6 and 0 < worlds["2 replicas"]["owned"] < len(one)


def test_all_processes_learn_what_the_check_of_one_finds(worlds):
    for name in ("1", "2 replicas"):
        nothing, something = worlds[name]["checked"]
        assert nothing is None and "eagerly" in something, name


@pytest.mark.parametrize("name", ["2", "4", "2x2", "2 replicas"])
def test_steps_are_those_of_one_process(worlds, name):
    """Losses, ratio losses, F, G and the norm before clipping. Measured rounding differences are near 1e-7."""
    columns = 3 + 3 * 2  # without the imbalance, which depends on the world
    for step, (one, many) in enumerate(zip(worlds["1"]["losses"], worlds[name]["losses"], strict=True)):
        assert many[:columns] == pytest.approx(one[:columns], rel=1e-5), step
        assert many[-1] == pytest.approx(one[-1], rel=1e-5), step
    assert worlds["1"]["losses"][-1][0] < worlds["1"]["losses"][0][0]


@pytest.mark.parametrize("name", ["2", "2x2", "2 replicas"])
def test_another_optimizer_makes_the_steps_of_one_process(worlds, name):
    """It is not fused, so each process clips its shards: the momentum would be ten times as large otherwise."""
    for parameter, wanted in worlds["1"]["moved"].items():
        gap = (worlds[name]["moved"][parameter] - wanted).norm() / wanted.norm()
        assert gap < 1e-3, (parameter, gap)  # a weight moves by 1e-3 of its size, which float32 rounds by 1e-4 of that


def test_slices_are_reduced_once_a_step(worlds):
    """One reduce-scatter per group of parameters, for any number of slices per rank."""
    for name in ("2", "4", "2x2"):
        assert worlds[name]["reductions"] == worlds[name]["groups"] == 10
    for name in ("1", "2 replicas"):
        assert worlds[name]["groups"] == worlds[name]["reductions"] == 0


@pytest.mark.parametrize("name", ["2", "4", "2x2"])
def test_what_is_sent_is_what_traffic_says(worlds, name):
    """Within a twentieth: FSDP pads rows to a multiple of the shards."""
    W, R = WORLDS[name]
    told = distributed.traffic(HNetConfig.load(TWO_STAGES), W // R, R, G // W, weight_bytes=4)
    assert worlds[name]["sent"] == pytest.approx(told[:2], rel=0.05)


@pytest.mark.parametrize("how", ["block", "selective", "guard", "kept"])
def test_gradients_do_not_depend_on_what_is_kept(worlds, how):
    """Recomputation, with or without the guard, and weights that stay gathered give the same bits."""
    assert {name: world["differing"][how] for name, world in worlds.items()} == {name: [] for name in WORLDS}


def test_the_guard_counts_micro_batches(worlds):
    """A limit of 10 chunks is exceeded in every micro-batch, on all ranks at once."""
    assert {n: world["guarded"] for n, world in worlds.items()} == {n: G // W for n, (W, _) in WORLDS.items()}


def test_dtypes_under_bfloat16(worlds):
    wanted = {
        "residual stream": {"float32"},
        "mixer's input": {"bfloat16"},
        "other weights": {"bfloat16"},
        "residual_proj": {"float32"},
        "gradients": {"float32"},
        **{leaf: {"float32"} for leaf in distributed.PLAIN_FLOAT32},
    }
    assert {name: world["dtypes"] for name, world in worlds.items()} == {name: wanted for name in WORLDS}


def test_imbalance_by_hand():
    """Two ranks, four slices: (2, 4) and (3, 3) run at the same time; largest over mean: 4/3 and 1."""
    world = World(0, 2, torch.device("cpu"), None)
    counts = torch.tensor([[2.0], [4.0], [3.0], [3.0]])
    assert distributed.imbalance(counts, world).tolist() == pytest.approx([(4 / 3 + 1) / 2])
    assert distributed.imbalance(counts, world._replace(size=1)).tolist() == [1.0]


def test_imbalance_is_reported_where_ranks_differ(worlds):
    assert [x for row in worlds["1"]["losses"] for x in row[9:11]] == [1.0] * (2 * STEPS)
    for row in worlds["4"]["losses"]:
        assert all(1 < x < 4 for x in row[9:11])


# ------------------------------------------------------------------------------------------------- what happens to runs

FLAGS = f"--mbs 128 --global-slices {G} --lr 1e-3 --schedule wsd --device cpu --val-slices 4 --log-every 5 --steps 20"
FLAGS += " --save-every 4 --keep 0 --val-every 10 --stats-every 10 --sample-bytes 0 --timeout 300"


def train_flags(corpus: Path, folder: Path, *more: str) -> list[str]:
    """Flags of a run. A flag in `more` takes the place of that in FLAGS."""
    model, data = f"{corpus}/model.json", f"{corpus}/data"
    words = FLAGS.split()
    kept = [word for name, value in zip(words[::2], words[1::2]) if name not in more for word in (name, value)]
    return ["-c", model, "--data", data, *kept, "--save-dir", str(folder), *more]


def train_job(corpus: Path, folder: Path, size: int, *more: str, of_rank: dict[int, list[str]] | None = None) -> Job:
    """train.py on `size` processes, its run in `folder`; `of_rank`: further flags of single ranks."""
    flags = train_flags(corpus, folder, *more)
    return Job(folder.parent, size, program, lambda rank: [*flags, *(of_rank or {}).get(rank, [])])


def wait_for(condition, job: Job, seconds: float = 600) -> None:
    """Waits until the condition holds or the job has ended."""
    until = time.monotonic() + seconds
    while not condition() and all(rank.is_alive() for rank in job.ranks):
        assert time.monotonic() < until, job.printed()
        time.sleep(0.005)


def steps_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory, worker_id) -> Path:
    def make(folder: Path) -> None:
        train_job(corpus, folder / "run", 2).succeed()

    folder = made_once(tmp_path_factory, worker_id, "scale_undisturbed", make) / "run"
    assert [row["step"] for row in records(folder)] == list(range(1, 21))
    return folder


COPIES = ["-C", "graph"]  # replicated weights, as graphs; without capture on a CPU


FOUR = pytest.param(4, ["--replicate", "2", "--ac", "block"], marks=pytest.mark.soak)


@pytest.mark.parametrize("size, more", [(1, []), (2, COPIES), FOUR])
def test_a_run_goes_on_at_another_world_size(corpus, undisturbed, tmp_path, size, more):
    """From step 8 of two processes: on one, on two with replicated weights, on four with two replicas: equal losses."""
    check_close(go_on_from_step_8(undisturbed, tmp_path / "run", corpus, size, *more), undisturbed)


def test_a_run_with_unsharded_weights_on_each_process_resumes(corpus, undisturbed, tmp_path):
    """Each saves its shard. Two such processes resume with the same bits, one alone with the same losses; also after
    one of them was killed.
    """
    folder = tmp_path / "run"
    train_job(corpus, folder, 2, *COPIES).succeed()
    check_close(folder, undisturbed)
    assert timeless(go_on_from_step_8(folder, tmp_path / "two", corpus, 2, *COPIES)) == timeless(folder)
    check_close(go_on_from_step_8(folder, tmp_path / "one", corpus, 1), undisturbed)
    kill_one_and_resume(corpus, tmp_path / "killed", 2, *COPIES)
    assert timeless(tmp_path / "killed") == timeless(folder)


def program_of_an_edit(*argv: str) -> None:
    """train.py with a buffer in each MLP, and with a weight that is in two places."""
    mlp, router, forward = SwiGLU.__init__, RoutingModule.__init__, SwiGLU.forward

    def with_gain(self, *args):
        mlp(self, *args)
        self.register_buffer("gain", torch.tensor(0.7))

    def with_one_weight(self, *args):
        router(self, *args)
        self.k_proj_layer.weight = self.q_proj_layer.weight

    SwiGLU.__init__, RoutingModule.__init__ = with_gain, with_one_weight
    SwiGLU.forward = lambda self, x_TD: forward(self, x_TD) * self.gain.to(x_TD.dtype)
    program(*argv)


def test_checkpoints_of_two_processes_have_buffers_and_second_names(corpus, tmp_path):
    """Each process saves what it updates; nobody updates these."""
    flags = train_flags(corpus, tmp_path / "run", *COPIES, "--steps", "4")
    Job(tmp_path, 2, program_of_an_edit, lambda rank: flags).succeed()
    (step,) = checkpoint.complete(tmp_path / "run")
    weights = load_own_checkpoint(step)
    gains = [x for name, x in weights.items() if name.endswith("mlp.gain")]
    assert gains and all(x == torch.tensor(0.7) for x in gains)
    q, k = (weights[f"backbone.routing_module.{one}_proj_layer.weight"] for one in "qk")
    assert torch.equal(q, k) and not torch.equal(q, torch.eye(len(q)))
    more = train_flags(corpus, tmp_path / "run", *COPIES, "--steps", "6", "--resume", "auto")
    assert "step_00000004" in Job(tmp_path, 2, program_of_an_edit, lambda rank: more).succeed()
    assert len(records(tmp_path / "run")) == 6


def program_of_other_names(*argv: str) -> None:
    """train.py with other names for the encoders and decoders."""
    made, names = HNet.__init__, {"encoder": "before", "decoder": "after"}

    def renamed(self, *args):
        made(self, *args)
        self._modules = {names.get(name, name): module for name, module in self._modules.items()}

    HNet.__init__ = renamed
    HNet.encode = lambda self, x_TD, packing: self.before(
        x_TD if self.pad_dimension is None else widen(x_TD, self.pad_dimension), packing
    )
    HNet.decode = lambda self, x_TD, packing: self.after(x_TD, packing)[:, : self.outer_width]
    program(*argv)


def test_encoders_and_decoders_may_have_other_names(corpus, tmp_path):
    """Sharded over two processes, and in steps as graphs of one."""
    for name, size, how in (("alone", 1, "graph"), ("sharded", 2, "eager")):
        flags = train_flags(corpus, tmp_path / name, "--steps", "4", "-C", how)
        Job(tmp_path, size, program_of_other_names, lambda rank, flags=flags: flags).succeed()
        check_close(tmp_path / "alone", tmp_path / name)
    (step,) = checkpoint.complete(tmp_path / "sharded")
    assert any(".before.layers.0." in name for name in load_own_checkpoint(step))


@pytest.mark.soak
def test_the_same_in_bfloat16(corpus, tmp_path):
    """Then each process has only the high bits of the other processes' shards."""
    folder, how = tmp_path / "run", [*COPIES, "--dtype", "bfloat16"]
    train_job(corpus, folder, 2, *how).succeed()
    assert timeless(go_on_from_step_8(folder, tmp_path / "two", corpus, 2, *how)) == timeless(folder)
    final = [ckpt.name for ckpt in checkpoint.complete(folder)][-1]
    weights = [load_own_checkpoint(run / "checkpoints" / final) for run in (folder, tmp_path / "two")]
    assert all(torch.equal(p, weights[1][name]) and p.isfinite().all() for name, p in weights[0].items())


def go_on_from_step_8(source: Path, folder: Path, corpus: Path, size: int, *more: str) -> Path:
    shutil.copytree(source, folder)
    for later in checkpoint.complete(folder)[2:]:
        shutil.rmtree(later)
    assert "step_00000008" in train_job(corpus, folder, size, "--resume", "auto", *more).succeed()
    return folder


def check_close(one: Path, other: Path) -> None:
    for ours, theirs in zip(records(one), records(other), strict=True):
        assert ours["step"] == theirs["step"]
        statistics = ("stage0_grad_norm", "stage0_weight_norm", "stage1_update_ratio") if ours["step"] % 10 == 0 else ()
        for key in ("ce", "grad_norm", "stage0_F", "stage0_ratio_loss", *statistics):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (ours["step"], key)
    assert records(one)[-1]["val_bpb"] == pytest.approx(records(other)[-1]["val_bpb"], rel=1e-4)


def kill_one_and_resume(corpus: Path, folder: Path, seed: int, *more: str) -> None:
    """Two processes; kill -9 of one at a random step. The other names it and ends; a second job resumes."""
    rng = random.Random(seed)
    job, target, victim = train_job(corpus, folder, 2, *more), rng.randint(1, 18), rng.randrange(2)
    wait_for(lambda: steps_done(folder) >= target, job)
    time.sleep(rng.uniform(0, 0.05))
    job.ranks[victim].kill()
    codes = job.wait()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, (codes, job.printed())
    message = job.printed()
    # if rank 0 dies without torchrun, the store with the ranks' reports is gone too
    assert f"rank {victim} (step " in message and "died" in message, message
    assert "The last good checkpoint: " in message, message
    assert (folder / "failure" / f"rank{1 - victim}.stacks").stat().st_size
    train_job(corpus, folder, 2, "--resume", "auto", *more).succeed()


@pytest.mark.parametrize("seed", range(1))
def test_one_process_killed_and_the_job_resumed_equals_undisturbed(corpus, undisturbed, tmp_path, seed):
    kill_one_and_resume(corpus, tmp_path / "run", seed)
    assert timeless(tmp_path / "run") == timeless(undisturbed)


def test_torchrun_starts_again_by_itself(corpus, undisturbed, tmp_path):
    """Started by torchrun; one process is killed, and the job recovers by itself."""
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            [*launch, str(ROOT / "train.py"), *train_flags(corpus, folder, "--resume", "auto")],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    while steps_done(folder) < 6:
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    (victim,) = [p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "1"]
    victim.kill()
    assert job.wait(600) == 0, (tmp_path / "log").read_text()
    output = (tmp_path / "log").read_text()
    assert "rank 1 (step " in output and "resuming from" in output, output
    assert timeless(folder) == timeless(undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 111))
def test_more_processes_killed(corpus, undisturbed, tmp_path, seed):
    kill_one_and_resume(corpus, tmp_path / "run", seed)
    assert timeless(tmp_path / "run") == timeless(undisturbed)


# Eight slices a step, however many processes share them. Steps, of float32 on CPUs, differ by rounding: with unsharded
# weights only in the order in which gradients are added. 1e-5 is a hundred times that of one addition.
EIGHT = ["--global-slices", "8"]
UNSHARDED, SHARDED, HYBRID = [*EIGHT, *COPIES], EIGHT, [*EIGHT, "--replicate", "2"]


@pytest.fixture(scope="module")
def of_one(corpus, tmp_path_factory, worker_id) -> Path:
    def make(folder: Path) -> None:
        train_job(corpus, folder / "run", 1, *EIGHT).succeed()

    return made_once(tmp_path_factory, worker_id, "scale_of_one", make) / "run"


@pytest.mark.soak
@pytest.mark.parametrize(
    "size, more",
    [(2, UNSHARDED), (4, UNSHARDED), (8, UNSHARDED), (8, SHARDED), (8, HYBRID)],
    ids=["2 unsharded", "4 unsharded", "8 unsharded", "8 sharded", "8 in two replicas"],
)
def test_up_to_eight_processes_train_as_one(corpus, of_one, tmp_path, size, more):
    """The losses of one process, and in a second run the same bits."""
    one, again = tmp_path / "one" / "run", tmp_path / "again" / "run"
    for folder in (one, again):
        folder.parent.mkdir()
        train_job(corpus, folder, size, *more).succeed()
    assert timeless(one) == timeless(again)
    check_close(one, of_one)
    if more == UNSHARDED:
        found, wanted = ([row["ce"] for row in records(folder)] for folder in (one, of_one))
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("more", [UNSHARDED, SHARDED], ids=["unsharded", "sharded"])
def test_one_of_eight_is_killed_and_four_resume(corpus, of_one, tmp_path, more):
    folder = tmp_path / "run"
    job = train_job(corpus, folder, 8, *more)
    wait_for(lambda: steps_done(folder) >= 10, job)
    job.ranks[5].kill()
    codes = job.wait()
    assert codes[5] == -signal.SIGKILL and set(codes) == {-signal.SIGKILL, 1}, job.printed()
    assert "rank 5 (step " in job.printed() and "died" in job.printed()
    train_job(corpus, folder, 4, "--resume", "auto", *more).succeed()
    check_close(folder, of_one)


def test_sigterm_to_one_process_saves_and_loses_no_step(corpus, undisturbed, tmp_path):
    folder = tmp_path / "run"
    job = train_job(corpus, folder, 2, "--save-every", "1000")
    wait_for(lambda: steps_done(folder) >= 3, job)
    os.kill(job.ranks[1].pid, signal.SIGTERM)
    assert "--resume auto" in job.succeed()
    (saved,) = checkpoint.complete(folder)
    done = checkpoint.read_train(saved)["step"]
    assert done == len(records(folder)) and 3 <= done < 20
    train_job(corpus, folder, 2, "--resume", "auto").succeed()
    assert timeless(folder) == timeless(undisturbed)


def signal_at_the_start(where: str, number: int, victim: int, *argv: str) -> None:
    """train.py, in which one rank gets a signal where it opens the data or makes the saver: no watchdog runs yet."""
    owner, name = {"data": (train, "open_data"), "saver": (checkpoint, "Saver")}[where]
    if os.environ["RANK"] == str(victim):
        setattr(owner, name, lambda *_: os.kill(os.getpid(), number))
    program(*argv)


def test_a_process_that_dies_at_the_start_is_told_in_one_sentence(corpus, tmp_path):
    argv = "data", signal.SIGKILL, 1, *train_flags(corpus, tmp_path / "run")
    job = Job(tmp_path / "log", 2, signal_at_the_start, lambda rank: argv)
    assert job.wait(60) == [1, -signal.SIGKILL]
    said = job.logs[0].read_text()
    assert said.startswith("error: another process of the job died, or does not answer (Connection "), said
    assert said.count("\n") == 1


def test_a_signal_at_the_start_ends_a_process_that_waits_for_another(corpus, tmp_path):
    """torchrun sends it to those that are left. Before the first step there is nothing to save."""
    argv = "saver", signal.SIGSTOP, 1, *train_flags(corpus, tmp_path / "run")
    job = Job(tmp_path / "log", 2, signal_at_the_start, lambda rank: argv)
    wait_for(lambda: "each line gives means" in job.logs[0].read_text(), job)
    time.sleep(0.5)
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    job.ranks[0].join(60)
    assert job.wait(0) == [-signal.SIGTERM, None]


def test_a_process_that_hangs_ends_the_job(corpus, tmp_path):
    """A process stopped by the system neither dies nor reports."""
    folder = tmp_path / "run"
    job = train_job(corpus, folder, 2, "--timeout", "10", "--steps", "1000")
    wait_for(lambda: steps_done(folder) >= 6, job)
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    job.ranks[0].join(300)
    assert job.ranks[0].exitcode == 1
    message = job.printed()
    assert "rank 1 (step " in message and "not been heard of for 10 s" in message and "step_00000004" in message, (
        message
    )
    job.wait(0)


def end_without_a_folder(run: Path) -> None:
    watchdog = Watchdog.__new__(Watchdog)
    watchdog.run, watchdog._known = run, [(0, 0, 7, "saving")] * 2
    watchdog.world = SimpleNamespace(rank=0, size=2, device=torch.device("cpu"))
    watchdog._end([1], "rank 1 died")


def test_a_process_that_cannot_write_its_stacks_ends_all_the_same(tmp_path):
    (tmp_path / "failure").write_text("in the way")
    job = Job(tmp_path / "log", 1, end_without_a_folder, lambda rank: [tmp_path])
    assert job.wait(60) == [1] and "rank 1 died; the job ends" in job.printed() and "Traceback" not in job.printed()


@pytest.mark.soak
def test_a_kill_during_a_save_of_two_processes(corpus, undisturbed, tmp_path):
    """Killed when files of step 8 appear: its checkpoint is either complete or ignored."""
    folder = tmp_path / "run"
    job = train_job(corpus, folder, 2)
    wait_for(lambda: list((folder / "checkpoints").glob("step_00000008*/*")), job)
    for rank in job.ranks:
        rank.kill()
    job.wait()
    torn = folder / "checkpoints" / "step_00000008.writing"
    was_torn = torn.exists()
    output = train_job(corpus, folder, 2, "--resume", "auto").succeed()
    assert f"resuming from {folder}/checkpoints/step_0000000{4 if was_torn else 8}" in output
    assert not was_torn or f"skipped {torn}" in output
    assert timeless(folder) == timeless(undisturbed)


def test_processes_started_differently_say_so(corpus, tmp_path):
    job = train_job(corpus, tmp_path / "run", 2, of_rank={1: ["--lr", "0.5"]})
    assert job.wait() == [2, 2]
    assert job.printed().count("rank 1 was started with another --lr than rank 0: 0.5, not 0.001") == 2
    assert not (tmp_path / "run").exists()


def test_mistakes_of_several_processes(corpus, undisturbed, tmp_path):
    """Every rank reports it and ends, instead of waiting for the others."""
    job = train_job(corpus, undisturbed, 2)
    assert job.wait() == [2, 2] and job.printed().count("holds a run already") == 2
    job = train_job(corpus, tmp_path / "a" / "run", 2, "--replicate", "3")
    assert job.wait() == [2, 2] and "--replicate 3" in job.printed() and "Traceback" not in job.printed()
    job = train_job(corpus, tmp_path / "b" / "run", 2, "--global-slices", "3")
    assert job.wait() == [2, 2] and "--global-slices 3: 2 processes do not divide it" in job.printed()


@pytest.mark.soak
def test_a_step_has_a_slice_for_each_process_unless_told_otherwise(corpus, tmp_path):
    """And the run keeps the number: a single process that resumes accumulates."""
    flags, run = ("--global-slices", "0", "--steps", "2"), tmp_path / "run"
    train_job(corpus, run, 2, *flags).succeed()
    assert [row["bytes_seen"] for row in records(run)] == [2 * 128, 4 * 128]
    go_on = ["--save-dir", str(run), "--resume", "auto", "--steps", "3"]
    three = Job(tmp_path, 3, program, lambda rank: go_on)
    assert three.wait() == [2, 2, 2] and "a run keeps the number it began with" in three.printed()
    Job(tmp_path, 1, program, lambda rank: [*go_on, "--global-slices", "0"]).succeed()
    assert records(run)[-1]["bytes_seen"] == 6 * 128


def test_a_disk_without_room_is_refused(tmp_path):
    checkpoint.require_disk_space(tmp_path, 1000)
    with pytest.raises(checkpoint.UserError, match="MB are free and a checkpoint takes 12,000,000,000.0"):
        checkpoint.require_disk_space(tmp_path, 10**15)


def test_what_is_saved_has_torchs_names(tmp_path):
    """So torch's own functions can load it."""
    distributed.start("cpu")
    model = init_weights(HNetLM(HNetConfig.load(MODEL | {"tie_embeddings": True})), 0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = checkpoint.Saver(tmp_path, model, optimizer)._state()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    theirs = {"model": get_model_state_dict(model)}
    theirs["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    wanted = {f"{part}.{key}": value for part, values in theirs.items() for key, value in values.items()}
    assert state.keys() == {name for name, value in wanted.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, wanted[name]) for name, value in state.items())
    distributed.stop()


def test_old_checkpoints_go_and_some_stay(tmp_path):
    """The newest two, and those of every sixth step."""
    distributed.start("cpu")
    model = torch.nn.Linear(2, 2)
    model.config = HNetConfig.load(MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = checkpoint.Saver(tmp_path, model, optimizer, keep=2, keep_every=6)
    for step in range(3, 22, 3):
        saver.start(step, {})
    saver.finish()
    assert [int(p.name[-2:]) for p in checkpoint.complete(tmp_path)] == [6, 12, 18, 21]
    distributed.stop()


def test_an_old_checkpoint_that_cannot_be_removed_fails_no_save(tmp_path, monkeypatch, caplog):
    """As with `chattr +i`. What a kill left of older ones, inside a removal or a save, is removed with them."""
    distributed.start("cpu")
    model = torch.nn.Linear(2, 2)
    model.config = HNetConfig.load(MODEL)
    saver = checkpoint.Saver(tmp_path, model, torch.optim.AdamW(model.parameters()), keep=1, keep_every=6)
    remove = shutil.rmtree

    def fail_for_the_first(path, **options):
        if path.name == "step_00000001":
            raise OSError(errno.EPERM, "Operation not permitted")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", fail_for_the_first)
    for step in (1, 2, 3):
        saver.start(step, {})
    assert saver.finish() == tmp_path / "checkpoints" / "step_00000003"
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000001", "step_00000003"]
    assert "step_00000001: can't be removed (Operation not permitted)" in caplog.text
    monkeypatch.setattr(shutil, "rmtree", remove)
    for name in ("step_00000001/manifest.json", "step_00000003/manifest.json"):
        (tmp_path / "checkpoints" / name).unlink()
    for name in ("step_00000004.writing", "step_00000006.writing", "step_00000006", "step_00000009"):
        (tmp_path / "checkpoints" / name).mkdir()
    saver.start(8, {})
    saver.finish()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000006", "step_00000008", "step_00000009"], "of every sixth step, the newest, a later one"
    distributed.stop()


def test_what_is_saved_is_the_state_when_the_save_began(tmp_path):
    """Weights that change during writing do not corrupt it: the copy was made before `staged` returned."""
    distributed.start("cpu")
    model = torch.nn.Linear(64, 64)
    model.config = HNetConfig.load(MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 64)).sum().backward()
    optimizer.step()
    saver = checkpoint.Saver(tmp_path, model, optimizer)
    for step in (1, 2):  # the second time the copy goes to the same place
        with torch.no_grad():
            model.weight.fill_(step)
        saver.start(step, {})
        saver.staged()
        with torch.no_grad():
            model.weight.fill_(-1)
        folder = saver.finish()
        checkpoint.load(folder, model, optimizer)
        assert (model.weight == step).all()
    distributed.stop()
