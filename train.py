"""Train an H-Net on bytes. `python train.py` alone trains a tiny one on the Python standard library's source text.

One process and many run the same program: `torchrun --nproc-per-node 8 train.py ...`. `python train.py --help` lists
the flags. A run's folder holds its configs, metrics.jsonl, checkpoints and plots.

Read top to bottom: config -> one step -> what is reported -> the run -> `main`.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
import torch.distributed as dist
import tyro
import yaml
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import fineweb
from hnet_runtime import (
    UserError,
    activations,
    agreement,
    checkpoint,
    distributed,
    equivalence,
    graphs,
    statistics,
    weights,
)
from hnet_runtime.chunks import bars, print_chunks, to_html
from hnet_runtime.distributed import World
from hnet_runtime.evaluation import chunks_of, validate
from hnet_runtime.graphs import GraphedModel
from hnet_runtime.metrics import (
    JsonlSink,
    Metrics,
    RouterHealth,
    TensorBoardSink,
    WandbSink,
    duration,
    read_metrics,
)
from hnet_runtime.plots import plot
from hnet_runtime.reports import write_whole
from hnet_runtime.run import (
    Compilations,
    Interrupts,
    checkpoint_to_resume,
    code_revision,
    in_words,
    keep_freed_memory,
    leave_unused,
    newest,
    of_main,
    open_folder,
)
from hnet_runtime.segments import memory_ran_out
from hnet_runtime.watchdog import Watchdog
from hnet_simple import HNetInference, generate
from hnet_trainable import ConfigError, HNetConfig, HNetLM, compile_blocks, count_flops, parameter_groups

logger = logging.getLogger("hnet")

DEFAULT_CONFIG = "hnet_1stage_tiny"
DEFAULT_DATA = "data/stdlib"  # prepared on first use from the running Python's own standard library


# ------------------------------------------------------------------------------------------------------------- config


def flag(*short: str):
    return tyro.conf.arg(aliases=short)


ABOUT = """Train an H-Net. Without flags: a tiny one, on the Python standard library, on this machine's best device.

--config-file FILE.yaml gives flags by their names with underscores, as a run's train.yaml does; flags win over it."""


