"""The config of an H-Net: reads and checks the files of configs/. Imports no torch.

`HNetConfig.load` reads a JSON file, a config of configs/ by its name, or a mapping. An invalid one raises a
ConfigError that names the key and says what is allowed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

HEADDIM = 64  # channels per head of Mamba-2
BOS, EOS = 0xFE, 0xFF  # neither byte occurs in UTF-8 (code)
_HERE = Path(__file__).resolve().parent
CONFIGS = _HERE / "hnet_configs" if (_HERE / "hnet_configs").is_dir() else _HERE / "configs"  # installed, or a checkout


class ConfigError(ValueError):
    """A model config that can't be used; the message names the key and says what is allowed."""


# The registry of mixers: letter of layouts -> class. hnet_trainable.py registers its own.
MIXERS: dict[str, Any] = {}

# The registry of routers: name in `routers` -> class. hnet_routers.py and hnet_trainable.py register theirs.
ROUTERS: dict[str, Any] = {}
LEARNED = "learned"  # the router of the paper, and the default


# No model that fits into a machine is near these bounds; a larger size is a typing error.
MAX_STAGES = 16
MAX_LAYERS = 10_000  # in one layout
MAX_PARAMETERS = 10**12
MAX_VALUES = {
    "vocab_size": 2**20,
    "d_model": 2**16,
    "d_intermediate": 2**20,
    "N_compress": 10**6,
    "ssm_cfg.chunk_size": 2**20,
    "ssm_cfg.d_conv": 2**10,
    "ssm_cfg.d_state": 2**16,
    "ssm_cfg.expand": 2**8,
    "attn_cfg.num_heads": 2**16,
    "attn_cfg.rotary_emb_dim": 2**16,
    "attn_cfg.window_size": 2**30,
}


@dataclasses.dataclass(frozen=True)
class SSMConfig:
    """Mamba-2 layers. `chunk_size` is an official key that does not change results; kernels choose their own."""

    chunk_size: int = 256
    d_conv: int = 4
    d_state: int = 128
    expand: int = 2


@dataclasses.dataclass(frozen=True)
class AttnConfig:
    """Attention layers, one entry per stage. `window_size` w lets position i see i - w..i; -1 means all before it."""

    num_heads: tuple[int, ...] = ()
    rotary_emb_dim: tuple[int, ...] = ()
    window_size: tuple[int, ...] = ()


class Layer(NamedTuple):
    """One letter of a layout, in lower case: `m` Mamba-2, `t` attention, or another of MIXERS."""

    mixer: str
    has_mlp: bool  # the letter was upper case: a SwiGLU follows the mixer


def parse_layout(layout: str) -> list[Layer]:
    """`"T1m2"` -> one attention block with MLP and two Mamba-2 blocks without. Raises ConfigError if invalid."""
    for letter in MIXERS:
        if not re.fullmatch("[a-z]", letter):
            raise ConfigError(f"MIXERS: {letter!r}; expected one lower-case letter: its capital adds an MLP")
    known = "".join(MIXERS or "mt")
    letters = f"[{known}{known.upper()}]"
    if not isinstance(layout, str) or not re.fullmatch(f"({letters}[0-9]+)+", layout):
        written = " ".join(f"{letter} {letter.upper()}" for letter in known)
        raise ConfigError(
            f"arch_layout: {_shown(layout)} is not a layout; write letters of {written}, each with a count: 'T1m4'"
        )
    found = re.findall(f"({letters})0*([0-9]*)", layout)
    counts = [int(count[:9] or 0) for _, count in found]  # the first nine digits already exceed any limit
    if sum(counts) > MAX_LAYERS:
        raise ConfigError(f"arch_layout: {_shown(layout)} has too many layers; expected at most {MAX_LAYERS:,} in one")
    return [Layer(letter.lower(), letter.isupper()) for (letter, _), count in zip(found, counts) for _ in range(count)]


