"""Which files of a source become training text, and which shapes of files and rows are read; with real files."""

import bz2
import gzip
import json
import os
import random
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb
from fineweb import DataError, prepare
from hnet_runtime import UserError
from hnet_runtime.data import documents, sources
from hnet_runtime.evaluation import choices

COMMIT = "d" * 40


def write(root: Path, name: str, text: str = "") -> None:
    """A file of a kind that its name says, with the text in it; by default its name."""
    path, text = root / name, text or f"text of {name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = json.dumps({"text": text}).encode() + b"\n"
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [text]}), path)
    elif name.endswith(".zst"):
        path.write_bytes(pa.compress(row, codec="zstd", asbytes=True))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(row))
    else:
        path.write_bytes(row if "json" in name else text.encode())


def texts(out: Path) -> list[str]:
    """All documents of a prepared folder, in order of their text."""
    return sorted(
        text.decode() for shard in sorted(out.glob("*.shard")) for text in shard.read_bytes().split(b"\xfe")[1:]
    )


def prepared(source: Path | str, tmp_path: Path, **options) -> tuple[list[str], dict]:
    manifest = prepare(str(source), tmp_path / "out", **{"holdout": 0, "processes": 1, **options})
    return texts(tmp_path / "out"), manifest


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *arguments])
    return fineweb.main()


# ------------------------------------------------------------------------------------------- splits of a dataset


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Makes a dataset in a hub's cache of its own, with no network: (files, card) -> the snapshot's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()

    def make(files: list[str], card: str = "", name: str = "n") -> Path:
        base = tmp_path / "hub" / f"datasets--o--{name}"
        snapshot = base / "snapshots" / COMMIT
        for file in files:
            write(snapshot, file)
        (base / "blobs").mkdir(parents=True, exist_ok=True)
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / "main").write_text(COMMIT)
        snapshot.mkdir(parents=True, exist_ok=True)
        if card:
            (snapshot / "README.md").write_text(f"---\n{card}\n---\nA dataset.\n")
        return snapshot

    return make


def decided(snapshot: Path, config: str | None, tmp_path: Path) -> dict[str, set[str]]:
    """The splits that the datasets library finds in a real folder."""
    try:
        builder = datasets.load_dataset_builder(str(snapshot), config, cache_dir=str(tmp_path / "datasets"))
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError):
        return {}
    return {
        str(split): {os.path.relpath(file, snapshot) for file in files}
        for split, files in builder.config.data_files.items()
    }


def taken(spec: str) -> set[str]:
    """The files that prepare would read."""
    report = sources.Report()
    _, files = sources.find(spec, "text", fineweb._Tally(False).reject, report)
    names = {file.path for file in files}
    assert report.taken.total() == len(names)
    return names


SHARDS = [
    "data/train-00000-of-00001.parquet",
    "data/test-00000-of-00001.parquet",
    "data/validation-00000-of-00001.parquet",
]
ONE = "configs:\n- config_name: default\n  data_files:\n"
TWO = "configs:\n- config_name: a\n  data_dir: a\n- config_name: b\n  data_dir: b\n  default: true"


