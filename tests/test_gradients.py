"""Destinations of gradients, and partial sums for small weights.

test_operations.py tests that operations fill them, test_graphs.py that they are a model's gradients, and
test_fused_triton.py the kernel that reduces partial sums.
"""

import pytest
import torch

from hnet_kernels.gradients import (
    Destinations,
    PartialSums,
    destination_of,
    slot_of,
    switch_to,
    write_product,
    writing_to,
)

SUMS = "an operation"


def layers(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    return [[torch.zeros(3, 1, 2, dtype=dtype), torch.zeros(3, dtype=dtype)] for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_slots_may_be_filled_in_any_order(dtype):
    sums, weights = PartialSums(), layers(dtype)
    wanted = [[torch.randn(w.shape).to(dtype) for w in layer] for layer in weights]
    for _ in range(2):
        for slot in reversed([sums.slot(*layer) for layer in weights]):
            slot.fill(*(x.to(torch.promote_types(dtype, torch.float32)) for x in wanted[slot.layer]))
        found = sums.total()
        assert sums.parts_LNW is None, "its memory is free again"
        for (weight, a), b, its in zip(found, sum(wanted, []), sum(weights, []), strict=True):
            assert weight is its and a.dtype == b.dtype == dtype and torch.equal(a, b)


def test_partial_sums_are_at_least_float32_and_reduced_at_once():
    sums, called = PartialSums(), []

    def add_up(parts_LNW, dtype):
        called.append((parts_LNW.shape, parts_LNW.dtype, dtype))
        return parts_LNW.sum(1).to(dtype)

    for slot in [sums.slot(*layer) for layer in layers(torch.bfloat16)]:
        slot.rows(5, add_up).fill_(1 + slot.layer)
    assert [x.flatten()[0].item() for _, x in sums.total()] == [5, 5, 10, 10, 15, 15, 20, 20]
    assert called == [((4, 5, 9), torch.float32, torch.bfloat16)]


def test_a_layer_with_other_tokens_has_its_own_partial_sums():
    """Its backward returns its gradients, and no other layer's."""
    weights = [torch.zeros(2) for _ in range(3)]
    destinations = Destinations({w: torch.full((2,), torch.nan) for w in weights})
    with writing_to(destinations):
        slots = [slot_of(SUMS, w) for w in weights]
    for slot, N in zip(slots, (5, 6, 5)):
        slot.rows(N, lambda parts, dtype: parts.sum(1).to(dtype)).fill_(1 + slot.layer * 10 if N == 5 else 7)
    assert [x.tolist() for x in slots[1].gradients()] == [[42, 42]]
    assert slots[0].gradients() == slots[2].gradients() == [None]
    destinations.finish()
    destinations = [destinations.by_tensor[w] for w in weights]
    assert [destination.written for destination in destinations] == [True, False, True]
    assert [destinations[i].tensor.tolist() for i in (0, 2)] == [[5, 5], [105, 105]]
    assert destinations[1].tensor.isnan().all(), "what its backward returns is written by who called it"


def test_a_second_backward_gives_the_same():
    """With retain_graph: then the gradients are returned, because the first sums have been written."""
    weights = [torch.zeros(2) for _ in range(2)]
    destinations = Destinations({w: torch.empty(2) for w in weights})
    with writing_to(destinations):
        slots = [slot_of(SUMS, w) for w in weights] + [slot_of(SUMS, torch.zeros(2))]
    for slot in slots:
        slot.fill(torch.ones(2))
    assert slots[0].gradients() == [None] and slots[2].gradients()[0].tolist() == [1, 1]
    destinations.finish()
    for i, slot in enumerate(slots):
        slot.fill(torch.full((2,), 2.0 + i))
        assert slot.gradients()[0].tolist() == [2 + i] * 2
    assert [destination.tensor.tolist() for destination in destinations.by_tensor.values()] == [[1, 1]] * 2


def test_a_layer_whose_backward_did_not_run_has_no_gradient():
    sums = PartialSums()
    first, second = (sums.slot(torch.zeros(2)) for _ in "ab")
    second.fill(torch.ones(2))
    assert [(weight is second.weights[0], x.tolist()) for weight, x in sums.total()] == [(True, [1, 1])]
    assert not first.filled and PartialSums().total() == []


def test_places_are_for_the_first_use_of_a_weight():
    weight, other = torch.zeros(2), torch.zeros(2)
    destinations = Destinations({weight: torch.empty(2)})
    assert destination_of(weight) is None
    with writing_to(destinations):
        assert destination_of(other) is None
        destination = destination_of(weight)
        assert destination is destinations.by_tensor[weight] and not destination.written
        assert destination_of(weight) is None, "later uses are added up by autograd"
        destinations.add(other, torch.empty(2), adds=True)
        assert destination_of(other) is None, "its gradient is to be added, which this backward does not do"
        assert destination_of(other, adds=True) is destinations.by_tensor[other]
    assert destination_of(weight) is None


def test_small_weights_share_a_slot_only_if_all_have_a_destination():
    weights = layers(torch.float32)
    destinations = Destinations({x: torch.empty_like(x) for layer in weights[:3] for x in layer})
    destinations.free.discard(weights[2][0])
    with writing_to(destinations):
        slots = [slot_of(SUMS, *layer) for layer in weights]
        of_another_kind = slot_of("another", torch.zeros(2))
    assert [slot.alone for slot in slots] == [False, False, True, True] and of_another_kind.alone
    assert slots[0].sums is slots[1].sums and len(slots[0].sums.slots) == 2
    assert weights[2][1] in destinations.free, "nothing was taken from those that lack one"


def test_sums_are_written_in_the_dtype_of_their_places():
    weights = [torch.zeros(2, dtype=torch.bfloat16) for _ in range(2)]
    destinations = Destinations(dict(zip(weights, (torch.empty(2), torch.empty(2, dtype=torch.bfloat16)))))
    with writing_to(destinations):
        slots = [slot_of(SUMS, w) for w in weights]
    for slot in slots:
        slot.fill(torch.tensor([1.0, 2.0]))
    destinations.finish()
    for destination in destinations.by_tensor.values():
        assert destination.written and destination.tensor.tolist() == [1, 2]
    assert not destinations.sums


def test_another_part_of_a_forward_has_other_destinations():
    weights = [torch.zeros(2) for _ in range(2)]
    first, second = (Destinations({w: torch.empty(2) for w in weights}) for _ in "ab")
    with writing_to(first):
        assert destination_of(weights[0]) is first.by_tensor[weights[0]]
        switch_to(second)
        assert destination_of(weights[1]) is second.by_tensor[weights[1]]
        with writing_to(None):
            assert destination_of(weights[0]) is None
    assert destination_of(weights[0]) is None


@pytest.mark.parametrize("to", [None, torch.bfloat16, torch.float32], ids=str)
def test_a_product_is_rounded_once_to_the_dtype_of_its_destination(to):
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(300, n, generator=generator).bfloat16() for n in (3, 5))
    weight, exact = torch.zeros(3, 5, dtype=torch.bfloat16), dy.double().T @ x.double()
    destinations = Destinations({} if to is None else {weight: torch.full((3, 5), torch.nan, dtype=to)})
    with writing_to(destinations):
        destination = destination_of(weight)
    returned = write_product(dy, x, weight, destination)
    found = returned if to is None else destination.tensor
    assert (returned is None) == (to is not None) and (destination is None or destination.written)
    assert found.dtype == (to or torch.bfloat16)
    # rounded once: half a unit of the last place, beside what sums of 300 terms in float32 are off by
    error = ((found.double() - exact) / exact).abs().max()
    assert error < (1e-5 if to == torch.float32 else 2**-8)