@dataclass
class TrainConfig:
    """The flags of a run."""

    config: Annotated[str, flag("-c")] = ""
    """Model config: a JSON file, or one of configs/ by name. Empty: that of -p, else hnet_1stage_tiny."""
    pt_ckpt: Annotated[str, flag("-p")] = ""
    """Weights to start from: an official .pt, safetensors, a checkpoint of ours, or hf:owner/name."""
    n_compression: Annotated[str, flag("-N")] = ""
    """Target compression, like 1-3-9: bytes per token that each stage should see. Empty: as the config says."""
    data: str = DEFAULT_DATA
    """Folder made by `fineweb.py prepare`, or a mixture of some: a:0.7,b:0.3."""
    order: Literal["shuffle", "length"] = "shuffle"
    """Order of the documents in an epoch; length goes from short to long."""
    mbs: int = 2048
    """Bytes in a slice, which is what a process runs at once (T)."""
    global_slices: int = 0
    """Slices in an optimizer step over all processes (G); the number of processes must divide it, and a run keeps it.
    0: as many as processes."""
    max_doc: int = 8192
    """Longest row in bytes; a longer document goes on in further rows."""
    steps: int = 900
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    optim: Annotated[Literal["adamw"], flag("-o")] = "adamw"
    """Optimizer: AdamW with betas (0.9, 0.95)."""
    lr: float = 4e-4
    """Peak learning rate before the stages' multipliers (eq. 11 of the paper)."""
    schedule: Literal["wsd", "wsd-linear", "cosine", "constant"] = "wsd-linear"
    """After the warmup. wsd: constant, then down to zero over the last `decay` as 1 - sqrt (wsd-linear: linearly)."""
    warmup: float = 0.1
    """Share of the steps that warm up linearly."""
    decay: float = 0.25
    """Share of the steps that decay, with wsd and wsd-linear."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices and embeddings only."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    alpha: float = 0.2
    """Weight of the ratio losses. The paper's 0.03 is for long runs; in a short one it leaves chunks far from words."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where torch has it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype beside float32 masters. auto: bfloat16 on CUDA, float32 on the CPU."""
    compile: Annotated[Literal["auto", "graph", "block", "eager"], flag("-C")] = "auto"
    """graph: steps as CUDA graphs of fused kernels, on Hopper GPUs in bfloat16 with whole weights on each; by far the
    fastest. block: each kind of block compiled by torch. auto: graph where it is possible on a GPU, else eager."""

    replicate: int = 0
    """Copies of the weights: as many as processes, 1 (FSDP2), or between (HSDP: with one for each node, weights are cut
    within nodes and copied across). 0: as many as processes where steps then run as graphs and what each holds takes no
    more than half of its GPU's memory, else 1."""
    reshard: bool = True
    """With several processes: free gathered weights after the forward and gather them again for the backward."""
    ac: Literal["none", "block", "selective"] = "none"
    """Activation checkpointing. block: keep only what enters a block and compute the rest again in the backward;
    selective: also keep the results of matrix products, attention and the scan."""
    max_chunks_per_rank: int = 0
    """Where a router on any process opens more chunks than this in a micro-batch, all run its inner stages as with
    --ac block. 0: no limit."""
    timeout: float = 300
    """Seconds without a sign of life or progress after which a process is taken for dead or hung and the job ends."""

    save_dir: str = ""
    """The run's folder. Empty: runs/<config>-<time>."""
    resume: str = ""
    """auto: go on from the newest complete checkpoint in save_dir, if there is one. Or a run's or checkpoint's folder.
    Flags that are not given are those of that run."""
    save_every: int = 250
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay; 0: all."""
    keep_every: int = 0
    """Checkpoints of every so many steps stay for good; 0: none."""
    val_every: int = 0
    """Steps between validations; the last step is always validated. 0: only the last."""
    val_slices: int = 64
    """Held-out slices to score; 0: all."""
    log_every: int = 20
    """Steps between lines on the console; metrics.jsonl has every step."""
    stats_every: int = 100
    """Steps between statistics of routers and weights: chunk lengths, where boundaries lie, norms, updates. 0: none."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """When a router has collapsed or is dead: say so, or save and stop with status 2. Oscillation is only named."""
    sample_every: int = 0
    """Steps between generated samples; the last step always gives one. 0: only the last."""
    sample_bytes: int = 160
    """Length of a sample; 0: none."""
    prompt: str = ""
    """What samples go on from."""
    logger: Annotated[Literal["local", "wandb", "tensorboard", "neptune"], flag("-l")] = "local"
    """Where metrics go beside metrics.jsonl."""
    early_exit: Annotated[Literal["no", "generate", "dumpparams"], flag("-e")] = "no"
    """generate: check that training forward, prefill and steps agree, and stop (status 1 if not). dumpparams: print the
    modules and each parameter's shape, dtype, stage, multiplier and decay, and stop; LOVELY_TENSORS=1 in the
    environment adds what is in them."""

    def check(self) -> None:
        """Raises UserError naming the first flag that is out of range."""
        for name in ("mbs", "max_doc", "steps", "save_every", "log_every"):
            self._expect(name, getattr(self, name) >= 1, "1 or more")
        for name in (
            "global_slices",
            "replicate",
            "val_every",
            "val_slices",
            "stats_every",
            "sample_every",
            "sample_bytes",
            "keep",
            "keep_every",
            "max_chunks_per_rank",
            "clip",
            "alpha",
            "weight_decay",
        ):
            self._expect(name, getattr(self, name) >= 0, "0 or more")
        for name, value in vars(self).items():
            self._expect(name, not isinstance(value, float) or math.isfinite(value), "a finite number")
        for name in ("lr", "timeout"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        for name in ("warmup", "decay"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        self._expect("decay", self.warmup + self.decay <= 1, f"at most 1 together with --warmup {self.warmup}")
        self._expect("ac", self.ac != "selective" or self.compile != "block", "none or block with --compile block")
        self._expect("logger", self.logger != "neptune", "wandb or tensorboard (neptune, which only printed, is gone)")
        self._expect("seed", 0 <= self.seed < 2**63, "0 or more, below 2**63")
        self._expect("resume", self.resume != "auto" or self.save_dir, "also --save-dir, the folder of the run")
        if self.resume and self.early_exit != "no":
            raise UserError(f"-e {self.early_exit} with --resume: expected -p, which names the weights to look at")
        for name in ("wandb", "tensorboard"):
            if self.logger == name and importlib.util.find_spec(name) is None:
                raise UserError(f"--logger {name}: {name} is not installed; pip install -e '.[{name}]'")

    def _expect(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")


def read_config(argv: Sequence[str]) -> TrainConfig:
    """Flags over the YAML file of --config-file, over those of the run that --resume goes on with, over the defaults.

    An unknown flag ends the program with status 2.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-file", default="")
    file, rest = parser.parse_known_args(argv)
    given = _read_yaml(file.config_file) if file.config_file else {}
    config = tyro.cli(TrainConfig, args=rest, default=TrainConfig(**given), description=ABOUT)
    if earlier := _flags_of_the_run(config):
        config = tyro.cli(TrainConfig, args=rest, default=TrainConfig(**earlier | given))
        config.global_slices = config.global_slices or earlier.get("global_slices", 0)
    config.check()
    return config


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        given = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file ({str(error).splitlines()[0]})") from None
    kinds = get_type_hints(TrainConfig)
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected flags and their values, like steps: 900")
    for key, value in given.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; known are {', '.join(kinds)}")
        kind, choices = kinds[key], get_args(kinds[key])
        if kind is float and not isinstance(value, bool):  # 1e-3 is text to YAML, which wants 1.0e-3
            with contextlib.suppress(TypeError, ValueError):
                value = given[key] = float(value)
        if choices and value not in choices:
            raise UserError(f"{path}: {key}: {value!r}; expected one of {', '.join(choices)}")
        if not choices and type(value) is not kind:
            raise UserError(f"{path}: {key}: {value!r}; expected {kind.__name__}")
    return given


