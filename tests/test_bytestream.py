"""ByteStream: every pair once per epoch, rows inside documents, slices a pure function of their number."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fineweb import BOS, EOS, ByteStream, DataError, prepare, slice_numbers, validation_stream

ROOT = Path(__file__).parent.parent
LAW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module")
def small_sections():
    """So that the order by length has several of them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hnet_runtime.data.stream.SECTION_DOCUMENTS", 4)
        yield


def write_corpus(folder: Path, shards: list[list[bytes]], split: str = "train") -> Path:
    """A prepared folder with exactly these documents, duplicates and empty ones too; indexes are left to be rebuilt."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, documents in enumerate(shards):
        data = b"".join(b"\xfe" + document for document in documents)
        name = f"{split}-{number:05d}.shard"
        (folder / name).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        entries.append(dict(file=name, bytes=len(data), documents=len(documents), sha256=sha256))
    (folder / "manifest.json").write_text(json.dumps(dict(splits={split: dict(shards=entries)})))
    return folder


@st.composite
def corpora(draw):
    """(documents by shard, slice_bytes, max_doc), with lengths around both."""
    T, max_doc = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    near = [max(0, edge + shift) for edge in (T, 2 * T, max_doc, 2 * max_doc) for shift in (-2, -1, 0, 1)]
    length = st.one_of(st.sampled_from([0, 1, *near]), st.integers(0, 150))
    text = length.flatmap(lambda n: st.binary(min_size=n, max_size=n).map(lambda b: bytes(x % 254 for x in b)))
    documents = draw(st.lists(text, min_size=1, max_size=12))
    documents += draw(st.lists(st.sampled_from(documents), max_size=4))
    cuts = sorted(draw(st.lists(st.integers(0, len(documents)), max_size=3)))
    return [documents[a:b] for a, b in zip([0, *cuts], [*cuts, len(documents)])], T, max_doc


def rows(piece):
    """(document, offset, inputs, labels) of each row of a slice."""
    ends = np.cumsum(piece.row_lengths)
    assert ends[-1] == len(piece.inputs) == len(piece.labels) and (piece.row_lengths > 0).all()
    for document, offset, begin, end in zip(piece.documents, piece.offsets, ends - piece.row_lengths, ends):
        yield int(document), int(offset), piece.inputs[begin:end].tobytes(), piece.labels[begin:end].tobytes()


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def check_epoch(shards, pieces, max_doc):
    """The slices have every pair of the documents once, in rows inside one document."""
    documents = [document for shard in shards for document in shard]
    found = {}
    for piece in pieces:
        for (number, offset, inputs, labels), size in zip(rows(piece), piece.document_bytes):
            whole = b"\xfe" + documents[number] + b"\xff"
            assert inputs == whole[offset : offset + len(inputs)]
            assert labels == whole[offset + 1 : offset + 1 + len(labels)]
            assert size == len(documents[number])
            assert offset // max_doc == (offset + len(inputs) - 1) // max_doc
            assert (inputs[0] == BOS) == (offset == 0) and BOS not in inputs[1:] and EOS not in labels[:-1]
            found.setdefault(number, []).append((offset, len(inputs)))
    assert sorted(found) == list(range(len(documents)))
    for number, spans in found.items():
        assert [a for a, _ in sorted(spans)] == np.cumsum([0, *(n for _, n in sorted(spans))])[:-1].tolist()
        assert sum(n for _, n in spans) == len(documents[number]) + 1


@LAW
@given(corpora(), st.integers(0, 3), st.integers(0, 3), st.sampled_from(["shuffle", "length"]))
def test_every_pair_exactly_once_per_epoch(corpus, epoch, seed, order):
    shards, T, max_doc = corpus
    with tempfile.TemporaryDirectory() as folder:
        # As many slices as an epoch has pairs are T whole epochs, cut where epochs are: each must be complete.
        stream = ByteStream(
            write_corpus(Path(folder) / "c", shards), slice_bytes=T, max_doc=max_doc, seed=seed, order=order
        )
        pairs = stream.pairs_per_epoch
        assert stream.text_bytes == pairs - stream.documents == sum(len(d) for shard in shards for d in shard)
        first, last = epoch * pairs // T, -(-(epoch + 1) * pairs // T)
        pieces = [stream.slice(i) for i in range(first, last)]
        inputs = np.concatenate([piece.inputs for piece in pieces])[epoch * pairs - first * T :][:pairs]
        labels = np.concatenate([piece.labels for piece in pieces])[epoch * pairs - first * T :][:pairs]
        expected = Counter(pair for shard in shards for d in shard for pair in zip(b"\xfe" + d, d + b"\xff"))
        assert Counter(zip(inputs.tolist(), labels.tolist())) == expected
        whole = ByteStream(Path(folder) / "c", slice_bytes=pairs, max_doc=max_doc, seed=seed, order=order)
        check_epoch(shards, [whole.slice(epoch)], max_doc)
        assert np.array_equal(whole.slice(epoch).inputs, inputs)
        assert sum(p.text_bytes for p in pieces) == sum(int((p.labels != EOS).sum()) for p in pieces)
        if order == "length":
            assert np.all(np.diff(whole.slice(epoch).document_bytes) >= 0)


@LAW
@given(corpora(), st.integers(0, 5), st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 1), (6, 2), (6, 3), (6, 6)]))
def test_ranks_share_a_step_whatever_their_number(corpus, step, shape):
    (G, W), (shards, T, max_doc) = shape, corpus
    with tempfile.TemporaryDirectory() as folder:
        stream = ByteStream(write_corpus(Path(folder) / "c", shards), slice_bytes=T, max_doc=max_doc)
        alone = list(stream.step(step, G))
        ranks = [list(stream.step(step, G, rank, W)) for rank in range(W)]
        assert len(alone) == G and {len(pieces) for pieces in ranks} == {G // W}
        assert all(same(alone[i], ranks[i % W][i // W]) for i in range(G))
        assert all(len(piece.inputs) == T for piece in alone)


@LAW
@given(corpora(), st.lists(st.integers(0, 60), min_size=1, max_size=12), st.sampled_from(["shuffle", "length"]))
def test_slices_do_not_depend_on_what_was_asked_before(corpus, numbers, order):
    shards, T, max_doc = corpus
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "c", shards)

        def fresh():
            return ByteStream(Path(folder) / "c", slice_bytes=T, max_doc=max_doc, seed=5, order=order)

        used = fresh()
        assert all(same(used.slice(i), fresh().slice(i)) for i in [*numbers, *sorted(numbers)])


@LAW
@given(corpora(), st.integers(1, 4))
def test_a_validation_pass_reads_every_byte_once(corpus, world):
    shards, T, max_doc = corpus
    with tempfile.TemporaryDirectory() as folder:
        stream = ByteStream(
            write_corpus(Path(folder) / "c", shards, "validation"), "validation", slice_bytes=T, max_doc=max_doc
        )
        pieces = list(stream.slices_once())
        check_epoch(shards, pieces, max_doc)
        assert [len(piece.inputs) for piece in pieces[:-1]] == [T] * (len(pieces) - 1)
        assert sum(piece.text_bytes for piece in pieces) == stream.text_bytes
        ranks = [list(stream.slices_once(rank=rank, world=world)) for rank in range(world)]
        assert all(same(piece, ranks[i % world][i // world]) for i, piece in enumerate(pieces))
        assert sum(map(len, ranks)) == len(pieces)
        for limit in (1, 3, len(pieces) + 1):  # so many of them, each once, spread over the whole
            some = [tuple(zip(p.documents.tolist(), p.offsets.tolist())) for p in stream.slices_once(limit)]
            every = [tuple(zip(p.documents.tolist(), p.offsets.tolist())) for p in pieces]
            taken = [every.index(each) for each in some]
            assert len(taken) == min(limit, len(pieces)) and taken[0] == 0 and sorted(set(taken)) == taken
            assert taken[-1] >= len(pieces) * (1 - 1 / limit) - 1


@settings(LAW, max_examples=15)
@given(corpora(), st.integers(100, 2000))
def test_prepared_text_comes_back(corpus, shard_bytes):
    """After prepare an epoch has the input documents without empty ones and duplicates."""
    documents = [bytes(x & 127 for x in d) for shard in corpus[0] for d in shard]
    _, T, max_doc = corpus
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "in.jsonl").write_text("".join(json.dumps(dict(text=d.decode())) + "\n" for d in documents))
        if not any(documents):
            with pytest.raises(DataError, match="no text"):
                prepare(str(folder / "in.jsonl"), folder / "out")
            return
        manifest = prepare(str(folder / "in.jsonl"), folder / "out", holdout=0, shard_bytes=shard_bytes, processes=1)
        stream = ByteStream(folder / "out", slice_bytes=T, max_doc=max_doc)
        kept = sorted(set(documents) - {b""}, key=lambda d: hashlib.sha256(d).digest())
        assert stream.documents == len(kept)
        counts = manifest["counts"]
        assert counts["read"] == len(documents) == len(kept) + counts["empty"] + counts["duplicates"]
        check_epoch([kept], stream.slices_once(), max_doc)


def test_orders_differ_between_seeds_and_epochs(tmp_path):
    write_corpus(tmp_path / "c", [[b"%03d" % (100 * s + i) for i in range(50)] for s in range(4)])
    orders = set()
    for seed in range(3):
        stream = ByteStream(tmp_path / "c", slice_bytes=800, seed=seed)
        orders |= {stream.slice(epoch).documents.tobytes() for epoch in range(3)}
    assert len(orders) == 9
    one = ByteStream(tmp_path / "c", slice_bytes=800).slice(0).documents // 50
    assert len(np.flatnonzero(np.diff(one))) == 3  # a shard is read to its end


def test_the_order_is_the_same_on_every_machine(tmp_path):
    """A change of these bytes would break the continuation of every run: the order is part of the format."""
    write_corpus(tmp_path / "c", [[b"%02d" % (10 * s + i) for i in range(10)] for s in range(3)])
    text = b"".join(ByteStream(tmp_path / "c", slice_bytes=45, seed=7).slice(i).inputs.tobytes() for i in range(3))
    assert hashlib.sha256(text).hexdigest()[:16] == "7a25a21167bffdc2"


def test_slices_are_the_same_in_another_process(tmp_path):
    write_corpus(tmp_path / "c", [[os.urandom(200).hex().encode() for _ in range(30)] for _ in range(3)])
    stream = ByteStream(tmp_path / "c", slice_bytes=1000, seed=3)
    code = (
        "import sys, fineweb; s = fineweb.ByteStream(sys.argv[1], slice_bytes=1000, seed=3);"
        "sys.stdout.buffer.write(b''.join(s.slice(i).inputs.tobytes() for i in (41, 3, 17)))"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "c"], capture_output=True, check=True).stdout
    assert out == b"".join(stream.slice(i).inputs.tobytes() for i in (41, 3, 17))


def test_importing_needs_numpy_only():
    code = (
        "import sys, fineweb; print([m for m in ('torch', 'pyarrow', 'rich', 'huggingface_hub') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_mixtures_follow_their_weights_and_stay_pure(tmp_path):
    for name in "ab":
        write_corpus(tmp_path / name, [[f"{name}{i}".encode() * 9 for i in range(40)]])
    text = f"{tmp_path}/a:0.7,{tmp_path}/b:0.3"
    stream = ByteStream(text, slice_bytes=64, seed=1)
    parts = [ByteStream(tmp_path / name, slice_bytes=64, seed=1) for name in "ab"]
    of_b = []
    for i in range(300):
        piece = stream.slice(i)
        of_b.append(int(piece.documents[0] >= 40))
        assert len(set(piece.documents >= 40)) == 1
        alone = parts[of_b[-1]].slice(of_b[:-1].count(of_b[-1]))
        assert np.array_equal(piece.inputs, alone.inputs)
    assert all(abs(sum(of_b[:n]) - 0.3 * n) <= 1 for n in range(300))
    assert same(ByteStream(text, slice_bytes=64, seed=1).slice(299), stream.slice(299))
    assert stream.pairs_per_epoch == sum(part.pairs_per_epoch for part in parts)
    assert stream.fingerprint not in {part.fingerprint for part in parts}
    assert ByteStream(f"{tmp_path}/a:1,{tmp_path}/b:3", slice_bytes=64).fingerprint != stream.fingerprint
    total = Counter(number for piece in stream.slices_once() for number in piece.documents[piece.offsets == 0].tolist())
    assert total == Counter(range(80))
    stream.require(stream.pairs_per_epoch // 2)
    with pytest.raises(DataError, match="less than one batch"):
        stream.require(2 * stream.pairs_per_epoch)


def test_a_turn_of_a_mixture_joins_the_next(tmp_path):
    """After 10,000 slices the rotation repeats, and each folder continues where it was."""
    for name in "abc":
        write_corpus(tmp_path / name, [[f"{name}{i}".encode() for i in range(7)]])
    stream = ByteStream(",".join(f"{tmp_path}/{name}:1" for name in "abc"), slice_bytes=4)
    counts = Counter(int(w) for w in stream._rotation[0])
    assert sum(counts.values()) == 10_000 and max(counts.values()) - min(counts.values()) <= 1
    for which, name in enumerate("abc"):
        alone = ByteStream(tmp_path / name, slice_bytes=4)
        i = 10_000 + int(np.flatnonzero(stream._rotation[0] == which)[0])
        assert np.array_equal(stream.slice(i).inputs, alone.slice(counts[which]).inputs)


def test_validation_leaves_out_folders_that_have_none_on_purpose(tmp_path, caplog):
    for name, holdout in (("a", 0), ("b", 0.5), ("c", 0)):
        (tmp_path / name).mkdir()
        for n in range(9):
            (tmp_path / name / f"{n}.txt").write_text(f"{name} {n}")
        prepare(str(tmp_path / name), tmp_path / f"{name}.out", holdout=holdout)
    paths = {name: tmp_path / f"{name}.out" for name in "abc"}
    alone = ByteStream(paths["b"], "validation", slice_bytes=8)
    with caplog.at_level("INFO", "hnet"):
        stream = validation_stream(f"{paths['a']}:0.5,{paths['b']}:0.2,{paths['c']}:0.3", slice_bytes=8)
        assert [same(*pair) for pair in zip(stream.slices_once(), alone.slices_once())].count(True) > 1
        assert stream.fingerprint == alone.fingerprint
        assert validation_stream(paths["a"], slice_bytes=8) is None
    assert f"validates on {paths['b']} alone: {paths['a']}, {paths['c']} prepared with --holdout 0" in caplog.messages
    with pytest.raises(DataError, match="no validation documents among its 9; --holdout 0 kept it without"):
        ByteStream(paths["a"], "validation", slice_bytes=8)
    write_corpus(tmp_path / "d", [[b"lost its other split"]])
    with pytest.raises(DataError, match="no validation documents"):  # nobody asked for that
        validation_stream(tmp_path / "d", slice_bytes=8)


@pytest.mark.parametrize("text", ["a:x,b:1", "a:0,b:1", "a,b", "a:-1,b:2", "a:1e-9,b:1"])
def test_a_bad_mixture_is_named(text):
    with pytest.raises(DataError, match="a:0.7,b:0.3"):
        ByteStream(text, slice_bytes=8)


@pytest.mark.parametrize(
    "text, what",
    [
        ("a:abc", "a has the weight abc"),
        ("b:1,a:abc", "a has the weight abc"),
        ("a:-1,b:3", "a has the weight -1"),
        ("a:1,b:0", "b has the weight 0"),
        ("a:1,b:1e999", "b has the weight inf"),
        ("a:1,b:1e-9", "b has the weight 1e-09"),
        ("a:1,b", "b has no weight"),
        ("gone:abc", "no such folder"),
    ],
)
def test_a_bad_weight_is_named(tmp_path, monkeypatch, text, what):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_corpus(tmp_path / name, [[b"text"]])
    with pytest.raises(DataError, match=f"^--data '{text}': {what}; expected "):
        ByteStream(text, slice_bytes=8)


def test_nested_rows_share_their_offsets(tmp_path):
    torch = pytest.importorskip("torch")
    write_corpus(tmp_path / "c", [[b"one", b"two!", b"x" * 30]])
    piece = ByteStream(tmp_path / "c", slice_bytes=41, max_doc=8).slice(0)
    iids, labels = piece.nested()
    assert iids.is_nested and iids.layout == torch.jagged and iids.dtype == labels.dtype == torch.int64
    assert iids.offsets() is labels.offsets() and iids.shape == labels.shape and iids.dim() == 2
    assert iids.values().tolist() == piece.inputs.tolist() and labels.values().tolist() == piece.labels.tolist()
    assert iids.offsets().diff().tolist() == piece.row_lengths.tolist()
    assert iids._get_max_seqlen() == piece.row_lengths.max() and iids._get_min_seqlen() == piece.row_lengths.min()


@pytest.mark.gpu
def test_nested_rows_reach_the_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    write_corpus(tmp_path / "c", [[b"one", b"two!"]])
    piece = ByteStream(tmp_path / "c", slice_bytes=9).slice(0)
    iids, labels = piece.nested("cuda")
    assert iids.device.type == "cuda" and labels.values().tolist() == piece.labels.tolist()


def test_ranks_must_divide_the_slices_of_a_step():
    assert list(slice_numbers(2, 6, 1, 3)) == [13, 16]
    with pytest.raises(DataError, match="4 processes"):
        slice_numbers(0, 6, 0, 4)


@pytest.mark.parametrize("bad", [dict(split="test"), dict(order="random"), dict(slice_bytes=0), dict(max_doc=0)])
def test_bad_arguments_are_named(tmp_path, bad):
    write_corpus(tmp_path / "c", [[b"text"]])
    with pytest.raises(DataError, match=next(iter(bad))):
        ByteStream(tmp_path / "c", **{"slice_bytes": 8, **bad})


def test_a_folder_that_is_not_one_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, what in (("gone", "no such folder"), ("empty", "not a prepared folder"), ("file", "a file")):
        with pytest.raises(DataError, match=f"{name}: {what}"):
            ByteStream(tmp_path / name, slice_bytes=8)
    write_corpus(tmp_path / "c", [[b"text"]])
    with pytest.raises(DataError, match="no validation documents"):
        ByteStream(tmp_path / "c", "validation", slice_bytes=8)
    with pytest.raises(DataError, match="less than one batch"):
        ByteStream(tmp_path / "c", slice_bytes=8).require(6)


@pytest.mark.parametrize("name", ["texts", "my texts", "article.txt"])
def test_text_that_is_not_prepared_is_answered_with_the_command(tmp_path, monkeypatch, name):
    """The command in the message prepares it, and with what it makes --data works."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("my texts").mkdir()
    for file in ("texts/one.txt", "my texts/one.txt", "article.txt"):
        Path(file).write_text("some text\n" * 1000)
    with pytest.raises(DataError) as mistake:
        ByteStream(name, slice_bytes=8)
    said = str(mistake.value)
    assert said.startswith(f"{name}: ") and "prepared folder" in said and said.endswith(", then use --data DIR")
    python, *command = shlex.split(said.split("`")[1])
    done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], capture_output=True, text=True)
    assert python == "python" and done.returncode == 0, done.stderr
    assert ByteStream("DIR", slice_bytes=8).pairs_per_epoch


