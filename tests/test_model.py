"""The complete model: any config, packed or alone, against a plain definition; and edge cases of its router."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from golden_io import pack
from hypothesis import example, given, settings
from reference import Reference
from small_models import (
    TWO_STAGES,
    build,
    draw_weights,
    inputs_of,
    random_documents,
    relative_gap,
)

import hnet_trainable as H
from hnet_kernels import cut, mamba2

EXACT = 1e-9  # float64: sums in another order differ by 1e-13 or so, and a deep model with sharp gates amplifies it


@st.composite
def configs(draw):
    """Any model that is small enough: 0 to 3 stages, every letter, equal widths, odd state sizes, tied or not."""
    stages = draw(st.integers(0, 3))
    widths = sorted(draw(st.lists(st.sampled_from([32, 64, 96]), min_size=stages + 1, max_size=stages + 1)))
    runs = st.tuples(st.sampled_from("mMtT"), st.integers(1, 2)).map(lambda run: f"{run[0]}{run[1]}")
    layouts = st.lists(runs, min_size=1, max_size=2).map("".join)
    arch = [draw(layouts)]
    for _ in range(stages):
        arch = [draw(layouts), arch, draw(layouts)]
    heads = [draw(st.sampled_from([1, 2, 4])) for _ in widths]
    rotary = [draw(st.sampled_from([0, 2, w // h])) for w, h in zip(widths, heads)]
    return {
        "arch_layout": arch,
        "d_model": widths,
        "d_intermediate": [draw(st.sampled_from([1, 128, 200])) for _ in widths],
        "ssm_cfg": {
            "d_state": draw(st.sampled_from([1, 5, 16, 130])),
            "d_conv": draw(st.sampled_from([1, 2, 4])),
            "expand": draw(st.sampled_from([2, 4])),
            "chunk_size": draw(st.sampled_from([16, 256])),
        },
        "attn_cfg": {
            "num_heads": heads,
            "rotary_emb_dim": rotary,
            "window_size": [draw(st.sampled_from([-1, 0, 1, 7, 64])) for _ in widths],
        },
        "tie_embeddings": draw(st.booleans()),
        "N_compress": [1.0, 2.0, 5.0, 6.5][: stages + 1],
    }


lengths_of_documents = st.lists(st.sampled_from([0, 1, 2, 3, 63, 64, 65]), max_size=4)

THREE_STAGES = {
    "arch_layout": ["m1T1", ["M1", ["t1", ["T1m1"], "m1"], "t1M1"], "T1"],
    "d_model": [32, 64, 64, 96],
    "d_intermediate": [128, 100, 0, 64],
    "ssm_cfg": {"d_state": 20, "chunk_size": 32},
    "attn_cfg": {"num_heads": [2, 1, 4, 3], "rotary_emb_dim": [16, 0, 8, 2], "window_size": [0, 5, -1, 63]},
    "tie_embeddings": True,
    "N_compress": [1, 2, 3, 7],
}


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@settings(max_examples=24, deadline=None, derandomize=True, database=None)
@given(configs(), lengths_of_documents, st.sampled_from([2, 66, 130]), st.integers(0, 9))
@example(THREE_STAGES, [257, 1, 0, 2, 63], 64, 3)
@example(TWO_STAGES, [0, 65, 0, 0, 257], 1, 4)
def test_packed_documents_equal_documents_alone_and_the_definition(raw, lengths, one_more, seed):
    """Logits, p, b and the gradient of every parameter, of a loss that weighs each document's CE and each stage's G."""
    lengths = [*lengths, one_more]
    model = build(H, raw, seed)
    stages = model.config.num_stages
    documents = random_documents(lengths, seed)
    doc_weight = [1.0 + 0.5 * i for i in range(len(documents))]
    stage_weight = [2.0 - 0.7 * s for s in range(stages)]

    def sum_of_p(out):  # G is a mean: times its tokens it adds up over documents
        return sum((w * s.G * s.boundary_prob.values().numel() for w, s in zip(stage_weight, out.stages)), start=0.0)

    iids, labels = pack(documents)
    together = model(iids, labels)
    ce_T = F.cross_entropy(together.logits.values(), labels.values(), reduction="none")
    weight_T = torch.tensor(doc_weight, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
    packed = gradients_of((ce_T * weight_T).sum() + sum_of_p(together), model)
    torch.testing.assert_close(together.ce, ce_T.mean(), rtol=1e-12, atol=0)

    alone_loss, plain_loss = 0.0, 0.0
    boundaries = [0] * stages
    plain_weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    reference = Reference(plain_weights, raw)
    for i, document in enumerate(documents):
        if lengths[i] == 0:
            assert together.logits[i].shape == (0, 256)
            continue
        alone = model(*pack([document]))
        alone_loss = alone_loss + doc_weight[i] * alone.ce * lengths[i] + sum_of_p(alone)
        logits, decisions = reference(torch.from_numpy(document[:-1]).long())
        plain_ce = F.cross_entropy(logits, torch.from_numpy(document[1:]).long(), reduction="sum")
        plain_loss = plain_loss + doc_weight[i] * plain_ce
        assert relative_gap(together.logits[i], alone.logits[0]) < EXACT
        assert relative_gap(together.logits[i], logits) < EXACT
        assert len(together.stages) == len(alone.stages) == len(decisions) == stages
        for s, (p, b) in enumerate(decisions):
            packed_stage, alone_stage = together.stages[s], alone.stages[s]
            assert relative_gap(packed_stage.boundary_prob[i], p) < EXACT
            assert relative_gap(packed_stage.boundary_prob[i], alone_stage.boundary_prob[0]) < EXACT
            assert torch.equal(packed_stage.boundary_mask[i], b)
            assert torch.equal(packed_stage.boundary_mask[i], alone_stage.boundary_mask[0])
            plain_loss = plain_loss + stage_weight[s] * p.sum()
            boundaries[s] += int(b.sum())

    for s, stage in enumerate(together.stages):
        tokens = stage.boundary_prob.values().numel()
        assert tokens == (boundaries[s - 1] if s else sum(lengths))
        torch.testing.assert_close(stage.F.item(), boundaries[s] / tokens, rtol=1e-12, atol=0)
        N = model.config.target_ratios[s]
        wanted = N / (N - 1) * ((N - 1) * stage.F * stage.G + (1 - stage.F) * (1 - stage.G))
        torch.testing.assert_close(together.ratio_losses[s], wanted)

    separate = gradients_of(alone_loss, model)
    plain_loss.backward()
    for name, gradient in packed.items():
        assert relative_gap(gradient, separate[name]) < EXACT, name
        assert relative_gap(gradient, plain_weights[name].grad) < EXACT, name


def test_ratio_loss_and_target_ratios_take_each_stage_its_own_n():
    """Unequal N, by hand: N = 3 for stage 0 and 2 for stage 1, from N_compress 1, 3, 6."""
    config = H.HNetConfig.load({**TWO_STAGES, "N_compress": [1, 3, 6]})
    assert config.target_ratios == (3, 2)
    model = H.HNetLM(config).double()
    draw_weights(model)
    out = model(inputs_of(random_documents([40, 9])))
    for s, N in enumerate((3, 2)):
        F_s, G_s = out.stages[s].F.item(), out.stages[s].G.item()
        wanted = N / (N - 1) * ((N - 1) * F_s * G_s + (1 - F_s) * (1 - G_s))
        assert out.ratio_losses[s].item() == pytest.approx(wanted, rel=1e-12)
    assert out.ce is None


def test_ratio_loss_is_one_at_its_target_and_below_it_for_confident_probabilities():
    def loss(F_, G_, N):
        return H.ratio_loss(H.StageOutput(None, None, torch.tensor(F_), torch.tensor(G_), None), N).item()

    for N in (1.5, 3.0, 6.0):
        assert loss(1 / N, 1 / N, N) == pytest.approx(1)
    assert loss(1 / 6, 0.1, 6.0) == pytest.approx(1.0)  # at F = 1/N the loss does not depend on G
    assert loss(0.1, 0.3, 6.0) == pytest.approx(1.2 * (5 * 0.03 + 0.9 * 0.7))
    assert loss(0.1, 0.3, 6.0) < 1


# ------------------------------------------------------------------------------------------------------------- router


def constant_router(model, q_sign: float, k_channel: int) -> None:
    """Make the outermost router's cosine the same everywhere: channel 0 of its input is always positive, and q reads
    channel 0 into channel 0, k reads it into `k_channel`."""
    with torch.no_grad():
        model.embeddings.weight[:, 0] = 100.0
        model.backbone.encoder.rmsnorm.weight[0].abs_()
        q, k = model.backbone.routing_module.q_proj_layer.weight, model.backbone.routing_module.k_proj_layer.weight
        q.zero_()[0, 0] = q_sign
        k.zero_()[k_channel, 0] = 1.0


def check_constant_router(q_sign: float, k_channel: int, p: float) -> torch.Tensor:
    """Router of constant p: compare everything with the definition, give back the mask."""
    model = build(H, TWO_STAGES, seed=5)
    constant_router(model, q_sign, k_channel)
    lengths = [65, 1, 30, 2]
    documents = random_documents(lengths)
    out = model(*pack(documents))
    stage = out.stages[0]
    for i, length in enumerate(lengths):
        wanted = torch.full((length,), p, dtype=torch.float64)
        wanted[0] = 1.0
        assert torch.equal(stage.boundary_prob[i], wanted)  # exactly: the tie must be one
    gradients = gradients_of(out.ce + out.stages[0].G + out.stages[1].G, model)
    weights = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
    reference, tokens = Reference(weights, TWO_STAGES), [sum(lengths), len(out.stages[1].boundary_prob.values())]
    loss = 0.0
    for i, document in enumerate(documents):
        logits, decisions = reference(torch.from_numpy(document[:-1]).long())
        loss = loss + F.cross_entropy(logits, torch.from_numpy(document[1:]).long(), reduction="sum") / sum(lengths)
        assert relative_gap(out.logits[i], logits) < EXACT
        for s, (p_L, b_L) in enumerate(decisions):
            assert torch.equal(out.stages[s].boundary_mask[i], b_L)
            loss = loss + p_L.sum() / tokens[s]
    loss.backward()
    for name, gradient in gradients.items():
        assert relative_gap(gradient, weights[name].grad) < EXACT, name
    return stage.boundary_mask


def test_an_exact_tie_is_no_boundary():
    """q and k orthogonal: p is 0.5 to the bit, and only the first position of each document opens a chunk."""
    mask = check_constant_router(q_sign=1.0, k_channel=1, p=0.5)
    assert [row.sum().item() for row in mask.unbind()] == [1, 1, 1, 1]


def test_every_position_a_boundary():
    mask = check_constant_router(q_sign=-1.0, k_channel=0, p=1.0)
    assert mask.values().all()


def test_one_boundary_a_document():
    mask = check_constant_router(q_sign=1.0, k_channel=0, p=0.0)
    assert [row.sum().item() for row in mask.unbind()] == [1, 1, 1, 1]


def test_router_compares_the_query_of_one_position_with_the_key_of_the_next():
    """By hand: identity weights, so p_t looks at x_{t-1} and x_t, and p = 1 opens each document."""
    router = H.RoutingModule(2).double()
    with torch.no_grad():
        router.q_proj_layer.weight.copy_(torch.eye(2))
        router.k_proj_layer.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))  # turns (a, b) into (b, -a)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.0, -5.0]]).double()
    packing = H.Packing.of(torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 4, 6])), 0)
    p_T = router(x, packing)
    p_T, G, chunks = cut(p_T, router.opens(p_T), packing.position_T, packing.cu_seqlens)
    # keys: (0,-1), (2,0), (0,-3), (0,1) | (0,1), (-5,0); cosines with the query before: -, 1, 0, 0 | -, 1
    # and one more turn: the fourth key (0,1) meets the query (3,0), a tie
    assert p_T.tolist() == [1.0, 0.0, 1.0, 0.5, 1.0, 0.0]
    assert chunks.b_T.tolist() == [True, False, True, False, True, False]
    assert chunks.shares[0].item() == 0.5
    assert G.item() == chunks.shares[1].item() == pytest.approx(3.5 / 6)


# ----------------------------------------------------------------------------------------------------- long documents


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_no_limit_on_document_length_and_positions_are_relative(dtype, tolerance):
    """5000 bytes through windowed attention: one layer's answer depends on the last w + 1 bytes and their distances.

    So the end of the long document equals a short one. In float32 an angle near 5000 is off by up to 2.4e-4, which
    reaches the logits as some 1e-6.
    """
    window = 15
    raw = {
        "arch_layout": ["T1"],
        "d_model": [32],
        "d_intermediate": [64],
        "attn_cfg": {"num_heads": [2], "rotary_emb_dim": [16], "window_size": [window]},
    }
    model = build(H, raw, dtype=dtype)
    long = random_documents([5000])[0]
    with torch.no_grad():
        logits = model(inputs_of([long])).logits[0]
        for end in (100, 2048, 2050, 4096, 5000):
            tail = model(inputs_of([long[end - window - 1 : end + 1]])).logits[0]
            assert relative_gap(logits[end - 1], tail[-1]) < tolerance
            one_less = model(inputs_of([long[end - window : end + 1]])).logits[0]
            assert relative_gap(logits[end - 1], one_less[-1]) > 2 * tolerance  # the far end of the window counts


def test_a_long_document_through_all_stages_equals_itself_in_company():
    """Nothing in a hierarchy depends on the length of the longest document either (float32, 3000 bytes)."""
    model = build(H, TWO_STAGES, dtype=torch.float32)
    documents = random_documents([3000, 5, 64])
    with torch.no_grad():
        together, alone = model(inputs_of(documents)), model(inputs_of(documents[:1]))
    # float32 sums in another order; a boundary that flips would show as a difference of order one
    assert relative_gap(together.logits[0], alone.logits[0]) < 1e-3
    assert torch.equal(together.stages[1].boundary_mask[0], alone.stages[1].boundary_mask[0])


# ------------------------------------------------------------------------------------------------------ dtypes, meta


def record(model, kind, pre=False):
    """A list that fills with the tensors that modules of one kind receive (pre) or return."""
    seen = []
    for module in model.modules():
        if isinstance(module, kind):
            if pre:
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            else:
                module.register_forward_hook(lambda _, args, out: seen.append(out))
    return seen


def dtypes(tensors):
    return {t.dtype for t in tensors}


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float64])
def test_residual_stream_router_and_loss_keep_at_least_float32(compute):
    model = build(H, TWO_STAGES, dtype=compute)
    wide = torch.promote_types(compute, torch.float32)
    residuals, normed = record(model, H.Block, pre=True), record(model, H.RMSNorm)
    linear_inputs = record(model, torch.nn.Linear, pre=True)
    blocks = record(model, H.Block)
    out = model(*pack(random_documents([30, 5])))
    assert dtypes(residuals) == dtypes(blocks) == {wide}
    assert dtypes(normed) == {compute}
    assert dtypes(linear_inputs) == {compute}
    assert dtypes([out.logits]) == {compute}
    stage_numbers = [t for s in out.stages for t in (s.boundary_prob, s.F, s.G)]
    assert dtypes([out.ce, out.ratio_losses, *stage_numbers]) == {wide}
    (out.ce + out.ratio_losses.sum()).backward()
    assert dtypes([p.grad for p in model.parameters()]) == {compute}
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_parameters_left_in_float32_keep_their_precision_beside_bfloat16_ones(monkeypatch):
    """residual_proj, A_log, dt_bias and D in float32 among bfloat16 weights: used as they are, not rounded."""
    model = build(H, TWO_STAGES, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if not (name.endswith(("A_log", "dt_bias", ".D")) or "residual_proj" in name):
            parameter.data = parameter.data.bfloat16()
    scans, real_ssd = [], mamba2.ssd
    monkeypatch.setattr(mamba2, "ssd", lambda *args: scans.append(args) or real_ssd(*args))
    projected = record(model.backbone.residual_proj, torch.nn.Linear)
    documents = pack(random_documents([30, 5]))
    out = model(*documents)
    assert dtypes(projected) == {torch.float32}
    assert len(scans) == 4
    for x, dt, A, B, C, _ in scans:
        assert dtypes([dt, A]) == {torch.float32} and dtypes([x, B, C]) == {torch.bfloat16}
    assert out.logits.dtype == torch.bfloat16 and out.ce.isfinite()


def test_float64_stays_float64_and_differs_from_float32():
    """A cast to float32 anywhere would leave a trace of 1e-7: the first digits of both runs agree, no more."""
    documents = random_documents([40, 3])
    double = build(H, TWO_STAGES)(inputs_of(documents)).logits.values()
    single = build(H, TWO_STAGES, dtype=torch.float32)(inputs_of(documents)).logits.values().double()
    assert double.dtype == torch.float64
    assert 1e-9 < relative_gap(single, double) < 1e-3


def test_builds_on_the_meta_device_and_runs_once_it_has_memory():
    config = H.HNetConfig.load(TWO_STAGES)
    with torch.device("meta"):
        model = H.HNetLM(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not list(model.buffers())  # what is computed at construction would be lost with to_empty
    model = model.to_empty(device="cpu").double()
    draw_weights(model)
    batch = inputs_of(random_documents([20, 3]))
    assert torch.equal(model(batch).logits.values(), build(H, TWO_STAGES)(batch).logits.values())


def test_two_runs_give_the_same_bits():
    batch = pack(random_documents([65, 3, 40]))
    results = []
    for _ in range(2):
        model = build(H, TWO_STAGES, dtype=torch.float32)
        out = model(*batch)
        results.append([out.logits.values(), *gradients_of(out.ce + out.ratio_losses.sum(), model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_tied_embeddings_stay_one_parameter_on_the_way_from_meta():
    with torch.device("meta"):
        model = H.HNetLM(H.HNetConfig.load({**TWO_STAGES, "tie_embeddings": True}))
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.embeddings.weight


def test_tied_embeddings_are_one_parameter_that_both_ends_train():
    tied = build(H, {**TWO_STAGES, "tie_embeddings": True})
    assert tied.lm_head.weight is tied.embeddings.weight
    assert [n for n, _ in tied.named_parameters() if "lm_head" in n] == []
    untied = build(H, TWO_STAGES)
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.embeddings.weight)
    batch = pack(random_documents([20, 3]))
    shared, apart = (gradients_of(m(*batch).ce, m) for m in (tied, untied))
    wanted = apart["embeddings.weight"] + apart["lm_head.weight"]
    torch.testing.assert_close(shared["embeddings.weight"], wanted, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_labels_of_another_shape_than_the_inputs_are_refused():
    model = build(H, TWO_STAGES)
    iids, labels = pack(random_documents([5, 3]))
    assert model(iids, pack(random_documents([5, 3]))[1]).ce.isfinite()  # equal lengths, other offsets: fine
    for wrong in ([3, 5], [5, 2], [8], [5, 3, 0], [5, 3, 2]):
        with pytest.raises(ValueError, match="labels"):
            model(iids, pack(random_documents(wrong))[1])
    with pytest.raises(ValueError, match="labels"):
        model(iids, labels.values())
    with pytest.raises(ValueError, match="labels.*strided"):
        model(iids, torch.nested.nested_tensor([torch.arange(5), torch.arange(3)]))
    with pytest.raises(ValueError, match="iids.*at least one byte"):
        model(pack(random_documents([0, 0]))[0])
    with pytest.raises(ValueError, match="iids"):
        model(iids.values())
    with pytest.raises(ValueError, match="iids"):
        model(iids.values(), labels)


def test_what_is_no_nested_tensor_of_bytes_is_refused():
    model = build(H, TWO_STAGES)
    iids, labels = pack(random_documents([5, 3]))
    for wrong, kind in (("hello", "str"), (b"hello", "bytes"), ([[1, 2]], "list"), (None, "NoneType"), (7, "int")):
        with pytest.raises(ValueError, match=f"iids: expected a nested tensor .* got {kind}"):
            model(wrong)
        if wrong is not None:
            with pytest.raises(ValueError, match=f"labels: expected a nested tensor .* got {kind}"):
                model(iids, wrong)
    for dtype, name in ((torch.float32, "float32"), (torch.uint8, "uint8"), (torch.bool, "bool")):
        with pytest.raises(ValueError, match=f"iids: expected int64, got {name}"):
            model(iids.to(dtype))
    narrowed = torch.nested.narrow(
        torch.zeros(2, 9, dtype=torch.int64), 1, torch.tensor([0, 1]), torch.tensor([5, 3]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match="iids: expected documents without gaps"):
        model(narrowed)


@pytest.mark.parametrize("value", [-100, -1, 256, 300, 2**62])
def test_values_beyond_the_vocabulary_are_refused_on_the_cpu_and_read_on_no_other_device(value):
    model = build(H, TWO_STAGES)
    iids, labels = pack(random_documents([5, 3]))
    for name, wrong in (("iids", iids.clone()), ("labels", labels.clone())):
        wrong.values()[6] = value
        with pytest.raises(ValueError, match=f"^{name}: holds the value {value}; expected 0 to 255"):
            model(wrong, labels) if name == "iids" else model(iids, wrong)
        H.check_documents(wrong.to("meta"), None)  # whose values nobody can read