def _flags_of_the_run(config: TrainConfig) -> dict[str, Any]:
    """The flags of the run that is resumed, if there is one; what they mean by now is for `TrainConfig.check`."""
    folder = config.save_dir if config.resume == "auto" else config.resume
    if not folder:
        return {}
    earlier = checkpoint.train_config_of(folder)
    if earlier is None and (Path(folder) / "train.yaml").exists():  # it ended before its first checkpoint
        earlier = _read_yaml(f"{folder}/train.yaml")
    known = {field.name for field in dataclasses.fields(TrainConfig)} - set(OF_ONE_START)
    return {name: value for name, value in (earlier or {}).items() if name in known}


OF_ONE_START = ("save_dir", "resume", "early_exit")  # flags that are not the run's


def read_model(config: TrainConfig) -> tuple[HNetConfig, dict[str, Tensor] | None]:
    """The model's config, and the weights to start from where -p names some."""
    overrides = {}
    if config.n_compression:
        try:
            numbers = [float(n) for n in config.n_compression.split("-")]
        except ValueError:
            raise UserError(f"-N {config.n_compression}: expected numbers joined by dashes, like 1-3-9") from None
        overrides["N_compress"] = [int(n) if n.is_integer() else n for n in numbers]
    named = config.config or DEFAULT_CONFIG
    if config.resume and (config.pt_ckpt or not Path(named).exists()):
        source = newest(Path(config.save_dir if config.resume == "auto" else config.resume))
        if checkpoint.is_complete(source):  # it has all that is needed
            return _load_config(str(source / "config.json"), overrides, config), None
    if not config.pt_ckpt:
        return _load_config(named, overrides, config), None
    start = weights.load(config.pt_ckpt, _load_config(config.config, overrides, config) if config.config else None)
    return _load_config(start.config.to_dict(), overrides, config), start.weights


def _load_config(source: str | dict[str, Any], overrides: dict[str, Any], config: TrainConfig) -> HNetConfig:
    try:
        return HNetConfig.load(source, **overrides)
    except ConfigError as error:
        if not overrides or "N_compress" not in str(error):
            raise
        raise UserError(f"-N {config.n_compression}: {error}") from None


def lr_scale(step: int, config: TrainConfig) -> float:
    """The share of the peak learning rate in step 0, 1, ..., steps - 1."""
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


def forward_backward(
    model: HNetLM | GraphedModel,
    slices: list[fineweb.Slice],
    config: TrainConfig,
    world: World,
    routers: list[Tensor] | None = None,
) -> Tensor:
    """Gradients of a step's loss, the mean over all G slices of CE + alpha * ratio losses, from this rank's slices.

    Every slice has T labels and every rank as many slices, so means of means are exact; FSDP averages over ranks.
    Returns means over the step's G slices, a float32 tensor on the device:
    [ce, text bytes, rows, ratio_0.., F_0.., G_0.., imbalance of chunks_0..].
    `routers`, where given, gets the `router_statistics` of this rank's last slice.
    """
    if isinstance(model, GraphedModel):
        batches = [piece.nested(world.device) for piece in slices]
        losses = model.forward_backward(batches)
        counted = (sum(n) / len(slices) for n in zip(*((p.text_bytes, len(p.row_lengths)) for p in slices)))
        numbers = [losses.ce, *(torch.full_like(losses.ce, n) for n in counted)]
        stats = [torch.cat([torch.stack(numbers), losses.ratio, losses.F, losses.G]).float()]
        (iids, _), slices = batches[-1], []
    else:
        stats = []
    for i, piece in enumerate(slices):
        if isinstance(model, FSDPModule):  # gradients are reduced once a step, with those of the last slice
            model.set_requires_gradient_sync(i == len(slices) - 1)
            model.set_is_last_backward(i == len(slices) - 1)
        iids, labels = piece.nested(world.device)
        out = model(iids, labels)
        loss = out.ce + config.alpha * out.ratio_losses.sum()
        (loss / len(slices)).backward()
        numbers = [out.ce, *(torch.full_like(out.ce, n) for n in (piece.text_bytes, len(piece.row_lengths)))]
        numbers += out.ratio_losses
        numbers += [stage.F for stage in out.stages] + [stage.G for stage in out.stages]
        stats.append(torch.stack([n.detach().float() for n in numbers]))
    if routers is not None:
        stages = model.stages() if isinstance(model, GraphedModel) else out.stages
        routers.append(statistics.router_statistics(iids, stages))
    stats_GK = distributed.gather_slices(torch.stack(stats), world)
    S = (stats_GK.shape[1] - 3) // 3
    chunks_GS = stats_GK[:, 3 + S : 3 + 2 * S].cumprod(1)  # a byte, at each stage: F is a share of the stage's tokens
    imbalance = distributed.imbalance(chunks_GS, world)
    return torch.cat([stats_GK.double().mean(0).float(), imbalance])


