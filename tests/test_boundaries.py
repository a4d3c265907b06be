"""Where chunks begin: places in words, enrichment, entropy and moved cuts against loops over single bytes."""

import math
import unicodedata

import numpy as np
import pytest
import torch
from test_evaluation import ALONE, corpus  # noqa: F401 (a fixture)
from test_simple import config_of, random_model

import fineweb
from hnet_runtime.evaluation import boundaries, scoring
from hnet_runtime.evaluation.validation import validate
from hnet_trainable import BOS, StageOutput


@pytest.fixture(scope="module")
def model():
    return random_model(config_of(["m1", ["T1", ["m1"], "m1"], "m1"], [32, 32, 64]))


def places_by_hand(row: bytes) -> list[str]:
    """The place of each byte, by decoding the row character by character."""
    found, letters, at = [], 0, 0
    while at < len(row):
        size = next((n for n in (1, 2, 3, 4) if _decodes(row[at : at + n])), 0)
        if not size:
            found.append("inside" if 0x80 <= row[at] < 0xC0 else "other")
            letters, at = letters if found[-1] == "inside" else 0, at + 1
            continue
        character = row[at : at + size].decode()
        category = unicodedata.category(character)[0]
        letters = letters + 1 if category == "L" else 0
        names = {"L": f"letter_{min(letters, 5)}", "N": "digit", "P": "punctuation", "S": "punctuation"}
        found += ["space" if character.isspace() else names.get(category, "other"), *["inside"] * (size - 1)]
        at += size
    return found


def _decodes(piece: bytes) -> bool:
    try:
        return len(piece.decode()) == 1
    except UnicodeDecodeError:
        return False


TEXT = 'The quick  fox,\n"Grüße" — naïve 12ab 東京タワー x² 🙂a\x07 \u200b e\u0301t a\xa0b'.encode()


def test_places_of_characters_in_words():
    row = bytes([BOS]) + TEXT
    first = np.arange(len(row)) == 0
    found = [boundaries.PLACES[i] for i in boundaries.places(np.frombuffer(row, np.uint8), first)]
    assert found == ["other", *places_by_hand(TEXT)]
    assert set(found) == set(boundaries.PLACES), "the text has every place"
    at = row.index("ße".encode())  # the fourth letter, then its second byte, then the fifth letter
    assert found[at : at + 3] == ["letter_4", "inside", "letter_5"]
    torn = TEXT[:30] + b"\xf0\x9f a\xe2" + TEXT[30:45] + b"\xff\x80"  # characters that end too early
    assert [
        boundaries.PLACES[i] for i in boundaries.places(np.frombuffer(torn, np.uint8), np.zeros(len(torn), bool))
    ] == (places_by_hand(torn))


def test_letters_are_counted_from_the_start_of_a_row():
    rows = np.frombuffer(b"abcdef" + b"ghi", np.uint8)
    first = np.isin(np.arange(9), [0, 6])
    found = [boundaries.PLACES[i] for i in boundaries.places(rows, first)]
    assert found == [f"letter_{n}" for n in (1, 2, 3, 4, 5, 5, 1, 2, 3)]


def brute_force(model, rows: list[tuple[bytes, bytes, int]]) -> dict:
    """All numbers by loops over rows (inputs, labels, labels that are context) that run alone."""
    S = model.config.num_stages
    by_place, nats, chunks, entropies = [], [], [[] for _ in range(S)], [[] for _ in range(S)]
    for inputs, labels, skip in rows:
        ids = torch.tensor(list(inputs))
        iids = torch.nested.nested_tensor_from_jagged(
            ids, torch.tensor([0, len(ids)]), min_seqlen=1, max_seqlen=len(ids)
        )
        with torch.no_grad():
            out = model(iids)
        log_p = out.logits.values().log_softmax(-1)
        place, at = places_by_hand(inputs), list(range(len(inputs)))
        assert inputs[1:] == labels[: len(inputs) - 1]
        for t in range(1 + skip, len(inputs)):
            by_place.append(place[t])
            nats.append(-log_p[t - 1, labels[t - 1]].item())
        for s, stage in enumerate(out.stages):
            for t, p in zip(at, stage.p_T.tolist()):
                if t > skip:
                    entropies[s].append(-sum(x * math.log2(x) for x in (p, 1 - p) if x))
            at = [t for t, b in zip(at, stage.b_T.tolist()) if b]
            chunks[s] += [(place[t], -log_p[t - 1, labels[t - 1]].item()) for t in at if t > skip]
    mean = sum(nats) / len(nats)
    return {
        "chance": {name: by_place.count(name) / len(by_place) for name in boundaries.PLACES},
        "stages": [
            {
                "enrichment": sum(x for _, x in chunks[s]) / len(chunks[s]) / mean,
                "p_entropy": sum(entropies[s]) / len(entropies[s]),
                "cuts": len(chunks[s]),
                "places": {name: [p for p, _ in chunks[s]].count(name) / len(chunks[s]) for name in boundaries.PLACES},
            }
            for s in range(S)
        ],
    }