def test_changed_and_torn_shards_are_named(tmp_path):
    folder = write_corpus(tmp_path / "c", [[b"some text", b"more"], [b"other"]])
    stream = ByteStream(folder, slice_bytes=8)
    fingerprint, shard = stream.fingerprint, folder / "train-00001.shard"
    before = [stream.slice(i) for i in range(4)]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match="train-00001.shard: torn, 5 bytes where manifest.json says 6"):
        ByteStream(folder, slice_bytes=8)
    with pytest.raises(
        DataError, match="train-00001.shard: (changed while|became shorter)"
    ):  # a run that was under way
        for i in range(len(before)):
            stream.slice(i)
    shard.write_bytes(data[:-1] + b"!")
    with pytest.raises(DataError, match="train-00001.shard: its contents changed"):
        ByteStream(folder, slice_bytes=8)
    shard.write_bytes(data)
    assert ByteStream(folder, slice_bytes=8).fingerprint == fingerprint  # a copy with new times is the same corpus
    shard.unlink()
    with pytest.raises(DataError, match="train-00001.shard: missing"):
        ByteStream(folder, slice_bytes=8)
    for text in ("{", '{"splits": {"train": {"shards": [{"file": "train-00000.shard", "bytes": 6}]}}}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="manifest.json: damaged; delete its folder and prepare it again"):
            ByteStream(folder, slice_bytes=8)


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.shard"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    folder = write_corpus(tmp_path / "c", [[b"some text", b"more"]])
    stream = ByteStream(folder, slice_bytes=8)
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # opening it fails, also for root
    with pytest.raises(DataError, match=f"{name}: can't be read .Too many levels of symbolic links"):
        stream.slice(0)
        ByteStream(folder, slice_bytes=8)


@pytest.mark.parametrize("damage", ["missing", "torn", "flipped", "junk", "another"])
def test_an_index_is_rebuilt(tmp_path, damage):
    folder = write_corpus(tmp_path / "c", [[b"some text", b"more"], [b"other", b"texts", b"entirely"]])
    wanted = [ByteStream(folder, slice_bytes=8).slice(i) for i in range(8)]
    index = folder / "train-00001.index"
    whole = index.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    another = (folder / "train-00000.index").read_bytes()
    index.write_bytes(dict(missing=b"", torn=whole[:-3], flipped=flipped, junk=b"\x00" * 99, another=another)[damage])
    if damage == "missing":
        index.unlink()
    assert all(same(ByteStream(folder, slice_bytes=8).slice(i), piece) for i, piece in enumerate(wanted))


def test_a_read_only_folder_works_without_indexes(tmp_path):
    folder = write_corpus(tmp_path / "c", [[b"some text", b"more"]])
    for name in os.listdir(folder):
        (folder / name).chmod(0o444)
    folder.chmod(0o555)
    try:
        assert len(list(ByteStream(folder, slice_bytes=4).slices_once())) == 4
    finally:
        folder.chmod(0o755)
