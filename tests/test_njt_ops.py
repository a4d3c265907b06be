"""The router's and the chunks' operations: gradients against finite differences, and the gradients that they leave out.

Each test runs the definition of an operation and its fast implementation, which without a GPU is its own backward over
the kernels' definitions.
"""

import pytest
import torch
from small_models import TWO_STAGES, build, inputs_of, random_documents
from torch.autograd import gradcheck
from torch.nested import nested_tensor_from_jagged

import hnet_kernels
import hnet_trainable as H
from hnet_kernels.dispatch import forcing

LENGTHS = [3, 1, 0, 5, 2, 0]  # documents without a token too, at the end as well


@pytest.fixture(params=[False, True], ids=["definition", "fast"], autouse=True)
def implementation(request):
    with forcing(request.param):
        yield


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
POSITION = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1])
# a document's first token always opens a chunk
MASK = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]).bool()
CHUNK_OFFSETS = offsets_of([2, 1, 0, 3, 1, 0])


def stage():
    """An HNet that cuts. What it smooths and upsamples depends on no weight."""
    return H.HNet(H.HNetConfig.load(TWO_STAGES))


def probability(q, k):
    return hnet_kernels.boundary_probability(q, k, POSITION)


def cut(p, mask=MASK):
    return hnet_kernels.cut(p, mask, POSITION, OFFSETS.to(torch.int32))


def chunks(p):
    """The chunks of MASK alone: `cut` has room for one a token."""
    found = cut(p)[2]
    return found._replace(start_C=found.start_C[: found.counts[0]])


# ------------------------------------------------------------------------------------------------------------- router


def test_boundary_probability_gradcheck():
    assert gradcheck(probability, (normal(T, 4), normal(T, 4, seed=1)))


def test_boundary_probability_of_one_channel_saturates():
    """One channel: the cosine is +1 or -1, p 0 or 1 exactly, and nothing is left of [0, 1] for rounding to exceed."""
    q, k = normal(T, 1), normal(T, 1, seed=1)
    p = probability(q, k)
    assert set(p.tolist()) <= {0.0, 1.0}
    p.sum().backward()
    assert q.grad.abs().max() < 1e-12 and k.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boundary_probability_is_clamped_where_rounding_leaves_its_range(dtype):
    """Parallel vectors: cosines come out as 1 + 1e-7 too. p stays in [0, 1] there and has no gradient."""
    x = normal(4000, 3).detach().to(dtype)
    for sign, edge in ((1, 0.0), (-1, 1.0)):
        constant = x[:1].expand(4000, -1)
        scale = torch.linspace(0.1, 3, 4000, dtype=dtype)[:, None]
        q = (constant * scale).requires_grad_()
        k = (sign * constant * scale.flip(0)).requires_grad_()
        p = hnet_kernels.boundary_probability(q, k, torch.arange(4000))
        assert ((p >= 0) & (p <= 1)).all()
        torch.testing.assert_close(p[1:], torch.full_like(p[1:], edge), rtol=0, atol=1e-6)
        p.sum().backward()
        assert q.grad.isfinite().all() and k.grad.isfinite().all()


def test_first_tokens_have_p_one_without_a_gradient():
    """Nothing comes back from p of the first tokens: neither to their keys nor, round a corner, to another document."""
    q, k = normal(T, 4), normal(T, 4, seed=1)
    p = probability(q, k)
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
    p = probability(q, k)
    assert p[6] == p[8] == 0.5
    p.sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- chunks


def test_cut_by_hand():
    """A document's first token opens a chunk whether the router says so or not. F and G are means over tokens."""
    p = inner_probabilities()
    undecided = MASK.clone()
    undecided[FIRST] = False
    for mask in (MASK, undecided):
        same_p, G, found = cut(p, mask)
        assert torch.equal(same_p, p) and torch.equal(found.b_T, MASK)
        assert found.chunk_T.tolist() == [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6]
        assert found.start_C.tolist() == [0, 2, 3, 4, 7, 8, 9, T, T, T, T]
        assert torch.equal(found.cu_seqlens, CHUNK_OFFSETS.to(torch.int32))
        assert found.position_C[:7].tolist() == [0, 1, 0, 0, 1, 2, 0] and found.counts.tolist() == [7, 3]
        torch.testing.assert_close(found.shares, torch.stack([torch.tensor(7 / T).double(), p.detach().mean()]))
        torch.testing.assert_close(G, p.mean(), rtol=1e-14, atol=0)


def test_cut_gradcheck():
    """p goes on as it is, and to its mean over tokens."""
    assert gradcheck(lambda p: cut(p)[:2], (inner_probabilities(),))


def test_select_chunks_gradcheck():
    found = chunks(inner_probabilities().detach())
    assert gradcheck(lambda x: H.SelectChunks.apply(nested(x, OFFSETS), found).values(), (normal(T, 3),))


