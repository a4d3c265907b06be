"""Train an H-Net on bytes. `python train.py` alone trains a tiny one on the Python standard library's source text.

One process and many run the same program: `torchrun --nproc-per-node 8 train.py ...`. `python train.py --help` lists
the flags. A run's folder holds its configs, metrics.jsonl, checkpoints and plots.

Read top to bottom: config -> one step -> the run (data, checks, loop) -> `main`, `train`, which puts all together. The
forward and backward of a step are in hnet_runtime/steps/: plain.py, or graphs.py for steps as CUDA graphs.
"""

from hnet_runtime import commands
from hnet_runtime.runs.flags import DEFAULT_DATA, TrainConfig, read_config

if __name__ == "__main__":

    def program(argv: list[str]) -> int:
        """Reads the flags before torch is imported, which takes seconds; then runs this file as the module `train`."""
        config = read_config(argv)
        with commands.importing():
            import train

        return train.main(config)

    commands.run(program, output_may_fail=True)  # ends the process; a run continues without its output

import dataclasses
import functools
import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import fineweb
from hnet_config import find_config
from hnet_kernels import cards
from hnet_runtime import RunFailed, UserError, cpu, distributed, estimate, losses
from hnet_runtime.checks import agreement, equivalence
from hnet_runtime.data import cuts
from hnet_runtime.data.cuts import Cutter
from hnet_runtime.distributed import World
from hnet_runtime.evaluation.boundaries import CutHistory
from hnet_runtime.evaluation.validation import bits_name, validate
from hnet_runtime.pages.chunks import print_chunks
from hnet_runtime.runs import checkpoint, statistics, weights
from hnet_runtime.runs.metrics import RouterHealth, read_metrics
from hnet_runtime.runs.progress import Progress, describe, dump_parameters, sample, show_results, speed
from hnet_runtime.runs.run import (
    Compilations,
    Interrupts,
    checkpoint_to_resume,
    code_revision,
    in_words,
    newest,
    of_main,
    open_folder,
    open_metrics,
    remove_unused,
    say_what_changed,
)
from hnet_runtime.runs.statistics import StepNumbers
from hnet_runtime.runs.watchdog import Watchdog
from hnet_runtime.steps import activations, compile_ahead, graphs
from hnet_runtime.steps.flat_adamw import adamw, clipped_step
from hnet_runtime.steps.graphs import GraphedModel
from hnet_runtime.steps.plain import PlainModel
from hnet_runtime.steps.segments import memory_ran_out
from hnet_simple import GenerationError, HNetInference
from hnet_trainable import ConfigError, HNetConfig, HNetLM, parameter_groups

logger = logging.getLogger("hnet")

DEFAULT_CONFIG = "hnet_1stage_tiny"


# ------------------------------------------------------------------------------------------------------------- config


def read_model(config: TrainConfig) -> tuple[HNetConfig, dict[str, Tensor] | None]:
    """The model's config, and the weights to start from if -p names some."""
    source, target = config.config or DEFAULT_CONFIG, {}
    if config.n_compression:
        target["N_compress"] = losses.compression(config.n_compression, "-N")
    from_weights = bool(config.pt_ckpt)
    if config.resume and (from_weights or not find_config(source).exists()):
        resumed = newest(Path(config.save_dir if config.resume == "auto" else config.resume))
        if checkpoint.is_complete(resumed):  # it has the config and the weights
            source, from_weights = resumed / "config.json", False
    try:
        if from_weights:
            start = weights.load(config.pt_ckpt, config.config or None, **target)
            return start.config, start.weights
        return HNetConfig.load(source, **target), None
    except ConfigError as error:
        if not target or "N_compress" not in str(error):
            raise
        raise UserError(f"-N {config.n_compression}: {error}") from None


def lr_scale(step: int, config: TrainConfig) -> float:
    """The factor of the peak learning rate at step 0, 1, ..., steps - 1."""
    warmup, decay = round(config.warmup * config.steps), round(config.decay * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))
    into_decay = step - (config.steps - decay)
    if config.schedule == "constant" or into_decay < 0:
        return 1.0
    left = into_decay / decay
    return 1 - (left if config.schedule == "wsd-linear" else math.sqrt(left))


# ----------------------------------------------------------------------------------------------------------- one step


