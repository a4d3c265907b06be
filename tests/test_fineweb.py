"""fineweb.py's prepare and show, with real files and processes; killed and restarted, it gives the same bytes."""

import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import run_train
from small_models import ONE_STAGE

import fineweb
import train
from fineweb import ByteStream, DataError, prepare
from hnet_runtime.data import documents as documents_module

FINEWEB = Path(fineweb.__file__)


def texts(n: int, seed: int = 0, size: int = 900) -> list[str]:
    rng = random.Random(seed)
    words = ["plain", "naïve", "データ", "\n", "0", "byte ", "a" * 30]
    return [f"{seed}/{i} " + " ".join(rng.choices(words, k=rng.randint(1, size // 4))) for i in range(n)]


def write_jsonl(path: Path, documents: list, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, documents: list, rows: int = 40, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(documents)), "text": pa.array(documents, options.pop("type", pa.string()))})
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.shard"))}


def documents(folder: Path) -> list[str]:
    return [text.decode() for data in shards(folder).values() for text in data.split(b"\xfe")[1:]]


def command(*arguments, **options) -> subprocess.CompletedProcess:
    line = [sys.executable, FINEWEB, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, **options)


# ------------------------------------------------------------------------------------------------- what comes out


def prepared(tmp_path: Path, documents: dict[str, str], *flags: str) -> tuple[int, dict, list[str], list[str]]:
    """(exit status, manifest, training and validation documents) of prepare on files with these names and texts."""
    shutil.rmtree(tmp_path / "texts", ignore_errors=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "texts").mkdir()
    for name, text in documents.items():
        (tmp_path / "texts" / name).write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fineweb.py", "prepare", f"{tmp_path}/texts", "--out", f"{tmp_path}/out", *flags])
        status = fineweb.main()
    manifest, found = json.loads((tmp_path / "out" / "manifest.json").read_bytes()), {}
    for split in ("train", "validation"):
        names = [shard["file"] for shard in manifest["splits"][split]["shards"]]
        data = b"".join((tmp_path / "out" / name).read_bytes() for name in names)
        found[split] = [text.decode() for text in data.split(b"\xfe")[1:]]
        assert manifest["splits"][split]["documents"] == len(found[split])
    return status, manifest, found["train"], found["validation"]


@pytest.mark.parametrize("holdout", ["0.02", "0.1", "0.5", "0.9"])
@pytest.mark.parametrize("edge", ["paragraph", "line", "word", "character"])
def test_a_lone_text_file_gives_both_splits(tmp_path, capsys, holdout, edge):
    between = {"paragraph": "\r\n\r\n", "line": "\n", "word": " ", "character": ""}[edge]
    whole = between.join(f"{n}-naïve-データ" for n in range(3000))
    status, manifest, train, validation = prepared(tmp_path, {"input.txt": whole}, "--holdout", holdout)
    size = len(whole.encode())
    assert status == 0 and len(train) == len(validation) == 1 and train[0] + validation[0] == whole
    assert train[0].endswith(between) and manifest["counts"]["duplicates"] == 0
    held = len(validation[0].encode())
    how = f"the last {held:,} of its {size:,} bytes, from the beginning of a {edge}, are held out"
    assert abs(held / size - float(holdout)) < 0.3 * float(holdout)
    assert how in capsys.readouterr().out and how in manifest["held_out"]
    assert ByteStream(tmp_path / "out", "validation", slice_bytes=64).text_bytes == held
    fineweb.show(tmp_path / "out", verify=True)
    assert how in capsys.readouterr().out


def test_a_document_longer_than_the_others_together_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "WHOLE_BYTES", 5000)
    monkeypatch.setattr(fineweb, "RUN_BYTES", 5000)
    whole = "".join(f"line {n}\n" for n in range(3000))
    numbers = {hashlib.sha256(f"{n}\n{whole}".encode()).digest()[0] < 5: n for n in range(300)}
    for n in numbers.values():  # also where by its hash it would be all that is held out
        status, _, train, validation = prepared(tmp_path, {"a.txt": f"{n}\n{whole}", "b.txt": f"small {n}"})
        assert status == 0 and f"small {n}" in train and len(validation) == 1 and len(train) == 2
        assert any(text + validation[0] == f"{n}\n{whole}" for text in train)
    assert len(numbers) == 2


def test_few_documents_give_at_least_one_to_validate_on(tmp_path, capsys):
    for n in (5, 20, 50, 109):
        for seed in range(2):
            files = {f"{i}.txt": text for i, text in enumerate(texts(n, seed))}
            files |= {f"{i}.txt": files[f"{i}.txt"] + "x" * 2000 for i in range(2)}
            _, manifest, train, validation = prepared(tmp_path, files)
            assert validation and sorted([*train, *validation]) == sorted(files.values())
            assert len(validation) == 1 or not manifest["held_out"]
    assert "of 109 documents by their hash: one is held out for validation" in capsys.readouterr().out
    _, _, train, validation = prepared(tmp_path, {f"{i}.txt": "x" * (i + 2000) for i in range(3)}, "--holdout", "0.999")
    assert len(train) == 1 and len(validation) == 2


def test_what_train_py_could_not_use_gives_status_1(tmp_path, capsys):
    assert train.TrainConfig().mbs == fineweb.DEFAULT_SLICE
    status, *_ = prepared(tmp_path, {"a.txt": "one document"})
    assert status == 1 and "are less than one slice of train.py (2,048)" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fineweb.py", "prepare", f"{tmp_path}/texts", "--out", f"{tmp_path}/out"])
        assert fineweb.main() == 1  # and again, where nothing is left to do
    assert "already prepared" in capsys.readouterr().out
    status, _, trained, validation = prepared(tmp_path, {"a.txt": "one document " * 300}, "--holdout", "0")
    assert status == 0 and len(trained) == 1 and not validation
    assert "without validation, as --holdout 0 says" in capsys.readouterr().out


def test_training_without_validation_says_so(tmp_path):
    prepared(tmp_path, {"a.txt": "a document to train on\n" * 50}, "--holdout", "0")
    (tmp_path / "model.json").write_text(json.dumps(ONE_STAGE))
    flags = f"-c {tmp_path}/model.json --data {tmp_path}/out --mbs 256 --steps 2 --val-every 1 --sample-bytes 4"
    done = run_train([*flags.split(), "--save-dir", "run", "--device", "cpu"], tmp_path, dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert f"trains without validation: {tmp_path}/out prepared with --holdout 0" in done.stdout
    assert "there was no held-out text to validate on" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([record for record in records if "bpb" in record]) == 2 and not any("val_bpb" in r for r in records)


def test_neither_help_nor_prepare_imports_torch(tmp_path):
    """And help nothing else that is slow."""
    source = write_jsonl(tmp_path / "in.jsonl.gz", texts(40))
    for argv, absent in (
        (["--help"], {"torch", "pyarrow", "datasets", "huggingface_hub", "rich"}),
        (["prepare", str(source), "--out", str(tmp_path / "out")], {"torch"}),
    ):
        code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        code += "except SystemExit as e: assert not e.code\nprint(*{name.partition('.')[0] for name in sys.modules})"
        done = subprocess.run([sys.executable, "-c", code, FINEWEB, *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not absent & set(done.stdout.splitlines()[-1].split())


def test_show_ends_quietly_when_its_reader_is_gone(tmp_path):
    prepare(str(write_jsonl(tmp_path / "in.jsonl", texts(40))), tmp_path / "out")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, FINEWEB, "show", tmp_path / "out"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""


def test_the_standard_library_needs_no_download(tmp_path, capsys):
    manifest = prepare("stdlib", tmp_path / "out")
    assert manifest["counts"]["empty"] > 0 and manifest["counts"]["duplicates"] > 0
    assert manifest["splits"]["train"]["documents"] > 500 and manifest["splits"]["validation"]["documents"] > 5
    everything = b"".join(shards(tmp_path / "out").values())
    assert (b"\xfe" + Path(contextlib.__file__).read_bytes()) in everything
    assert "train documents" in capsys.readouterr().out
    assert ByteStream(tmp_path / "out", "validation", slice_bytes=100).slice(0).inputs[0] == 0xFE
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [
        ".index",
        ".index",
        ".json",
        ".shard",
        ".shard",
    ]


def test_all_formats_and_nested_folders(tmp_path):
    t, source = texts(60), tmp_path / "in"
    for i in range(5):
        (source / "10BT" / str(len(t[i].encode()))).mkdir(parents=True)
        (source / "10BT" / str(len(t[i].encode())) / f"{i}.txt").write_bytes(t[i].encode())
    (source / "a.md").write_text(t[5])
    (source / "b.PY").write_text(t[6])
    write_jsonl(source / "x/c.jsonl", [*t[7:20], "", None, t[0]])
    write_jsonl(source / "x/d.jsonl.gz", t[20:30])
    write_parquet(source / "e.parquet", [*t[30:45], None, "", t[44]], rows=7)
    write_parquet(source / "f.parquet", t[45:50], type=pa.large_string(), compression="zstd")
    write_parquet(source / "g.parquet", t[50:55] * 3, type=pa.dictionary(pa.int32(), pa.string()))
    write_parquet(source / "h.parquet", [text.encode() for text in t[55:60]], type=pa.binary())
    (source / ".git").mkdir()
    (source / ".git" / "hidden.txt").write_text("hidden")
    (source / "image.png").write_bytes(b"\xff")
    (source / "x" / "loop").symlink_to(source)
    manifest = prepare(str(source), tmp_path / "out", holdout=0.3)
    assert sorted(documents(tmp_path / "out")) == sorted(t)
    assert manifest["counts"] == dict(read=60 + 2 + 2 + 2 + 10, empty=4, bad=0, duplicates=2 + 10)


def test_documents_are_sorted_by_hash_and_the_lowest_are_held_out(tmp_path):
    t = texts(300)
    prepare(str(write_jsonl(tmp_path / "in.jsonl", t)), tmp_path / "out", holdout=0.25, shard_bytes=20_000)
    found = documents(tmp_path / "out")  # train before validation
    hashes = [hashlib.sha256(text.encode()).digest() for text in found]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    cut = manifest["splits"]["train"]["documents"]
    assert len(manifest["splits"]["train"]["shards"]) > 3 and len(manifest["splits"]["validation"]["shards"]) > 1
    assert hashes[:cut] == sorted(hashes[:cut]) and hashes[cut:] == sorted(hashes[cut:])
    assert max(hashes[cut:])[0] < 64 <= min(hashes[:cut])[0] and 45 < len(hashes) - cut < 105
    for name, data in shards(tmp_path / "out").items():
        split = manifest["splits"][name.partition("-")[0]]
        entry = next(entry for entry in split["shards"] if entry["file"] == name)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["documents"] == data.count(b"\xfe")
    everything = "".join(found).encode()
    assert sum(split["text_bytes"] for split in manifest["splits"].values()) == len(everything)
    assert sum(split["non_ascii"] for split in manifest["splits"].values()) == sum(b > 127 for b in everything)


def test_the_same_text_in_other_files_gives_the_same_shards(tmp_path):
    t = texts(200)
    write_jsonl(tmp_path / "a" / "all.jsonl", t)
    write_parquet(tmp_path / "b" / "one.parquet", t[150:])
    write_jsonl(tmp_path / "b" / "two.jsonl.gz", t[:150][::-1])
    for name in "ab":
        prepare(str(tmp_path / name), tmp_path / f"out-{name}", shard_bytes=30_000)
    assert shards(tmp_path / "out-a") == shards(tmp_path / "out-b")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A source of many pieces, and the shards of an undisturbed prepare in one process."""
    folder = tmp_path_factory.mktemp("many")
    t = texts(2400)
    write_jsonl(folder / "in/a.jsonl", t[:800])
    write_jsonl(folder / "in/b.jsonl.gz", t[700:1200])
    write_parquet(folder / "in/c.parquet", t[1100:2000])
    for i, text in enumerate(t[2000:]):
        (folder / "in" / f"{i}.txt").write_text(text)
    prepare(str(folder / "in"), folder / "out", shard_bytes=150_000, processes=1)
    assert len(shards(folder / "out")) > 6 and sorted(documents(folder / "out")) == sorted(t)
    return folder


def test_shards_do_not_depend_on_processes(many, tmp_path):
    prepare(str(many / "in"), tmp_path / "out", shard_bytes=150_000, processes=2)
    assert shards(tmp_path / "out") == shards(many / "out")
    a, b = (json.loads((out / "manifest.json").read_text()) for out in (tmp_path / "out", many / "out"))
    assert a == b


def test_parts_on_several_machines_make_one_corpus(many, tmp_path, capsys):
    options = dict(shard_bytes=150_000, processes=1)
    assert prepare(str(many / "in"), tmp_path / "out", part="2/3", **options) is None
    assert prepare(str(many / "in"), tmp_path / "out", part="3/3", **options) is None
    assert prepare(str(many / "in"), tmp_path / "out", part="3/3", **options) is None  # again: nothing left to do
    with pytest.raises(DataError, match="an unfinished prepare"):
        ByteStream(tmp_path / "out", slice_bytes=8)
    assert not shards(tmp_path / "out")
    assert prepare(str(many / "in"), tmp_path / "out", part="1/3", **options)
    assert shards(tmp_path / "out") == shards(many / "out")
    assert "left to other parts" in capsys.readouterr().out
    assert prepare(str(many / "in"), tmp_path / "out", part="2/3", **options)  # too late, and harmless


def test_long_documents_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "RUN_BYTES", 5000)
    monkeypatch.setattr("hnet_runtime.data.stream.BLOCK_BYTES", 1001)
    monkeypatch.setattr(fineweb, "MB", 997)
    t = ["é" * 9000, "x" * 20_000, *texts(80), "y" * 5000, "z" * 5001]
    (tmp_path / "in").mkdir()
    for i, text in enumerate([*t, t[0]]):
        (tmp_path / "in" / f"{i}.txt").write_text(text)
    manifest = prepare(str(tmp_path / "in"), tmp_path / "out", holdout=0)
    assert sorted(documents(tmp_path / "out")) == sorted(t) and manifest["counts"]["duplicates"] == 1
    (tmp_path / "in" / "bad.txt").write_bytes(b"x" * 9000 + b"\xc3")
    with pytest.raises(DataError, match="bad.txt: not UTF-8"):
        prepare(str(tmp_path / "in"), tmp_path / "out2")


# ------------------------------------------------------------------------------------------- interrupted and resumed


def killed_and_resumed(many: Path, out: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    line = [
        sys.executable,
        FINEWEB,
        "prepare",
        many / "in",
        "--out",
        out,
        "--shard-bytes",
        "150000",
        "--processes",
        "2",
    ]
    for _ in range(kills):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            process.wait(rng.uniform(0.2, 1.5))
        except subprocess.TimeoutExpired:
            process.kill()  # the parent alone: its workers must go by themselves
        stderr = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), stderr
        for path in out.glob("*"):  # what bears a final name is whole
            wanted = many / "out" / path.name
            assert path.suffix != ".shard" or path.read_bytes() == wanted.read_bytes()
    assert subprocess.run(line, capture_output=True).returncode == 0
    assert shards(out) == shards(many / "out")
    assert (out / "manifest.json").read_text() == (many / "out" / "manifest.json").read_text()
    assert not (out / ".work").exists() and ByteStream(out, slice_bytes=100).slice(0)


def test_three_kills_leave_the_same_bytes(many, tmp_path):
    killed_and_resumed(many, tmp_path / "out", 3, seed=time.time_ns())


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_twenty_kills_leave_the_same_bytes(many, tmp_path, seed):
    killed_and_resumed(many, tmp_path / "out", 20, seed)


def test_workers_die_with_the_command(many, tmp_path):
    psutil = pytest.importorskip("psutil")
    line = [sys.executable, FINEWEB, "prepare", many / "in", "--out", tmp_path / "out", "--shard-bytes", "150000"]
    process = psutil.Popen([*line, "--processes", "2"], stdout=subprocess.DEVNULL)
    children = []
    while process.poll() is None and len(children) < 3:  # two workers and multiprocessing's resource tracker
        children = process.children()
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_ctrl_c_is_one_line_and_can_be_continued(many, tmp_path):
    line = [sys.executable, FINEWEB, "prepare", many / "in", "--out", tmp_path / "out", "--shard-bytes", "150000"]
    process = subprocess.Popen(
        [*line, "--processes", "1"], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("out/.work/plan-*/*.last")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130 and stderr.count("\n") == 1 and "continues from here" in stderr
    done = command("prepare", many / "in", "--out", tmp_path / "out", "--shard-bytes", "150000", "--processes", "1")
    assert done.returncode == 0 and "were read before" in done.stdout
    assert shards(tmp_path / "out") == shards(many / "out")


def test_a_full_disk_leaves_nothing_torn(many, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ("prepare", many / "in", "--out", tmp_path / "out", "--shard-bytes", "150000", "--processes", "2")
    done = command(*arguments, preexec_fn=small_files)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "no space to write it (File too large)" in done.stderr and str(tmp_path / "out") in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert all(data == shards(many / "out")[name] for name, data in shards(tmp_path / "out").items())
    assert command(*arguments).returncode == 0
    assert shards(tmp_path / "out") == shards(many / "out")


def test_two_prepares_of_one_folder_do_not_meet(many, tmp_path):
    import fcntl

    (tmp_path / "out" / ".work").mkdir(parents=True)
    with open(tmp_path / "out" / ".work" / "part-1-of-1.lock", "ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another prepare of part 1/1"):
            prepare(str(many / "in"), tmp_path / "out")


@pytest.mark.parametrize("file, text", [("a.jsonl", b'{"text": '), ("a.txt", b"caf\xe9"), (None, b""), ("a.txt", b"")])
@pytest.mark.parametrize("made", [False, True])
def test_a_refused_source_leaves_nothing(tmp_path, file, text, made):
    """Bad JSON, text that is not UTF-8, no file, an empty one. A folder that was there before stays."""
    (tmp_path / "in").mkdir()
    if file:
        (tmp_path / "in" / file).write_bytes(text)
    out = tmp_path / "data" / "out"
    if made:
        out.mkdir(parents=True)
    refuses(f"{tmp_path}/in", tmp_path / "in", out)
    assert list(out.iterdir()) == [] if made else not (tmp_path / "data").exists()


def test_a_refused_source_leaves_what_was_finished(tmp_path):
    """The same command continues from there with --skip-bad, and runs of another plan are not its own."""
    for n, text in enumerate(texts(8)):
        (tmp_path / f"in/{n}").mkdir(parents=True)
        (tmp_path / f"in/{n}/a.txt").write_text(text * 50)
    (tmp_path / "in" / "9.txt").write_bytes(b"caf\xe9")
    options = dict(shard_bytes=1000, processes=1)
    refuses("9.txt: not UTF-8", tmp_path / "in", tmp_path / "out", **options)
    finished = sorted(tmp_path.glob("out/.work/plan-*/*.last"))
    before = [path.stat().st_mtime_ns for path in finished]
    assert len(finished) > 2 and not list(tmp_path.glob("out/.work/unfinished-*"))
    (tmp_path / "other.jsonl").write_text('{"text": ')
    refuses("holds a part of text of .*/in and not of", tmp_path / "other.jsonl", tmp_path / "out", **options)
    assert [path.stat().st_mtime_ns for path in finished] == before
    assert prepare(str(tmp_path / "in"), tmp_path / "out", skip_bad=True, **options)["counts"]["bad"] == 1
    assert not (tmp_path / "out" / ".work").exists()


def test_a_refused_part_leaves_the_work_of_others(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ')
    other = tmp_path / "out" / ".work" / "unfinished-2-of-2"
    other.mkdir(parents=True)
    for part in ("1/2", "1/1"):
        refuses("in.jsonl", tmp_path / "in.jsonl", tmp_path / "out", part=part)
        assert other.exists() and not list(tmp_path.glob("out/.work/unfinished-1-*"))


def test_an_unfinished_folder_belongs_to_its_source(many, tmp_path):
    prepare(str(many / "in"), tmp_path / "out", part="1/3", shard_bytes=150_000, processes=1)
    read = sorted(tmp_path.glob("out/.work/plan-*/*"))
    (tmp_path / "empty").mkdir()
    refuses("empty: no text in it", tmp_path / "empty", tmp_path / "out")
    assert len(read) > 2 and sorted(tmp_path.glob("out/.work/plan-*/*")) == read
    with pytest.raises(DataError, match="holds a part of a corpus prepared with --holdout 0.02, not 0.1"):
        prepare(str(many / "in"), tmp_path / "out", holdout=0.1, shard_bytes=150_000)
    with pytest.raises(DataError, match="holds a part of text of .*many.*/in and not of .*/more"):
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "a.txt").write_text("more")
        prepare(str(tmp_path / "more"), tmp_path / "out", shard_bytes=150_000)


def test_a_finished_folder_is_left_alone(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", texts(50))
    first = prepare(str(source), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(str(source), tmp_path / "out", processes=3) == first
    assert "already prepared" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="holds a corpus prepared with --holdout 0.02, not 0.5"):
        prepare(str(source), tmp_path / "out", holdout=0.5)
    write_jsonl(source, texts(51))
    with pytest.raises(DataError, match="files that have changed since"):
        prepare(str(source), tmp_path / "out")


def test_a_mistake_can_be_corrected_in_the_same_folder(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", texts(50))
    with pytest.raises(DataError, match="in.parquet: no column 'body'; --text-column must be one of id, text"):
        prepare(str(source), tmp_path / "out", text_column="body")
    assert prepare(str(source), tmp_path / "out")["counts"]["read"] == 50


# ------------------------------------------------------------------------------------------------------- bad input


def refuses(match: str, source: Path | str, out: Path, **options) -> None:
    with pytest.raises(DataError, match=match) as e:
        prepare(str(source), out, **options)
    assert "\n" not in str(e.value)


def skips(source: Path, out: Path, expected: list[str], bad: int = 1) -> None:
    """Without --skip-bad the input is refused; with it, the good documents are taken and the others counted."""
    refuses("--skip-bad", source, out)
    manifest = prepare(str(source), out, skip_bad=True)
    assert sorted(documents(out)) == sorted(expected)
    assert manifest["counts"]["bad"] == bad and len(manifest["bad_examples"]) == min(bad, 5)


def test_sources_that_are_none(tmp_path):
    refuses("gone: no such file or folder", tmp_path / "gone", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refuses("empty: no text in it", tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "a.txt").touch()
    refuses("empty: no text in it .1 empty, 0 bad", tmp_path / "empty", tmp_path / "out")
    (tmp_path / "taken").write_text("mine")
    refuses("--out .*taken: a file; expected a folder", tmp_path / "empty", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    refuses("--processes -1: expected 1 or more", tmp_path / "empty", tmp_path / "out", processes=-1)
    refuses("hf:a/b/c: not a dataset's name", "hf:a/b/c", tmp_path / "out")
    (tmp_path / "image.png").touch()
    refuses("image.png: expected one of .txt", tmp_path / "image.png", tmp_path / "out")
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(holdout=1), "--holdout 1"),
        (dict(part="0/4"), "--part 0/4"),
        (dict(part="5/4"), "--part 5/4"),
        (dict(part="x"), "--part x"),
        (dict(shard_bytes=0), "--shard-bytes 0"),
        (dict(processes=0), "--processes 0"),
    ],
)
def test_options_out_of_range(tmp_path, options, match):
    refuses(match, write_jsonl(tmp_path / "in.jsonl", ["text"]), tmp_path / "out", **options)


def test_folders_that_cannot_be_written(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["text"])
    (tmp_path / "file").touch()
    refuses("file.*Not a directory", source, tmp_path / "file" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    refuses("full: not empty, and not made by prepare", source, tmp_path / "full")


def test_a_truncated_parquet(tmp_path):
    t = texts(200)
    write_parquet(tmp_path / "in/a.parquet", t[:100])
    whole = write_parquet(tmp_path / "in/b.parquet", t[100:])
    whole.write_bytes(whole.read_bytes()[:-1000])
    refuses("b.parquet: not a whole parquet file", tmp_path / "in", tmp_path / "out")
    skips(tmp_path / "in", tmp_path / "out", t[:100])


def test_a_damaged_row_group_of_parquet(tmp_path):
    t = texts(200)
    path = write_parquet(
        tmp_path / "in/a.parquet", t, compression="none", write_page_checksum=True, use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[data.index(t[105].encode()) + 20] ^= 1  # not the first or last, which the statistics repeat
    path.write_bytes(data)
    refuses("a.parquet, rows 80 to 119 .*: row group 2 is damaged", tmp_path / "in", tmp_path / "out")
    skips(tmp_path / "in", tmp_path / "out", t[:80] + t[120:])


def test_bad_lines_of_jsonl_are_named_in_every_piece(tmp_path):
    t = texts(400)
    path = write_jsonl(tmp_path / "in" / "a.jsonl", t)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = {
        300: b'{"text": "cut\n',
        310: b"[1, 2]\n",
        320: b'{"body": "x"}\n',
        330: b'{"text": "\xff"}\n',
        340: b'{"text": "\\ud800"}\n',
        350: b'{"text": 7}\n',
    }
    for number, line in bad.items():
        path.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
        match = f"a.jsonl, line {number}: expected a JSON object with text under 'text'"
        refuses(match, path, tmp_path / f"out{number}", shard_bytes=50_000, processes=1)
    for number, line in bad.items():
        lines[number - 1] = line
    kept = [text for i, text in enumerate(t) if i + 1 not in range(300, 351, 10)]
    path.write_bytes(b"".join(lines) + b"\n \n")
    skips(path, tmp_path / "out2", kept, bad=6)


def test_truncated_gzip(tmp_path):
    t = texts(200)
    path = write_jsonl(tmp_path / "in" / "a.jsonl.gz", t)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a.jsonl.gz, line \d+: the file can't be read after this line") as e:
        prepare(str(path), tmp_path / "out")
    manifest = prepare(str(path), tmp_path / "out", skip_bad=True)
    assert manifest["counts"]["bad"] == 1
    assert sorted(documents(tmp_path / "out")) == sorted(t[: int(re.search(r"line (\d+)", str(e.value))[1])])


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("good")
    (tmp_path / "in" / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "in" / "fe.md").write_bytes(b"a\xfeb")
    refuses("fe.md: not UTF-8", tmp_path / "in", tmp_path / "out")
    skips(tmp_path / "in", tmp_path / "out", ["good"], bad=2)
    write_parquet(tmp_path / "p" / "a.parquet", [b"good", b"\xff"], type=pa.binary())
    refuses(r"a.parquet, row 1 \(counted from 0\): not UTF-8", tmp_path / "p", tmp_path / "out2")


def test_a_column_of_files_without_rows(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    refuses("--text-column body: .*in has no rows", tmp_path / "in", tmp_path / "out", text_column="body")
    assert not (tmp_path / "out").exists()


def test_columns_that_are_not_text(tmp_path):
    source = write_parquet(tmp_path / "in.parquet", texts(5))
    refuses(
        "column 'id' holds int64; --text-column must name a column of text", source, tmp_path / "out", text_column="id"
    )
    source = write_jsonl(tmp_path / "in.jsonl", texts(5), "body")
    refuses("in.jsonl, line 1: .*there is no 'text'", source, tmp_path / "out2")
    refuses("no text in it .0 empty, 5 bad, such as .*in.jsonl, line 1", source, tmp_path / "out2", skip_bad=True)
    assert prepare(str(source), tmp_path / "out2", text_column="body")["counts"]["read"] == 5


def test_mistakes_are_one_line_and_exit_2(tmp_path):
    done = command("prepare", tmp_path / "gone", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gone" in done.stderr
    assert command("prepare", "stdlib", "--out", tmp_path / "out", "--colour", "red").returncode == 2


# ------------------------------------------------------------------------------------------------------------ show


def test_show(many, capsys):
    fineweb.show(many / "out")
    out = capsys.readouterr().out
    manifest = json.loads((many / "out" / "manifest.json").read_text())
    assert f"{manifest['splits']['train']['documents']:,} train documents" in out
    assert f"{manifest['counts']['duplicates']} duplicate" in out and manifest["splits"]["train"]["fingerprint"] in out
    counts = [int(n.replace(",", "")) for n in re.findall(r" to [\d,]+ +([\d,]+) ?#*$", out, re.MULTILINE)]
    assert sum(counts) == 2400
    assert documents(many / "out")[0].split()[0] in out and "not ASCII" in out


def test_show_verify_reads_every_byte(tmp_path):
    prepare(str(write_jsonl(tmp_path / "in.jsonl", texts(99))), tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.shard"
    stat, data = shard.stat(), bytearray(shard.read_bytes())
    assert command("show", tmp_path / "out", "--verify").returncode == 0
    data[50] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a change that its size and time don't betray
    done = command("show", tmp_path / "out", "--verify")
    assert done.returncode == 2 and "train-00000.shard: its contents changed" in done.stderr
    assert "delete its folder and prepare it again" in done.stderr


def test_a_manifest_without_its_keys_is_damaged(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", texts(9))
    manifest = prepare(str(source), tmp_path / "out")
    manifest.pop("plan")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    for arguments in (("show", tmp_path / "out"), ("prepare", source, "--out", tmp_path / "out")):
        done = command(*arguments)
        assert done.returncode == 2 and "manifest.json: damaged; delete its folder" in done.stderr, arguments
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------- the hub


COMMIT = "c" * 40
CARD = """---
configs:
- config_name: default
  default: true
  data_files:
  - split: train
    path: data/*.parquet
  - split: test
    path: test/*
- config_name: small
  data_files: small/*
---
A dataset.
"""


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub that its client needs, with `server.files`; `server.broken` drops file contents."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entry(self, path):
        return dict(type="file", path=path, size=len(self.server.files[path]), oid="0" * 40)

    def do_POST(self):
        paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.reply([self.entry(path) for path in paths if path in self.server.files])

    def do_GET(self):
        path, files = self.path.partition("?")[0], self.server.files
        if path in ("/api/datasets/o/n", f"/api/datasets/o/n/revision/{COMMIT}", "/api/datasets/o/n/revision/main"):
            self.reply(dict(id="o/n", sha=COMMIT, siblings=[dict(rfilename=f) for f in files], private=False, tags=[]))
        elif tree := re.fullmatch(f"/api/datasets/o/n/tree/{COMMIT}/?(.*)", path):
            below = [file for file in files if file.rpartition("/")[0] == tree[1]]
            folders = {file.partition("/")[0] for file in files if "/" in file and not tree[1]}
            directories = [dict(type="directory", path=folder, oid="0" * 40) for folder in folders]
            self.reply([*map(self.entry, below), *directories])
        elif (file := path.partition(f"/resolve/{COMMIT}/")[2]) in files and path.startswith("/datasets/o/n/"):
            body, status, headers = files[file], 200, dict(ETag=f'"{file}"', X_Repo_Commit=COMMIT)
            if self.server.broken and file != "README.md":
                return self.reply({}, 403)
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
                headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
                body, status = body[first : last + 1], 206
            self.reply(body, status, **headers)
        else:
            self.reply({}, 404, X_Error_Code="RepoNotFound" if "/o/n" not in path else "EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine: (environment for commands, server)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    t = texts(300)
    files = dict(a=write_parquet(tmp_path / "a.parquet", t[:150]), b=write_parquet(tmp_path / "b.parquet", t[150:]))
    server.files = {f"data/{name}.parquet": path.read_bytes() for name, path in files.items()}
    server.files["test/x.parquet"] = write_parquet(tmp_path / "x.parquet", ["of the test split"]).read_bytes()
    server.files["small/s.jsonl.gz"] = write_jsonl(tmp_path / "s.jsonl.gz", t[:5]).read_bytes()
    server.files["README.md"] = CARD.encode()
    server.texts, server.broken = t, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    drop = {"HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"}
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    environment |= dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"))
    yield environment | dict(NO_PROXY="*", no_proxy="*"), server
    server.shutdown()
    server.server_close()


def test_a_dataset_on_the_hub(hub, tmp_path):
    environment, server = hub
    done = command("prepare", "hf:o/n", "--out", tmp_path / "out", "--shard-bytes", "20000", env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(documents(tmp_path / "out")) == sorted(server.texts)
    done = command("prepare", "hf:o/n@main:small", "--out", tmp_path / "small", env=environment)
    assert done.returncode == 0 and sorted(documents(tmp_path / "small")) == sorted(server.texts[:5])
    for source, why in {
        "hf:o/n:large": "expected hf:o/n:CONFIG, with CONFIG one of default, small",
        "hf:no/such": "the hub has no dataset no/such",
    }.items():
        done = command("prepare", source, "--out", tmp_path / "none", env=environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and why in done.stderr, done.stderr
    server.broken = True  # a network that fails midway is never counted as bad input
    done = command("prepare", "hf:o/n:small", "--out", tmp_path / "none", "--skip-bad", env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "the hub stopped answering" in done.stderr


def test_without_a_network(hub, tmp_path):
    environment, server = hub
    server.shutdown()
    server.server_close()
    done = command("prepare", "hf:o/n", "--out", tmp_path / "out", env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "hf:o/n: not in the hub's cache, and the hub can't be reached" in done.stderr
    cached = tmp_path / "home" / "hub" / "datasets--o--n"
    for name, data in server.files.items():
        path = cached / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "blobs").mkdir()
    done = command("prepare", "hf:o/n", "--out", tmp_path / "out", env=environment | dict(HF_HUB_OFFLINE="1"))
    assert done.returncode == 0 and "no network; taking the 2 files that the hub's cache holds" in done.stdout
    assert sorted(documents(tmp_path / "out")) == sorted(server.texts)
