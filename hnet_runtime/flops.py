"""Floating-point operations of a training step, from the document lengths at each stage; and what a GPU can do."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hnet_config import HNetConfig
from hnet_kernels import cards
from hnet_trainable import Block, HNetLM, stage_of


class Flops(NamedTuple):
    """Floating-point operations of one forward and backward (a multiply-add counts as two)."""

    matmul: float  # 6 x parameters of matrix products x tokens that reach them
    mixing: float  # other work of mixers: attention's scores and weighted sums, Mamba-2's recurrence

    @property
    def total(self) -> float:
        return sum(self)


@functools.cache
def _parts(config: HNetConfig) -> tuple[list[int], list[list[nn.Module]]]:
    """Per stage: the number of elements of its matrices, and its mixers."""
    with torch.device("meta"):
        model = HNetLM(config)
    elements, mixers = [0] * (config.num_stages + 1), [[] for _ in range(config.num_stages + 1)]
    for name, module in model.named_modules(remove_duplicate=False):  # a layer in two places computes in both
        s = stage_of(f"{name}.", config)
        if not isinstance(module, nn.Embedding):
            elements[s] += sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)
        if isinstance(module, Block):
            mixers[s].append(module.mixer)
    return elements, mixers


def count_flops(config: HNetConfig, stage_lengths: Sequence[Sequence[int]]) -> Flops:
    """FLOPs of a training step. stage_lengths[s]: the lengths of stage s's documents, in its tokens.

    These are model FLOPs: recomputation (activation checkpointing) does not count.
    """
    if len(stage_lengths) != config.num_stages + 1:
        raise ValueError(f"stage_lengths: {len(stage_lengths)} lists for {config.num_stages + 1} stages")
    hashable = dataclasses.replace(config, arch_layout=_with_tuples(config.arch_layout))
    matmul = mixing = 0.0
    for lengths, elements, mixers in zip(stage_lengths, *_parts(hashable)):
        matmul += 6 * elements * sum(lengths)
        mixing += sum(3 * mixer.flops(lengths) for mixer in mixers if hasattr(mixer, "flops"))
    return Flops(matmul, mixing)


def _with_tuples(layout: Any) -> Any:
    return tuple(map(_with_tuples, layout)) if isinstance(layout, list | tuple) else layout


def peak_flops(device: torch.device) -> float:
    """The device's dense bf16 peak in FLOP/s; NaN if it is unknown."""
    card = cards.named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card.tflops * 1e12 if card else math.nan
