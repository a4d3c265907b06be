"""The autograd functions on NJTs: gradients against finite differences, and the gradients that they leave out."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nested import nested_tensor_from_jagged

import hnet_trainable as H

LENGTHS = [3, 1, 0, 5, 2, 0]  # documents without a token too, at the end as well


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def nested(values, offsets):
    return nested_tensor_from_jagged(values, offsets, min_seqlen=0, max_seqlen=5)


OFFSETS = offsets_of(LENGTHS)
T = int(OFFSETS[-1])
FIRST = [0, 3, 4, 9]  # the first tokens of the documents that have one
# a document's first token always opens a chunk
MASK = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]).bool()
CHUNK_OFFSETS = offsets_of([2, 1, 0, 3, 1, 0])


def flat(function):
    """gradcheck wants tensors without a ragged dimension: NJTs in and out of `function` as their values."""
    return lambda *values: function(*(nested(v, OFFSETS) for v in values)).values()


def test_boundary_probability_gradcheck():
    assert gradcheck(flat(H.BoundaryProbability.apply), (normal(T, 4), normal(T, 4, seed=1)))


def test_boundary_probability_of_one_channel_saturates():
    """One channel: the cosine is +1 or -1, p 0 or 1 exactly, and nothing is left of [0, 1] for rounding to exceed."""
    q, k = normal(T, 1), normal(T, 1, seed=1)
    p = flat(H.BoundaryProbability.apply)(q, k)
    assert set(p.tolist()) <= {0.0, 1.0}
    p.sum().backward()
    assert q.grad.abs().max() < 1e-12 and k.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boundary_probability_is_clamped_where_rounding_leaves_its_range(dtype):
    """Parallel vectors: cosines come out as 1 + 1e-7 too. p stays in [0, 1] there and has no gradient."""
    x = normal(4000, 3).detach().to(dtype)
    offsets = torch.tensor([0, 4000])
    for sign, edge in ((1, 0.0), (-1, 1.0)):
        constant = x[:1].expand(4000, -1)
        scale = torch.linspace(0.1, 3, 4000, dtype=dtype)[:, None]
        q = (constant * scale).requires_grad_()
        k = (sign * constant * scale.flip(0)).requires_grad_()
        p = H.BoundaryProbability.apply(nested(q, offsets), nested(k, offsets)).values()
        assert ((p >= 0) & (p <= 1)).all()
        torch.testing.assert_close(p[1:], torch.full_like(p[1:], edge), rtol=0, atol=1e-6)
        p.sum().backward()
        assert q.grad.isfinite().all() and k.grad.isfinite().all()


def test_first_tokens_have_p_one_without_a_gradient():
    """Nothing comes back from p of the first tokens: neither to their keys nor, round a corner, to another document."""
    q, k = normal(T, 4), normal(T, 4, seed=1)
    p = flat(H.BoundaryProbability.apply)(q, k)
    assert p[FIRST].tolist() == [1.0] * 4
    assert (p.detach() < 1).sum() == T - 4
    grad_q, grad_k = torch.autograd.grad(p[FIRST].sum(), (q, k), retain_graph=True)
    assert not grad_q.any() and not grad_k.any()
    grad_q, grad_k = torch.autograd.grad(p.sum(), (q, k))
    last = [2, 3, 8, 10]  # no key follows the last query of a document
    assert grad_q.abs().sum(1).nonzero().flatten().tolist() == [t for t in range(T) if t not in last]
    assert grad_k.abs().sum(1).nonzero().flatten().tolist() == [t for t in range(T) if t not in FIRST]


def test_a_zero_query_or_key_gives_p_a_half_and_no_nan():
    q, k = normal(T, 4).detach(), normal(T, 4, seed=1).detach()
    q[5], k[8] = 0, 0
    q.requires_grad_(), k.requires_grad_()
    p = flat(H.BoundaryProbability.apply)(q, k)
    assert p[6] == p[8] == 0.5
    p.sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


def test_select_chunks_gradcheck():
    mask = nested(MASK, OFFSETS)
    assert gradcheck(flat(lambda x: H.SelectChunks.apply(x, mask)), (normal(T, 3),))


def test_select_chunks_keeps_marked_rows_and_documents():
    x = normal(T, 3)
    h = H.SelectChunks.apply(nested(x, OFFSETS), nested(MASK, OFFSETS))
    assert torch.equal(h.values(), x[MASK])
    assert torch.equal(h.offsets(), CHUNK_OFFSETS)
    assert (h._maybe_min_seqlen, h._maybe_max_seqlen) == (0, 3)
    h.values().sum().backward()
    assert torch.equal(x.grad, MASK[:, None].expand(T, 3).double())


def upsample(y, p):
    return H.EmaUpsample.apply(nested(y, CHUNK_OFFSETS), nested(p, OFFSETS), nested(MASK, OFFSETS)).values()


def inner_probabilities():
    """Away from the clamp and from its kinks, for finite differences."""
    return torch.linspace(0.05, 0.95, T, dtype=torch.float64).requires_grad_()


def test_ema_upsample_gradcheck():
    assert gradcheck(upsample, (normal(7, 3), inner_probabilities()))


def test_ema_upsample_by_hand():
    """Each token repeats z of the last boundary at or before it; z starts from 0 in each document."""
    y, p = normal(7, 3), inner_probabilities()
    P = p[MASK]
    z, before = [], torch.zeros(3, dtype=torch.float64)
    for k in range(7):
        if k in (0, 2, 3, 6):  # the chunks that open a document
            before = torch.zeros(3, dtype=torch.float64)
        before = P[k] * y[k] + (1 - P[k]) * before
        z.append(before)
    wanted = torch.stack([z[k] for k in (0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6)])
    torch.testing.assert_close(upsample(y, p), wanted, rtol=1e-13, atol=1e-13)


def test_ema_upsample_clamps_p_and_cuts_its_gradient_there():
    """P in [1e-4, 1 - 1e-4]: z_0 = 0.9999 y_0 for p = 1; p outside gets no gradient, and only boundaries' p any."""
    y, p = normal(7, 3), inner_probabilities().detach()
    p[FIRST], p[2], p[7] = 1.0, 1e-7, 1.0
    p.requires_grad_()
    up = upsample(y, p)
    torch.testing.assert_close(up[0], 0.9999 * y[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(up[2], 1e-4 * y[1] + 0.9999 * 0.9999 * y[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(up[7], 0.9999 * y[4] + 1e-4 * up[4], rtol=1e-12, atol=0)
    up.sin().sum().backward()
    assert p.grad.nonzero().flatten().tolist() == [8]  # the one boundary that is neither first nor clamped
    # y and the p inside still have the right gradients
    inside = torch.arange(T) == 8
    fixed = p.detach()
    assert gradcheck(lambda y, some: upsample(y, torch.where(inside, some, fixed)), (y, inner_probabilities()))


def test_ema_upsample_computes_and_returns_in_the_dtype_of_p():
    y, p = normal(7, 3).detach(), inner_probabilities().detach()
    y16 = y.bfloat16().requires_grad_()
    p32 = p.float().requires_grad_()
    up = upsample(y16, p32)
    assert up.dtype == torch.float32
    wanted = upsample(y16.double(), p32.double())
    torch.testing.assert_close(up.double(), wanted, rtol=1e-5, atol=1e-5)  # float32 arithmetic on rounded inputs
    up.sum().backward()
    assert (y16.grad.dtype, p32.grad.dtype) == (torch.bfloat16, torch.float32)


def test_straight_through_is_one_forward_and_the_identity_backward():
    c = normal(T)
    ones = flat(H.StraightThrough.apply)(c)
    assert torch.equal(ones, torch.ones(T, dtype=torch.float64))
    gradient = normal(T, seed=2).detach()
    ones.backward(gradient)
    assert torch.equal(c.grad, gradient)


def dechunk_plainly(y, p, residual):
    """Dechunking with the same smoothing, in plain autograd."""
    c = torch.where(MASK, p, 1 - p)
    return upsample(y, p) * (c + (1 - c).detach())[:, None] + residual


def test_dechunk_gradients_equal_those_of_the_formula():
    y, p, residual = normal(7, 3), inner_probabilities(), normal(T, 3, seed=4)
    stage = H.StageOutput(nested(p, OFFSETS), nested(MASK, OFFSETS), None, None)
    ours = H.dechunk(nested(y, CHUNK_OFFSETS), stage, nested(residual, OFFSETS)).values()
    wanted = dechunk_plainly(y, p, residual)
    torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours, upsample(y, p) + residual, rtol=1e-13, atol=1e-13)  # the confidence's value is 1
    got, expected = (torch.autograd.grad(out.sin().sum(), (y, p, residual)) for out in (ours, wanted))
    for name, a, b in zip(("y", "p", "residual"), got, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    assert (got[1] != 0).all()  # the confidence hands every position a gradient, boundary or not


@pytest.mark.parametrize("keep", [slice(None, 2), slice(1, None), slice(1, 4, 2), slice(None, -1)])
def test_backward_of_a_slice_of_the_last_dimension(keep):
    assert gradcheck(flat(lambda x: x[..., keep] * 1.0), (normal(T, 5),))


def test_slice_backward_of_wider_njts():
    x = normal(T, 2, 5)
    nested(x, OFFSETS)[..., :3].values().sin().sum().backward()
    wanted = torch.cat([x[..., :3].cos(), torch.zeros(T, 2, 2)], dim=-1)
    torch.testing.assert_close(x.grad, wanted.detach())


def test_registering_twice_changes_nothing():
    from torch.nested._internal import ops

    before = dict(ops.JAGGED_OPS_TABLE)
    H.register_njt_ops()
    assert before == ops.JAGGED_OPS_TABLE
    assert torch.ops.aten.slice_backward.default in before


def test_positions_and_cu_seqlens_skip_empty_documents():
    x = nested(normal(T, 2), OFFSETS)
    assert H.positions(x).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]
    assert H.cu_seqlens(x).tolist() == OFFSETS.tolist()
    assert H.cu_seqlens(x).dtype == torch.int32


def test_outputs_share_the_offsets_of_their_inputs():
    """The contract: only NJTs with the very same offsets can be combined."""
    x, mask = nested(normal(T, 3), OFFSETS), nested(MASK, OFFSETS)
    q, p = nested(normal(T, 3, seed=1), OFFSETS), nested(inner_probabilities(), OFFSETS)
    h = H.SelectChunks.apply(x, mask)
    for out in (
        H.BoundaryProbability.apply(q, x),
        H.EmaUpsample.apply(h, p, mask),
        H.StraightThrough.apply(p),
        H.nested_like(x.values(), x),
    ):
        assert out.offsets() is OFFSETS
