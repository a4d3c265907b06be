"""The inference model is the training model: prefill, step and any mix of them, caches, borrowed weights, sampling."""

import itertools
import math
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.golden_weights import golden_weight
from golden_io import NAMES, golden_documents, golden_model, load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hnet_decoder import generate, stream
from hnet_kernels.sampling import UTF8_NEXT, SamplingRows, draw_rows, utf8_state
from hnet_runtime.runs.weights import load
from hnet_simple import GenerationError, HNetInference, Sampling, ring_slots
from hnet_trainable import BOS, EOS, HNetConfig, HNetLM, parse_layout


def config_of(layout, d_model, **changes) -> HNetConfig:
    S = len(d_model)
    attn = {"num_heads": [2] * S, "rotary_emb_dim": [8] * S, "window_size": [-1] * S}
    attn |= {key: changes.pop(key) for key in list(changes) if key in attn}
    fields = {"d_intermediate": [48] * S, "ssm_cfg": {"d_state": 16}, "N_compress": [3**i for i in range(S)]}
    return HNetConfig.load({"arch_layout": layout, "d_model": d_model, "attn_cfg": attn, **fields, **changes})


def random_model(config: HNetConfig, dtype: torch.dtype = torch.float64, salt: str = "") -> HNetLM:
    """Weights as the goldens have them, but inner routers without the identity in W_q.

    Inner tokens are alike where `pad_dimension` is a part of all of them, so that few would open a chunk: the deepest
    stages would see a token or two.
    """
    model = HNetLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = golden_weight(salt + name, tuple(parameter.shape))
            if "main_network.routing_module.q_proj_layer" in name:
                value -= np.eye(len(value))
            parameter.copy_(torch.from_numpy(value))
    return model


@pytest.mark.parametrize("name", ["conv1d", "norm"])
def test_a_mixer_refuses_a_wrapped_module_that_it_would_not_call(name):
    """As adapters do it: the wrapper has the weight, but its own forward would not run."""

    class Wrapper(torch.nn.Module):
        def __init__(self, wrapped: torch.nn.Module):
            super().__init__()
            self.weight, self.bias = wrapped.weight, getattr(wrapped, "bias", None)

    document = torch.tensor([BOS, 1, 2])
    model = random_model(config_of(["m1", ["T1"], "m1"], [32, 64]))
    mixer = model.backbone.encoder.layers[0].mixer
    setattr(mixer, name, Wrapper(getattr(mixer, name)))
    for run in (lambda: model(nested([document])), lambda: HNetInference.from_training(model).prefill([document])):
        with pytest.raises(TypeError, match=f"{name} of a Mamba-2 mixer was replaced by Wrapper"):
            run()


def nested(documents: list[torch.Tensor]) -> torch.Tensor:
    lengths = torch.tensor([len(d) for d in documents], device=documents[0].device)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    limits = {"min_seqlen": int(lengths.min()), "max_seqlen": int(lengths.max())}
    return torch.nested.nested_tensor_from_jagged(torch.cat(documents), offsets, **limits)


@torch.no_grad()
def training_logits(
    model: HNetLM, documents: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """(logits of each document, boundary masks [stage][document])."""
    out = model(nested(documents))
    return list(out.logits.unbind()), [list(stage.boundary_mask.unbind()) for stage in out.stages]


def random_documents(lengths, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.tensor([BOS]), torch.randint(256, (n - 1,), generator=generator)]) for n in lengths]


