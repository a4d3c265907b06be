"""Gradients of the small weights of many layers, which are added up together: who asks for memory, and what comes out.
That they are a model's gradients is tested in test_graphs.py, the kernel in test_fused_triton.py."""

import pytest
import torch

from hnet_kernels.sums import Sums


def layers(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    return [[torch.zeros(3, 1, 2, dtype=dtype), torch.zeros(3, dtype=dtype)] for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_slots_that_are_filled_in_any_order_give_each_weights_gradient(dtype):
    sums = Sums(layers(dtype))
    wanted = [[torch.randn(w.shape).to(dtype) for w in weights] for weights in sums.layers]
    for _ in range(2):
        for slot in reversed(sums.slots()):
            slot.fill(*(x.to(torch.promote_types(dtype, torch.float32)) for x in wanted[slot.layer]))
        found = sums.total()
        assert sums.parts_LNW is None, "its memory is free again"
        for a, b in zip(found, sum(wanted, []), strict=True):
            assert a.dtype == b.dtype == dtype and torch.equal(a, b)


def test_parts_are_at_least_float32_and_added_up_at_once():
    sums, called = Sums(layers(torch.bfloat16)), []

    def add_up(parts_LNW, dtype):
        called.append((parts_LNW.shape, parts_LNW.dtype, dtype))
        return parts_LNW.sum(1).to(dtype)

    for slot in sums.slots():
        slot.rows(5, add_up).fill_(1 + slot.layer)
    assert [x.flatten()[0].item() for x in sums.total()] == [5, 5, 10, 10, 15, 15, 20, 20]
    assert called == [((4, 5, 9), torch.float32, torch.bfloat16)]


def test_layers_have_as_many_parts():
    first, second, *_ = Sums(layers(torch.float32)).slots()
    first.rows(5, torch.sum)
    with pytest.raises(AssertionError):
        second.rows(6, torch.sum)
