"""Validation against sums over documents that are run alone, by another path: the inference model's prefill."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_simple import config_of, random_model

import fineweb
from hnet_runtime.distributed import World
from hnet_runtime.evaluation.validation import _same_number_each, chunks_of, validate, word_edges
from hnet_simple import HNetInference
from hnet_trainable import BOS, EOS

LENGTHS = [1, 40, 200, 256, 257, 1024, 1025, 1300]  # text bytes; both sides of two buckets' edges
ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[str, list[bytes]]:
    folder = tmp_path_factory.mktemp("evaluation")
    generator = torch.Generator().manual_seed(0)
    alphabet = torch.tensor(list(b"abc de,f\nghi. jkl0123"))
    texts = [bytes(alphabet[torch.randint(len(alphabet), (n,), generator=generator)].tolist()) for n in LENGTHS]
    (folder / "in").mkdir()
    for i, text in enumerate(texts):
        (folder / "in" / f"{i}.txt").write_bytes(text)
    fineweb.prepare(str(folder / "in"), str(folder / "data"), holdout=0)
    return str(folder / "data"), texts


@pytest.fixture(scope="module")
def model():
    return random_model(config_of(["m1", ["T1", ["m1"], "m1"], "m1"], [32, 32, 64]))


def nats_alone(lm: HNetInference, inputs: bytes, labels: bytes) -> float:
    logits_LV = lm.prefill([inputs]).logits_BLV[0]
    return F.cross_entropy(logits_LV, torch.tensor(list(labels)), reduction="sum").item()


def test_bits_per_byte_of_whole_documents_by_length(corpus, model):
    data, texts = corpus
    lm = HNetInference.from_training(model)
    nats = {len(t): nats_alone(lm, bytes([BOS]) + t, t + bytes([EOS])) for t in texts}
    stream = fineweb.ByteStream(data, "train", slice_bytes=sum(LENGTHS) + len(LENGTHS))
    found = validate(model, stream, ALONE, None)
    assert model.training and found["val_bytes"] == sum(LENGTHS)
    assert found["val_bpb"] == pytest.approx(sum(nats.values()) / sum(LENGTHS) / math.log(2), rel=1e-9)
    for name, lengths in {"le_256": LENGTHS[:4], "le_1024": LENGTHS[4:6], "le_4096": LENGTHS[6:]}.items():
        expected = sum(nats[n] for n in lengths) / sum(lengths) / math.log(2)
        assert found[f"val_bpb_{name}"] == pytest.approx(expected, rel=1e-9)
    assert not {"val_bpb_le_16384", "val_bpb_longer"} & found.keys()  # no such documents
    counts = [0.0, 0.0, 0.0]
    for text in texts:
        masks = lm.prefill([bytes([BOS]) + text]).boundaries
        counts = [c + n for c, n in zip(counts, [len(text) + 1, *(int(mask.sum()) for mask in masks)])]
    for s in range(2):
        assert found[f"val_stage{s}_compression"] == pytest.approx(counts[s] / counts[s + 1])


def test_slices_cover_every_byte_once_and_a_limit_takes_some(corpus, model):
    data, _ = corpus
    lm, nats = HNetInference.from_training(model), 0.0
    stream = fineweb.ByteStream(data, "train", slice_bytes=500, max_doc=300)
    pieces = list(stream.slices_once())
    for piece in pieces:
        ends = piece.row_lengths.cumsum()
        for end, n in zip(ends, piece.row_lengths):
            nats += nats_alone(lm, piece.inputs[end - n : end].tobytes(), piece.labels[end - n : end].tobytes())
    found = validate(model, stream, ALONE, None)
    assert found["val_bytes"] == sum(LENGTHS)
    assert found["val_bpb"] == pytest.approx(nats / sum(LENGTHS) / math.log(2), rel=1e-9)
    first = validate(model, stream, ALONE, 3)
    assert first == validate(model, stream, ALONE, 3) and 0 < first["val_bytes"] < sum(LENGTHS)
    for size in (2, 3, 20):  # more ranks than slices too: all run as many, and weights make each slice count once
        ranks = [list(_same_number_each(stream, World(r, size, torch.device("cpu"), None), None)) for r in range(size)]
        assert len({len(r) for r in ranks}) == 1
        scored = [p for rank in ranks for p, weight in rank if weight]
        assert sorted(p.inputs.tobytes() for p in scored) == sorted(p.inputs.tobytes() for p in pieces)


def test_edges_of_words(corpus, model):
    """Both by hand: where kinds change, and what share of boundaries lies there."""
    data, _ = corpus
    text = "ab, c_é1"
    iids = torch.nested.nested_tensor([torch.tensor([BOS, *text.encode()]), torch.tensor([65])], layout=torch.jagged)
    kinds = [True, True, True, False, False, True, False, True, True, True]  # BOS a b , space c _ é é 1
    expected = [False, *(a != b for a, b in zip(kinds, kinds[1:])), False]
    assert word_edges(iids).tolist() == expected

    stream = fineweb.ByteStream(data, "train", slice_bytes=sum(LENGTHS) + len(LENGTHS))
    found, at, of = validate(model, stream, ALONE, None), [0, 0], [0, 0]
    for piece in stream.slices_once():
        for end, n in zip(piece.row_lengths.cumsum(), piece.row_lengths):
            row = piece.inputs[end - n : end].tobytes()
            opens = HNetInference.from_training(model).prefill([row]).boundaries[0][0].tolist()
            for t in range(1, n):
                edge = (row[t - 1] >= 128 or chr(row[t - 1]).isalnum()) != (row[t] >= 128 or chr(row[t]).isalnum())
                of, at = [of[0] + opens[t], of[1] + 1], [at[0] + (edge and opens[t]), at[1] + edge]
    assert found["val_edge_share"] == pytest.approx(at[0] / of[0])
    assert found["val_edge_base"] == pytest.approx(at[1] / of[1])


def test_chunks_of_a_text(model):
    text = "Where do chunks begin, and who decides? Grüße!".encode()
    opens = chunks_of(model, text, ALONE)
    starts_LS = HNetInference.from_training(model).prefill([bytes([BOS]) + text]).starts_BLS[0, 1:]
    for s in range(2):
        assert opens[s].tolist() == [True, *starts_LS[1:, s].tolist()]
    assert 1 < opens[1].sum() < opens[0].sum() < len(text)
