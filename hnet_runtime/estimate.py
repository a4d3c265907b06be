"""What a run will take of a card, before it starts: memory, and a range for the time of a step. No GPU is needed.

Memory is counted from the shapes of the model: weights and optimizer; what each layer saves for the backward; the
largest layer's work; buffers between stages. On 2026-11-29 this was 0 to 12% below what an H200 reserved (tests compare
it with the ledger), so MARGIN is added.

The time is that of an H200 (a fixed part for the optimizer, and model FLOPs at the share of its peak that was measured)
times how much slower the card's tensor cores are, and its memory: two numbers, between which the time should be.
"""

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hnet_config import HNetConfig
from hnet_kernels import cards
from hnet_kernels.cards import CARDS, Card
from hnet_kernels.launch_options import SCAN, family
from hnet_kernels.recompute import MODES
from hnet_runtime.flops import count_flops
from hnet_trainable import Block, HNetLM, stage_of

GIB = 2**30
WEIGHT = 14  # bytes per parameter: float32 in two halves of 16 bits, two moments, a gradient in bfloat16
MARGIN = 1.12
FREE_SHARE = 8  # 1 / FREE_SHARE of the memory is left for validation and saving, see steps/graphs.py
EARLY = 0.5  # the share of tokens that opens a chunk while a router is untrained, which takes most memory
OPTIMIZER = 30  # bytes per parameter that clipping and AdamW read and write
H200 = CARDS["h200"]
# Share of an H200's bfloat16 peak that a step reaches beside its fixed part, by the width of the innermost stage: from
# the steps of 32,768 bytes of hnet_1stage_small (31.7 ms) and hnet_2stage_XL (128.5 ms), 2026-11-29, commit 57ee6b1
UTILISATION = {1024: 0.387, 2048: 0.496}
FIXED_MS = 0.1  # per block, from the steps of 8,192 bytes (11.6 ms)
RECOMPUTES = {"none": 1.0, "selective": 1.03, "block": 1.22}  # times the work of a step, measured there too


class Memory(NamedTuple):
    """GiB on each GPU, by what they hold."""

    weights: float
    saved: float
    work: float

    @property
    def total(self) -> float:
        return self.weights + MARGIN * (self.saved + self.work)


class _Layer(NamedTuple):
    """Bytes per token of a layer: saved for the backward by mode, and its largest work."""

    stage: int
    saved: dict[str, int]
    work: int
    states: int  # of the scan, per token if a chunk has one token; saved with `none`


@functools.cache
def _shapes(text: str) -> tuple[int, list[_Layer]]:
    """Parameters, and two layers for each block: as it is, and recomputed. text: a config as JSON."""
    config = HNetConfig.load(json.loads(text))
    with torch.device("meta"):
        model = HNetLM(config)
    layers = []
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        stage = stage_of(name + ".", config)
        D = config.d_model[stage]
        largest = max(p.shape[0] for p in block.mixer.parameters() if p.ndim == 2)  # of the projection into it
        stream = 3 * D  # the residual stream in 24 bits, and everything else in bfloat16
        if hasattr(block.mixer, "A_log"):
            inner = config.ssm_cfg.expand * D
            after, states = 2 * (inner + 2 * config.ssm_cfg.d_state), 2 * inner * config.ssm_cfg.d_state
            selective = 2 * largest + 2 * inner + stream
            full = selective + 2 * D + after + 2 * inner
            work = 4 * largest + 2 * after + 8 * inner
        else:
            selective = 2 * largest + 2 * D + stream
            full, work, states = selective + 2 * D, 4 * largest + 8 * D, 0
        everything = full
        if block.has_mlp:
            hidden = config.d_intermediate[stage]
            selective += 4 * hidden + stream
            full += 2 * D + 6 * hidden + stream
            work = max(work, 12 * hidden + 4 * D)
            everything += 2 * D + 6 * hidden + stream
        layers += [
            _Layer(stage, {"none": full, "selective": selective, "block": stream}, work, states),
            _Layer(stage, dict.fromkeys(MODES, 0), work + everything, states),  # what --ac block computes at once
        ]
    return sum(p.numel() for p in model.parameters()), layers


def tokens(config: HNetConfig, mbs: int, shares: Sequence[float]) -> list[float]:
    """Tokens of each stage in a micro-batch; shares: of its tokens that open a chunk, by stage."""
    found = [float(mbs)]
    for share in shares:
        found.append(found[-1] * share)
    return found


