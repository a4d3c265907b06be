"""The model agrees with the official implementation: outputs, losses and the gradient of every parameter."""

import numpy as np
import pytest
import torch
from golden_io import NAMES, golden_documents, golden_model, load_golden, pack, projected


def disagreements(name: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Largest difference per kind of number; gradients relative to their norm. Masks: how many positions differ."""
    golden = load_golden(name)
    model = golden_model(golden, dtype, device)
    out = model(*pack(golden_documents(golden), device))
    loss = out.ce + 0.03 * out.ratio_losses.sum()
    loss.backward()
    worst = dict.fromkeys(("logits", "p", "b", "ce", "ratio", "loss", "grad_norm", "grad_dot"), 0.0)

    def note(kind: str, ours, theirs, scale: float = 1.0) -> None:
        difference = np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)) / scale
        assert np.isfinite(difference).all(), f"{kind} is not finite"
        worst[kind] = max(worst[kind], float(difference.max(initial=0.0)))

    for i in range(int(golden["n_docs"])):
        note("logits", out.logits[i].detach().cpu(), golden[f"logits{i}"])
        for s, stage in enumerate(out.stages):
            assert stage.boundary_prob[i].shape == golden[f"p{i}_s{s}"].shape
            note("p", stage.boundary_prob[i].detach().cpu(), golden[f"p{i}_s{s}"])
            worst["b"] += int((stage.boundary_mask[i].cpu().numpy() != golden[f"b{i}_s{s}"]).sum())
    note("ce", out.ce.item(), golden["ce"])
    note("ratio", out.ratio_losses.detach().cpu(), golden["ratio"])
    note("loss", loss.item(), golden["loss"])
    names = [str(n) for n in golden["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    for n, norm, dot in zip(names, golden["grad_norm"], golden["grad_dot"]):
        our_norm, our_dot = projected(parameters[n].grad, n)
        note("grad_norm", our_norm, norm, scale=norm)
        note("grad_dot", our_dot, dot, scale=norm)
    return worst


@pytest.mark.parametrize("name", NAMES)
def test_float64(name):
    """Tolerances of tests/golden/README.md: the logits are stored in float32, all else in float64."""
    worst = disagreements(name, torch.float64)
    assert worst.pop("logits") < 1e-6
    assert worst.pop("b") == 0
    assert max(worst.values()) < 1e-9, worst


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    """1e-4, and every boundary: the nearest |p - 0.5| of the goldens is 4e-5."""
    worst = disagreements(name, torch.float32)
    assert worst.pop("b") == 0
    assert max(worst.values()) < 1e-4, worst