@pytest.mark.parametrize(
    "files, card, config",
    [
        ([*SHARDS, "Stories-valid.txt", "Stories-train.txt"], "", None),
        ([*SHARDS, "Stories-valid.txt"], "license: mit\ndataset_info:\n  splits:\n  - name: train", None),
        (["wiki-train.txt", "wiki-valid.txt", "wiki.test.txt"], "license: mit", None),
        (["train/a.jsonl", "val/b.jsonl", "test/c.jsonl", "d.jsonl"], "", None),
        (["books/train_1/a.parquet", "books/dev/b.parquet"], "", None),
        (["a.jsonl.gz", "sub/b.jsonl.gz", ".hidden/c.jsonl.gz", "__x/d.jsonl.gz"], "", None),
        (["a.parquet", "b.parquet", "notes.txt", "c.jsonl"], "", None),
        (["train.jsonl", "eval/x.jsonl"], ONE + "  - split: train\n    path: '*.jsonl'", None),
        (["x.jsonl", "a/x.jsonl", "a/b/x.jsonl"], ONE + "  - split: train\n    path: '**/x.jsonl'", None),
        (["x.jsonl", "a/x.jsonl", "a/b/x.jsonl"], ONE + "  - split: train\n    path: 'a/*'", None),
        (["x.jsonl", "a/x.jsonl", "a/test.jsonl"], ONE + "  - split: train\n    path: ['x.jsonl', 'a/x*']", None),
        (["x/a.jsonl", "x/b.jsonl"], "configs:\n- config_name: c\n  data_files: x/a.jsonl", None),
        (["d/x/a.jsonl", "x/a.jsonl"], "configs:\n- config_name: c\n  data_dir: d\n  data_files: 'x/*'", None),
        (["a/train.jsonl", "a/test.jsonl", "b/train.jsonl", "b/dev.jsonl"], TWO, None),
        (["a/train.jsonl", "a/test.jsonl", "b/train.jsonl", "b/dev.jsonl"], TWO, "a"),
    ],
)
def test_the_train_split_is_what_the_datasets_library_says(cached, tmp_path, files, card, config):
    snapshot = cached(files, card)
    expected = decided(snapshot, config, tmp_path)
    assert expected["train"]
    assert taken("hf:o/n" + (f":{config}" if config else "")) == expected["train"]


def test_random_repositories_are_split_as_the_datasets_library_does(cached, tmp_path):
    rng, refused = random.Random(7), 0
    for number in range(14):
        parts = ["data", "train", "val", "test", "x", "my-train", "2train", "testing set", "retrain", "dev_1"]
        stems = ["a", "train", "b-valid", "test.1", "train-00000-of-00002", "evaluation", "contest", "training"]
        files = {"/".join([*rng.choices(parts, k=rng.randint(0, 2)), f"{rng.choice(stems)}.jsonl"]) for _ in range(2)}
        snapshot = cached(sorted(files), "license: mit" * rng.randint(0, 1), f"r{number}")
        expected = decided(snapshot, None, tmp_path)
        if "train" in expected:
            assert taken(f"hf:o/r{number}") == expected["train"], files
        else:
            refused += 1
            with pytest.raises(DataError, match=f"has no train split, only {', '.join(expected)};"):
                taken(f"hf:o/r{number}")
    assert 1 < refused < 13


def test_what_is_no_training_text_is_refused_with_what_there_is(cached):
    for name, files, card, words in (
        ("held", ["test/a.jsonl", "val/b.jsonl"], "", "hf:o/held: has no train split, only validation, test; prepare"),
        ("csv", ["train.csv", "test.csv"], "", "found .csv; try hf:o/csv@refs/convert/parquet"),
        ("none", ["a.py"], "", "hf:o/none: expected data files of .txt.*found none"),
        ("many", ["a/x.jsonl", "b/y.jsonl"], TWO.replace("\n  default: true", ""), "hf:o/many:CONFIG, .* one of a, b"),
        ("odd", ["a.jsonl"], "configs: 7", "can't tell which files are which .Expected configs to be a list"),
    ):
        cached(files, card, name)
        with pytest.raises(DataError, match=words) as error:
            taken(f"hf:o/{name}")
        assert "\n" not in str(error.value) and "/tmp" not in str(error.value)
    with pytest.raises(DataError, match="hf:o/many:CONFIG, with CONFIG one of a, b"):
        taken("hf:o/many:c")


def test_the_hubs_own_parquet_files_are_found_by_config(cached):
    """The branch refs/convert/parquet has no card: a folder for each config, with one for each split."""
    files = [f"{config}/{split}/0000.parquet" for config in ("default", "b") for split in ("train", "test")]
    cached([*files, "b/partial-train/0001.parquet"])
    assert taken("hf:o/n:default") == {"default/train/0000.parquet"}
    assert taken("hf:o/n:b") == {"b/train/0000.parquet", "b/partial-train/0001.parquet"}