def forward_backward(steps: GraphedModel | PlainModel, slices: list[fineweb.Slice], world: World) -> StepNumbers:
    """Computes the gradients of a step's loss: the mean over all G slices of CE + alpha * ratio losses.

    slices: those of this rank. Every slice has T labels and every rank has equally many, so means of means are exact.
    Returns means over the step's G slices, on the device; `grad_norm` is 0 and there are no statistics.
    """
    computed = steps.forward_backward([slice_.nested(world.device) for slice_ in slices])
    counts_G2 = torch.tensor([[slice_.text_bytes, len(slice_.row_lengths)] for slice_ in slices])
    counts_G2 = counts_G2.to(world.device, torch.float32, non_blocking=True)
    columns = [computed.ce[:, None], counts_G2, computed.ratio, computed.F, computed.G]  # in the order of StepNumbers
    all_GK = distributed.gather_slices(torch.cat([x.float() for x in columns], dim=1), world)
    *_, F_GS, _ = all_GK.split([x.shape[1] for x in columns], dim=1)
    imbalance_S = distributed.imbalance(F_GS.cumprod(1), world)  # cumprod: chunks of each stage per byte
    no_norm = all_GK.new_zeros(1)
    return StepNumbers.of(torch.cat([all_GK.double().mean(0).float(), imbalance_S, no_norm]), len(imbalance_S))


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW with betas 0.9 and 0.95, over the float32 weights. It may be another one: see docs/CHANGING.md.

    groups: those of `parameter_groups`, whose keys the optimizer's groups must have too.
    """
    return adamw(groups)


class TrainState:
    """The model, its optimizer, and how a step runs.

    model: the HNetLM with the float32 weights. Read and change them inside `steps.full_precision()` only.
    evaluated: the HNetLM that training computes with. Its weights are the same, or those in the compute dtype.
    """

    def __init__(
        self,
        model: HNetLM,
        groups: list[dict[str, Any]],
        how: Literal["graph", "eager", "plain"],
        dtype: torch.dtype,
        hnet: HNetConfig,
        config: TrainConfig,
        world: World,
    ):
        """groups: those of `parameter_groups`. dtype: the compute dtype.

        how: `graph` and `eager` make a GraphedModel, `plain` makes a PlainModel, for FSDP2 and float32.
        """
        self.model, self.dtype, self.hnet, self.config, self.world = model, dtype, hnet, config, world
        self.parameters = list(model.parameters())  # before a forward, after which FSDP shows gathered ones
        distributed.check_groups(groups, model)

        def checked(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            made = make_optimizer(groups)
            distributed.check_optimizer(made, model)
            return made

        groups, limit = distributed.optimizer_groups(groups), config.max_chunks_per_rank
        self.ratio = losses.ratio(config, hnet, world.device, torch.promote_types(dtype, torch.float32))
        alpha = self.ratio.weight
        if how == "plain":
            self.steps = PlainModel(model, alpha, world, groups, checked)
        else:
            accumulates, ac = config.global_slices > world.size, config.checkpointing
            self.steps = GraphedModel(model, dtype, alpha, world, groups, ac, accumulates, how == "graph", checked)
        losses.attach(self.ratio, self.steps.masters, self.steps.model)
        self.evaluated, self.optimizer = self.steps.model, self.steps.optimizer
        if how != "graph" and (config.checkpointing != "none" or limit):
            activations.recompute(self.evaluated, config.checkpointing)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.guard = activations.ChunkGuard(self.evaluated, limit, world) if limit else None
        model.train()

    def load(self, source: Path) -> None:
        """Loads the weights and the optimizer of a checkpoint."""
        with self.steps.full_precision():
            checkpoint.load(source, self.model, self.optimizer)

    def step(
        self, done: int, slices: list[fineweb.Slice], wants_statistics: bool, before_update: Callable[[], None]
    ) -> StepNumbers:
        """Makes one optimizer step. The host waits for the device only for the stages' numbers of chunks.

        done: the number of steps before this one. before_update: called before the weights change.
        If the loss or the norm of the gradient is not finite, the weights do not change. Without AdamW the host waits
        to know that.
        """
        config, world, optimizer = self.config, self.world, self.optimizer
        for group, peak in zip(optimizer.param_groups, self.peaks):
            group["lr"] = peak * lr_scale(done, config)
        self.ratio.set(done, config.steps)
        self.steps.begin_step(done, distributed.seed_of_step(config.seed, done, world.rank))
        numbers = forward_backward(self.steps, slices, world)
        norm = distributed.clip_in_optimizer(optimizer, self.parameters, config.clip, world, numbers.ce)
        numbers, more = numbers._replace(grad_norm=norm), []
        if wants_statistics:
            more.append(statistics.router_statistics(slices[-1].nested(world.device)[0], self.steps.stages()))
        before_update()
        clipped_step(optimizer)
        if wants_statistics:
            count = functools.partial(statistics.weight_statistics, optimizer, self.hnet.num_stages, world)
            more.append(self.steps.retry_without_graphs(count))
        self.steps.finish_step()
        return numbers._replace(more=torch.cat(more)) if more else numbers

    def preparing(self, compilations: Compilations) -> str:
        """What the first step compiled and captured, in words."""
        if not self.steps.captured:
            return f"{compilations}"
        return f"{compilations}, {self.steps.capture_seconds:.1f} s for {self.steps.captured} parts captured"

    def counted(self) -> dict[str, int]:
        """How often the run has captured a graph and recomputed a micro-batch so far, by names in the metrics."""
        recomputed = {"recomputed_micro_batches": self.guard.count} if self.guard else {}
        captured = {} if self.steps.captured is None else {"graphs_captured": self.steps.captured}
        return recomputed | captured


# ------------------------------------------------------------------------------------------------------------ the run


def open_data(
    config: TrainConfig, world: World, cutter: Cutter | None = None
) -> tuple[fineweb.ByteStream, fineweb.ByteStream | None]:
    """(training stream, held-out stream). Prepares the default corpus on first use. cutter: see hnet_runtime/data/cuts.

    The held-out stream is None if the data was prepared with --holdout 0.
    """
    if config.data == DEFAULT_DATA and world.is_main and not (Path(DEFAULT_DATA) / "manifest.json").exists():
        fineweb.prepare("stdlib", DEFAULT_DATA)
    dist.barrier()
    if config.global_slices % world.size:
        kept = "; a run keeps the number it began with, by default one for each process then" if config.resume else ""
        raise UserError(f"--global-slices {config.global_slices}: {world.size} processes do not divide it{kept}")
    common = {"slice_bytes": config.mbs, "max_doc": config.max_doc, "cutter": cutter}
    train = fineweb.ByteStream(config.data, "train", seed=config.seed, order=config.order, **common)
    train.require(config.mbs * config.global_slices)
    return train, fineweb.validation_stream(config.data, **common)


def check_continuation(source: Path, about: dict[str, Any]) -> int:
    """The number of steps that a checkpoint has done. Raises UserError if the data would not continue from there.

    The order of the data depends only on what is compared here. All other flags may change when a run is resumed.
    """
    saved = checkpoint.read_train(source)
    files = {"data": "the text in --data", "tokenizer": "the file of the router tokens"}  # compared by fingerprints
    theirs, ours = ({**a["config"], **{name: a.get(name) for name in files}} for a in (saved, about))
    for name in ("data", "tokenizer", "seed", "mbs", "global_slices", "max_doc", "order"):
        if theirs.get(name) != ours[name]:
            what = files.get(name, f"--{name.replace('_', '-')}")
            raise UserError(
                f"{source}: {what} differs ({theirs.get(name)} there, {ours[name]} here), so the data would not "
                "continue where it stopped; to start a new run from these weights use -p"
            )
    is_elsewhere = Path(ours["save_dir"]).resolve() != source.resolve().parent.parent
    if saved["step"] + is_elsewhere > ours["steps"]:
        raise UserError(f"--steps {ours['steps']}: {source} has done {saved['step']} steps already")
    return saved["step"]


def takes_graphs(
    config: TrainConfig, hnet: HNetConfig, dtype: torch.dtype, world: World, is_checked: bool = False
) -> tuple[bool, World]:
    """Whether steps run as graphs; and the world, with one replica per process if graphs need it.

    is_checked: a model of this config has passed the check in this process.
    Raises UserError if --compile graph is given and graphs cannot run.
    """
    if config.compile == "eager" or (config.compile == "auto" and world.device.type != "cuda"):
        return False, world
    reason = graphs.why_unsupported(hnet, world.device, dtype)
    if config.max_chunks_per_rank:
        reason = "graphs do not support --max-chunks-per-rank"
    if world.shards > 1 and not reason:
        if config.replicate:
            reason = f"graphs need unsharded weights: with {world.size} processes, --replicate {world.size}"
        elif too_large := distributed.too_large_to_replicate(hnet, world):
            reason = too_large
        else:
            world = world._replace(mesh=distributed.make_mesh(world.device.type, world.size, world.size))
    ratio = losses.ratio(config, hnet, torch.device("cpu"), torch.float64)
    if not is_checked:
        how = config.checkpointing
        reason = reason or agreement.steps_as_graphs(hnet, how, functools.partial(losses.attach, ratio))
    if reason and config.compile == "graph":
        raise UserError(f"--compile graph: {reason}; use eager")
    if reason:
        logger.info("steps do not run as graphs: %s", reason)
    return not reason, world


def without_graphs(hnet: HNetConfig, dtype: torch.dtype, world: World) -> Literal["eager", "plain"]:
    """How steps run if not as graphs: see `TrainState`."""
    is_eager = dtype == torch.bfloat16 and world.device.type == "cuda" and world.shards == 1
    return "eager" if is_eager and not graphs.frozen(hnet) else "plain"


def choose_ac(config: TrainConfig, hnet: HNetConfig, world: World) -> str:
    """The activation checkpointing for --ac auto, the same on every rank. Logs it unless it is `none`."""
    if world.device.type != "cuda":
        return "none"
    card = estimate.card_of(world.device)
    shards = world.shards if config.replicate or distributed.too_large_to_replicate(hnet, world) else 1
    accumulates = config.global_slices > world.size
    chosen = estimate.choose_ac(hnet, config.mbs, card, accumulates, shards)
    # the smallest GPU decides: flag i says whether any rank needs MODES[i] or a later one, which saves more memory
    flags = distributed.anywhere(world, *(chosen in estimate.MODES[i:] for i in range(len(estimate.MODES))))
    chosen = estimate.MODES[sum(flags) - 1]
    if chosen != "none":
        needed = estimate.memory(hnet, config.mbs, "none", None, accumulates, shards, card).total
        logger.info(
            f"--ac {chosen}: with --ac none, steps may take {needed:.0f} of the {card.gib:.0f} GiB of this GPU's memory"
        )
    return chosen


def dry_run(config: TrainConfig, hnet: HNetConfig) -> None:
    """Prints a run's memory and times on the card that HNET_GPU names, or the GPU here, or else all known cards."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if card := cards.imitated():
        chosen = [card]
    elif torch.cuda.is_available() and config.device != "cpu":
        chosen = [estimate.card_of(torch.device("cuda"))]
    else:
        chosen = list(cards.CARDS.values())
    slices = max(1, (config.global_slices or size) // size)
    print(estimate.report(hnet, config.mbs, slices, config.ac, chosen))


class Run:
    """One run, from its first step or a checkpoint to its last step. Every rank makes the same calls."""

    def __init__(self, state: TrainState, data: tuple[fineweb.ByteStream, fineweb.ByteStream | None]):
        """Opens the run's folder, and loads a checkpoint if the run resumes. data: what `open_data` returns.

        Raises UserError if the folder or the checkpoint does not match the flags, or if ranks have different flags.
        """
        config, hnet, world = state.config, state.hnet, state.world
        self.state, self.config, self.hnet, self.world = state, config, hnet, world
        self.train_stream, self.val_stream = data
        name = Path(config.config or config.pt_ckpt or DEFAULT_CONFIG).stem
        code = {"code": code_revision(), "model_code": checkpoint.model_code()}
        about = {"config": dataclasses.asdict(config), "data": self.train_stream.fingerprint, **code}
        if tokenizer := cuts.fingerprint(hnet):
            about["tokenizer"] = tokenizer
        flags = {f"--{key.replace('_', '-')}": value for key, value in about["config"].items()}
        same = {"code revision": code, "model config": hnet.to_dict(), "text in --data": about["data"]}
        distributed.check_same(flags | same, world)
        self.about, self.folder = about, open_folder(config.save_dir, name, world)
        parameters = sum(p.numel() for p in state.parameters)
        try:
            of_main(lambda: checkpoint.require_disk_space(self.folder, parameters), world)
            self.step = self._resume()
        except UserError:
            remove_unused(self.folder, world)
            raise
        self.first_step = self.step
        self.metrics = open_metrics(self.folder, self.step, about, hnet, config, world)
        logger.info(
            f"{name}: {parameters / 1e6:.1f}M parameters, {world.size} x {world.device.type} in "
            f"{str(state.dtype).removeprefix('torch.')}; {config.data}: "
            f"{self.train_stream.text_bytes / 1e6:.1f} MB of text; {config.steps} step{'s' * (config.steps != 1)} of "
            f"{config.mbs * config.global_slices:,} bytes; run folder {self.folder}"
        )
        logger.info("each line gives means over the steps since the line before")
        self.compilations = Compilations(on_gpu=world.device.type == "cuda")
        if world.device.type == "cuda":
            logger.info("the first step waits for kernels that are not in Triton's cache yet, for up to a minute")
        self.inference = None  # where generation computes another model, no samples are written
        if config.sample_bytes and (reason := agreement.generation(hnet)):
            logger.warning("no samples: %s", reason)
        elif config.sample_bytes:
            self.inference = HNetInference.from_training(state.evaluated)  # borrows the weights: nothing is copied
        elif config.prompt or config.sample_every:
            logger.info("no samples (--sample-bytes 0): --prompt and --sample-every have no effect")
        earlier = self.folder / "metrics.jsonl"
        self.health = of_main(lambda: RouterHealth(hnet.learned_ratios, config.mbs, read_metrics(earlier)), world)
        self.history = CutHistory(self.folder, self.step, world)
        self.progress, self.settled = Progress(hnet, config, self.step), time.perf_counter()
        self.saver = checkpoint.Saver(self.folder, state.model, state.optimizer, config.keep, config.keep_every)
        # the last step, until it is recorded: its numbers, which are on the way to the host, and the host's counts
        self.waiting: tuple[distributed.Fetched, dict[str, int]] | None = None

    def _resume(self) -> int:
        """Loads the checkpoint from which the run resumes, if there is one. Returns the number of steps done."""
        source = checkpoint_to_resume(self.folder, self.config.resume, self.world)
        if source is None:
            return 0
        checkpoint.check_contents(source)
        done = check_continuation(source, self.about)
        self.state.load(source)
        logger.info("resuming from %s", source)
        say_what_changed(source, self.about)
        if done == self.config.steps:
            logger.info("all %d steps are done; a larger --steps trains on", done)
        return done

    def train(self, then: Callable[["Run"], None] | None = None) -> None:
        """Runs the steps, and after the last one shows the results or calls `then`.

        Raises RunFailed for a loss that is not finite or a stuck router, UserError for a failed save.
        """
        config = self.config
        watchdog = Watchdog(self.folder, self.world, config.timeout, self.state.model)
        self.interrupts = Interrupts()
        with self.saver.ready_to_save(config.save_every > 0), watchdog as watch:
            while self.step < config.steps:
                self._step(watch)
                stuck, asked = config.on_collapse == "stop" and self.health.stuck, self.interrupts.received is not None
                interrupted, save_failed = distributed.anywhere(self.world, asked, self.saver.failed)
                if save_failed:
                    self.saver.finish()
                self._between_steps(watch, saves=interrupted or stuck)
                if stuck:
                    saved = self.saver.finish() or "nothing (--save-every 0)"
                    self.metrics.close()
                    raise RunFailed(
                        f"step {self.step}: a router is stuck, see above (--on-collapse stop); saved {saved}"
                    )
                if interrupted and self.step < config.steps:
                    how = "nothing is saved (--save-every 0)"
                    if saved := self.saver.finish():
                        how = f"saved {saved}; resume with --save-dir {self.folder} --resume auto"
                    logger.info("asked to stop: %s", how)
                    break
            self.saver.finish()
            self.metrics.close()
            if self.step == config.steps:
                watch.at(self.step, "showing results")
                if then:
                    then(self)
                else:
                    show_results(self.state.evaluated, self.val_stream, self.folder, self.world)

    def _step(self, watch: Watchdog) -> None:
        """Launches one step, and reports the step before while the device runs it."""
        config, state, done = self.config, self.state, self.step
        watch.at(done + 1, "reading data")
        slices = list(self.train_stream.step(done, config.global_slices, self.world.rank, self.world.size))
        watch.at(done + 1, "forward and backward")
        before = state.counted()
        wants_statistics = config.stats_every > 0 and (done + 1) % config.stats_every == 0
        numbers = state.step(done, slices, wants_statistics, self.saver.staged)
        if self.waiting:
            record = self._settle(done, *self.waiting)
            self.metrics.log(done, record)
            self._print_step(done, record)
        if done == self.first_step:
            self.saver.check_state()
            gc.collect()  # these objects stay: exclude them from garbage collection
            gc.freeze()
        done_by_host = {name: n - before[name] for name, n in state.counted().items()}
        self.waiting, self.step = (distributed.Fetched(numbers.flat()), done_by_host), done + 1

    def _between_steps(self, watch: Watchdog, saves: bool) -> None:
        """Validates, samples and saves when due. Records the step then, and on a CPU; else `_step` does it later."""
        config, step = self.config, self.step
        is_last = step == config.steps
        validates = self.val_stream and (is_last or (config.val_every and step % config.val_every == 0))
        samples = self.inference and (is_last or (config.sample_every and step % config.sample_every == 0))
        saves = config.save_every > 0 and (saves or is_last or step % config.save_every == 0)
        at_once = step == self.first_step + 1 or self.world.device.type == "cpu"
        if not (validates or samples or saves or at_once):
            return
        assert self.waiting
        record, self.waiting = self._settle(step, *self.waiting), None
        if validates or samples or saves:
            self.state.steps.free_memory()
        if validates:
            watch.at(step, "validation")
            opens: list = []
            record |= validate(self.state.evaluated, self.val_stream, self.world, config.val_slices or None, opens)
            if not math.isfinite(bits := record[f"val_{bits_name(self.hnet)}"]):
                raise RunFailed(f"step {step}: {bits} bits per byte of held-out text. {self.saver.last_good()}")
            record |= self.history.update(step, opens, checkpoint.oldest_step(self.folder))
        written = None
        if samples:
            watch.at(step, "writing a sample")
            written = sample(self.inference, config, self.world)
            record |= written.record() if written else {}
        self.metrics.log(step, record)
        if saves:
            watch.at(step, "saving")
            self.metrics.sync()
            self.saver.start(step, self.about)
        self._print_step(step, record)
        if written:
            beginning = f", beginning with {config.prompt!r}" if config.prompt else ""
            logger.info(f"the model writes{beginning}:")
            print_chunks(written.data, written.starts)
        self.settled = time.perf_counter()  # the next step's time starts here

    def _settle(self, done: int, arriving: distributed.Fetched, of_host: dict[str, int]) -> dict[str, Any]:
        """Waits for a step's numbers and returns its record. Raises RunFailed if they are not finite."""
        config = self.config
        numbers = StepNumbers.of(arriving.numbers(), self.hnet.num_stages)
        if not (numbers.ce + numbers.grad_norm).isfinite():
            raise RunFailed(
                f"step {done}: cross entropy {numbers.ce}, gradient norm {numbers.grad_norm}; stopped before they "
                f"reached the weights. {self.saver.last_good(done)}"
            )
        record = describe(numbers, self.hnet, config)
        record["lr"] = config.lr * lr_scale(done - 1, config)
        targets = self.state.ratio.targets_at(done - 1, config.steps)
        record |= {f"stage{s}_target": target for s, target in enumerate(targets) if target}
        record |= {"bytes_seen": done * config.mbs * config.global_slices} | of_host
        if waited := self.saver.stall():
            record["save_ms"] = 1000 * waited  # by the save before this step
        now, before = time.perf_counter(), self.settled
        self.settled = now
        return record | speed(record, now - before, self.hnet, config, self.world)

    def _print_step(self, done: int, record: dict[str, Any]) -> None:
        """Prints warnings and the progress line of a recorded step."""
        for trouble in self.health.look(done, record):
            logger.warning("step %d: %s", done, trouble)
        if done == self.first_step + 1 and self.world.device.type == "cuda":
            logger.info(
                f"the first step took {record['step_ms'] / 1000:.1f} s: {self.state.preparing(self.compilations)}"
            )
        if line := self.progress.add(done, record):
            logger.info(line)


def start_process(config: TrainConfig) -> World:
    """Joins the other processes of the run, and sets torch's options of this process."""
    world = distributed.start(config.device, config.replicate or 1, max(600, 2 * config.timeout))
    config.global_slices = config.global_slices or world.size
    if config.early_exit != "no" and not world.is_main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (one process prints what all find)
    if world.device.type == "cpu":
        cpu.keep_freed_memory()
        cpu.share_cores()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU for what stays float32: residual_proj
    return world


def compare_generation(config: TrainConfig, hnet: HNetConfig, world: World) -> int:
    """-e generate: compares the inference model with the training model. Returns the exit status."""
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    agreement.choose_implementations(world.device, dtype, hnet)
    try:
        equal = equivalence.run(hnet, config.pt_ckpt or None, world.device, dtype, config.seed)
    except GenerationError as error:
        raise UserError(f"-e generate: {error}") from None
    distributed.stop()
    return 0 if equal else 1


def main(config: TrainConfig) -> int:
    """`train`, but prints a mistake of the user, or that memory is full, as one sentence."""
    try:
        return train(config)
    except commands.user_errors() as error:
        status = commands.print_error(error)  # at once: other ranks may print it too
        if dist.is_initialized() and (dist.get_world_size() == 1 or not torch.cuda.is_available()):
            dist.destroy_process_group()  # else NCCL adds a warning, or gloo's threads remain
        return status
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if not memory_ran_out(error):
            raise
        return commands.print_error(RunFailed(f"{in_words(error, config.ac)} ({str(error).splitlines()[0]})"))


def train(config: TrainConfig, then: Callable[[Run], None] | None = None, is_checked: bool = False) -> int:
    """Trains with these flags and returns the exit status. Raises UserError, ConfigError or DataError for mistakes.

    Two arguments are for a program that makes several runs in one process. then: called with the finished run instead
    of showing its results; the process group stays. is_checked: a run with the same config and flags, except for its
    seed, has passed the checks before graphs in this process.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s", stream=sys.stdout)
    hnet, start_weights = read_model(config)
    losses.check(config, hnet)
    if config.dry_run:
        dry_run(config, hnet)
        return 0
    is_training = config.early_exit == "no"
    compiler = compile_ahead.prepare(config.device, config.compile_ahead and is_training and not is_checked)
    world = start_process(config)
    if config.early_exit == "generate":
        return compare_generation(config, hnet, world)
    data = open_data(config, world, cuts.cutter(hnet)) if is_training else None  # first, as it may have mistakes
    if data:
        hnet, measured = cuts.with_measured_rate(hnet, data[0])
        if measured:
            logger.info(measured)
    is_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and world.device.type == "cuda")
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    config.ac = choose_ac(config, hnet, world) if config.ac == "auto" else config.ac
    accumulates = config.global_slices > world.size
    work = compile_ahead.Work(hnet, dtype, config.mbs, config.ac, accumulates, texts=min(1, config.sample_bytes))
    compile_ahead.begin(compiler, work, world.device)
    drawn = None if start_weights else distributed.draw_ahead(hnet, world, config.seed)
    agreement.choose_implementations(world.device, dtype, hnet)
    graph, world = takes_graphs(config, hnet, dtype, world, is_checked)
    agreement.warn_of(hnet, repeats=graph)

    def build(how: str) -> tuple[HNetLM, list[dict[str, Any]], str]:
        """The first arguments of `TrainState`."""
        own_dtype = dtype if how == "plain" else torch.float32  # a GraphedModel makes the weights in dtype itself
        model = distributed.build_model(hnet, world, own_dtype, config.seed, start_weights, config.reshard, drawn)
        return model, parameter_groups(model, config.lr, config.weight_decay, config.router_lr), how

    model, groups, how = build("graph" if graph else without_graphs(hnet, dtype, world))
    if config.early_exit == "dumpparams":
        dump_parameters(model, groups)
        distributed.stop()
        return 0
    state = TrainState(model, groups, how, dtype, hnet, config, world)
    is_compared = graph and world.device.type == "cuda" and not is_checked
    difference = distributed.first_answer(world, agreement.captured(state.steps)) if is_compared else None
    if difference:
        if config.compile == "graph":
            raise UserError(f"--compile graph: {difference}; use eager")
        logger.info("steps do not run as graphs: %s", difference)
        del state, model, groups  # frees their memory first
        state = TrainState(*build(without_graphs(hnet, dtype, world)), dtype, hnet, config, world)
    elif graph:
        logger.info(
            "steps run as graphs, and compute what hnet_trainable.py says: checked on a small model of this config"
        )
    Run(state, data).train(then)
    if not then:
        distributed.stop()
    return 0