def feed(lm: HNetInference, documents, splits, n_steps) -> list[torch.Tensor]:
    """All logits from a prefill for each part between `splits` (one list a document), then from steps."""
    cache, got = None, [[] for _ in documents]
    done = [0] * len(documents)
    for cut in zip(*splits):
        if list(cut) == done:
            continue
        out = lm.prefill([d[a:b] for d, a, b in zip(documents, done, cut)], cache)
        for b, (start, stop) in enumerate(zip(done, cut)):
            got[b].append(out.logits_BLV[b, : stop - start])
        cache, done = out.cache, list(cut)
    cache = cache or lm.new_cache(len(documents))
    for t in range(n_steps):
        active = [at + t < len(d) for d, at in zip(documents, done)]
        byte_B = torch.stack([d[min(at + t, len(d) - 1)] for d, at in zip(documents, done)])
        if not any(active):
            break
        out = lm.step(byte_B, cache, active)
        for b in (b for b, goes_on in enumerate(active) if goes_on):
            got[b].append(out.logits_BV[b, None])
    return [torch.cat(parts) for parts in got]


def worst(ours, theirs) -> float:
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs) if len(b))


# ---------------------------------------------------------------------------------------------- it is the same model


@pytest.mark.parametrize("name", NAMES)
def test_goldens_prefill_and_step(name):
    golden = load_golden(name)
    model = golden_model(golden, torch.float64)
    documents = [torch.from_numpy(d[:-1].astype(np.int64)) for d in golden_documents(golden)]
    expected, masks = training_logits(model, documents)
    lm = HNetInference.from_training(model)
    whole = lm.prefill(documents)
    for i, document in enumerate(documents):
        assert worst([whole.logits_BLV[i, : len(document)]], [expected[i]]) < 1e-9
        assert worst([whole.logits_BLV[i, : len(document)]], [torch.from_numpy(golden[f"logits{i}"])]) < 1e-6
        for s, mask in enumerate(masks):
            assert torch.equal(whole.boundaries[s][i, : len(mask[i])], mask[i])
    stepped = feed(lm, documents, [[]] * len(documents), max(map(len, documents)))
    assert worst(stepped, expected) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_goldens_in_float32(name):
    golden = load_golden(name)
    documents = [torch.from_numpy(d[:-1].astype(np.int64)) for d in golden_documents(golden)]
    lm = HNetInference.from_training(golden_model(golden, torch.float32))
    stepped = feed(lm, documents, [[len(d) - 20] if len(d) > 20 else [1] for d in documents], 20)
    assert worst(stepped, [torch.from_numpy(golden[f"logits{i}"]) for i in range(len(documents))]) < 1e-4