def test_select_chunks_keeps_marked_rows_and_documents():
    x = normal(T, 3)
    h = H.SelectChunks.apply(nested(x, OFFSETS), chunks(inner_probabilities()))
    assert torch.equal(h.values(), x[MASK])
    assert torch.equal(h.offsets(), CHUNK_OFFSETS)
    assert (h._maybe_min_seqlen, h._maybe_max_seqlen) == (0, 3)
    h.values().sum().backward()
    assert torch.equal(x.grad, MASK[:, None].expand(T, 3).double())


def test_take_rows_gradcheck():
    place = MASK.nonzero().flatten()
    assert gradcheck(lambda x: hnet_kernels.take_rows(x, place), (normal(T, 3),))
    assert gradcheck(lambda p: hnet_kernels.take_rows(p, place), (normal(T),))


# --------------------------------------------------------------------------------------------- smoothing and upsampling


def upsample(y, p):
    """Each token's smoothed chunk, nothing else."""
    found = chunks(p)
    z = stage().smooth(y, hnet_kernels.take_rows(p, found.start_C), found.cu_seqlens)
    nothing = z.new_zeros(T, z.shape[1])
    return hnet_kernels.upsample(z, torch.ones_like(p), found.chunk_T, found.start_C, nothing, z.dtype)


def inner_probabilities():
    """Away from the clamp and from its kinks, for finite differences."""
    return torch.linspace(0.05, 0.95, T, dtype=torch.float64).requires_grad_()


def test_smoothing_and_upsampling_gradcheck():
    assert gradcheck(upsample, (normal(7, 3), inner_probabilities()))


def test_smoothing_and_upsampling_by_hand():
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


def test_smoothing_clamps_p_and_cuts_its_gradient_there():
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


def test_smoothing_computes_and_returns_in_the_dtype_of_p():
    y, p = normal(7, 3).detach(), inner_probabilities().detach()
    y16 = y.bfloat16().requires_grad_()
    p32 = p.float().requires_grad_()
    up = upsample(y16, p32)
    assert up.dtype == torch.float32
    wanted = upsample(y16.double(), p32.double())
    torch.testing.assert_close(up.double(), wanted, rtol=1e-5, atol=1e-5)  # float32 arithmetic on rounded inputs
    up.sum().backward()
    assert (y16.grad.dtype, p32.grad.dtype) == (torch.bfloat16, torch.float32)


def test_the_confidence_is_one_forward_and_passes_its_gradient_straight_through():
    """Where z is one, the output is the confidence: 1 to the bit, and its gradient is p's, negated at no boundary."""
    z, p, nothing = torch.ones(7, 1).double(), inner_probabilities(), torch.zeros(T, 1).double()
    ones = stage().upsample(z, p, chunks(p), nothing, torch.float64)[:, 0]
    assert torch.equal(ones, torch.ones(T, dtype=torch.float64))
    gradient = normal(T, seed=2).detach()
    ones.backward(gradient)
    assert torch.equal(p.grad, torch.where(MASK, gradient, -gradient))


def dechunk_plainly(y, p, residual):
    """Dechunking with the same smoothing, in plain autograd."""
    c = torch.where(MASK, p, 1 - p)
    return upsample(y, p) * (c + (1 - c).detach())[:, None] + residual