class Trainee:
    """What is trained, and all that a step of it takes.

    model: its weights in float32, whole or sharded; in graphs they may have numbers inside `optimizer.whole()` alone.
    evaluated: an HNetLM that computes as training does and has these weights, or copies of them.
    """

    def __init__(
        self,
        model: HNetLM,
        groups: list[dict[str, Any]],
        graph: bool,
        dtype: torch.dtype,
        hnet: HNetConfig,
        config: TrainConfig,
        world: World,
    ):
        """groups: as `parameter_groups` gives them. graph: steps run as graphs. dtype: of what is computed."""
        self.model, self.graph, self.dtype = model, graph, dtype
        self.parameters = list(model.parameters())  # now: after a forward FSDP shows gathered ones in their place
        self.hnet, self.config, self.world = hnet, config, world
        if config.compile == "block":
            compile_blocks(model)
        limit = config.max_chunks_per_rank
        if not graph and (config.ac != "none" or limit):
            activations.recompute(model, config.ac)
        self.guard = activations.ChunkGuard(model, limit, world) if limit else None
        groups = distributed.optimizer_groups(groups)
        if graph:
            accumulates = config.global_slices > world.size
            self.runner = GraphedModel(model, dtype, config.alpha, world, groups, config.ac, accumulates)
            self.evaluated, self.optimizer = self.runner.model, self.runner.optimizer
        else:
            self.runner = self.evaluated = model
            self.optimizer = torch.optim.AdamW(groups, betas=distributed.BETAS, fused=True)
        model.train()

    def load(self, source: Path) -> None:
        """Weights and optimizer of a checkpoint."""
        with self.optimizer.whole() if self.graph else contextlib.nullcontext():
            checkpoint.load(source, self.model, self.optimizer)

    def make_room(self) -> None:
        """For what runs between steps."""
        if self.graph:
            self.runner.make_room()

    def step(
        self, slices: list[fineweb.Slice], scale: float, wants_statistics: bool, before_update: Callable[[], None]
    ) -> Tensor:
        """One optimizer step; it waits for the device at the stages' numbers of chunks alone.

        scale: of the learning rates. before_update: called before the weights change.
        Returns what `forward_backward` does, the norm of the gradient before clipping, and statistics where they are
        wanted (see `statistics.names`). Where loss or norm are not finite, the weights stay as they are.
        """
        more: list[Tensor] | None = [] if wants_statistics else None
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * group["multiplier"] * scale
        stats = forward_backward(self.runner, slices, self.config, self.world, more)
        if not self.graph:
            distributed.reduce_plain_gradients(self.parameters, self.world)
        norm = distributed.clip_in_optimizer(self.optimizer, self.parameters, self.config.clip, self.world, stats[0])
        before_update()
        self.optimizer.step()
        if more is not None:
            count = functools.partial(statistics.weight_statistics, self.optimizer, self.hnet.num_stages, self.world)
            more.append(self.runner.with_room(count) if self.graph else count())
        if not self.graph:  # graphs write every gradient anew
            self.optimizer.zero_grad()
        return torch.cat([stats, norm[None], *(more or [])])

    def preparing(self, compilations: Compilations) -> str:
        """What a first step has had to do before others, in words."""
        captures = (
            f", {self.runner.capture_seconds:.1f} s for {self.runner.captured} parts captured" if self.graph else ""
        )
        return f"{compilations}{captures}"

    def counted(self) -> dict[str, int]:
        """What the host has done so far, beside the steps."""
        return {
            **({"recomputed_micro_batches": self.guard.count} if self.guard else {}),
            **({"graphs_captured": self.runner.captured} if self.graph else {}),
        }


# ------------------------------------------------------------------------------------------------- what is reported


def describe(stats: list[float], hnet: HNetConfig, config: TrainConfig) -> dict[str, Any]:
    """`forward_backward`'s numbers by their names in metrics.jsonl."""
    S = hnet.num_stages
    ce, text_bytes, rows, *rest = stats
    record = {"bpb": ce * config.mbs / (text_bytes * math.log(2)), "ce": ce, "rows": rows}
    rest, more = rest[: 4 * S], rest[4 * S :]
    for s in range(S):
        ratio, F, G, imbalance = rest[s::S]
        record |= {f"stage{s}_ratio_loss": ratio, f"stage{s}_F": F, f"stage{s}_G": G}
        record |= {f"stage{s}_compression": 1 / F, f"stage{s}_target": hnet.target_ratios[s]}
        record |= {f"stage{s}_imbalance": imbalance}
    return record | dict(zip(statistics.names(S), more))