@st.composite
def configs(draw):
    S = draw(st.integers(0, 3))
    d_model = sorted(draw(st.lists(st.sampled_from([32, 64, 96]), min_size=S + 1, max_size=S + 1)))
    layout = st.lists(st.sampled_from(["m1", "M1", "t1", "T1", "m2"]), min_size=1, max_size=2).map("".join)
    node = [draw(layout)]
    for _ in range(S):
        node = [draw(layout), node, draw(layout)]
    per_stage = {"min_size": S + 1, "max_size": S + 1}
    return config_of(
        node,
        d_model,
        rotary_emb_dim=draw(st.lists(st.sampled_from([0, 4, 16]), **per_stage)),
        window_size=draw(st.lists(st.sampled_from([-1, 0, 1, 5, 70]), **per_stage)),
        ssm_cfg={"d_state": draw(st.sampled_from([8, 16])), "d_conv": draw(st.integers(1, 4))},
        tie_embeddings=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(configs(), st.data())
def test_any_layout_any_split(config, data):
    """Training forward = prefill in any pieces, then steps, each sequence cut elsewhere and of another length."""
    lengths = data.draw(st.lists(st.integers(1, 90) | st.sampled_from([1, 2, 64, 65, 300]), min_size=1, max_size=4))
    splits = []
    for n in lengths:
        a, b = sorted(data.draw(st.tuples(st.integers(1, n), st.integers(max(1, n - 12), n))))
        splits.append([a, b])
    documents = random_documents(lengths, seed=len(lengths))
    model = random_model(config, salt=str(sum(lengths)))
    expected, _ = training_logits(model, documents)
    assert worst(feed(HNetInference.from_training(model), documents, splits, 12), expected) < 1e-9


@pytest.mark.parametrize("name", ["forward", "embed", "head"])
def test_a_subclass_whose_formula_generation_would_leave_out_is_refused(name):
    kind = type("Softcapped", (HNetLM,), {name: lambda self, *args: 2 * getattr(HNetLM, name)(self, *args)})
    with pytest.raises(GenerationError, match=f"Softcapped has its own {name}"):
        HNetInference.from_training(kind(config_of(["m1", ["T1"], "m1"], [32, 32])))
    HNetInference.from_training(type("Plain", (HNetLM,), {})(config_of(["m1", ["T1"], "m1"], [32, 32])))


def test_rings_turn():
    """Steps and prefills far beyond a window, at stages where some sequences have turned the ring and others not."""
    config = config_of(["t1", ["T1", ["T2"], "t1"], "m1t1"], [32, 32, 64], window_size=[9, 4, -1])
    documents = random_documents([3, 40, 150])
    model = random_model(config)
    expected, masks = training_logits(model, documents)
    assert sum(len(m) for m in masks[1]) > 40  # inner tokens
    lm = HNetInference.from_training(model)
    for splits in (
        [[], [], []],
        [[1], [30], [11]],
        [[3, 3], [7, 29], [60, 150]],
        [[2, 3, 3], [10, 11, 12], [9, 10, 140]],
    ):
        assert worst(feed(lm, documents, splits, 150), expected) < 1e-9


def test_batch_equals_alone():
    golden = load_golden("two_stage")
    lm = HNetInference.from_training(golden_model(golden, torch.float64))
    documents = random_documents([1, 7, 80, 33])
    splits = [[1], [5], [60], [20]]
    together = feed(lm, documents, splits, 20)
    alone = [feed(lm, [d], [s], 20)[0] for d, s in zip(documents, splits)]
    assert worst(together, alone) < 1e-9


def test_inactive_sequences_keep_their_state():
    lm = HNetInference.from_training(random_model(config_of(["m1t1", ["T1"], "t1m1"], [32, 64], window_size=[3, -1])))
    documents = random_documents([20, 20])
    cache = lm.prefill([d[:10] for d in documents]).cache
    reference = lm.prefill([documents[0][:10]]).cache
    for _ in range(7):  # sequence 1 goes on alone
        lm.step(documents[1][10:12].flip(0), cache, [False, True])
    for t in range(10, 20):
        both = lm.step(torch.stack([documents[0][t], documents[1][t]]), cache)
        one = lm.step(documents[0][t : t + 1], reference)
        assert worst([both.logits_BV[:1]], [one.logits_BV]) < 1e-9
        assert both.starts[0] == one.starts[0]


def test_starts_are_nested_and_the_same_in_prefill_and_step():
    lm = HNetInference.from_training(golden_model(load_golden("two_stage"), torch.float64))
    document = random_documents([120])[0]
    whole = lm.prefill([document])
    cache, stepped = lm.new_cache(1), []
    for byte in document:
        stepped.append(lm.step(byte[None], cache).starts[0])
    assert stepped == [tuple(row) for row in whole.starts_BLS[0].tolist()]
    assert stepped[0] == (True, True) and not any(inner and not outer for outer, inner in stepped)
    assert 2 < sum(inner for _, inner in stepped) < sum(outer for outer, _ in stepped) < 115
    assert [int(b.sum()) for b in whole.boundaries] == [sum(s) for s in zip(*stepped)]
    assert lm.stages[1].outer_width == 256 and cache.stages[2].tokens == [sum(inner for _, inner in stepped)]


def test_bfloat16_keeps_to_float32():
    """bf16 weights with A_log, dt_bias, D and residual_proj in float32, as training computes: close, and finite."""
    model = random_model(config_of(["m1T1", ["T1m1"], "m1"], [64, 64]), torch.float32)
    documents = random_documents([40, 25])
    expected = [logits.float() for logits in training_logits(model, documents)[0]]
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias", ".D")) and "residual_proj" not in name:
            parameter.data = parameter.data.bfloat16()
    lm = HNetInference.from_training(model)
    low, masks = training_logits(model, documents)
    prefill = lm.prefill(documents)
    assert prefill.logits_BLV.dtype == torch.bfloat16 and prefill.probabilities[0].dtype == torch.float32
    for i, document in enumerate(documents):
        if torch.equal(prefill.boundaries[0][i, : len(document)], masks[0][i]):
            error = (prefill.logits_BLV[i, : len(document)].float() - low[i].float()).square().mean().sqrt()
            noise = (low[i].float() - expected[i]).square().mean().sqrt()
            assert error < 2 * noise + 1e-3
    stepped = feed(lm, documents, [[20], [20]], 20)
    assert all(torch.isfinite(logits).all() for logits in stepped)


# -------------------------------------------------------------------------------------------------------------- caches


def formula(config: HNetConfig, batch: int, tokens: list[int], c: int, a: int) -> int:
    total = 0
    for s, D in enumerate(config.d_model):
        total += 8
        for letter in (letter for layout in config.layouts(s) for letter in parse_layout(layout)):
            ssm, window = config.ssm_cfg, config.attn_cfg.window_size[s]
            if letter.mixer == "m":
                total += (ssm.d_conv - 1) * (ssm.expand * D + 2 * ssm.d_state) * c + ssm.expand * D * ssm.d_state * a
            else:
                slots = 64
                while slots < tokens[s]:
                    slots *= 2
                total += 2 * D * c * (slots if window < 0 else min(slots, window + 1))
        if s < config.num_stages:
            total += D * c + D * a
    return batch * total


@pytest.mark.parametrize("dtype, c, a", [(torch.float64, 8, 8), (torch.float32, 4, 4), (torch.bfloat16, 2, 4)])
def test_cache_bytes(dtype, c, a):
    config = config_of(["m2t1", ["T1m1", ["T2"], "t1"], "m1"], [32, 32, 64], window_size=[99, 9, -1])
    lm = HNetInference.from_training(random_model(config, dtype))
    cache = lm.new_cache(3)
    assert cache.cache_bytes() == pytest.approx(formula(config, 3, [0, 0, 0], c, a), rel=0.05)
    sizes = set()
    for document in (random_documents([1])[0], *[torch.randint(256, (70,))] * 3):
        lm.prefill([document, document[:1], document[:1]], cache)
        tokens = [max(state.tokens) for state in cache.stages]
        assert cache.cache_bytes() == pytest.approx(formula(config, 3, tokens, c, a), rel=0.05)
        sizes.add(cache.cache_bytes())
    assert tokens[0] == 211 and len(sizes) > 1
    ours = [
        layer.k_BWHP.shape[1] for state in cache.stages for layer in state.layers.values() if hasattr(layer, "k_BWHP")
    ]
    assert ours[:3] == [100, 10, 10] and ours[3] == ring_slots(tokens[2], -1)  # windows stay, the main network grows


def test_max_len_reserves():
    config = config_of(["t1", ["T1"], "m1"], [32, 64], window_size=[20, -1])
    lm = HNetInference.from_training(random_model(config))
    cache = lm.new_cache(2, max_len=300)
    before, places = (
        cache.cache_bytes(),
        [layer.k_BWHP.data_ptr() for s in cache.stages for layer in list(s.layers.values())[:1]],
    )
    lm.prefill(random_documents([300, 4]), cache)
    assert before == cache.cache_bytes()
    assert places == [layer.k_BWHP.data_ptr() for s in cache.stages for layer in list(s.layers.values())[:1]]
    assert lm.new_cache(2, max_len=[300, 100]).cache_bytes() < before


class Waits(TorchDispatchMode):
    """Counts operations that would make a CUDA device report to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
        masks = args[1] if name in ("index", "index_put", "index_put_") else []
        self.count += any(t is not None and t.dtype == torch.bool for t in masks)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_once(monkeypatch):
    lm = HNetInference.from_training(random_model(config_of(["m1t1", ["T1m1", ["T1"], "m1"], "m1"], [32, 32, 64])))
    cache = lm.prefill(random_documents([5, 9])).cache
    copies = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copies.append(1) or original(tensor))
    with Waits() as waits:
        for byte in (65, 32, 66):
            lm.step(torch.tensor([byte, byte + 1]), cache)
    assert len(copies) == 3 and waits.count == 0


# ----------------------------------------------------------------------------------------------------- borrowed weights


def test_pointer_copy():
    """The same storage, no new memory, later optimizer steps are seen."""
    for tied in (False, True):
        model = random_model(config_of(["m1", ["T1"], "M1"], [32, 64], tie_embeddings=tied), torch.float32)
        lm = HNetInference.from_training(model)
        ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (lm, model))
        assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in theirs)
        assert list(lm.state_dict()) == list(model.state_dict()) and not list(lm.buffers())
        documents = random_documents([30])
        before = lm.prefill(documents).logits_BLV
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(nested(documents)).logits.values().square().mean().backward()
        optimizer.step()
        after = lm.prefill(documents).logits_BLV
        assert (after - before).abs().max() > 1e-3
        assert worst([after[0]], training_logits(model, documents)[0]) < 1e-4
        with lm.unsharded() as same:
            assert same is lm and torch.equal(lm.prefill(documents).logits_BLV, after)
        assert lm.backbone is model.backbone, "and so are the layers, with whatever was changed in them"


def test_allocates_no_parameter_memory():
    """As counted by torch: building the inference model touches no storage but the training model's."""

    class Allocations(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                self.total += out.nbytes
            return out

    model = random_model(config_of(["m1", ["T1"], "m1"], [32, 64]))
    with Allocations() as allocations:
        HNetInference.from_training(model)
    assert allocations.total == 0


def sharded_worker(rank: int, world_size: int, port: int, folder: Path) -> None:
    """What a rank of a sharded training does; an assertion that fails fails the test."""
    from hnet_runtime import distributed
    from hnet_runtime.runs import checkpoint

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    world = distributed.start("cpu")
    config = config_of(["m1T1", ["T1"], "M1"], [64, 64])
    documents = random_documents([30, 12])
    for compute_dtype, tolerance in ((torch.bfloat16, 0.5), (torch.float32, 1e-4)):
        model = random_model(config, torch.float32)
        distributed.shard_model(model, world.mesh, compute_dtype)
        lm = HNetInference.from_training(model)
        with pytest.raises(RuntimeError, match="unsharded"):
            lm.prefill(documents)
        optimizer = torch.optim.AdamW(distributed.optimizer_groups([{"params": list(model.parameters())}]), lr=1e-2)
        for _ in range(2):  # the second time sees the optimizer's step
            expected, masks = training_logits(model, documents)
            with lm.unsharded():
                weights, whole = dict(lm.named_parameters()), dict(model.named_parameters())
                assert all(weights[n].data_ptr() == whole[n].data_ptr() for n in whole)
                assert weights["lm_head.weight"].dtype == compute_dtype
                assert weights["backbone.encoder.layers.0.mixer.A_log"].dtype == torch.float32
                assert weights["backbone.residual_proj.weight"].dtype == torch.float32
                storage = weights["lm_head.weight"].untyped_storage()
                assert storage.nbytes() > 0
                if rank == 0:  # one rank alone: nothing inside talks to the others
                    out = lm.prefill(documents)
                    for i, document in enumerate(documents):
                        assert torch.equal(out.boundaries[0][i, : len(document)], masks[0][i])
                        assert worst([out.logits_BLV[i, : len(document)].float()], [expected[i].float()]) < tolerance
                    generate(lm, ["ab"], max_bytes=3)
                del weights, whole
            assert hasattr(lm.lm_head.weight, "device_mesh") and storage.nbytes() == 0
            model(nested(documents)).logits.values().float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    checkpoint.save(folder, 2, model, optimizer, {}, keep=0)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    distributed.stop()


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_training_model(world_size, tmp_path):
    """FSDP2 over gloo: pointers to the gathered weights inside the `with`, released after it.

    And what such a run saves is loaded by one process without a process group.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(sharded_worker, args=(world_size, port, tmp_path), nprocs=world_size)
    loaded, whole = load(tmp_path), torch.load(tmp_path / "whole.pt")
    assert loaded.weights.keys() == whole.keys()
    assert all(torch.equal(loaded.weights[name], whole[name]) for name in whole)


# ------------------------------------------------------------------------------------------------------------ sampling


def tiny_model(dtype=torch.float32) -> HNetInference:
    return HNetInference.from_training(random_model(config_of(["m1", ["T1"], "m1"], [32, 32]), dtype))


def test_filters_match_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 256, generator=generator) * 3
    for sampling in (
        Sampling(0.7, top_k=5),
        Sampling(1.3, top_p=0.6),
        Sampling(1.0, min_p=0.1),
        Sampling(2.0, top_k=40, top_p=0.9, min_p=0.02),
        Sampling(1.0, top_p=1e-9),
        Sampling(),
    ):
        prob = (logits[0].double() / sampling.temperature).softmax(-1).tolist()
        ranked = sorted(range(256), key=lambda byte: -prob[byte])
        kept, mass = [], 0.0
        for rank, byte in enumerate(ranked):
            if (sampling.top_k and rank >= sampling.top_k) or mass >= sampling.top_p:
                break
            if prob[byte] >= sampling.min_p * prob[ranked[0]]:
                kept.append(byte)
            mass += prob[byte]
        uniform = torch.arange(4000, dtype=torch.float64) / 4000
        drawn = sampling.draw(logits.expand(4000, -1), uniform).bincount(minlength=256)
        for byte in range(256):
            share = prob[byte] / sum(prob[k] for k in kept) if byte in kept else 0.0
            assert abs(drawn[byte].item() / 4000 - share) <= 1 / 4000 + 1e-9


def test_greedy_is_argmax():
    logits = torch.tensor([[0.0] * 65 + [1.0, 1.0 - 1e-7] + [0.5] * 189])
    assert Sampling(temperature=0).draw(logits, torch.tensor([0.99])).tolist() == [65]
    edges = torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64)
    spiked = torch.full((2, 256), -1e9)
    spiked[:, [7, 200]] = 0.0
    assert Sampling().draw(spiked, edges).tolist() == [7, 200]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_generates_what_single_runs_do(temperature):
    """8 sequences of different lengths, greedy and sampled, float32 and float64."""
    prompts = ["", "a", "The quick brown fox ", b"\xff\x00\x80", "日本", "x" * 70, "\n\n", "def f(x):"]
    for dtype in (torch.float64, torch.float32):
        lm = tiny_model(dtype)
        options = {"max_bytes": 40, "sampling": Sampling(temperature), "stop_at_eos": False}
        together = generate(lm, prompts, seed=list(range(100, 108)), **options)
        for b, prompt in enumerate(prompts):
            (alone,) = generate(lm, [prompt], seed=100 + b, **options)
            assert alone == together[b] and len(alone.continuation) == 40
    assert len({g.continuation for g in together}) == 8


def test_stream_ends_at_eos_and_echoes():
    lm = tiny_model()
    texts = generate(lm, ["one", "two"], max_bytes=400, seed=3, sampling=Sampling(3.0))
    assert any(len(t.continuation) < 400 for t in texts)
    for b, text in enumerate(texts):
        assert EOS not in text.continuation and len(text.starts) == len(text.data)
        alone = [
            e for e in stream(lm, ["one", "two"], max_bytes=400, seed=3, sampling=Sampling(3.0)) if e.sequence == b
        ]
        assert bytes(e.byte for e in alone) == text.continuation
        assert [e.starts for e in alone] == text.starts[3:]
        whole = lm.prefill([bytes([BOS]) + text.data]).starts_BLS[0, 1:]
        assert [tuple(row) for row in whole.tolist()] == text.starts
    (endless,) = generate(lm, ["one"], max_bytes=400, seed=3, sampling=Sampling(3.0), stop_at_eos=False)
    assert len(endless.continuation) == 400


@pytest.mark.parametrize(
    "options, names",
    [
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_k": -1}, "top_k: -1"),
        ({"min_p": 2.0}, "min_p: 2.0"),
    ],
)
def test_impossible_sampling(options, names):
    with pytest.raises(ValueError, match=names):
        Sampling(**options)


def test_bad_input_is_named():
    lm = tiny_model()
    cache = lm.prefill([b"\xfeab"]).cache
    for call, words in (
        (lambda: lm.prefill([]), "0 sequences"),
        (lambda: lm.prefill([b""]), "sequence 0 is empty"),
        (lambda: lm.prefill([b""], cache), "every sequence is empty"),
        (lambda: lm.prefill([b"a", b"b"], cache), "2 sequences; expected 1"),
        (lambda: lm.prefill([[1, 256]]), "values outside 0..255"),
        (lambda: lm.prefill([[1, -1]]), "values outside 0..255"),
        (lambda: lm.prefill([torch.ones(2, 2)]), r"expected whole numbers"),
        (lambda: lm.step(torch.tensor([1, 2]), cache), "2 bytes, 1 flags"),
        (lambda: lm.step(torch.tensor([1]), cache, [False]), "every sequence is False"),
        (lambda: lm.new_cache(0), "batch: 0"),
        (lambda: generate(lm, []), "prompts: 0"),
        (lambda: generate(lm, ["a"], seed=[1, 2]), "1 with 2 seeds"),
        (lambda: generate(lm, ["a"], max_bytes=0), "max_bytes: 0"),
        (lambda: generate(lm, [b"\xe6"], max_bytes=1, valid_utf8=True), "needs 2 more"),
        (lambda: generate(lm, ["a\udc80"]), "character 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(RuntimeError, match="no weights"), torch.device("meta"):
        HNetInference(lm.config).prefill([b"\xfe"])


def test_empty_prompt_is_bos_alone(monkeypatch):
    lm = tiny_model(torch.float64)
    (text,) = generate(lm, [""], max_bytes=1, sampling=Sampling(0))
    assert text.continuation == bytes([int(lm.prefill([[BOS]]).last_logits().argmax())])


def test_long_prompts_warn():
    lm = tiny_model()
    with pytest.warns(UserWarning, match="10 bytes and 8190 more exceed the 8192"):
        stream(lm, ["x" * 10], max_bytes=8190)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(lm, ["x" * 10], max_bytes=8182)


def test_beyond_the_trained_length_still_agrees():
    config = config_of(["t1", ["T1"], "m1"], [32, 32], window_size=[16, -1])
    model = random_model(config)
    documents = random_documents([2600])
    expected, _ = training_logits(model, documents)
    assert worst(feed(HNetInference.from_training(model), documents, [[2590]], 10), expected) < 1e-9


# --------------------------------------------------------------------------------------------------------------- UTF-8


def test_automaton_is_pythons():
    """Every string of up to 4 bytes over the edges of all ranges: the automaton ends at 0 where Python decodes it."""
    edges = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF]
    edges += [0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFE, 0xFF]
    table = UTF8_NEXT.tolist()
    for data in itertools.chain.from_iterable(itertools.product(edges, repeat=n) for n in range(1, 5)):
        state = 0
        for byte in data:
            state = table[state][byte]
            if state < 0:
                break
        try:
            bytes(data).decode()
            assert state == 0
        except UnicodeDecodeError as error:
            cut_off = error.reason == "unexpected end of data"
            assert (state > 0) == cut_off
            if cut_off:
                assert utf8_state(b"xyz" + bytes(data)) == state


def test_ten_thousand_seeds_decode():
    """Whole generations, cut at 1 to 10 bytes, after prompts that end inside a character."""
    lm = HNetInference.from_training(random_model(config_of(["m1"], [32], ssm_cfg={"d_state": 4}), torch.float32))
    with torch.no_grad():
        lm.embeddings.weight[:] *= 3
    seed, lengths = 0, set()
    for max_bytes in range(1, 11):
        prompts = ["", "é", "日本".encode()[:5], "🙂".encode()[:3]] * 250
        for text in generate(lm, prompts, max_bytes=max_bytes, seed=seed, valid_utf8=True):
            text.data.decode()
            lengths.add(len(text.continuation))
        seed += 1000
    assert lengths == set(range(11))


def test_flat_logits_reach_every_kind_of_character():
    """Uniform draws from what the guard allows, so that every lead byte and range is met."""
    B, n, generator = 2000, 12, torch.Generator().manual_seed(1)
    rows, drawn = SamplingRows.new(B, n, torch.device("cpu")), []
    rows.temperature_B += 1
    rows.top_p_B += 1
    rows.left_B += n
    rows.active_B[:] = True
    rows.noise_BN.copy_(torch.rand(B, n, generator=generator).double())
    for _ in range(n):
        draw_rows(torch.zeros(B, 256), rows)
        drawn.append(rows.byte_B.clone())
    texts = [bytes(row).decode() for row in torch.stack(drawn, 1).tolist()]
    assert {len(c.encode()) for text in texts for c in text} == {1, 2, 3, 4}
    assert len({c.encode()[0] for text in texts for c in text}) == 128 + 30 + 16 + 5


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_goldens_on_cuda(name):
    golden = load_golden(name)
    documents = [torch.from_numpy(d[:-1].astype(np.int64)).cuda() for d in golden_documents(golden)]
    model = golden_model(golden, torch.float64, "cuda")
    expected, _ = training_logits(model, documents)
    lm = HNetInference.from_training(model)
    splits = [[1, max(1, len(d) - 9)] for d in documents]
    assert worst(feed(lm, documents, splits, 9), expected) < 1e-9
    assert worst(feed(lm, documents, [[]] * len(documents), 40), [logits[:40] for logits in expected]) < 1e-9


@pytest.mark.gpu
def test_windows_on_cuda_in_bfloat16(capsys):
    """Flash attention in prefill against the ring in steps; boundaries that rounding turns are excused and counted."""
    from hnet_runtime.checks.equivalence import check, random_model

    config = config_of(
        ["m1t1", ["T1m1", ["T2"], "m1T1"], "m1"],
        [256, 256, 512],
        num_heads=[4, 4, 8],
        rotary_emb_dim=[32, 32, 32],
        window_size=[40, 7, -1],
        d_intermediate=[0, 512, 512],
        ssm_cfg={"d_state": 128},
    )
    model = random_model(config, 0, "cuda", torch.bfloat16)
    documents = [
        bytes(torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (1, 50, 200)
    ]
    report = check(model, HNetInference.from_training(model), documents)
    report.print()
    assert report.ok
    assert sum(map(len, report.turned)) <= 0.03 * sum(report.positions)


@pytest.mark.gpu
def test_a_step_on_cuda_waits_once():
    lm = HNetInference.from_training(random_model(config_of(["m1t1", ["T1"], "m1"], [32, 64])).cuda())
    cache = lm.prefill(random_documents([5, 9])).cache
    byte_B = torch.tensor([65, 66], device="cuda")
    lm.step(byte_B, cache)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lm.step(byte_B, cache, [True, False])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 1


@pytest.mark.gpu
def test_batch_generates_what_single_runs_do_on_cuda():
    lm = HNetInference.from_training(random_model(config_of(["m1", ["T1"], "m1"], [32, 32])).cuda())
    prompts = ["", "a", "The quick brown fox ", b"\xff\x00\x80", "日本", "x" * 70, "\n\n", "def f(x):"]
    for temperature in (0.0, 1.0):
        options = {"max_bytes": 30, "sampling": Sampling(temperature), "stop_at_eos": False}
        together = generate(lm, prompts, seed=list(range(8)), **options)
        assert together == [generate(lm, [p], seed=b, **options)[0] for b, p in enumerate(prompts)]
