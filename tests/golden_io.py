"""The golden files (see tests/golden/README.md): a model with their weights, their documents packed, their answers."""

import json
from pathlib import Path

import numpy as np
import torch
from golden.golden_weights import golden_weight, gradient_direction

from hnet_trainable import HNetConfig, HNetLM

FOLDER = Path(__file__).parent / "golden"
NAMES = ("one_stage", "two_stage")


def load_golden(name: str) -> dict:
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


def golden_config(golden: dict) -> HNetConfig:
    return HNetConfig.load(json.loads(str(golden["config"])), N_compress=[int(n) for n in golden["N_compress"]])


def golden_model(golden: dict, dtype: torch.dtype, device: str = "cpu") -> HNetLM:
    model = HNetLM(golden_config(golden)).to(device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(golden_weight(name, tuple(parameter.shape))))
    return model


def golden_documents(golden: dict) -> list[np.ndarray]:
    return [golden[f"doc{i}"] for i in range(int(golden["n_docs"]))]


def pack(documents: list[np.ndarray], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(iids, labels) of documents that hold one byte more than they have inputs."""
    lengths = torch.tensor([len(d) - 1 for d in documents])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    limits = {"min_seqlen": int(lengths.min()), "max_seqlen": int(lengths.max())}
    inputs = torch.from_numpy(np.concatenate([d[:-1] for d in documents]).astype(np.int64)).to(device)
    labels = torch.from_numpy(np.concatenate([d[1:] for d in documents]).astype(np.int64)).to(device)
    nested = torch.nested.nested_tensor_from_jagged
    return nested(inputs, offsets, **limits), nested(labels, offsets, **limits)


def projected(grad: torch.Tensor, name: str) -> tuple[float, float]:
    """(norm, projection on the golden direction) of a parameter's gradient."""
    flat = grad.detach().double().cpu()
    direction = torch.from_numpy(gradient_direction(name, tuple(flat.shape)))
    return flat.norm().item(), (flat * direction).sum().item() / direction.numel() ** 0.5