def speed(
    record: dict[str, Any], seconds: float, hnet: HNetConfig, config: TrainConfig, world: World
) -> dict[str, Any]:
    """A step's speed. MFU counts matrix products alone, over the tokens that each stage really saw."""
    tokens = [float(config.mbs * config.global_slices)]
    for s in range(hnet.num_stages):
        tokens.append(tokens[-1] * record[f"stage{s}_F"])
    peak = distributed.peak_flops(world.device) * world.size
    flops = count_flops(hnet, [[n] for n in tokens]).matmul
    measured = {"step_ms": 1000 * seconds, "bytes_per_s": tokens[0] / seconds, "mfu": flops / seconds / peak}
    if world.device.type == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        measured["reserved_gib"] = torch.cuda.memory_reserved() / 2**30  # with what graphs use when replayed
    return measured


def progress_line(step: int, record: dict[str, Any], seconds_left: float, hnet: HNetConfig, config: TrainConfig) -> str:
    parts = [f"step {step:>{len(str(config.steps))}}/{config.steps}", f"bpb {record['bpb']:.3f}"]
    if stages := range(hnet.num_stages):
        parts.append("ratio loss " + " ".join(f"{record[f'stage{s}_ratio_loss']:.2f}" for s in stages))
        compression = " ".join(f"{record[f'stage{s}_compression']:.1f}/{hnet.target_ratios[s]:g}" for s in stages)
        parts.append(f"bytes per chunk {compression}" if len(stages) == 1 else f"compression {compression}")
    parts += [f"lr {record['lr']:.1e}", f"grad {record['grad_norm']:.2f}"]
    parts += [f"{record['bytes_per_s'] / 1e3:.1f} kB/s", f"ETA {duration(seconds_left)}"]
    if "val_bpb" in record:
        parts.append(f"val bpb {record['val_bpb']:.3f}")
    return "  ".join(parts)


# ------------------------------------------------------------------------------------------------------------ the run


def open_data(config: TrainConfig, world: World) -> tuple[fineweb.ByteStream, fineweb.ByteStream | None]:
    """(training stream, held-out stream). Prepares the default corpus on first use.

    The held-out stream is None where the data was prepared with --holdout 0.
    """
    if config.data == DEFAULT_DATA and world.is_main and not (Path(DEFAULT_DATA) / "manifest.json").exists():
        fineweb.prepare("stdlib", DEFAULT_DATA)
    dist.barrier()
    if config.global_slices % world.size:
        kept = "; a run keeps the number it began with, by default one for each process then" if config.resume else ""
        raise UserError(f"--global-slices {config.global_slices}: {world.size} processes do not divide it{kept}")
    common = {"slice_bytes": config.mbs, "max_doc": config.max_doc}
    train = fineweb.ByteStream(config.data, "train", seed=config.seed, order=config.order, **common)
    train.require(config.mbs * config.global_slices)
    return train, fineweb.validation_stream(config.data, **common)


def check_continuation(source: Path, about: dict[str, Any]) -> int:
    """The steps that a checkpoint has done. Raises UserError where the data would not go on where it stopped.

    The order of the data is a function of these alone; all else may change between parts of a run.
    """
    saved = checkpoint.read_train(source)
    theirs, ours = ({**a["config"], "data": a["data"]} for a in (saved, about))
    for name in ("data", "seed", "mbs", "global_slices", "max_doc", "order"):
        if theirs.get(name) != ours[name]:
            what = "the text in --data" if name == "data" else f"--{name.replace('_', '-')}"
            raise UserError(
                f"{source}: {what} differs ({theirs.get(name)} there, {ours[name]} here), so the data would not go on "
                "where it stopped; to start a new run from these weights use -p"
            )
    if saved["step"] > ours["steps"]:
        raise UserError(f"--steps {ours['steps']}: {source} has done {saved['step']} steps already")
    return saved["step"]


def takes_graphs(config: TrainConfig, hnet: HNetConfig, dtype: torch.dtype, world: World) -> tuple[bool, World]:
    """Whether steps run as graphs, and the world with as many copies of the weights as it is to have.

    Raises UserError where --compile graph asks for what they cannot do.
    """
    if config.compile not in ("auto", "graph") or (config.compile == "auto" and world.device.type != "cuda"):
        return False, world
    obstacle = graphs.obstacle(hnet, world.device, dtype)
    if config.max_chunks_per_rank:
        obstacle = "graphs do not know --max-chunks-per-rank"
    if world.shards > 1 and not obstacle:
        if config.replicate:
            obstacle = f"graphs need whole weights on each process: with {world.size}, --replicate {world.size}"
        elif too_large := distributed.too_large_for_copies(hnet, world):
            obstacle = too_large
        else:
            world = world._replace(mesh=distributed.make_mesh(world.device.type, world.size, world.size))
    obstacle = obstacle or agreement.steps_as_graphs(hnet, config.ac)
    if obstacle and config.compile == "graph":
        raise UserError(f"--compile graph: {obstacle}; use eager or block")
    if obstacle:
        logger.info("steps do not run as graphs: %s", obstacle)
    else:
        logger.info("steps run as graphs; a toy of the config agrees with hnet_trainable.py in float64")
    return not obstacle, world


