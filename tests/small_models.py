"""Small models with weights that make every part matter, and batches for them."""

from types import ModuleType

import numpy as np
import torch
from golden.golden_weights import golden_weight
from golden_io import pack
from torch import Tensor, nn

TWO_STAGES = {
    "arch_layout": ["m1", ["T1m1", ["t1M1"], "m1T1"], "t1"],
    "d_model": [32, 64, 64],
    "d_intermediate": [0, 96, 128],
    "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [2, 2, 4], "rotary_emb_dim": [8, 16, 0], "window_size": [7, 3, -1]},
}

ONE_STAGE = {
    "arch_layout": ["m1", ["T1"], "m1"],
    "d_model": [64, 64],
    "d_intermediate": [0, 64],
    "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [2, 2], "rotary_emb_dim": [16, 16], "window_size": [-1, -1]},
}


def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Weights as the goldens draw them: nothing is zero or one, chunks have random lengths."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(golden_weight(f"{seed}.{name}", tuple(parameter.shape))))


def build(module: ModuleType, raw: dict, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An HNetLM of `module`, which is hnet_trainable."""
    model = module.HNetLM(module.HNetConfig.load(raw)).to(dtype)
    draw_weights(model, seed)
    return model


def random_documents(lengths: list[int], seed: int = 0, vocab: int = 256) -> list[np.ndarray]:
    """Documents of so many inputs: one byte longer each, for the labels. Bytes repeat, as text does."""
    rng = np.random.RandomState(seed)
    alphabet = rng.permutation(vocab)[:12]
    return [alphabet[rng.randint(0, len(alphabet), n + 1)].astype(np.uint8) for n in lengths]


def inputs_of(documents: list[np.ndarray]) -> Tensor:
    return pack(documents)[0]


def relative_gap(ours: Tensor | None, wanted: Tensor | None) -> float:
    """The largest difference, relative to the largest of `wanted` or 1. A gradient that was not computed is zero."""
    if ours is None or wanted is None:
        given = ours if wanted is None else wanted
        return 0.0 if given is None else given.abs().max().item()
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    if not ours.numel():
        return 0.0
    return ((ours - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item()