def test_validation_and_evaluation_count_what_loops_count(corpus, model):  # noqa: F811
    stream = fineweb.ByteStream(corpus[0], "train", slice_bytes=700, max_doc=400)
    rows = []
    for piece in stream.slices_once():
        ends = np.cumsum(piece.row_lengths)[:-1]
        rows += [
            (a.tobytes(), b.tobytes(), 0) for a, b in zip(np.split(piece.inputs, ends), np.split(piece.labels, ends))
        ]
    wanted, found = brute_force(model, rows), validate(model, stream, ALONE, None)
    for name, share in wanted["chance"].items():
        assert found[f"val_chance_{name}"] == pytest.approx(share, abs=1e-12)
    for s, stage in enumerate(wanted["stages"]):
        assert stage["enrichment"] != pytest.approx(1, abs=1e-3), "else it could be anything"
        for name in ("enrichment", "p_entropy"):
            assert found[f"val_stage{s}_{name}"] == pytest.approx(stage[name], rel=1e-9)
        for name, share in stage["places"].items():
            assert found[f"val_stage{s}_at_{name}"] == pytest.approx(share, abs=1e-12)
    windows = [row for text in corpus[1] for row in scoring.windows(text, 300, 100)]
    wanted = brute_force(model, [(row.inputs.tobytes(), row.labels.tobytes(), row.skip) for row in windows])
    found = boundaries.summary(scoring.tally_with_cuts(model, windows, 5, ALONE)[1])
    assert found["chance"] == pytest.approx(wanted["chance"])
    for ours, theirs in zip(found["stages"], wanted["stages"], strict=True):
        assert ours["places"] == pytest.approx(theirs["places"])
        for name in ("enrichment", "p_entropy", "cuts"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9)


def test_without_chunks_there_is_nothing_to_say():
    counts = boundaries.nothing_counted(1)
    text = np.frombuffer(bytes([BOS]) + b"ab", np.uint8)
    stage = StageOutput(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([True, False, False]), None, None, None)
    more, opens = boundaries.count(text, np.array([3]), np.ones(3), [stage])
    found = boundaries.summary(counts + more)["stages"][0]
    assert found["enrichment"] is None and found["cuts"] == 0, "the first chunk of a row is not counted"
    assert found["p_entropy"] == 0.5, "0 bits for p = 0, 1 bit for p = 0.5"
    assert opens[0].tolist() == [True, False, False]
    assert "val_stage0_enrichment" not in boundaries.metrics(counts + more)
    assert boundaries.metrics(boundaries.nothing_counted(0)) == {}


def test_moved_cuts(tmp_path):
    a = np.array([1, 0, 1, 0, 0, 1], bool)
    b = np.array([1, 0, 0, 1, 0, 0], bool)
    assert boundaries.moved(a, a) == 0 and boundaries.moved(a, ~a) == 1
    assert boundaries.moved(a, b) == (2 + 1) / (3 + 2)  # two cuts of a are not in b, one of b is not in a
    history = boundaries.CutHistory(tmp_path, 0, ALONE)
    assert history.update(10, [[a], [b]]) == {}, "nothing to compare with"
    assert history.update(20, [[a], [a]]) == {"val_stage0_moved": 3 / 11}
    resumed = boundaries.CutHistory(tmp_path, 10, ALONE)
    assert resumed.update(20, [[a], [a]]) == {"val_stage0_moved": 3 / 11}, "as in the run that was not interrupted"
    assert resumed.update(30, [[b]]) == {}, "another text"
    (tmp_path / "cuts" / "step_00000030.npz").write_bytes(b"torn")
    assert resumed.update(40, [[b]]) == {}
    assert resumed.update(50, [[b]], oldest=40) == {"val_stage0_moved": 0.0}
    assert sorted(path.name for path in (tmp_path / "cuts").iterdir()) == ["step_00000040.npz", "step_00000050.npz"]