def dump_parameters(model: HNetLM, groups: list[dict[str, Any]]) -> None:
    """Prints modules and parameters; with LOVELY_TENSORS=1 also lovely-tensors' summary of each."""
    lovely = None
    if os.environ.get("LOVELY_TENSORS") == "1" and not (lovely := equivalence.lovely_summary()):
        logger.warning("LOVELY_TENSORS=1: lovely-tensors is not installed; pip install -e '.[debug]'")
    print(model)
    group_of = {name: group for group in groups for name in group["names"]}
    for name, p in model.named_parameters():
        group, dtype = group_of[name], str(p.dtype).removeprefix("torch.")
        decay = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
        rate = f"stage {group['stage']}  lr x {group['multiplier']:.3f}"
        summary = f"  {lovely(distributed.whole(p.detach()))}" if lovely else ""
        print(f"{name:72} {str(tuple(p.shape)):14} {dtype}  {rate}  {decay}{summary}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


class Run:
    """A run from its first step, or where it goes on, to its last. Every rank has one and calls the same."""

    def __init__(self, trainee: Trainee):
        """Opens data and the run's folder; loads a checkpoint where the run goes on from one.

        Raises UserError where data, folder or checkpoint do not fit the flags, or ranks have different ones.
        """
        config, hnet, world = trainee.config, trainee.hnet, trainee.world
        self.trainee, self.config, self.hnet, self.world = trainee, config, hnet, world
        self.train_stream, self.val_stream = open_data(config, world)
        name = Path(config.config or config.pt_ckpt or DEFAULT_CONFIG).stem
        about = {"config": dataclasses.asdict(config), "data": self.train_stream.fingerprint, "code": code_revision()}
        flags = {f"--{key.replace('_', '-')}": value for key, value in about["config"].items()}
        same = {"code revision": about["code"], "model config": hnet.to_dict(), "text in --data": about["data"]}
        distributed.check_same(flags | same, world)
        self.about, self.folder = about, open_folder(config.save_dir, name, world)
        parameters = sum(p.numel() for p in trainee.parameters)
        try:
            of_main(lambda: checkpoint.require_room(self.folder, parameters), world)
            self.step = self._go_on()
        except UserError:
            leave_unused(self.folder, world)
            raise
        self.first_step = self.step
        self.metrics = open_metrics(self.folder, self.step, about, hnet, config, world)
        logger.info(
            f"{name}: {parameters / 1e6:.1f}M parameters, {world.size} x {world.device.type} in "
            f"{str(trainee.dtype).removeprefix('torch.')}; {config.data}: "
            f"{self.train_stream.text_bytes / 1e6:.1f} MB of text; {config.steps} steps of "
            f"{config.mbs * config.global_slices:,} bytes; run folder {self.folder}"
        )
        self.compilations = Compilations()
        if world.device.type == "cuda":
            logger.info("the first step compiles kernels, for up to a minute where Triton's cache has none of them")
        self.inference = None  # where generation computes another model, no samples are written
        if config.sample_bytes and (difference := agreement.generation(hnet)):
            logger.warning("no samples: generation (hnet_simple.py) differs from hnet_trainable.py: %s", difference)
        elif config.sample_bytes:
            self.inference = HNetInference.from_training(trainee.evaluated)  # borrows the weights: nothing is copied
        self.interrupts, self.health = Interrupts(), RouterHealth(hnet.target_ratios, config.mbs)
        self.settled = time.perf_counter()
        self.last_line = self.settled, self.step
        self.saver = checkpoint.Saver(self.folder, trainee.model, trainee.optimizer, config.keep, config.keep_every)
        # of the last step: its numbers, which the device has yet to deliver, and what the host has done for it
        self.waiting: tuple[distributed.Fetched, dict[str, int]] | None = None

    def _go_on(self) -> int:
        """Loads the checkpoint that the run goes on from, if there is one. Returns the optimizer steps done."""
        source = checkpoint_to_resume(self.folder, self.config.resume, self.world)
        if source is None:
            return 0
        checkpoint.check_contents(source)
        done = check_continuation(source, self.about)
        self.trainee.load(source)
        logger.info("going on from %s", source)
        theirs, ours = checkpoint.read_train(source)["config"], self.about["config"]
        for name in ours:
            if name not in OF_ONE_START and name in theirs and theirs[name] != ours[name]:
                logger.info(f"with --{name.replace('_', '-')} {ours[name]}, which was {theirs[name]}")
        if done == self.config.steps:
            logger.info("all %d steps are done", done)
        return done

    def train(self) -> None:
        """Raises UserError where a number isn't finite, a checkpoint can't be written, or a router is stuck."""
        config = self.config
        with Watchdog(self.folder, self.world, config.timeout, self.trainee.model) as watch:
            while self.step < config.steps:
                self._step(watch)
                stuck, asked = config.on_collapse == "stop" and self.health.stuck, self.interrupts.received is not None
                interrupted, save_failed = distributed.anywhere(self.world, asked, self.saver.failed)
                if save_failed:
                    self.saver.finish()
                self._between_steps(watch, saves=interrupted or stuck)
                if stuck:
                    saved = self.saver.finish()
                    self.metrics.close()
                    raise UserError(
                        f"step {self.step}: a router is stuck, see above (--on-collapse stop); saved {saved}"
                    )
                if interrupted and self.step < config.steps:
                    saved = self.saver.finish()
                    logger.info("asked to stop: saved %s; go on with --save-dir %s --resume auto", saved, self.folder)
                    break
            self.saver.finish()
            self.metrics.close()
            if self.step == config.steps:
                watch.at(self.step, "showing results")
                show_results(self.trainee.evaluated, self.val_stream, self.folder, self.world)

    def _step(self, watch: Watchdog) -> None:
        """One step; the host goes on before the device has done it, and meanwhile reports the step before."""
        config, trainee, done = self.config, self.trainee, self.step
        watch.at(done + 1, "reading data")
        slices = list(self.train_stream.step(done, config.global_slices, self.world.rank, self.world.size))
        watch.at(done + 1, "forward and backward")
        before = trainee.counted()
        wants_statistics = config.stats_every > 0 and (done + 1) % config.stats_every == 0
        numbers = trainee.step(slices, lr_scale(done, config), wants_statistics, self.saver.staged)
        if self.waiting:
            self._report(done, self._settle(done, *self.waiting))
        done_by_host = {name: n - before[name] for name, n in trainee.counted().items()}
        self.waiting, self.step = (distributed.Fetched(numbers), done_by_host), done + 1

    def _between_steps(self, watch: Watchdog, saves: bool) -> None:
        """Validates, samples and saves where it is time to; on a CPU, where numbers are there at once, reports them."""
        config, step = self.config, self.step
        is_last = step == config.steps
        validates = self.val_stream and (is_last or (config.val_every and step % config.val_every == 0))
        samples = self.inference and (is_last or (config.sample_every and step % config.sample_every == 0))
        saves = saves or is_last or step % config.save_every == 0
        at_once = step == self.first_step + 1 or self.world.device.type == "cpu"
        if not (validates or samples or saves or at_once):
            return
        assert self.waiting
        record, self.waiting = self._settle(step, *self.waiting), None
        if validates or samples or saves:
            self.trainee.make_room()
        if validates:
            watch.at(step, "validation")
            record |= validate(self.trainee.evaluated, self.val_stream, self.world, config.val_slices or None)
        if samples:
            watch.at(step, "writing a sample")
            record |= sample(self.inference, config, self.world)
        self._report(step, record)
        if saves:
            watch.at(step, "saving")
            self.saver.start(step, self.about)
        self.settled = time.perf_counter()  # the next step's time begins here

    def _settle(self, done: int, arriving: distributed.Fetched, of_host: dict[str, int]) -> dict[str, Any]:
        """The record of a step, once the device has run it. Raises UserError where its numbers are not finite."""
        config = self.config
        numbers = arriving.numbers().tolist()
        grad_norm = numbers.pop(3 + 4 * self.hnet.num_stages)  # after forward_backward's, before the statistics
        if not math.isfinite(grad_norm + numbers[0]):
            self.saver.finish()  # what is being written is good too
            saved = checkpoint.complete(self.folder)
            raise UserError(
                f"step {done}: cross entropy {numbers[0]}, gradient norm {grad_norm}; stopped before they reached "
                f"the weights. The last good checkpoint: {saved[-1] if saved else 'none yet'}"
            )
        record = describe(numbers, self.hnet, config)
        record |= {"grad_norm": grad_norm, "lr": config.lr * lr_scale(done - 1, config)}
        record |= {"bytes_seen": done * config.mbs * config.global_slices} | of_host
        if waited := self.saver.stall():
            record["save_ms"] = 1000 * waited  # of the save before this step
        now, before = time.perf_counter(), self.settled
        self.settled = now
        return record | speed(record, now - before, self.hnet, config, self.world)

    def _report(self, done: int, record: dict[str, Any]) -> None:
        config = self.config
        for trouble in self.health.look(done, record):
            logger.warning("step %d: %s", done, trouble)
        self.metrics.log(done, record)
        if done == self.first_step + 1 and self.world.device.type == "cuda":
            logger.info(
                f"the first step took {record['step_ms'] / 1000:.1f} s: {self.trainee.preparing(self.compilations)}"
            )
        if done == config.steps or done % config.log_every == 0 or done == self.first_step + 1:
            now, (before, step) = time.perf_counter(), self.last_line
            self.last_line = now, done
            seconds_left = (now - before) / (done - step) * (config.steps - done)  # at the pace since the last line
            logger.info(progress_line(done, record, seconds_left, self.hnet, config))


def open_metrics(run: Path, step: int, about: dict, hnet: HNetConfig, config: TrainConfig, world: World) -> Metrics:
    if not world.is_main:
        return Metrics([])
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_ONE_START}
    flags = yaml.safe_dump(flags, sort_keys=False)
    write_whole(run / "train.yaml", lambda scratch: scratch.write_text(flags))
    checkpoint.write_json(run / "config.json", hnet.to_dict())
    sinks = [JsonlSink(run / "metrics.jsonl", step)]
    if config.logger == "wandb":
        sinks.append(WandbSink(run, about | {"model": hnet.to_dict()}))
    elif config.logger == "tensorboard":
        sinks.append(TensorBoardSink(run, step))
    return Metrics(sinks)