def memory(
    config: HNetConfig, mbs: int, ac: str, shares: Sequence[float] | None = None, accumulates: bool = False,
    shards: int = 1, card: Card = H200,
) -> Memory:  # fmt: skip
    """Memory of training steps. shares: as in `tokens`; by default those of an untrained router.

    accumulates: with several micro-batches per step, gradients are summed in float32. shards: of the weights (FSDP2).
    card: decides how many tokens a chunk of the scan has.
    """
    chunk = SCAN[family(card.capability)][torch.bfloat16].tokens
    count, layers = _shapes_of(config)
    at = tokens(config, mbs, shares or [EARLY] * config.num_stages)
    weights = count * (WEIGHT + 6 * accumulates) / shards
    blocks = layers[0::2]
    saved = sum((x.saved[ac] + (ac == "none") * x.states / chunk) * at[x.stage] for x in blocks)
    work = max((x.work + 2 * x.states / chunk) * at[x.stage] for x in (layers[1::2] if ac == "block" else blocks))
    for s in range(config.num_stages):  # what stages pass to each other, with gradients
        work += config.d_model[s] * (12 * at[s] + 8 * at[s + 1])
    return Memory(weights / GIB, saved / GIB, work / GIB)


def _shapes_of(config: HNetConfig) -> tuple[int, list[_Layer]]:
    return _shapes(json.dumps(config.to_dict()))


def choose_ac(config: HNetConfig, mbs: int, card: Card, accumulates: bool = False, shards: int = 1) -> str:
    """The activation checkpointing that costs least time among those that fit into a card's memory; else `block`."""
    return next((ac for ac in MODES if fits(memory(config, mbs, ac, None, accumulates, shards, card), card)), MODES[-1])


def fits(needed: Memory, card: Card) -> bool:
    return needed.total <= card.gib * (1 - 1 / FREE_SHARE)


def card_of(device: torch.device) -> Card:
    """What estimates need of a GPU; peaks are those of a card of its name, where it is known."""
    name = torch.cuda.get_device_name(device)
    card = cards.imitated() or cards.named(name) or H200
    return card._replace(name=name, capability=cards.capability(device), gib=cards.memory(device)[1] / GIB)


def step_ms(config: HNetConfig, mbs: int, slices: int, ac: str, card: Card = H200) -> tuple[float, float]:
    """The least and the most milliseconds of a step of this many micro-batches, at the config's target compression."""
    at = tokens(config, mbs, [1 / ratio for ratio in config.target_ratios])
    document = 4096  # bytes, for the share of attention
    lengths = [[max(1, round(n / max(1, mbs // document)))] * max(1, mbs // document) for n in at]
    flops = count_flops(config, lengths).total * RECOMPUTES[ac]
    narrow, wide = UTILISATION
    share = min(1.0, max(0.0, (config.d_model[-1] - narrow) / (wide - narrow)))
    reached = UTILISATION[narrow] + share * (UTILISATION[wide] - UTILISATION[narrow])
    count, layers = _shapes_of(config)
    fixed = FIXED_MS * slices * len(layers) / 2
    on_h200 = slices * flops / (H200.tflops * 1e12 * reached) + OPTIMIZER * count / (H200.gb_per_s * 1e9)
    factors = H200.tflops / card.tflops, H200.gb_per_s / card.gb_per_s
    return fixed + 1000 * on_h200 * min(factors), fixed + 1000 * on_h200 * max(factors)


def report(config: HNetConfig, mbs: int, slices: int, ac: str, chosen: Sequence[Card]) -> str:
    """Lines about a run on each of some cards: parameters; memory and time of a step. ac: `auto`, or one of MODES."""
    count, layers = _shapes_of(config)
    lines = [
        f"{count:,} parameters in {len(layers) // 2} blocks; a step has {slices} x {mbs:,} bytes on each GPU",
        f"{'card':12} {'--ac':10} {'weights':>9} {'steps':>9} {'needed':>9} {'card has':>9}   {'time of a step':18}",
    ]
    for card in chosen:
        mode = choose_ac(config, mbs, card, slices > 1) if ac == "auto" else ac
        needed = memory(config, mbs, mode, None, slices > 1, card=card)
        least, most = step_ms(config, mbs, slices, mode, card)
        time = f"{least:.0f} to {most:.0f} ms" if most - least >= 1 else f"{most:.0f} ms"
        if not fits(needed, card):
            time = "does not fit: take a smaller --mbs with more --global-slices, or more GPUs"
        sizes = needed.weights, needed.total - needed.weights, needed.total, card.gib
        lines.append(f"{card.name:12} {mode:10} " + " ".join(f"{n:5.1f} GiB" for n in sizes) + f"   {time}")
    lines.append(
        "weights: with gradients and the optimizer's state. steps: what a step stores beside them. "
        "Memory is counted from the shapes of the model, with routers that are not trained yet: half of all tokens "
        "open a chunk. Times are those of steps measured on an H200, scaled by model FLOPs and by the peaks of the "
        "cards. They can be wrong by a fifth or more."
    )
    return "\n".join(lines)