def test_formats_that_differ_between_splits_are_no_obstacle(cached):
    cached(["train.jsonl", "test.csv"])
    assert taken("hf:o/n") == {"train.jsonl"}


def test_a_download_that_was_cut_short_is_named(cached, tmp_path, capsys):
    snapshot = cached([SHARDS[0], SHARDS[1]], "license: mit")
    (snapshot / "data/train-00001-of-00003.parquet").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(DataError, match="data/train-00001-of-00003.parquet is missing from the hub's cache"):
        prepare("hf:o/n", tmp_path / "out")
    _, manifest = prepared("hf:o/n", tmp_path, skip_bad=True)
    assert manifest["counts"]["bad"] == 1
    out = capsys.readouterr().out
    assert "taking the 1 files that the hub's cache holds" in out
    assert "leaves out 2 files: of the test split: 1 (data/test-00000-of-00001.parquet); dataset card: 1" in out
    assert "are missing: data/train-00000-of-00003.parquet, data/train-00002-of-00003.parquet" in out


# -------------------------------------------------------------------------------------------------- local folders


@pytest.mark.parametrize(
    "files, card, train",
    [
        (["a.py", "pkg/test/t.py"], False, "all"),  # by the library's rule only a test split
        (["a.py", "train/x.py", "test/y.py", "test/y.txt", "train/x.txt"], False, "all"),
        (["docs/training.md", "docs/evaluation.md", "docs/a.md"], False, "all"),
        (["docs/test/x.txt", "docs/a.txt"], False, "all"),
        (["x.parquet", "test/y.parquet"], False, "all"),
        (["a.jsonl", "b.parquet", "c.txt"], False, "all"),
        (["the train.txt", "a.txt"], False, "all"),
        (["wiki.train.txt", "wiki.valid.txt", "a.md"], False, {"wiki.train.txt"}),
        (["pos/train/a.txt", "pos/test/b.txt"], False, {"pos/train/a.txt"}),
        (["train.parquet", "test.jsonl", "load.py"], False, {"train.parquet"}),
        (["x-valid.jsonl", "x-train.jsonl", "y.jsonl"], True, {"x-train.jsonl"}),
        (["a.jsonl", "b.jsonl.gz"], True, "all"),
    ],
)
def test_a_local_folder_is_a_dataset_where_it_says_so(tmp_path, capsys, files, card, train):
    for file in files:
        write(tmp_path / "in", file)
    if card:
        (tmp_path / "in" / "README.md").write_text("---\nlicense: mit\n---\n# Data\n")
    found, manifest = prepared(tmp_path / "in", tmp_path)
    assert found == sorted(f"text of {file}" for file in (files if train == "all" else train))
    out, left = capsys.readouterr().out, manifest["source_files"]["left_out"]
    assert f"takes {len(found)} file" in out and sum(manifest["source_files"]["taken"].values()) == len(found)
    assert sum(entry["files"] for entry in left.values()) == len(files) + card - len(found)
    named = [file for file in files if "test/" in file]
    if train == "all" and named:
        assert f"named like a held-out split, too: {named[0].rpartition('/')[0]}/" in out
    if train != "all":
        assert "of the test split: 1" in out or "of the validation split: 1" in out