def sample(inference: HNetInference, config: TrainConfig, world: World) -> dict[str, str]:
    """Let the model write, print that, and return it with bars between chunks and in colours. Called by every rank."""
    with inference.unsharded():  # gathers the weights of all ranks; then rank 0 alone generates
        if not world.is_main:
            return {}
        written = generate(
            inference, [os.fsencode(config.prompt)], max_bytes=config.sample_bytes, seed=config.seed, valid_utf8=True
        )[0]
    logger.info("the model writes, beginning with %r:", config.prompt)
    print_chunks(written.data, written.starts)
    return {"sample": bars(written.data, written.starts), "sample_html": to_html(written.data, written.starts)}


def show_results(model: HNetLM, val_stream: fineweb.ByteStream | None, run: Path, world: World) -> None:
    """The last validation, the plot, and a piece of held-out text with the model's chunks in colours."""
    if val_stream is None:
        if world.is_main:
            plot([run], run / "plots")
            logger.info(f"curves in {run / 'plots.html'}; there was no held-out text to validate on")
        return
    *_, piece = val_stream.slices_once(2)  # the first and one from the middle
    text = bytes(piece.labels[: piece.row_lengths[0]]).rstrip(b"\xff")[:800]
    opens = chunks_of(model, text, world)
    if not world.is_main:
        return
    plot([run], run / "plots")
    records = [record for record in read_metrics(run / "metrics.jsonl") if "val_bpb" in record]
    if not records:
        return
    last = records[-1]
    if opens:
        logger.info("held-out text in the chunks that the model cut:")
        print_chunks(text, list(zip(*opens)))
        share, base = last["val_edge_share"], last["val_edge_base"]
        compared = f": {share / base:.1f} times as often as by chance" if base else ""
        logger.info(
            f"{share:.0%} of the chunks begin at the edge of a word, where {base:.0%} of all bytes do{compared}"
        )
    logger.info(
        f"{last['val_bpb']:.3f} bits per byte on {last['val_bytes']:,} bytes of held-out text; "
        f"curves in {run / 'plots.html'}"
    )