def test_dechunk_gradients_equal_those_of_the_formula():
    y, p, residual = normal(7, 3), inner_probabilities(), normal(T, 3, seed=4)
    found, hnet = chunks(p), stage()
    z = hnet.smooth(y, hnet_kernels.take_rows(p, found.start_C), found.cu_seqlens)
    ours = hnet.upsample(z, p, found, residual, torch.float64)
    wanted = dechunk_plainly(y, p, residual)
    torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours, upsample(y, p) + residual, rtol=1e-13, atol=1e-13)  # the confidence's value is 1
    got, expected = (torch.autograd.grad(out.sin().sum(), (y, p, residual)) for out in (ours, wanted))
    for name, a, b in zip(("y", "p", "residual"), got, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    assert (got[1] != 0).all()  # the confidence hands every position a gradient, boundary or not


# ----------------------------------------------------------------------------------------------------- widths, offsets


def test_widen_puts_the_same_channels_behind_each_row():
    x, pad = normal(T, 3), normal(2, seed=1)
    wide = hnet_kernels.widen(x, pad)
    assert torch.equal(wide[:, :3], x) and torch.equal(wide[:, 3:], pad.expand(T, 2))
    direction = normal(T, 5, seed=2).detach()
    dx, dpad = torch.autograd.grad((wide * direction).sum(), (x, pad))
    assert torch.equal(dx, direction[:, :3])
    torch.testing.assert_close(dpad, direction[:, 3:].sum(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("part", ["decode", "run_innermost"])
def test_what_a_stage_returns_is_as_wide_as_the_stage_outside(part):
    """The channels beyond are dropped, and hand no gradient back: the final norm's weight has none there."""
    heads = {**TWO_STAGES["attn_cfg"], "num_heads": [2, 2, 2]}
    model = build(H, {**TWO_STAGES, "d_model": [32, 64, 96], "attn_cfg": heads})
    hnet = model.backbone.main_network if part == "decode" else model.backbone.main_network.main_network
    x_BjD = nested(normal(T, 64), OFFSETS)
    out = getattr(hnet, part)(x_BjD.values(), H.Packing.of(x_BjD, hnet.rotary_dim))
    norm = (hnet.decoder if part == "decode" else hnet.main_network).rmsnorm
    out.sin().sum().backward()
    assert out.shape == (T, hnet.outer_width)
    assert norm.weight.grad.nonzero().flatten().tolist() == list(range(hnet.outer_width))


def test_positions_and_cu_seqlens_skip_empty_documents():
    x = nested(normal(T, 2), OFFSETS)
    assert H.positions(x).tolist() == POSITION.tolist()
    assert H.cu_seqlens(x).tolist() == OFFSETS.tolist()
    assert H.cu_seqlens(x).dtype == torch.int32


def test_flat_and_nested_like_gradcheck():
    like = nested(normal(T, 2), OFFSETS)
    assert gradcheck(lambda x: H.flat(nested(x, OFFSETS)), (normal(T, 3),))
    assert gradcheck(lambda x: H.nested_like(x, like).values(), (normal(T, 3),))


def test_flat_and_nested_like_are_what_torch_has():
    """Values, documents, gradients, and what is known of lengths: as by `values` and `nested_tensor_from_jagged`."""
    x, like = normal(T, 3), nested(normal(T, 2), OFFSETS)
    ours, theirs = H.nested_like(x, like), nested(x, OFFSETS)
    assert torch.equal(ours.values(), theirs.values()) and ours.offsets() is theirs.offsets() is OFFSETS
    assert (ours._maybe_min_seqlen, ours._maybe_max_seqlen) == (0, 5)
    assert torch.equal(H.flat(ours), x) and H.flat(ours).data_ptr() == x.data_ptr()
    assert ours.requires_grad and not H.nested_like(x.detach(), like).requires_grad
    (found,) = torch.autograd.grad(H.flat(ours).sin().sum(), ours)
    assert found.offsets() is OFFSETS and torch.equal(found.values(), x.cos())
    both = torch.autograd.grad((ours + theirs).values().sin().sum(), x)
    assert torch.equal(both[0], 2 * (2 * x).cos())


def test_documents_are_nested_as_by_torch():
    """With every attribute that torch's own constructor sets, other than its marks for torch.compile."""
    x = normal(T, 3).detach()
    theirs = nested_tensor_from_jagged(x, OFFSETS, min_seqlen=0, max_seqlen=5)
    ours = H.Documents.between(OFFSETS, 0, 5).nest(x)
    assert type(ours) is type(theirs) and ours.shape == theirs.shape and ours.stride() == theirs.stride()
    assert {name for name in vars(theirs) if not name.startswith("_dynamo")} == set(vars(ours))
    assert ours.offsets() is OFFSETS and ours.lengths() is None and ours.values().data_ptr() == x.data_ptr()
    assert (ours._maybe_min_seqlen, ours._maybe_max_seqlen) == (theirs._maybe_min_seqlen, theirs._maybe_max_seqlen)
    for found, wanted in zip(ours.unbind(), theirs.unbind(), strict=True):
        assert torch.equal(found, wanted)


def test_compiled_functions_can_nest():
    """NJTs of torch's making and of ours, of different sizes."""
    doubled = torch.compile(lambda x: H.nested_like(2 * H.flat(x), x), backend="eager")
    for n in (1, 2, 3):
        values, offsets = normal(n * T, 3).detach(), n * OFFSETS
        for x in (nested(values, offsets), H.Documents.between(offsets, 0, n * 5).nest(values)):
            assert torch.equal(doubled(x).values(), 2 * values) and doubled(x).offsets() is offsets


def test_outputs_share_the_offsets_of_their_inputs():
    """The contract: only NJTs with the very same offsets can be combined."""
    x = nested(normal(T, 3), OFFSETS)
    assert H.nested_like(x.values(), x).offsets() is OFFSETS
    iids = inputs_of(random_documents([30, 1, 7]))
    out = build(H, TWO_STAGES)(iids)
    outer, inner = out.stages
    for same in (out.logits, outer.boundary_prob, outer.boundary_mask):
        assert same.offsets() is iids.offsets()
    assert inner.boundary_prob.offsets() is inner.boundary_mask.offsets()
