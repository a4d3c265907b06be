"""The definitions of hnet_kernels against loops over time under autograd: outputs, and every gradient by name."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from reference import attend, each_document, ema_loop, ssd_loop, ssd_quadratic
from torch.autograd import gradcheck

from hnet_kernels import attention, causal_conv_silu, ema_backward, ema_forward, ssd

# the package exports the functions ssd and attention under the names of their files
ssd_file = importlib.import_module("hnet_kernels.ssd")
attention_file = importlib.import_module("hnet_kernels.attention")
conv_file = importlib.import_module("hnet_kernels.conv")

LENGTHS = {
    "awkward": [1, 2, 63, 64, 65, 257],
    "one": [130],
    "short": [1, 1, 2, 1, 3],
    "empty": [0, 65, 0, 0, 3, 0],
    "on_the_edge": [64, 64, 128],
}
# float64: sums in another order, of a few hundred terms
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=LENGTHS)
def lengths(request):
    return LENGTHS[request.param]


def cu_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def positions_of(lengths):
    return torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def compare(ours, wanted, inputs, **tolerance):
    """Outputs and, for a random projection of them, the gradient of every input of the dict `inputs`."""
    tolerance = tolerance or CLOSE
    torch.testing.assert_close(ours, wanted, **tolerance, msg=lambda m: f"output: {m}")
    direction = normal(*wanted.shape, seed=9)
    got, expected = (torch.autograd.grad((out * direction).sum(), list(inputs.values())) for out in (ours, wanted))
    for name, a, b in zip(inputs, got, expected):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"gradient of {name}: {m}")


# ---------------------------------------------------------------------------------------------------------------- ssd


def ssd_inputs(T, dt=(0.01, 1.0), A=(1.0, 16.0), heads=2, P=3, N=4):
    uniform = torch.rand(T, heads, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = {
        "x": normal(T, heads, P),
        "dt": dt[0] * (dt[1] / dt[0]) ** uniform,
        "A": -torch.linspace(*A, heads, dtype=torch.float64),
        "B": normal(T, N, seed=2),
        "C": normal(T, N, seed=3),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def ssd_by_document(lengths, x, dt, A, B, C, function=ssd_loop):
    return each_document(lengths, lambda x, dt, B, C: function(x, dt, A, B, C), x, dt, B, C)


def test_ssd_equals_the_recurrence(lengths):
    inputs = ssd_inputs(sum(lengths))
    compare(ssd(*inputs.values(), cu_of(lengths)), ssd_by_document(lengths, **inputs), inputs)


@pytest.mark.parametrize("heads, P, N", [(1, 1, 1), (3, 64, 130)])
def test_ssd_of_other_sizes(heads, P, N):
    lengths = [3, 70]
    inputs = ssd_inputs(73, heads=heads, P=P, N=N)
    compare(ssd(*inputs.values(), cu_of(lengths)), ssd_by_document(lengths, **inputs), inputs)


@pytest.mark.parametrize(
    "dt, A",
    [
        pytest.param((1e-6, 1e-5), (1e-3, 1e-2), id="remembers_everything"),
        pytest.param((1e-3, 0.1), (1.0, 16.0), id="as_initialised"),
        pytest.param((5.0, 50.0), (16.0, 100.0), id="forgets_at_once"),
        pytest.param((1e-6, 100.0), (1.0, 16.0), id="both"),
    ],
)
def test_ssd_with_long_and_short_memory(dt, A):
    """Sums of log decays of 1e5 beside sums of 1e-9: differences must not lose the small ones."""
    lengths = [257, 65]
    inputs = ssd_inputs(sum(lengths), dt=dt, A=A)
    compare(ssd(*inputs.values(), cu_of(lengths)), ssd_by_document(lengths, **inputs), inputs, rtol=1e-8, atol=1e-9)


def test_ssd_in_float32_keeps_small_decays_after_large_ones():
    """With float32 inputs the result is as close to float64 as float32 sums of 300 terms can be."""
    lengths = [300]
    inputs = ssd_inputs(300, dt=(1e-6, 100.0))
    single = [t.detach().float() for t in inputs.values()]
    wanted = ssd_by_document(lengths, *(t.double() for t in single))
    ours = ssd(*single, cu_of(lengths))
    assert ours.dtype == torch.float32
    scale = wanted.abs().max().item()
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-5 * scale)


def test_ssd_grows_its_chunks(monkeypatch):
    """More than MAX_CHUNKS chunks are avoided by longer ones: tested with at most 4 chunks of at least 8 tokens."""
    least = ssd_file.MIN_CHUNK
    most = least * ssd_file.MAX_CHUNKS
    assert [ssd_file._chunk_size(T) for T in (0, 1, most, most + 1, 8 * most)] == [
        least,
        least,
        least,
        2 * least,
        8 * least,
    ]
    monkeypatch.setattr(ssd_file, "MIN_CHUNK", 8)
    monkeypatch.setattr(ssd_file, "MAX_CHUNKS", 4)
    for total, size in ((32, 8), (33, 16), (150, 64)):
        assert ssd_file._chunk_size(total) == size
        lengths = [total - 12, 1, 11]
        inputs = ssd_inputs(total)
        compare(ssd(*inputs.values(), cu_of(lengths)), ssd_by_document(lengths, **inputs), inputs)


@pytest.mark.parametrize("chunk", [1, 5, 400])
def test_ssd_does_not_depend_on_the_chunk_size(monkeypatch, chunk):
    monkeypatch.setattr(ssd_file, "MIN_CHUNK", chunk)
    lengths = [65, 0, 1, 40]
    inputs = ssd_inputs(106)
    compare(ssd(*inputs.values(), cu_of(lengths)), ssd_by_document(lengths, **inputs), inputs)


def test_ssd_gradcheck(monkeypatch):
    monkeypatch.setattr(ssd_file, "MIN_CHUNK", 2)
    inputs = ssd_inputs(9, heads=2, P=2, N=2)
    cu = cu_of([4, 0, 5])
    assert gradcheck(lambda *values: ssd(*values, cu), tuple(inputs.values()))


def test_ssd_takes_int64_cu_seqlens_and_mixed_precision():
    """bfloat16 x, B and C with float32 dt and A: the result is that of float64 for the same values, rounded once."""
    lengths = [40, 1, 80]
    inputs = {n: t.detach() for n, t in ssd_inputs(121).items()}
    mixed = {n: t.float() if n in ("dt", "A") else t.bfloat16() for n, t in inputs.items()}
    ours = ssd(*mixed.values(), cu_of(lengths).long())
    assert ours.dtype == torch.bfloat16
    wanted = ssd_by_document(lengths, *(t.double() for t in mixed.values()))
    torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=1e-5)


def test_the_loop_and_the_quadratic_form_of_the_reference_agree():
    inputs = ssd_inputs(66)
    compare(ssd_quadratic(*inputs.values()), ssd_loop(*inputs.values()), inputs)


def poison(tensor, rows):
    """A copy whose `rows` are NaN."""
    tensor = tensor.detach().clone()
    tensor[rows] = torch.nan
    return tensor


def test_nothing_of_a_poisoned_document_reaches_its_neighbours():
    """Documents of NaN before and after a finite one, in all operations, forward and backward.

    EMA and scan multiply by a decay of zero at the end of a document, and 0 * NaN is NaN: there it is large values.
    """
    lengths, middle = [65, 70, 3], slice(65, 135)
    cu = cu_of(lengths)
    outside = torch.ones(138, dtype=torch.bool)
    outside[middle] = False

    x, weight, bias = (t.detach() for t in conv_inputs(138).values())
    clean = causal_conv_silu(x[middle], weight, bias, positions_of([70]))
    ours = causal_conv_silu(poison(x, outside), weight, bias, positions_of(lengths))
    torch.testing.assert_close(ours[middle], clean, **CLOSE)

    q, k, v = (poison(normal(138, 2, 4, seed=s), outside) for s in range(3))
    clean = attention(*(t[middle] for t in (q, k, v)), cu_of([70]), 70, 5)
    torch.testing.assert_close(attention(q, k, v, cu, 70, 5)[middle], clean, **CLOSE)

    inputs = ssd_inputs(138)
    for name in ("x", "B", "C"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][outside] *= 1e100
        inputs[name].requires_grad_()
    ours = ssd(*inputs.values(), cu)[middle]
    alone = ssd(*(t if n == "A" else t[middle] for n, t in inputs.items()), cu_of([70]))
    compare(ours, alone, inputs)


# ---------------------------------------------------------------------------------------------------------------- ema


def ema_inputs(T, low=0.01, high=0.99):
    uniform = torch.rand(T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"y": normal(T, 3).requires_grad_(), "p": (low + (high - low) * uniform).requires_grad_()}


class Ema(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, p, cu):
        z = ema_forward(y, p, cu)
        ctx.save_for_backward(y, p, z, cu)
        return z

    @staticmethod
    def backward(ctx, dz):
        y, p, z, cu = ctx.saved_tensors
        return (*ema_backward(dz, y, p, z, cu), None)


def test_ema_equals_the_recurrence(lengths):
    inputs = ema_inputs(sum(lengths))
    wanted = each_document(lengths, ema_loop, *inputs.values())
    compare(Ema.apply(*inputs.values(), cu_of(lengths)), wanted, inputs)


@pytest.mark.parametrize("low, high", [(1e-4, 1e-4), (1 - 1e-4, 1 - 1e-4), (1e-4, 1 - 1e-4), (1e-9, 1e-8)])
def test_ema_with_long_and_short_memory(low, high):
    lengths = [257, 1, 65]
    inputs = ema_inputs(sum(lengths), low, high)
    wanted = each_document(lengths, ema_loop, *inputs.values())
    compare(Ema.apply(*inputs.values(), cu_of(lengths)), wanted, inputs)


def test_ema_gradcheck(monkeypatch):
    monkeypatch.setattr(ssd_file, "MIN_CHUNK", 2)
    cu = cu_of([4, 0, 1, 5])
    assert gradcheck(lambda y, p: Ema.apply(y, p, cu), tuple(ema_inputs(10).values()))


def test_ema_in_bfloat16_computes_in_the_dtype_of_p():
    lengths = [100, 29]
    inputs = ema_inputs(129)
    y, p = inputs["y"].detach().bfloat16(), inputs["p"].detach().float()
    z = ema_forward(y, p, cu_of(lengths))
    assert z.dtype == torch.float32
    # float32 arithmetic, each step adding half a unit in the last place
    torch.testing.assert_close(z.double(), each_document(lengths, ema_loop, y.double(), p.double()), rtol=0, atol=1e-5)
    dy, dp = ema_backward(torch.ones_like(z), y, p, z, cu_of(lengths))
    assert (dy.dtype, dp.dtype) == (torch.bfloat16, torch.float32)


# ---------------------------------------------------------------------------------------------------------- attention


def attention_inputs(T, heads=2, P=4, scale=1.0):
    return {n: normal(T, heads, P, seed=s, scale=scale).requires_grad_() for s, n in enumerate(("q", "k", "v"))}


@pytest.mark.parametrize("window", [-1, 0, 1, 7, 63, 64, 1000])
def test_attention_equals_the_definition(lengths, window):
    inputs = attention_inputs(sum(lengths))
    ours = attention(*inputs.values(), cu_of(lengths), max(lengths), window)
    wanted = each_document(lengths, lambda q, k, v: attend(q, k, v, window), *inputs.values())
    compare(ours, wanted, inputs)


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("window", [-1, 0, 5, 100])
def test_attention_in_blocks_of_queries(monkeypatch, block, window):
    """The definition takes blocks of queries: tested with small ones, windows within a block and over several."""
    monkeypatch.setattr(attention_file, "QUERY_BLOCK", block)
    lengths = [1, 66, 0, 30]
    inputs = attention_inputs(97)
    ours = attention(*inputs.values(), cu_of(lengths), 66, window)
    wanted = each_document(lengths, lambda q, k, v: attend(q, k, v, window), *inputs.values())
    compare(ours, wanted, inputs)


@pytest.mark.parametrize("window", [-1, 0, 2])
def test_attention_gradcheck(window):
    cu = cu_of([4, 0, 1, 3])
    inputs = tuple(attention_inputs(8, P=3).values())
    assert gradcheck(lambda q, k, v: attention_file.attention_definition(q, k, v, cu, window), inputs)


def test_attention_of_large_scores_does_not_overflow():
    inputs = attention_inputs(65, scale=100.0)
    compare(attention(*inputs.values(), cu_of([65]), 65), attend(*inputs.values(), -1), inputs)


def test_attention_by_hand_at_the_window_edge():
    """With equal scores the result is the mean of the visible values, i - w..i."""
    v = torch.arange(6.0, dtype=torch.float64).view(6, 1, 1)
    q = torch.zeros_like(v)
    means = {
        -1: [0, 0.5, 1, 1.5, 4, 4.5],
        0: [0, 1, 2, 3, 4, 5],
        1: [0, 0.5, 1.5, 2.5, 4, 4.5],
        2: [0, 0.5, 1, 2, 4, 4.5],
    }
    for window, wanted in means.items():
        out = attention(q, q, v, cu_of([4, 2]), 4, window)
        torch.testing.assert_close(out.flatten().tolist(), [float(w) for w in wanted])


def test_attention_in_bfloat16_sums_in_float32():
    lengths = [300]
    inputs = [t.detach().bfloat16() for t in attention_inputs(300).values()]
    ours = attention(*inputs, cu_of(lengths), 300)
    assert ours.dtype == torch.bfloat16
    wanted = attend(*(t.double() for t in inputs), -1)
    torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=1e-6)  # rounded once, at the end


# --------------------------------------------------------------------------------------------------------- convolution


def conv_inputs(T, D=3, taps=4):
    inputs = {"x": normal(T, D), "weight": normal(D, 1, taps, seed=1), "bias": normal(D, seed=2)}
    return {name: t.requires_grad_() for name, t in inputs.items()}


def conv_loop(x, weight, bias):
    """silu(y), y_t = bias + sum_k weight[last - k] x_{t - k} in one document: the last tap is the present."""
    taps = weight.shape[-1]
    rows = [bias + sum(weight[:, 0, taps - 1 - k] * x[t - k] for k in range(min(taps, t + 1))) for t in range(len(x))]
    return F.silu(torch.stack(rows)) if rows else torch.zeros_like(x)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv_equals_the_loop(lengths, taps):
    inputs = conv_inputs(sum(lengths), taps=taps)
    ours = causal_conv_silu(*inputs.values(), positions_of(lengths))
    wanted = each_document(lengths, lambda x: conv_loop(x, inputs["weight"], inputs["bias"]), inputs["x"])
    compare(ours, wanted, inputs)


def test_causal_conv_gradcheck():
    positions = positions_of([4, 0, 1, 3])
    assert gradcheck(lambda *values: causal_conv_silu(*values, positions), tuple(conv_inputs(8).values()))


# ------------------------------------------------------------------------------------------- fakes, ids, the dispatcher


def test_custom_ops_describe_themselves_truly():
    """Schemas, fakes and registered gradients, on which torch.compile relies."""
    lengths = [65, 0, 9]
    cu, total = cu_of(lengths), sum(lengths)
    for op, backward, inputs, rest in (
        (ssd, ssd_file.ssd_backward, ssd_inputs(total), (cu,)),
        (conv_file.causal_conv_silu, conv_file.causal_conv_silu_backward, conv_inputs(total), (positions_of(lengths),)),
        (
            attention_file.attention_definition,
            attention_file.attention_definition_backward,
            attention_inputs(total),
            (cu, 3),
        ),
    ):
        torch.library.opcheck(op, (*inputs.values(), *rest))
        plain = [t.detach() for t in inputs.values()]
        torch.library.opcheck(backward, (torch.ones_like(plain[0]), *plain, *rest))


def test_copies_of_a_file_have_operations_of_their_own(dispatch):
    """transformers loads copies of these files beside the files themselves."""

    def ssd(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    other = dispatch.dispatched(ssd)
    assert other.name() != ssd_file.ssd.name()
    assert other(torch.zeros(1)) == 1
    inputs = ssd_inputs(3)
    assert ssd_file.ssd(*inputs.values(), cu_of([3])).shape == inputs["x"].shape


def test_document_ids_skip_empty_documents():
    ids = ssd_file.document_ids(cu_of([2, 0, 3, 0]), 7)
    assert ids.tolist() == [0, 0, 2, 2, 2, 4, 4]


@pytest.fixture
def dispatch(monkeypatch):
    module = importlib.import_module("hnet_kernels.dispatch")
    monkeypatch.setattr(module, "_chosen", {})
    module.requested.cache_clear()
    yield module
    monkeypatch.undo()
    module.requested.cache_clear()


def test_dispatcher_takes_the_fast_kernel_where_it_can(dispatch, monkeypatch):
    monkeypatch.setenv("HNET_KERNELS", "auto")
    assert dispatch.use_fast("scan", "cpu", torch.float32, None)
    assert not dispatch.use_fast("scan", "cpu", torch.float64, "no CUDA device")
    assert dispatch.kernel_report() == {
        "scan cpu float32": "fast",
        "scan cpu float64": "reference (no CUDA device)",
    }


def test_dispatcher_obeys_and_refuses(dispatch, monkeypatch):
    kind = "scan", "cpu", torch.float32
    monkeypatch.setenv("HNET_KERNELS", "reference")
    assert not dispatch.use_fast(*kind, None)
    dispatch.requested.cache_clear()
    monkeypatch.setenv("HNET_KERNELS", "triton")
    assert dispatch.use_fast(*kind, None)
    with pytest.raises(dispatch.KernelError, match="scan.*no CUDA device"):
        dispatch.use_fast(*kind, "no CUDA device")
    dispatch.requested.cache_clear()
    monkeypatch.setenv("HNET_KERNELS", "fast")
    with pytest.raises(dispatch.KernelError, match="HNET_KERNELS=fast.*auto, reference, triton"):
        dispatch.use_fast(*kind, None)


def test_a_choice_is_logged_once(dispatch, monkeypatch, caplog):
    monkeypatch.setenv("HNET_KERNELS", "auto")
    with caplog.at_level("DEBUG", logger="hnet_kernels"):
        for _ in range(3):
            dispatch.use_fast("scan", "cuda", torch.float32, "no triton")
            dispatch.use_fast("scan", "cpu", torch.float32, "no CUDA device")
            dispatch.use_fast("scan", "cuda", torch.float64, "dtype float64")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "scan on cuda float32: reference (no triton)"),
        ("DEBUG", "scan on cpu float32: reference (no CUDA device)"),  # every run on a CPU would print many of these
        ("DEBUG", "scan on cuda float64: reference (dtype float64)"),
    ]