def main(argv: Sequence[str]) -> None:
    config = read_config(argv)
    hnet, start_weights = read_model(config)
    world = distributed.start(config.device, config.replicate or 1, max(600, 2 * config.timeout))
    config.global_slices = config.global_slices or world.size
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s", stream=sys.stdout)
    if config.early_exit != "no" and not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process tells what all find)
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU for what stays float32: residual_proj

    if config.early_exit == "generate":
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        equal = equivalence.run(hnet, config.pt_ckpt or None, world.device, dtype, config.seed)
        distributed.stop()
        sys.exit(not equal)
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and world.device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    graph, world = takes_graphs(config, hnet, dtype, world)
    # graphs have bfloat16 copies of their own beside a whole float32 model
    model = distributed.build_model(
        hnet, world, torch.float32 if graph else dtype, config.seed, start_weights, config.reshard
    )
    groups = parameter_groups(model, config.lr, config.weight_decay)
    if config.early_exit == "dumpparams":
        dump_parameters(model, groups)
    else:
        Run(Trainee(model, groups, graph, dtype, hnet, config, world)).train()
    distributed.stop()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ConfigError, fineweb.DataError) as error:
        sys.stderr.write(f"train.py: {error}\n")  # at once: other ranks may say it too
        if dist.is_initialized() and (dist.get_world_size() == 1 or not torch.cuda.is_available()):
            dist.destroy_process_group()  # else NCCL adds a warning to the sentence; gloo's threads must be gone
        sys.exit(2)
    except KeyboardInterrupt:  # before training began; then a Ctrl-C saves
        sys.exit(130)
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if not memory_ran_out(error):
            raise
        print(f"train.py: {in_words(error)} ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(1)