def parse_router(written: str, s: int) -> tuple[Any, str]:
    """`"stride:4"` -> the class that is registered as `stride`, and `"4"`.

    Raises ConfigError if there is no such router or stage s cannot have it.
    """
    if not ROUTERS:
        import hnet_routers  # noqa: F401 (it registers them; here, because it imports torch)
    name, colon, argument = written.partition(":") if isinstance(written, str) else ("", "", "")
    if name not in ROUTERS:
        known = ", ".join(dict.fromkeys([LEARNED, *(kind.usage for kind in ROUTERS.values())]))
        raise ConfigError(f"routers: {_shown(written)} for stage {s}; expected one of {known}")
    kind = ROUTERS[name]
    if not re.fullmatch(kind.pattern, argument) or bool(colon) != bool(argument):
        raise ConfigError(f"routers: {_shown(written)} for stage {s}; expected {kind.usage}")
    if kind.reads_bytes and s:
        raise ConfigError(f"routers: {_shown(written)} for stage {s}; it reads bytes, so only stage 0 can have it")
    return kind, argument


@dataclasses.dataclass(frozen=True)
class HNetConfig:
    """The official JSON keys plus `N_compress`. Stage 0 is outermost; a config of S + 1 widths has S chunking stages.

    arch_layout: `["m4", ["T1m4", ["T26"], "m4T1"], "m4"]`: encoder, inner network, decoder; innermost one string.
    d_model, d_intermediate: a width per stage; d_intermediate is 0 where no layer has an MLP, and is rounded up to a
        multiple of 128 (code).
    N_compress: `(1, 3, 9)`: target bytes per token at each stage; a chunk of stage s should have N[s + 1] / N[s].
    routers: what decides where chunks begin, one for each chunking stage: `learned`, or a rule of ROUTERS.
    """

    arch_layout: Any
    d_model: tuple[int, ...]
    d_intermediate: tuple[int, ...]
    vocab_size: int = 256
    ssm_cfg: SSMConfig = SSMConfig()
    attn_cfg: AttnConfig = AttnConfig()
    tie_embeddings: bool = False
    N_compress: tuple[float, ...] = ()
    routers: tuple[str, ...] = ()

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], **overrides: Any) -> HNetConfig:
        """A checked config from a JSON file or a mapping, with keys replaced by `overrides`.

        If the file does not exist, its name is looked up in configs/, from any folder: "hnet_1stage_tiny". Raises
        ConfigError (with the file and the key) for anything unknown, missing or impossible.
        """
        if isinstance(source, Mapping):
            return cls._from_mapping({**source, **overrides})
        try:
            raw = json.loads(find_config(source).read_text(encoding="utf-8-sig"), parse_int=_parse_int)
        except FileNotFoundError:
            names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
            raise ConfigError(f"{source}: no such config file; known by name are {names}") from None
        except OSError as error:
            raise ConfigError(f"{source}: can't be read ({error.strerror}); expected a JSON file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: not JSON (byte {error.start} is not UTF-8)") from None
        except RecursionError:
            raise ConfigError(f"{source}: not a model config (its lists are nested too deep)") from None
        except ValueError as error:
            raise ConfigError(f"{source}: not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{source}: expected a JSON object with the keys {', '.join(_keys(cls))}")
        if "model_type" in raw and isinstance(raw.get("hnet"), dict):  # written by transformers
            raw = raw["hnet"]
        try:
            return cls._from_mapping({**raw, **overrides}, find_config(source).parent)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def _from_mapping(cls, raw: dict[str, Any], folder: Path = Path(".")) -> HNetConfig:
        """folder: where a file that the config names is looked for first."""
        for section, kind in (("", cls), ("ssm_cfg", SSMConfig), ("attn_cfg", AttnConfig)):
            given = raw.get(section, {}) if section else raw
            if not isinstance(given, Mapping):
                raise ConfigError(f"{section}: expected an object with the keys {', '.join(_keys(kind))}")
            for key in given:
                if key not in _keys(kind):
                    place = f"{section}." if section else ""
                    raise ConfigError(f"unknown key {place}{str(key)[:60]}; known are {', '.join(_keys(kind))}")
        for key in ("arch_layout", "d_model", "d_intermediate", "attn_cfg"):
            if key not in raw:
                raise ConfigError(f"{key}: missing")
        lists = {k: _numbers(raw[k], k) for k in ("d_model", "d_intermediate")}
        heads = {k: _numbers(v, f"attn_cfg.{k}") for k, v in raw["attn_cfg"].items()}
        ratios = _numbers(raw.get("N_compress", ()), "N_compress", whole=False)
        stages = len(lists["d_model"]) - 1
        if stages < 0:
            raise ConfigError("d_model: an empty list; expected one width per stage")
        routers = _routers(raw.get("routers", [LEARNED] * stages), stages, folder)
        if not ratios:
            rates = [_known_rate(router, s) for s, router in enumerate(routers)]
            if stages > 2 and None in rates:
                raise ConfigError(
                    f"N_compress: missing; it has no default for {stages} stages: give {stages + 1} numbers"
                )
            default = 6 if stages == 1 else 3
            ratios = tuple(itertools.accumulate([1, *(rate or default for rate in rates)], operator.mul))
            ratios = _numbers(ratios, "N_compress", whole=False)
        ssm = SSMConfig(**{k: _whole(v, f"ssm_cfg.{k}") for k, v in raw.get("ssm_cfg", {}).items()})
        fields = {**raw, **lists, "ssm_cfg": ssm, "attn_cfg": AttnConfig(**heads), "N_compress": ratios}
        config = cls(**fields | {"routers": routers})
        config._check()
        return config

    def _check(self) -> None:
        S = self.num_stages
        attn, per_stage = self.attn_cfg, {"d_intermediate": self.d_intermediate, "N_compress": self.N_compress}
        per_stage |= {f"attn_cfg.{f.name}": getattr(attn, f.name) for f in dataclasses.fields(attn)}
        for key, values in per_stage.items():
            if len(values) != S + 1:
                raise ConfigError(f"{key}: {len(values)} numbers for {S + 1} widths in d_model; give one a stage")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tie_embeddings: {_shown(self.tie_embeddings)}; expected true or false")
        if _whole(self.vocab_size, "vocab_size") < 256:
            raise ConfigError(f"vocab_size: {self.vocab_size}; a byte model needs at least 256")
        for field in dataclasses.fields(SSMConfig):
            if getattr(self.ssm_cfg, field.name) < 1:
                raise ConfigError(f"ssm_cfg.{field.name}: {getattr(self.ssm_cfg, field.name)}; expected 1 or more")
        if any(a > b for a, b in zip(self.d_model, self.d_model[1:])):
            raise ConfigError(
                f"d_model: {list(self.d_model)} shrinks; a stage is at least as wide as the one around it"
            )
        if self.N_compress[0] != 1 or any(a >= b for a, b in zip(self.N_compress, self.N_compress[1:])):
            raise ConfigError(f"N_compress: {list(self.N_compress)}; expected 1 and then growing numbers, like 1, 3, 9")
        for s, (router, N) in enumerate(zip(self.routers, self.target_ratios)):
            rate = _known_rate(router, s)
            if rate and not math.isclose(N, rate):
                raise ConfigError(
                    f"N_compress: {list(self.N_compress)} with {router} for stage {s}; expected "
                    f"{rate * self.N_compress[s]:g} in place of {self.N_compress[s + 1]:g}"
                )
        node = self.arch_layout
        for s in range(S + 1):
            wanted, form = (3, '["m4", [...], "m4"]') if s < S else (1, '["T12"]')
            if not isinstance(node, list | tuple) or len(node) != wanted:
                raise ConfigError(
                    f"arch_layout: {_shown(node)} for stage {s} of {S + 1} widths in d_model; expected {form}"
                )
            self._check_stage(s, [layer for layout in node[::2] for layer in parse_layout(layout)])
            node = node[1] if s < S else None
        if (count := self.count_parameters()) > MAX_PARAMETERS:
            raise ConfigError(
                f"d_model: with these widths and layers the model has {count:,} parameters; expected at most "
                f"{MAX_PARAMETERS:,}"
            )

    def _check_stage(self, s: int, layers: list[Layer]) -> None:
        width, heads, rotary = self.d_model[s], self.attn_cfg.num_heads[s], self.attn_cfg.rotary_emb_dim[s]
        if width < 1:
            raise ConfigError(f"d_model: {width} for stage {s}; expected 1 or more")
        if any(layer.has_mlp for layer in layers) and self.d_intermediate[s] < 1:
            raise ConfigError(
                f"d_intermediate: {self.d_intermediate[s]} for stage {s}, whose M and T layers need 1 or more"
            )
        if any(layer.mixer == "m" for layer in layers) and width * self.ssm_cfg.expand % HEADDIM:
            raise ConfigError(f"d_model: {width} * ssm_cfg.expand is no multiple of Mamba-2's head size {HEADDIM}")
        if any(layer.mixer == "t" for layer in layers):
            if heads < 1 or width % heads:
                raise ConfigError(f"attn_cfg.num_heads: {heads} does not divide d_model {width} of stage {s}")
            if rotary < 0 or rotary % 2 or rotary > width // heads:
                raise ConfigError(
                    f"attn_cfg.rotary_emb_dim: {rotary} for stage {s}; expected an even number from 0 to the head size "
                    f"{width // heads}"
                )
            if self.attn_cfg.window_size[s] < -1:
                raise ConfigError(
                    f"attn_cfg.window_size: {self.attn_cfg.window_size[s]} for stage {s}; expected -1 or more"
                )

    def count_parameters(self) -> int:
        """The number of parameters of the model, computed without building it; without parameters of added mixers."""
        N, d_conv = self.ssm_cfg.d_state, self.ssm_cfg.d_conv
        total = self.vocab_size * self.d_model[0] * (1 if self.tie_embeddings else 2)
        for s, D in enumerate(self.d_model):
            d_inner, mlp = self.ssm_cfg.expand * D, -(-self.d_intermediate[s] // 128) * 128
            channels, heads = d_inner + 2 * N, d_inner // HEADDIM
            mamba = D * (d_inner + channels + heads) + channels * (d_conv + 1) + 3 * heads + d_inner + d_inner * D
            for layout in self.layouts(s):
                layers = parse_layout(layout)
                total += D  # the final norm
                total += sum({"m": mamba, "t": 4 * D * D}.get(layer.mixer, 0) + D for layer in layers)
                total += sum(3 * D * mlp + D for layer in layers if layer.has_mlp)
            if s < self.num_stages:
                total += D * D + D + self.is_learned[s] * 2 * D * D  # residual_proj and a learned router
            total += D - self.d_model[max(s - 1, 0)]  # pad_dimension
        return total

    @property
    def num_stages(self) -> int:
        """S, the number of chunking stages: 0 for a plain isotropic model."""
        return len(self.d_model) - 1

    @property
    def target_ratios(self) -> tuple[float, ...]:
        """N of the ratio loss (eq. 10) for each chunking stage: the target number of its tokens per chunk."""
        return tuple(inner / outer for outer, inner in zip(self.N_compress, self.N_compress[1:]))

    def _router(self, s: int) -> Any:
        """The class of stage s's router; None for `learned` where no torch, and so no RoutingModule, is imported."""
        return ROUTERS.get(LEARNED) if self.routers[s] == LEARNED else parse_router(self.routers[s], s)[0]

    @property
    def is_learned(self) -> tuple[bool, ...]:
        """For each chunking stage, whether its router learns. A rule has no weights and no ratio loss."""
        return tuple((kind := self._router(s)) is None or kind.is_learned for s in range(self.num_stages))

    @property
    def learned_ratios(self) -> tuple[float | None, ...]:
        """`target_ratios`, but None for a rule, which has no target."""
        return tuple(N if learns else None for N, learns in zip(self.target_ratios, self.is_learned))

    @property
    def stages_by_cuts(self) -> tuple[int, ...]:
        """The chunking stages whose routers read the `cuts` of `HNetLM.forward`."""
        return tuple(s for s in range(self.num_stages) if (kind := self._router(s)) and kind.reads_cuts)

    @property
    def stages_not_causal(self) -> tuple[int, ...]:
        """The chunking stages whose routers open chunks by bytes that come later."""
        return tuple(s for s in range(self.num_stages) if (kind := self._router(s)) and not kind.is_causal)

    def layouts(self, s: int) -> tuple[str, ...]:
        """Stage s's layouts: (encoder, decoder), or (main network,) for the innermost."""
        node = self.arch_layout
        for _ in range(s):
            node = node[1]
        return tuple(node[::2])

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `load` reads, ready for JSON. `routers` is left out where all are learned."""
        raw = json.loads(json.dumps(dataclasses.asdict(self)))
        if all(router == LEARNED for router in self.routers):
            del raw["routers"]
        return raw


def find_config(source: str | Path) -> Path:
    """The file that `source` names: itself if it exists, else the file of configs/ with that name."""
    path = Path(source)
    ours = CONFIGS / f"{path.name.removesuffix('.json')}.json"
    is_ours = path.parent in (Path("."), Path("configs")) and ours.is_file() and not path.is_file()
    return ours if is_ours else path


def _keys(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key}: {_shown(value)}; expected a whole number")
    return _bounded(value, key, _shown(value))


def _numbers(values: Any, key: str, whole: bool = True) -> tuple:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{key}: {_shown(values)}; expected a list of numbers, one a stage")
    if len(values) > MAX_STAGES + 1:
        raise ConfigError(f"{key}: a list of {len(values):,} numbers; expected at most {MAX_STAGES + 1}, one a stage")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ConfigError(f"{key}: {_shown(value)} in the list; expected {'whole ' if whole else ''}numbers")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}: {value} in the list; expected finite numbers")
        _bounded(value, key, f"{_shown(value)} in the list")
    return tuple(values)


def _routers(written: Any, stages: int, folder: Path) -> tuple[str, ...]:
    """The routers of all chunking stages, checked, with complete paths of their files."""
    if not isinstance(written, list | tuple):
        raise ConfigError(f"routers: {_shown(written)}; expected a list of names, one for each chunking stage")
    if len(written) != stages:
        raise ConfigError(f"routers: {len(written)} names for {stages} chunking stages; give one for each")
    found: list[str] = []
    for s, name in enumerate(written):
        if name == LEARNED:
            found.append(name)
            continue
        kind, argument = parse_router(name, s)
        if kind.reads_cuts and s and (found[-1] == LEARNED or not parse_router(found[-1], s - 1)[0].reads_cuts):
            raise ConfigError(
                f"routers: {_shown(name)} for stage {s}; expected a router of this kind for stage {s - 1}, too"
            )
        found.append(f"{name.partition(':')[0]}:{_find_file(argument, s, folder)}" if kind.reads_file else name)
    return tuple(found)


def _find_file(name: str, s: int, folder: Path) -> Path:
    """The complete path of a file: beside the config, or from the working directory."""
    for path in (folder / name, Path(name), folder / Path(name).name):
        if path.is_file():
            return path.resolve()
    places = dict.fromkeys((str(folder.resolve()), os.getcwd()))
    raise ConfigError(f"routers: the file {name!r} for stage {s} is missing; looked for in {' and '.join(places)}")


def _known_rate(router: str, s: int) -> int | None:
    """The tokens per chunk of a rule that fixes them."""
    kind, argument = (None, "") if router == LEARNED else parse_router(router, s)
    return int(argument) if kind and kind.fixes_rate else None


def _bounded(value: Any, key: str, shown: str) -> Any:
    least, most = -1 if key == "attn_cfg.window_size" else 0, MAX_VALUES.get(key, math.inf)
    if abs(value) > most:
        raise ConfigError(f"{key}: {shown}; expected {f'at most {most:,}' if value > 0 else f'{least} or more'}")
    return value


def _parse_int(digits: str) -> int:
    """An integer in JSON. Python refuses thousands of digits; the first thousand already exceed any limit."""
    return int(digits[:1000])


class _Shown(reprlib.Repr):
    """A value in a message, shortened."""

    maxlist = maxtuple = 8
    maxstring = maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**15 else f"a number of about {round(x.bit_length() * math.log10(2))} digits"


_shown = _Shown().repr