def test_a_local_dataset_without_a_train_split_is_refused(tmp_path):
    write(tmp_path / "in", "test/a.jsonl")
    (tmp_path / "in" / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(DataError, match="in: has no train split, only test"):
        prepare(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_kind_of_text_is_read_and_the_rest_is_named(tmp_path, capsys):
    source = tmp_path / "in"
    kinds = ["a.txt", "b.md", "c.py", "d.jsonl", "e.ndjson", "f.json", "g.json.gz", "h.jsonl.zst", "i.parquet"]
    for file in kinds:
        write(source, file)
    (source / "array.json").write_text(
        '\ufeff [\n {"text": "of an array: [{,\\"\\u00e9"},\n{"n": [1], "text": "more"} ]\n'
    )
    (source / "empty.json").write_text("[]")
    (source / "j.txt.bz2").write_bytes(bz2.compress("packed té".encode()))
    (source / "k.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"text"))
    (source / "package.json").write_text('{\n "name": "no rows"\n}')
    (source / "short.json").write_text('{"name": "no rows"}')
    (source / "README.md").write_text("# About the data")
    for file in ("l.rst", "m.rst", "n.csv.gz", "LICENSE", ".cache"):
        (source / file).write_text("left out")
    found, manifest = prepared(source, tmp_path)
    more = ['of an array: [{,"é', "more", "packed té", "one text"]
    assert found == sorted([*(f"text of {file}" for file in kinds), *more])
    left = {what: entry["files"] for what, entry in manifest["source_files"]["left_out"].items()}
    assert left == {
        ".rst": 2, ".csv.gz": 1, "without suffix": 1, "hidden": 1, "dataset card": 1, ".json without rows": 2
    }  # fmt: skip
    out = capsys.readouterr().out
    assert ".rst: 2 (l.rst, ...)" in out and "dataset card: 1 (README.md)" in out and "takes 13 files" in out


def test_labels_of_a_dataset_with_a_card(tmp_path):
    """evaluate.py --by: the card is no document, and so lacks no label."""
    (tmp_path / "README.md").write_text("# Data")
    pq.write_table(pa.table({"text": ["hello", "hallo"], "language": ["en", "de"]}), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text('[{"text": "salut", "language": "fr"}]')
    found = [(text, label) for _, text, label in fineweb.read_documents(str(tmp_path), label_column="language")]
    assert found == [(b"hello", "en"), (b"hallo", "de"), (b"salut", "fr")]


# ---------------------------------------------------------------------------------------------------- shapes of rows


def test_marks_and_ends_of_lines_inside_rows(tmp_path, monkeypatch):
    rows = ["in \u2028the\u2029 sky", "Water\u0085 is\x0b wet", "\ufeffa mark in the text"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in rows]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        "\ufeff" + "\r\n".join(lines) + "\n\ufeff" + json.dumps({"text": "joined"})
    )
    (tmp_path / "in" / "b.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "in" / "c.txt").write_bytes(b"\xef\xbb\xbf" + b"long" * 50)
    monkeypatch.setattr(documents, "WHOLE_BYTES", 100)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    assert prepared(tmp_path / "in", tmp_path)[0] == sorted([*rows, "joined", "marked", "long" * 50])


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.json", '[{"text": "kept"}, {"text": 7}]', "a.json, row 1 .counted from 0.: .* but it is a number"),
        ("a.json", '[{"text": "kept"}, {"text": "cut', "a.json, row 0 .*: the file can't be read after this row"),
        ("a.json", '[{"text": "kept"} {"text": "b"}]', "expected a comma or a closing bracket, found '{'"),
        ("a.json", '[{"text": "kept"}, [1]]', "but it is a list"),
        ("a.jsonl", '{"text": "kept"}\n[1, 2]\n', "a.jsonl, line 2: .* but it is a list"),
        ("a.jsonl", '{"text": "kept"}\n{"text": ["x"]}\n', "but it is a list"),
        ("a.jsonl", '{"text": "kept"}\n{"text": true}\n', "but it is true or false"),
        ("a.jsonl", '{"text": "kept"}\n{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("a.jsonl", '{"text": "kept"}\n' + "[" * 100_000 + "\n", "nested too deeply"),
    ],
)
def test_rows_that_are_no_text_are_named_in_plain_words(tmp_path, name, data, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(data)
    with pytest.raises(DataError, match=words) as error:
        prepare(str(tmp_path / "in"), tmp_path / "out", processes=1)
    assert "\n" not in str(error.value) and "object has no" not in str(error.value)
    found, manifest = prepared(tmp_path / "in", tmp_path, skip_bad=True)
    assert found == ["kept"] and manifest["counts"]["bad"] == 1


def test_a_json_file_that_holds_no_rows_is_refused_where_it_is_the_source(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "one object"\n}')
    with pytest.raises(DataError, match="a.json: expected an array of JSON objects, or one on each line"):
        prepare(str(tmp_path / "a.json"), tmp_path / "out")


def test_a_long_array_is_read_a_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MB", 16)
    rows = [{"text": f"é{'x' * (n % 50)}{n}", "more": [n, {"]": "["}]} for n in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    assert prepared(tmp_path / "a.json", tmp_path)[0] == sorted(row["text"] for row in rows)


@pytest.mark.parametrize(
    "column, words",
    [
        (pa.array([["a", "b"]] * 5), r"a.parquet: column 'text' holds list<.*string>; --text-column must name"),
        (pa.array([{"s": "x"}] * 5), "a.parquet: column 'text' holds struct<s: string>"),
        (pa.array([["a"]] * 5, pa.large_list(pa.binary())), "holds large_list"),
        (pa.array([[("a", "b")]] * 5, pa.map_(pa.string(), pa.string())), "holds map<string, string"),
        (pa.array([1, 2, 3, 1, 2]).dictionary_encode(), "holds int64"),
        (None, "a.parquet: no column 'text'; --text-column must be one of x"),
        ("twice", "a.parquet: 2 columns are named 'text'; --text-column must name one"),
    ],
)
def test_columns_that_hold_no_text_are_refused_and_their_rows_counted(tmp_path, column, words):
    (tmp_path / "in").mkdir()
    names, columns = ["text"], [column]
    if not isinstance(column, pa.Array | pa.ChunkedArray):
        names, columns = (["text", "text"], [["a"] * 5, ["b"] * 5]) if column else (["x"], [["a"] * 5])
    pq.write_table(pa.table(columns, names=names), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"text.raw": ["no"] * 2, "text": ["plain", "good"]}), tmp_path / "in" / "b.parquet")
    with pytest.raises(DataError, match=words):
        prepare(str(tmp_path / "in"), tmp_path / "out", processes=1)
    found, manifest = prepared(tmp_path / "in", tmp_path, skip_bad=True)
    assert found == ["good", "plain"] and manifest["counts"]["bad"] == 5


def test_a_column_of_nothing_but_null_is_rows_without_text(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(4)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no text in it .4 empty, 0 bad"):
        prepare(str(tmp_path / "a.parquet"), tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"text": ["doc"]}), tmp_path / "in" / "b.parquet")
    found, manifest = prepared(tmp_path / "in", tmp_path)
    assert found == ["doc"] and manifest["counts"]["empty"] == 4


def test_shapes_of_questions(tmp_path):
    good = {"ctx": "A man\u2028 sits", "endings": ["in \u0085the sky", "down"], "label": 1}
    line = json.dumps(good, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text(f"\ufeff{line}\r\n\n\ufeff{line}", encoding="utf-8")
    questions = choices.read_questions(tmp_path / "q.jsonl")
    assert [q.prompt for q in questions] == [good["ctx"]] * 2 and questions[0].endings == tuple(good["endings"])
    for bad in (dict(endings="ab"), dict(label=0.5), dict(label=None), dict(ctx=["a"]), dict(ctx="\ud800")):
        (tmp_path / "q.jsonl").write_text(line + "\n" + json.dumps(good | bad), encoding="utf-8")
        with pytest.raises(UserError, match="q.jsonl, line 2: "):
            choices.read_questions(tmp_path / "q.jsonl")


# ------------------------------------------------------------------------------------- links, rights and odd names


def test_links_in_circles_or_to_nowhere_and_folders_reached_twice(tmp_path, capsys):
    corpus = tmp_path / "up" / "corpus"
    write(corpus, "a.txt")
    write(corpus, "real/b.txt")
    write(tmp_path / "up", "secret/c.txt")
    write(tmp_path / "elsewhere", "d.txt")
    for name, target in {
        "self": "self",
        "gone": "nowhere",
        "parent": "..",
        "real/up": "../..",
        "twice": "real",
    }.items():
        (corpus / name).symlink_to(target)
    (corpus / "other").symlink_to(tmp_path / "elsewhere")
    (corpus / "other2").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(corpus / "pipe.txt")
    found, manifest = prepared(corpus, tmp_path)
    assert found == ["text of a.txt", "text of d.txt", "text of real/b.txt"]
    left = {what: entry["files"] for what, entry in manifest["source_files"]["left_out"].items()}
    assert left == {
        "link that leads nowhere": 2,
        "link to a folder that is above or was read before": 4,
        "neither file nor folder": 1,
    }
    (corpus / "lost.parquet").symlink_to("nowhere")
    with pytest.raises(DataError, match="lost.parquet: a link to a file that is missing .--skip-bad"):
        prepare(str(corpus), tmp_path / "out2")
    assert prepare(str(corpus), tmp_path / "out2", skip_bad=True)["counts"]["bad"] == 1
    assert "link that leads nowhere: 2 (gone, self)" in capsys.readouterr().out


def test_what_may_not_be_read_is_named_or_counted(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c.jsonl", "sub/d.txt", "e.parquet"):
        write(tmp_path / "in", name)
    locked, scandir, really_open = {"b.txt", "c.jsonl", "sub", "e.parquet"}, os.scandir, open

    def guarded(real):
        def do(path, *more, **options):
            if isinstance(path, str | Path) and os.path.basename(path) in locked:
                raise PermissionError(13, "Permission denied", path)
            return real(path, *more, **options)

        return do

    monkeypatch.setattr(os, "scandir", guarded(scandir))  # the tests may run as root, who may read everything
    monkeypatch.setattr("builtins.open", guarded(really_open))
    for name in ("sub: can't be", "b.txt: can't be read", "c.jsonl: can't be read", "e.parquet: Permission denied"):
        with pytest.raises(DataError, match=name):
            prepare(str(tmp_path / "in"), tmp_path / "out", processes=1)
        locked.remove(name.partition(":")[0])
    locked |= {"b.txt", "c.jsonl", "sub", "e.parquet"}
    found, manifest = prepared(tmp_path / "in", tmp_path, skip_bad=True)
    assert found == ["text of a.txt"] and manifest["counts"]["bad"] == 4


def test_names_of_any_bytes(tmp_path, monkeypatch, capsys):
    source = os.path.join(os.fsencode(tmp_path), b"\xff in,a:0.5\n")
    os.mkdir(source)
    for name in (b"\xfe train.txt", b"\xfe test.txt", b"\x1b[31m.txt", b"'\"*?[x].txt", "naïve データ.txt".encode()):
        with open(os.path.join(source, name), "wb") as f:
            f.write(b"text " * 500)
            f.write(name.replace(b"\xfe", b""))
    out = os.fsdecode(source) + ".out"
    assert command(monkeypatch, "prepare", os.fsdecode(source), "--out", out) == 0
    assert command(monkeypatch, "show", out, "--verify") == 0
    said = capsys.readouterr().out
    assert r"\udcff in,a:0.5\n: takes 1 file (1 .txt)" in said and "\x1b" not in said
    os.rename(os.path.join(source, b"\xfe train.txt"), os.path.join(source, b"\xfe.txt"))
    assert command(monkeypatch, "prepare", os.fsdecode(source), "--out", out + "2") == 0
    assert "takes 5 files (5 .txt)" in capsys.readouterr().out
    mixture = fineweb.ByteStream(f"{out}:0.7, {out}2:3e-1", slice_bytes=64)
    assert mixture.documents == 1 + 4 and mixture.slice(3).inputs[0]
    assert command(monkeypatch, "prepare", os.fsdecode(source), "--out", "x" * 300) == 2
    assert command(monkeypatch, "show", "x" * 300) == 2
    assert "File name too long" in capsys.readouterr().err
