"""Tests that need a CUDA device; skipped without one."""

import pytest
import torch
from golden_io import NAMES, golden_documents, golden_model, load_golden, pack
from test_golden import disagreements

from hnet_kernels.attention import attention, attention_definition

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", NAMES)
def test_golden_float64_on_cuda(name):
    worst = disagreements(name, torch.float64, "cuda")
    assert worst.pop("logits") < 1e-6 and worst.pop("b") == 0
    assert max(worst.values()) < 1e-9, worst


@pytest.mark.parametrize("name", NAMES)
def test_golden_float32_on_cuda(name):
    """Without TF32, torch's default: the tolerance of tests/golden/README.md."""
    assert torch.get_float32_matmul_precision() == "highest"
    worst = disagreements(name, torch.float32, "cuda")
    assert worst.pop("b") == 0
    assert max(worst.values()) < 1e-4, worst


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("window", [-1, 7, 63])
def test_flash_attention_matches_the_definition(window):
    """bf16 keeps 8 bits: an operand's rounding is 2^-9 relative, some of which add up. 1e-2 is the usual bound."""
    lengths = [1, 2, 63, 64, 65, 257]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(sum(lengths), 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    do = torch.randn_like(q)
    fast = attention(q, k, v, cu, max(lengths), window)
    fast_grads = torch.autograd.grad(fast, (q, k, v), do)
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = attention_definition(*exact_inputs, cu, window)
    exact_grads = torch.autograd.grad(exact, exact_inputs, do.double())
    for name, a, b in zip(("o", "dq", "dk", "dv"), (fast, *fast_grads), (exact, *exact_grads)):
        assert relative(a, b) < 1e-2, name


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_distance_to_the_golden(name):
    """bf16 weights and activations: logits within 5% of the float64 ones where no boundary flips.

    Documents in which rounding moved p across 0.5 are cut differently and not compared; they are counted, and at least
    one document must be left.
    """
    golden = load_golden(name)
    model = golden_model(golden, torch.bfloat16, "cuda")
    for module in model.modules():
        if hasattr(module, "A_log"):
            for leaf in ("A_log", "dt_bias", "D"):
                getattr(module, leaf).data = getattr(module, leaf).data.float()
        if hasattr(module, "residual_proj"):
            module.residual_proj.float()
    with torch.no_grad():
        out = model(*pack(golden_documents(golden), "cuda"))
    compared = 0
    for i in range(int(golden["n_docs"])):
        same = all((s.boundary_mask[i].cpu().numpy() == golden[f"b{i}_s{j}"]).all() for j, s in enumerate(out.stages))
        if same:
            compared += 1
            assert relative(out.logits[i].cpu(), torch.from_numpy(golden[f"logits{i}"])) < 5e-2
    assert compared
