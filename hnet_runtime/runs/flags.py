"""The flags of train.py, read from the command line, a YAML file and an earlier run.

Nothing here imports torch, so that `--help` and a wrong flag are answered at once.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro
import yaml

from hnet_config import find_config
from hnet_runtime import UserError, commands
from hnet_runtime.runs import run_folder

DEFAULT_DATA = "data/stdlib"  # prepared on first use from the standard library of the running Python
# flags that a resumed run does not take over
OF_ONE_START = ("save_dir", "resume", "dry_run", "compile_ahead", "early_exit")


def flag(*short: str):
    return tyro.conf.arg(aliases=short)


ABOUT = """Train an H-Net. Without flags: a tiny one on the Python standard library, on this machine's best device.

Flags can also come from --config-file FILE.yaml, named as in a run's train.yaml; the command line overrides it."""


@dataclass
class TrainConfig:
    """The flags of a run."""

    config: Annotated[str, flag("-c")] = ""
    """Model config: a JSON file, or a name from configs/. Empty: that of -p, else hnet_1stage_tiny."""
    pt_ckpt: Annotated[str, flag("-p")] = ""
    """Weights to start from: an official .pt, safetensors, a checkpoint of a run, or hf:owner/name."""
    n_compression: Annotated[str, flag("-N")] = ""
    """Target compression, such as 1-3-9: bytes per token at each stage. Empty: that of the config."""
    data: str = DEFAULT_DATA
    """Folder made by `fineweb.py prepare`, or a mixture of several: a:0.7,b:0.3."""
    order: Literal["shuffle", "length"] = "shuffle"
    """Order of the documents in an epoch; length: from short to long."""
    mbs: int = 2048
    """Bytes per slice (T), the micro-batch of one process."""
    global_slices: int = 0
    """Slices per optimizer step over all processes (G). It must be a multiple of the number of processes, and does not
    change within a run. 0: one per process."""
    max_doc: int = 8192
    """Longest row in bytes; longer documents are split into several rows."""
    steps: int = 900
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    optim: Annotated[Literal["adamw"], flag("-o")] = "adamw"
    """Optimizer: AdamW with betas (0.9, 0.95). `make_optimizer` in train.py may return another."""
    lr: float = 4e-4
    """Peak learning rate before the stages' multipliers (eq. 11 of the paper)."""
    schedule: Literal["wsd", "wsd-linear", "cosine", "constant"] = "wsd-linear"
    """Learning rate after the warmup. wsd: constant, then 1 - sqrt decay to zero (wsd-linear: linear decay)."""
    warmup: float = 0.1
    """Share of the steps with linear warmup."""
    decay: float = 0.25
    """Share of the steps with decay, for wsd and wsd-linear."""
    weight_decay: float = 0.1
    """Weight decay of AdamW: on all weights, but not on norms, biases and the names in NO_DECAY (hnet_trainable.py)."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    alpha: float = 0.2
    """Weight of the ratio losses. The paper's 0.03 is for long runs; in short ones its chunks are far from words."""
    ratio_form: Literal["both", "hinge"] = "both"
    """Form of the ratio losses. both: eq. 10 of the paper, where too many and too few chunks cost. hinge: only too many
    do, as in FLEXITOKENS (arXiv 2507.12720)."""
    ratio_from: str = ""
    """Target compression at the first step, such as 1-2. It then rises linearly to that of -N: from low to high
    compression, as in ATDC (arXiv 2605.30080). Empty: the target does not change."""
    ratio_rise: float = 0.0
    """Share of the steps over which the target rises from --ratio-from."""
    router_lr: float = 1.0
    """Factor on the learning rate of the routers' W_q and W_k, beside the multiplier of their stage (eq. 11)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: CUDA if torch has it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights are float32. auto: bfloat16 on CUDA, float32 on the CPU."""
    compile: Annotated[Literal["auto", "graph", "eager"], flag("-C")] = "auto"
    """graph: steps run as CUDA graphs, the fastest; needs GPUs of compute capability 8.0 or later (docs/CARDS.md),
    bfloat16 and unsharded weights on each. eager: operations run one by one, with the same kernels. auto: graph where
    possible on a GPU, else eager."""

    replicate: int = 0
    """Replicas of the weights: one per process, 1 (FSDP2), or between (HSDP: with one per node, weights are sharded
    within nodes and replicated across them). 0: one per process if steps can then run as graphs and a replica takes at
    most half of a GPU's memory, else 1."""
    reshard: bool = True
    """With sharded weights: free gathered weights after the forward and gather them again for the backward."""
    ac: Literal["auto", "none", "block", "selective"] = "auto"
    """Activation checkpointing. block: save only the input of each block and recompute the rest in the backward;
    selective: also save the results of matrix products, attention and the scan. auto: none, unless the GPU's memory is
    too small for it."""
    max_chunks_per_rank: int = 0
    """If a router on any process opens more chunks than this in a micro-batch, all processes run its inner stages as
    with --ac block. 0: no limit."""
    timeout: float = 300
    """Seconds without progress after which a process counts as dead or hung and the job ends."""

    save_dir: str = ""
    """The run's folder. Empty: runs/<config>-<time>."""
    resume: str = ""
    """auto: resume from the newest complete checkpoint in save_dir, if there is one. Or the folder of a run or of a
    checkpoint. Flags that are not given keep the values of that run."""
    save_every: int = 250
    """Steps between checkpoints; the last step is always saved. 0: nothing is saved, and the run cannot be resumed."""
    keep: int = 2
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Always keep the checkpoints of every this many steps; 0: none."""
    val_every: int = -1
    """Steps between validations; the last step is always validated. -1: a third of the run; 0: only the last."""
    val_slices: int = 64
    """Held-out slices per validation; 0: all."""
    log_every: int = 20
    """Steps per line on the console, which shows their means; metrics.jsonl has every step."""
    stats_every: int = 100
    """Steps between statistics of routers and weights: chunk lengths, boundaries, norms, updates. 0: none."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """When a router has collapsed or is dead: warn, or save and stop with status 1. Oscillation only warns."""
    sample_every: int = 0
    """Steps between generated samples; the last step always writes one. 0: only the last."""
    sample_bytes: int = 160
    """Bytes of a sample, at most 65536; 0: no samples."""
    prompt: str = ""
    """The start of each sample, which the model continues."""
    logger: Annotated[Literal["local", "wandb", "tensorboard"], flag("-l")] = "local"
    """Where metrics are written in addition to metrics.jsonl."""
    dry_run: bool = False
    """Print parameters, memory and the expected time of a step, and stop: for the GPU here or the card that HNET_GPU
    names. On a machine without a GPU: a line for each known GPU, and none for the CPU."""
    compile_ahead: bool = True
    """Compile kernels in other processes while a run starts, if Triton's cache does not have them."""
    early_exit: Annotated[Literal["no", "generate", "dumpparams"], flag("-e")] = "no"
    """generate: check that training forward, prefill and steps agree, and stop (status 1 if not). dumpparams: print the
    modules and each parameter's shape, dtype, stage, multiplier and decay, and stop; LOVELY_TENSORS=1 in the
    environment adds a summary of its values."""

    @property
    def checkpointing(self) -> str:
        """--ac, which is `none` as long as nothing was chosen for `auto`."""
        return "none" if self.ac == "auto" else self.ac

    def check(self) -> None:
        """Raises UserError that names the first flag out of range."""
        for name in ("mbs", "max_doc", "steps", "log_every"):
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
            "save_every",
            "max_chunks_per_rank",
            "clip",
            "alpha",
            "weight_decay",
        ):
            self._expect(name, getattr(self, name) >= 0, "0 or more")
        for name, value in vars(self).items():
            self._expect(name, not isinstance(value, float) or math.isfinite(value), "a finite number")
            if type(value) is int and name not in ("seed", "val_every"):
                self._expect(name, value < 2**53, "less than 2**53")
        self._expect("mbs", self.mbs < 2**31, "less than 2**31, because positions have 32 bits")
        self._expect("timeout", self.timeout <= 1e7, "at most 1e7 seconds")
        for name in ("lr", "timeout", "router_lr"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        for name in ("warmup", "decay"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        decay = self.decay if self.schedule.startswith("wsd") else 0
        self._expect("decay", self.warmup + decay <= 1, f"at most 1 together with --warmup {self.warmup}")
        self._expect("ratio_rise", 0 <= self.ratio_rise <= 1, "a share from 0 to 1")
        self._expect("ratio_rise", self.ratio_from or not self.ratio_rise, "also --ratio-from, where the target starts")
        self._expect("ratio_from", self.ratio_rise or not self.ratio_from, "also --ratio-rise, the share of the steps")
        self._expect("sample_bytes", self.sample_bytes <= 2**16, "at most 65536")
        self._expect("seed", 0 <= self.seed < 2**63, "0 or more, below 2**63")
        self._expect("resume", self.resume != "auto" or self.save_dir, "also --save-dir, the folder of the run")
        if self.resume and self.early_exit != "no":
            raise UserError(f"-e {self.early_exit} with --resume: expected -p, which names the weights to check")
        if self.resume not in ("", "auto") and not Path(self.resume).is_dir():
            what = "a file" if Path(self.resume).exists() else "no such folder"
            raise UserError(f"--resume {self.resume}: {what}; expected auto, or the folder of a run or of a checkpoint")
        for name in ("wandb", "tensorboard"):
            if self.logger == name and importlib.util.find_spec(name) is None:
                raise UserError(f"--logger {name}: {name} is not installed; pip install -e '.[{name}]'")

    def _expect(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")


def read_config(argv: Sequence[str]) -> TrainConfig:
    """The flags of a command line. Missing ones come from --config-file, then from the run of --resume, then defaults.

    Raises UserError for flags that can't be used.
    """
    parser = commands.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-file")
    file, rest = parser.parse_known_args(argv)
    given = _read_yaml(file.config_file) if file.config_file else {}
    config = commands.read_flags(TrainConfig, rest, default=TrainConfig(**given), description=ABOUT)
    if earlier := _flags_of_the_run(config):
        config = commands.read_flags(TrainConfig, rest, default=TrainConfig(**earlier | given))
        config.global_slices = config.global_slices or earlier.get("global_slices", 0)
        _keep_model_of_the_run(config, earlier)
    if config.val_every == -1:
        config.val_every = max(1, config.steps // 3)
    config.check()
    return config


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        given = yaml.safe_load(Path(path).read_bytes()) or {}
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); expected a YAML file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file ({str(error).splitlines()[0]})") from None
    kinds = get_type_hints(TrainConfig)
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected flags and their values, like steps: 900")
    for key, value in given.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r}; known are {', '.join(kinds)}")
        kind, choices = kinds[key], get_args(kinds[key])
        if kind is float and not isinstance(value, bool):  # YAML reads 1e-3 as text; it expects 1.0e-3
            with contextlib.suppress(TypeError, ValueError):
                value = given[key] = float(value)
        if choices and value not in choices:
            raise UserError(f"{path}: {key}: {value!r}; expected one of {', '.join(choices)}")
        if not choices and type(value) is not kind:
            raise UserError(f"{path}: {key}: {value!r}; expected {kind.__name__}")
    return given


def _keep_model_of_the_run(config: TrainConfig, earlier: dict[str, Any]) -> None:
    """Where a checkpoint is resumed, which has the weights: warns that another -p is not used, and drops it.

    A start without a checkpoint uses -p. Raises UserError for a -c of the command line that does not exist.
    """
    folder = Path(_resumed_folder(config))
    if not (run_folder.complete(folder) or run_folder.is_complete(folder)):
        return
    if config.config != earlier.get("config", "") and not find_config(config.config).exists():
        raise UserError(f"-c {config.config}: no such config file")
    if config.pt_ckpt != (of_the_run := earlier.get("pt_ckpt", "")):
        if os.environ.get("RANK", "0") == "0":
            commands.warn(f"-p {config.pt_ckpt} is not used: {folder} has a checkpoint, whose weights the run resumes")
        config.pt_ckpt = of_the_run


def _resumed_folder(config: TrainConfig) -> str:
    """The folder that --resume names, of a run or of a checkpoint; empty without --resume."""
    return config.save_dir if config.resume == "auto" else config.resume


def _flags_of_the_run(config: TrainConfig) -> dict[str, Any]:
    """The flags of the run that is resumed, if there is one; `TrainConfig.check` checks them later."""
    folder = _resumed_folder(config)
    if not folder:
        return {}
    earlier = run_folder.train_config_of(folder)
    if earlier is None and (Path(folder) / "train.yaml").exists():  # it ended before its first checkpoint
        earlier = _read_yaml(f"{folder}/train.yaml")
    known = {field.name for field in dataclasses.fields(TrainConfig)} - set(OF_ONE_START)
    return {name: value for name, value in (earlier or {}).items() if name in known}
