"""Prepares text as shards, from which training reads batches.

    python fineweb.py prepare SOURCE --out DIR      make a folder of shards from any text
    python fineweb.py show DIR                      show its contents

    stream = ByteStream("DIR", slice_bytes=32768)   read micro-batches from shards
    inputs, labels = stream.slice(0).nested("cuda")

A shard is a sequence of UTF-8 documents, each preceded by the byte 0xFE, which UTF-8 never contains: `cat` joins
shards, `grep -a` searches them. Documents are sorted by the SHA-256 of their text. The lowest share of that order is
the validation split, the rest the training split, and the shards of a split are consecutive ranges of it. So the order
of documents depends only on their bytes, equal documents are adjacent, and a sequential read of a shard is a random
sample. Each shard has an index (where its documents start), which is rebuilt if it is missing or outdated.
`manifest.json` lists the contents of the folder and is written last.

Preparing takes two passes, both parallel over processes. Each consists of small steps whose results get their final
names only when complete, so that the command can be killed at any moment and run again:

    scatter    a unit of the source (some files, or a piece of one) -> runs: up to 32 MB of text, sorted by digest
    merge      one range of digests from every run                  -> one shard, without exact duplicates

Training needs this file and numpy; other packages are imported where they are used.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnet_runtime import DataError, UserError
from hnet_runtime.commands import Parser, prog
from hnet_runtime.data import documents, sources
from hnet_runtime.data.stream import (  # noqa: F401 (ByteStream, Slice and others are for importers of this file)
    BOS,
    EOS,
    FULL,
    MANIFEST,
    MB,
    SPLITS,
    WORK,
    ByteStream,
    Corpus,
    Slice,
    atomic_file,
    disk_full,
    fingerprint,
    load_manifest,
    named,
    read_index,
    reindex,
    say,
    slice_numbers,
    sync_folder,
    validation_stream,
    write_index,
    write_table,
)

DEFAULT_SLICE = 2048  # bytes per slice, the default of train.py
RUN_BYTES = 32 * MB  # text that a process collects before it writes; its memory is a small multiple
MIN_SHARD_BYTES = 4096  # of the command; smaller shards would be more files than a folder should have
RUN_DOCUMENTS, SHARD_DOCUMENTS = 1 << 18, 1 << 20  # limits for very short documents, whose digests take most memory


# -------------------------------------------------------------------------------------------------------- sources


class _Tally:
    """Counts of what a unit read. `reject` raises DataError, or with --skip-bad counts and stores a few examples."""

    def __init__(self, skip: bool):
        self.skip, self.counts, self.examples = skip, dict(read=0, empty=0, bad=0), []

    def reject(self, what: str, count: int = 1) -> None:
        if not self.skip:
            raise DataError(f"{what} (--skip-bad counts such input and continues)")
        self.counts["bad"] += count
        self.examples = [*self.examples, what][:5]


def _no_files(source: str, report: sources.Report) -> DataError:
    but = "; ".join(report.lines()[1:])
    what = f"no text in it; expected files of {documents.KINDS}"
    return DataError(f"{named(source)}: {what}{'; it ' + but if report.left else ''}")


def _check_column(column: str, source: str, report: sources.Report) -> None:
    """Raises DataError for a named column of a source that has no rows."""
    if column != "text" and report.taken and not any(found.startswith(documents.ROWS) for found in report.taken):
        raise DataError(f"--text-column {column}: {named(source)} has no rows, only files of text")


def read_documents(
    source: str, text_column: str = "text", label_column: str = "", says: bool = True
) -> Iterator[tuple[str, bytes, str]]:
    """The documents of any source of `prepare`, in order, as (where, UTF-8 text, label), without empty ones.

    label: the text in `label_column` of a row; "" without a column. Duplicates are kept.
    says: print on standard error which files are left out. Raises DataError, with file and row, for input that can't be
    read, is not UTF-8 or lacks its label.
    """

    def reject(what: str, count: int = 1) -> None:
        raise DataError(what)

    report = sources.Report()
    root, files = sources.find(source, text_column, reject, report)
    for name, size, _ in files:
        path = os.path.join(root, name)
        if label_column and not documents.has_rows(path):
            raise DataError(f"{documents.in_words(path)}: has no {label_column!r}; only rows carry labels")
        texts = documents.read(path, size, text_column, reject)
        labels = documents.read(path, size, label_column, reject) if label_column else itertools.repeat((None, b""))
        for (where, text), (_, label) in zip(texts, labels):
            place, text = where(), text if isinstance(text, bytes) else b"".join(text)
            try:
                text.decode()
            except UnicodeDecodeError as e:
                raise DataError(f"{place}: not UTF-8 ({e.reason} at byte {e.start})") from None
            if label_column and not label:
                raise DataError(f"{place}: {label_column!r} is empty; expected a label for every document")
            if text:
                yield place, text, label.decode(errors="replace")
    if not report.taken:
        raise _no_files(source, report)
    _check_column(text_column, source, report)
    if says and (report.left or report.notes):
        say(*(f"{documents.in_words(source)}: {line}" for line in report.lines()), file=sys.stderr)


# ------------------------------------------------------------------------------------------------ scatter and merge


class _Unit(NamedTuple):
    """Work for one process: some files of the list of files, or one piece of one file."""

    number: int
    offset: int  # in the list
    files: int
    piece: int
    pieces: int
    bytes: int


def _make_units(files: Iterable[tuple], sink, unit_bytes: int) -> tuple[list[_Unit], str]:
    """Writes the list of files to `sink`. Returns units of about `unit_bytes`, and the digest of the list."""
    units, digest, offset = [], hashlib.sha256(), 0
    first, count, size = 0, 0, 0  # of the unit that is being filled with files
    for path, file_bytes, version in files:
        pieces = -(-file_bytes // unit_bytes) if documents.is_divisible(path) else 1
        if count and (pieces > 1 or size + file_bytes > unit_bytes or count == 10_000):
            units.append(_Unit(len(units), first, count, 0, 1, size))
            count = size = 0
        if pieces > 1:
            units += [_Unit(len(units) + i, offset, 1, i, pieces, file_bytes // pieces) for i in range(pieces)]
        else:
            first, count, size = first if count else offset, count + 1, size + file_bytes
        line = json.dumps([path, file_bytes, version]).encode() + b"\n"
        sink.write(line)
        digest.update(line)
        offset += len(line)
    if count:
        units.append(_Unit(len(units), first, count, 0, 1, size))
    return units, digest.hexdigest()


@dataclass(frozen=True)
class _Job:
    """The settings of every worker."""

    root: str  # of the source
    out: Path
    work: Path  # for the list of files and the runs
    scratch: Path  # for unfinished files of this command
    column: str
    skip_bad: bool
    run_bytes: int


def _scatter(job: _Job, unit: _Unit) -> int:
    """Writes the runs of a unit; the last one has its own kind of name. Returns the bytes of text in them."""
    tally, run, size, total, runs = _Tally(job.skip_bad), [], 0, 0, 0
    with open(job.work / "files", "rb") as f:
        f.seek(unit.offset)
        files = [json.loads(f.readline())[:2] for _ in range(unit.files)]
    for name, file_bytes in files:
        path = os.path.join(job.root, name)
        for where, text in documents.read(path, file_bytes, job.column, tally.reject, unit.piece, unit.pieces):
            try:
                digest = documents.digest(text)
            except UnicodeDecodeError as e:
                tally.reject(f"{where()}: not UTF-8 ({e.reason})")
                continue
            tally.counts["read"] += 1
            if not len(text):
                tally.counts["empty"] += 1
                continue
            run.append((digest, text))
            size += len(text)
            if size >= job.run_bytes or len(run) == RUN_DOCUMENTS:
                _write_run(job, f"{unit.number:07d}-{runs:05d}.run", run, {})
                run, size, total, runs = [], 0, total + size, runs + 1
    _write_run(job, f"{unit.number:07d}-{runs:05d}.last", run, tally.counts | dict(examples=tally.examples))
    return total + size


def _write_run(job: _Job, name: str, run: list[tuple], counts: dict) -> None:
    """Writes a run, sorted by digest, each text once: digests (high halves, low halves), ends of texts, texts."""
    keys = np.frombuffer(b"".join(digest for digest, _ in run), ">u8").reshape(-1, 2).astype("<u8")
    order = _sort_unique(keys)
    texts = [run[i][1] for i in order]
    ends = np.cumsum([len(text) for text in texts], dtype="<i8")
    header = dict(documents=len(texts), bytes=int(ends[-1]) if texts else 0, duplicates=len(run) - len(texts))
    table = (keys[order, 0].tobytes(), keys[order, 1].tobytes(), ends.tobytes())
    blocks = itertools.chain(table, *([text] if isinstance(text, bytes) else text for text in texts))
    write_table(job.work / name, header | counts, blocks, job.scratch)


def _sort_unique(keys: np.ndarray) -> np.ndarray:
    """The order of (n, 2) keys by digest, with each digest once."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return order[first]


def _runs(work: Path) -> list[Path]:
    return sorted(path for path in work.iterdir() if path.suffix in (".run", ".last"))


@functools.cache
def _run_header(path: Path) -> tuple[dict, int]:
    """The header of a run, and the offset of its table."""
    with open(path, "rb") as f:
        return json.loads(f.readline()), f.tell()


class _Cut(NamedTuple):
    """A document whose end is held out."""

    high: int  # the digest
    low: int
    at: int  # bytes before the held-out end
    keeps_end: bool = False  # whether the end is meant, or the part before it


class _Range(NamedTuple):
    """A shard: the documents whose digests' first 64 bits are in [low, high); of one document perhaps only a part."""

    name: str
    low: int
    high: int
    cut: _Cut | None = None


def _shard_ranges(documents: int, size: int, holdout: Fraction, shard_bytes: int) -> list[_Range]:
    shards = []
    need = max(Fraction(size + documents, shard_bytes), Fraction(documents, SHARD_DOCUMENTS))
    for split, low, share in (("validation", Fraction(0), holdout), ("train", holdout, 1 - holdout)):
        n = max(1, math.ceil(need * share)) if share else 0
        edges = [int((low + share * i / max(1, n)) * 2**64) for i in range(n + 1)]
        shards += [_Range(f"{split}-{i:05d}.shard", *edge) for i, edge in enumerate(itertools.pairwise(edges))]
    return shards


def _hold_out(job: _Job, holdout: float) -> tuple[Fraction, _Cut | None, str]:
    """The share of digests that is held out, the document whose end is held out, and an explanation in words.

    The share is `holdout` if no split is empty then, and training keeps at least one slice. Otherwise, if one document
    of at least one slice is longer than all others together, only its end is held out. If all of a few documents are in
    one split, one moves to the other.
    """
    share, both = Fraction(holdout), [0, 0]
    if not holdout:
        return share, None, ""
    for path in _runs(job.work):
        (high, _, _), lengths = _run_table(path)
        held = high < np.uint64(int(share * 2**64))
        both = [n + int((lengths[side] + 1).sum()) for n, side in zip(both, (held, ~held))]
    held, rest = both
    if held and rest and not rest < DEFAULT_SLICE <= held:
        return share, None, ""
    runs = _runs(job.work)
    tables = [_run_table(path) for path in runs]
    keys = np.concatenate([table[:2].T for table, _ in tables])
    lengths = np.concatenate([lengths for _, lengths in tables])
    order = _sort_unique(keys)
    longest = int(order[np.argmax(lengths[order])])
    size, total = int(lengths[longest]), int(lengths[order].sum())
    if 2 * size > total and size >= DEFAULT_SLICE:
        run, i = 0, longest
        while i >= len(tables[run][1]):
            i, run = i - len(tables[run][1]), run + 1
        ends = tables[run][0][2]
        begin = _run_header(runs[run])[1] + 24 * len(ends) + (int(ends[i - 1]) if i else 0)
        if found := _find_cut(runs[run], begin, size, holdout):
            at, edge = found
            cut = _Cut(int(keys[longest, 0]), int(keys[longest, 1]), at)
            which = "the only document" if len(order) == 1 else f"the longest of {len(order)} documents"
            part = f"the last {size - at:,} of its {size:,} bytes, from the beginning of a {edge},"
            return Fraction(0), cut, f"{which} has more than half of the text: {part} are held out for validation"
    if len(order) < 2 or (held and rest):
        return share, None, ""
    side = Fraction(int(keys[order[0], 0]) + 1, 2**64) if rest else Fraction(int(keys[order[-1], 0]), 2**64)
    one = "one is held out for validation" if rest else "one is left to train on"
    none = "validation" if rest else "training"
    return side, None, f"--holdout {holdout} leaves {none} none of {len(order)} documents by their hash: {one}"


def _find_cut(path: Path, begin: int, size: int, holdout: float) -> tuple[int, str] | None:
    """Where to cut a document of `size` bytes at `begin` of a run, and what starts there; None if nowhere."""
    target = size - max(1, round(size * holdout))
    tail = min(size - target, MB)
    low, high = max(1, target - max(tail // 2, min(2000, size // 4))), min(size - 1, target + tail // 2)
    with open(path, "rb", buffering=0) as f:
        text = os.pread(f.fileno(), high - low + 1, begin + low)
    for edge, mark in (
        ("paragraph", rb"\n\s*\n(?=\S)"),
        ("line", rb"\n(?=.)"),
        ("word", rb"[ \t](?=\S)"),
        ("character", rb"(?=[^\x80-\xbf])"),
    ):
        ends = [low + found.end() for found in re.finditer(mark, text, re.DOTALL)]
        if ends := [end for end in ends if 0 < end < size]:
            return min(ends, key=lambda end: abs(end - target)), edge
    return None


def _run_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A run's table: digests (high halves, low halves) and ends, uint64 (3, n); and lengths, int64 (n,)."""
    header, base = _run_header(path)
    with open(path, "rb") as f:
        f.seek(base)
        table = np.frombuffer(f.read(24 * header["documents"]), "<u8").reshape(3, -1)
    return table, np.diff(table[2].astype(np.int64), prepend=0)


def _merge(job: _Job, shard_range: _Range) -> int:
    """Writes one shard and its index: all documents with digests in [low, high), sorted, each text once."""
    name, low, high, cut = shard_range
    runs = _runs(job.work)
    keys, places = [np.empty((0, 2), np.uint64)], [np.empty((0, 3), np.int64)]  # place: run, offset, length
    for number, path in enumerate(runs):
        header, base = _run_header(path)
        n = header["documents"]
        with open(path, "rb", buffering=0) as f:

            def column(i: int, a: int, b: int):
                return np.frombuffer(os.pread(f.fileno(), 8 * (b - a), base + 8 * (i * n + a)), "<u8")  # noqa: B023

            digests = column(0, 0, n)
            a, b = (int(np.searchsorted(digests, np.uint64(edge))) if edge < 2**64 else n for edge in (low, high))
            ends = np.concatenate([column(2, a - 1, a) if a else [0], column(2, a, b)]).astype(np.int64)
            keys.append(np.stack([column(0, a, b), column(1, a, b)], axis=1))
            places.append(np.stack([np.full(b - a, number), ends[:-1] + base + 24 * n, np.diff(ends)], axis=1))
    keys, places = np.concatenate(keys), np.concatenate(places)
    order, read = _sort_unique(keys), len(keys)
    keys, places = keys[order], places[order]
    if cut:
        is_cut = (keys == np.array([cut.high, cut.low], np.uint64)).all(axis=1)
        if cut.keeps_end:
            places, read = places[is_cut] + [0, cut.at, -cut.at], 1
        else:
            places[is_cut, 2] = cut.at
    starts = np.concatenate([[0], np.cumsum(places[:, 2] + 1)])

    # Documents are read in batches, run by run; a long document is a batch of its own, read in blocks.
    long = places[:, 2] > RUN_BYTES
    new_window = np.diff(starts[:-1] // RUN_BYTES, prepend=-1) > 0
    cuts = np.flatnonzero(new_window | long | np.concatenate([[False], long[:-1]])).tolist()
    digest, high_bytes = hashlib.sha256(), 0
    with atomic_file(job.out / name, job.scratch) as out:
        for a, b in itertools.pairwise([*cuts, len(places)]):
            for block in _read_batch(runs, places[a:b]):
                out.write(block)
                digest.update(block)
                high_bytes += int(np.count_nonzero(np.frombuffer(block, np.int8) < 0))
    counts = dict(documents=len(places), duplicates=read - len(places), non_ascii=high_bytes - len(places))
    write_index(job.out / name, starts, digest.hexdigest(), job.scratch, **counts)
    return int(starts[-1])


def _read_batch(runs: list[Path], places: np.ndarray) -> Iterator[bytes]:
    """The documents at `places` in the format of a shard, about a megabyte at a time."""
    texts, (number, offset, length) = [b""] * len(places), places[0].tolist()
    if length > RUN_BYTES:
        yield bytes([BOS])
        with open(runs[number], "rb", buffering=0) as f:
            for at in range(0, length, MB):
                yield os.pread(f.fileno(), min(MB, length - at), offset + at)
        return
    for number in np.unique(places[:, 0]):
        with open(runs[number], "rb", buffering=0) as f:
            for i in np.flatnonzero(places[:, 0] == number):
                texts[i] = os.pread(f.fileno(), int(places[i, 2]), int(places[i, 1]))
    some = max(1, len(texts) * MB // RUN_BYTES)
    for i in range(0, len(texts), some):
        yield b"".join(b"\xfe" + text for text in texts[i : i + some])


# -------------------------------------------------------------------------------------------------------- prepare


def prepare(
    source: str,
    out: str | Path,
    *,
    text_column: str = "text",
    holdout: float = 0.02,
    processes: int | None = None,
    part: str = "1/1",
    skip_bad: bool = False,
    shard_bytes: int = 64 * MB,
) -> dict | None:
    """Makes a folder of shards from any text. Run again after an interruption, it continues where it stopped.

    source: "stdlib" (the source text of the running Python's standard library; what isn't UTF-8 is skipped); a file,
        or a folder searched recursively, of .txt .md .py (one document each), .jsonl .ndjson .json (one document per
        line or element of an array) and .parquet (one document per row), all but .parquet also with .gz, .zst or
        .bz2; or "hf:owner/name[@revision][:config]", a dataset on the Hugging Face Hub. Of a dataset only the train
        split is taken: see hnet_runtime/data/sources.py.
    out: the folder. While it is being made it needs space for the text twice.
    text_column: the column with the text of rows.
    holdout: share of documents in the validation split, chosen by the hash of their text. If that would leave a split
        empty, one document moves to it, or the end of a document that is longer than all others together is held out.
        0: no validation split.
    processes: by default one per core; each takes less than 500 MB. The shards don't depend on it.
    part: "i/n", i from 1 to n, to prepare one corpus with n commands, also on several machines that share `out`.
        The shards don't depend on it; the command that finishes last writes them.
    skip_bad: count documents that can't be read and continue, instead of stopping at the first.
    shard_bytes: target size. The time and memory to open a shard are proportional to it.

    Returns the manifest, or None while other parts are missing. Prints progress. Raises DataError.
    """
    out, begun = Path(out), time.monotonic()
    i, n = _parse_part(part)
    if not 0 <= holdout < 1:
        raise DataError(f"--holdout {holdout}: expected a share from 0 to below 1")
    if shard_bytes < 1 or (processes is not None and processes < 1):
        name, value = ("--shard-bytes", shard_bytes) if shard_bytes < 1 else ("--processes", processes)
        raise DataError(f"{name} {value}: expected 1 or more")
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    run_bytes = min(RUN_BYTES, max(1, shard_bytes // 2))
    if os.path.exists(out) and not os.path.isdir(out):
        raise DataError(f"--out {out}: a file; expected a folder, or a name for a new one")
    plan = dict(source=source, options=dict(text_column=text_column, holdout=holdout, shard_bytes=shard_bytes))
    skip_bad = skip_bad or source == "stdlib"
    listing, report = _Tally(skip_bad), sources.Report()
    try:
        root, files = sources.find(source, text_column, listing.reject, report)
        if (out / MANIFEST).exists():
            with open(os.devnull, "wb") as sink:
                plan["files"] = _make_units(files, sink, run_bytes)[1]
            manifest = load_manifest(out, ("plan", "counts"))
            _check_same(out, "holds", manifest["plan"], plan)
            shutil.rmtree(out / WORK, ignore_errors=True)  # left by a kill after the manifest was written
            say(f"{named(out)}: already prepared from {named(source)}")
            return manifest
        if out.is_dir() and not (out / WORK).is_dir() and any(out.iterdir()):
            raise DataError(f"{out}: not empty, and not made by prepare; choose another --out")
        scratch = out / WORK / f"unfinished-{i}-of-{n}"
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        scratch.mkdir(parents=True, exist_ok=True)
        busy = f"{out}: another prepare of part {part} is at work on it"
        with _locked(out / WORK / f"part-{i}-of-{n}.lock", busy), _cleaned_up(out, scratch, made, n):
            for left_over in scratch.iterdir():
                left_over.unlink()
            units, work = _begin(out, scratch, plan, files, run_bytes, report)
            if report.left or report.notes or report.taken.total() > 1:
                say(*(f"{named(source)}: {line}" for line in report.lines()))
            job = _Job(root, out, work, scratch, text_column, skip_bad, run_bytes)
            missing = _missing(work, units)
            if len(missing) < len(units):
                say(f"{named(out)}: continues; {len(units) - len(missing)} of {len(units)} pieces were read before")
            mine = [unit for unit in missing if unit.number % n == i - 1]
            _parallel("reading", _scatter, job, mine, [unit.bytes for unit in mine], processes)
            if missing := _missing(work, units):
                say(f"{named(out)}: part {part} is read; {len(missing)} of {len(units)} pieces are left to other parts")
                return None
            with _locked(out / WORK / "merge.lock", f"{out}: another part is writing the shards; nothing to do here"):
                manifest = _finish(job, plan, processes, listing, report)
    except OSError as e:
        if e.errno in FULL:
            raise disk_full(out, e) from e
        raise DataError(f"{named(e.filename or out)}: {e.strerror or e}") from e
    say(f"{_summary(out, manifest)}; {time.monotonic() - begun:.0f} s")
    return manifest


def shortcoming(folder: str | Path, manifest: dict) -> str:
    """Why `train.py` can't train on a prepared folder with its default flags, in a sentence; "" if it can."""
    pairs = {split: sum(s["bytes"] for s in manifest["splits"][split]["shards"]) for split in SPLITS}
    if pairs["train"] < DEFAULT_SLICE:
        less = f"{pairs['train']:,} bytes of training text are less than one slice of train.py ({DEFAULT_SLICE:,})"
        return f"{named(folder)}: {less}; prepare more text, or train with a shorter --mbs"
    if not pairs["validation"] and manifest["plan"]["options"]["holdout"]:
        return f"{named(folder)}: has no validation text; prepare more text, or say --holdout 0 to train without"
    return ""


def _parse_part(part: str) -> tuple[int, int]:
    i, _, n = part.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise DataError(f"--part {part}: expected i/n with i from 1 to n, such as 3/8")
    return int(i), int(n)


@contextlib.contextmanager
def _locked(path: Path, busy: str):
    """A context that holds a lock, which ends with the process."""
    import fcntl

    with open(path, "ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(busy) from None
        except OSError:  # a file system without locks: two commands would write the same bytes twice
            pass
        yield


@contextlib.contextmanager
def _cleaned_up(out: Path, scratch: Path, made: list[Path], parts: int):
    """A context in which a mistake (DataError) leaves no unfinished work, and of the folders in `made` no empty ones.

    Finished runs stay: those of other plans, and those from which the same command with --skip-bad continues. Other
    parts may be running, so with them nothing is removed that could be theirs.
    """
    try:
        yield
    except DataError:
        shutil.rmtree(scratch, ignore_errors=True)
        used = f"{WORK}/plan-*/*.last" if parts == 1 else f"{WORK}/plan-*"
        if not any(out.glob(used)) and not any(out.glob(f"{WORK}/unfinished-*")):
            shutil.rmtree(out / WORK, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def _check_same(out: Path, holds: str, old: dict, new: dict) -> None:
    """Raises DataError if the folder was started with another plan."""
    for key, value in new["options"].items():
        if old["options"][key] != value:
            what = f"with --{key.replace('_', '-')} {old['options'][key]}, not {value}"
            raise DataError(f"{out}: {holds} a corpus prepared {what}; delete it or choose another --out")
    if old["files"] != new["files"]:
        what = f"text of {old['source']} and not of {new['source']}, or of files that have changed since"
        raise DataError(f"{out}: {holds} {what}; delete it or choose another --out")


def _begin(
    out: Path, scratch: Path, plan: dict, files: Iterable[tuple], run_bytes: int, report: sources.Report
) -> tuple[list[_Unit], Path]:
    """Lists the source. Returns its units and the folder for their runs, which belongs only to this plan."""
    with open(scratch / "files", "wb") as sink:
        units, plan["files"] = _make_units(files, sink, run_bytes)
    if not units:
        raise _no_files(plan["source"], report)
    _check_column(plan["options"]["text_column"], plan["source"], report)
    identity = json.dumps([plan["options"], plan["files"]], sort_keys=True)
    work = out / WORK / f"plan-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    for other in out.glob(f"{WORK}/plan-*/*.last"):
        if other.parent != work:
            _check_same(out, "holds a part of", json.loads((other.parent / "plan.json").read_bytes()), plan)
    work.mkdir(exist_ok=True)
    os.replace(scratch / "files", work / "files")
    write_table(work / "plan.json", plan, [], scratch)
    return units, work


def _missing(work: Path, units: list[_Unit]) -> list[_Unit]:
    done = {int(path.name.partition("-")[0]) for path in work.glob("*.last")}
    return [unit for unit in units if unit.number not in done]


def _finish(job: _Job, plan: dict, processes: int, listing: _Tally, report: sources.Report) -> dict:
    """Merges the runs into shards, writes the manifest and removes temporary files."""
    totals, examples = Counter(bad=listing.counts["bad"]), list(listing.examples)
    for path in _runs(job.work):
        header = dict(_run_header(path)[0])
        examples += header.pop("examples", [])
        totals.update(header)
    if not totals["documents"]:
        shutil.rmtree(job.out / WORK)
        example = "".join(f", such as {text}" for text in examples[:1])
        empty = f"{totals['empty']} empty, {totals['bad']} bad{example}"
        raise DataError(f"{named(plan['source'])}: no text in it ({empty})")
    options = plan["options"]
    share, cut, how = _hold_out(job, options["holdout"])
    ranges = _shard_ranges(totals["documents"], totals["bytes"], share, options["shard_bytes"])
    if cut:
        ranges.insert(0, _Range("validation-00000.shard", cut.high, cut.high + 1, cut._replace(keeps_end=True)))
        ranges = [r._replace(cut=cut) if r.low <= cut.high < r.high and not r.cut else r for r in ranges]
    todo = [shard_range for shard_range in ranges if not read_index(job.out / shard_range.name)[0]]
    sizes = [totals["bytes"] * (shard_range.high - shard_range.low) >> 64 for shard_range in todo]
    _parallel("writing shards", _merge, job, todo, sizes, processes)

    counts = {name: totals[name] for name in ("read", "empty", "bad", "duplicates")}
    splits = {split: dict(documents=0, text_bytes=0, non_ascii=0, shards=[]) for split in SPLITS}
    for name in (shard_range.name for shard_range in ranges):
        header, _ = read_index(job.out / name, header_only=True)
        split, documents = splits[name.partition("-")[0]], header["documents"]
        split["shards"].append(dict(file=name, bytes=header["bytes"], documents=documents, sha256=header["sha256"]))
        split["documents"] += documents
        split["text_bytes"] += header["bytes"] - documents
        split["non_ascii"] += header["non_ascii"]
        counts["duplicates"] += header["duplicates"]
    for split in splits.values():
        split["fingerprint"] = fingerprint(split["shards"])
    manifest = dict(format="hnet shards 1", plan=plan, counts=counts, bad_examples=examples[:20], splits=splits)
    manifest |= dict(source_files=report.as_dict(), held_out=how)
    sync_folder(job.out)
    with atomic_file(job.out / MANIFEST, job.scratch) as f:
        f.write(json.dumps(manifest, indent=1).encode() + b"\n")
    sync_folder(job.out)
    shutil.rmtree(job.out / WORK, ignore_errors=True)
    return manifest


def _parallel(what: str, function: Callable, job: _Job, tasks: list, sizes: list[int], processes: int) -> None:
    """Calls function(job, task), which returns bytes of text, for every task in worker processes. Shows progress."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    with _Progress(what, sum(sizes)) as progress:
        processes = min(processes, len(tasks), max(1, sum(sizes) // (2 * job.run_bytes)))
        if processes < 2:  # a small source is done before a process has started
            for task, size in zip(tasks, sizes):
                progress.advance(size, function(job, task))
            return
        context = multiprocessing.get_context("spawn")  # the caller may have threads, which a fork would lose
        leash, held = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(processes, context, _start_worker, (leash,))
        try:
            futures = {pool.submit(function, job, task): size for task, size in zip(tasks, sizes)}
            for future in as_completed(futures):
                progress.advance(futures[future], future.result())
        except BrokenProcessPool as e:
            how = f"a process was killed while {what}, perhaps for want of memory; run the same command again"
            raise DataError(f"{job.out}: {how}") from e
        finally:
            held.close()
            leash.close()
            pool.shutdown(cancel_futures=True)


def _start_worker(leash) -> None:
    """Ends this worker when the other end of the pipe closes or its process dies; that process handles Ctrl-C."""
    import signal

    def watch():
        with contextlib.suppress(EOFError, OSError):
            leash.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """Shows MB/s of text and the time left: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.text = what, max(1, total), 0, 0
        self.begun = self.said = time.monotonic()
        self.bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            speed = TextColumn("{task.fields[speed]}")
            columns = (TextColumn(self.what), BarColumn(), TaskProgressColumn(), speed, TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, speed="")
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def advance(self, size: int, text: int) -> None:
        now, self.done, self.text = time.monotonic(), self.done + size, self.text + text
        speed = f"{self.text / 1e6 / max(now - self.begun, 1e-3):.0f} MB/s"
        if self.bar:
            self.bar.update(self.task, completed=self.done, speed=speed)
        elif now - self.said > 10:
            left = (now - self.begun) * (self.total - self.done) / max(self.done, 1)
            say(f"{self.what}: {self.done / self.total:.0%}, {speed}, {left:.0f} s left", file=sys.stderr)
            self.said = now


# --------------------------------------------------------------------------------------------------- the command


def _summary(out: Path, manifest: dict) -> str:
    splits, counts = manifest["splits"], manifest["counts"]
    texts = {s: f"{splits[s]['documents']:,} {s} document{'s' * (splits[s]['documents'] != 1)}" for s in SPLITS}
    parts = [f"{texts[s]} ({splits[s]['text_bytes'] / 1e6:,.1f} MB)" for s in SPLITS]
    dropped = [f"{counts['duplicates']:,} duplicate", f"{counts['empty']:,} empty", f"{counts['bad']:,} unreadable"]
    if manifest["plan"]["options"]["holdout"] == 0:
        dropped[-1] += "; without validation, as --holdout 0 says"
    if manifest.get("held_out"):
        dropped[-1] += f"; {manifest['held_out']}"
    return f"{named(out)}: {' and '.join(parts)}; dropped {', '.join(dropped)}"


def show(folder: str | Path, verify: bool = False) -> None:
    """Prints the contents of a prepared folder. verify: also checks every shard against its checksum."""
    folder, manifest = Path(folder), load_manifest(folder, ("plan", "counts", "bad_examples"))
    lines = [_summary(folder, manifest), f"source: {named(manifest['plan']['source'])}"]
    lines += [f"unreadable: {example}" for example in manifest["bad_examples"]]
    for name, split in manifest["splits"].items():
        if not split["documents"]:
            continue
        corpus = Corpus(folder, name)
        for path, sha256 in zip(corpus.paths, corpus.hashes) if verify else ():
            reindex(path, sha256)
        histogram = np.zeros(64, int)  # by the number of bits of the length
        for shard in range(len(corpus.paths)):
            histogram += np.bincount(np.frexp(np.diff(corpus.starts(shard)) - 1)[1], minlength=64)
        mean, non_ascii = split["text_bytes"] / split["documents"], split["non_ascii"] / max(1, split["text_bytes"])
        shards = f"{len(corpus.paths)} shard{'s' * (len(corpus.paths) != 1)}"
        lines += ["", f"{name}: {shards}, fingerprint {split['fingerprint']}"]
        lines += [f"  {non_ascii:.2%} of bytes are not ASCII; documents of {mean:,.0f} bytes on average:"]
        for bits in range(int(np.flatnonzero(histogram)[0]), int(np.flatnonzero(histogram)[-1]) + 1):
            bar = "#" * round(50 * histogram[bits] / histogram.max())
            lines.append(f"  {1 << bits >> 1:>13,} to {(1 << bits) - 1:<13,} {histogram[bits]:>13,} {bar}".rstrip())
        first = corpus.read(0, min(401, corpus.pairs), corpus.pairs, "file")
        sample = first.inputs[1 : int(first.row_lengths[0])].tobytes().decode(errors="ignore")
        lines += ["  a sample:", *(f"  | {line}".rstrip() for line in sample.splitlines())]
    say("\n".join([*lines, *["", "every byte is as prepared"] * verify]))


def main() -> int:
    parser = Parser(prog="fineweb.py", description="Prepare text as shards of UTF-8 documents.")
    commands = parser.add_subparsers(dest="command")
    about = {"help": "make shards", "description": "Make shards from any text."}
    add = commands.add_parser("prepare", prog=prog("fineweb.py prepare"), **about).add_argument
    add("source", help=f"stdlib, hf:owner/name[@revision][:config], or a file or folder of {documents.KINDS}")
    add("--out", required=True, help="the folder to make; needs space for the text twice while it is made")
    add("--text-column", default="text", help="the column with the text of rows (text)")
    add("--holdout", type=float, default=0.02, help="share of documents for validation, chosen by hash (0.02); 0: none")
    add("--processes", type=int, help="number of processes; default: one per core")
    add("--part", default="1/1", metavar="I/N", help="prepare part I of N; the N commands share --out; I is from 1")
    add("--skip-bad", action="store_true", help="count input that can't be read, and continue")
    add("--shard-bytes", type=int, default=64 * MB, help="target size of shards (67108864)")
    about = {"help": "show what is in a folder", "description": "Show counts, lengths and a sample of a folder."}
    add = commands.add_parser("show", prog=prog("fineweb.py show"), **about).add_argument
    add("folder", help="a folder made by fineweb.py prepare")
    add("--verify", action="store_true", help="check every shard against its checksum")
    try:
        arguments = vars(parser.parse_args())
        command = arguments.pop("command")
        if command is None:
            raise UserError("expected prepare or show, with what to work on (see --help)")
        if arguments.get("shard_bytes", MIN_SHARD_BYTES) < MIN_SHARD_BYTES:
            raise UserError(f"--shard-bytes {arguments['shard_bytes']}: expected {MIN_SHARD_BYTES} or more")
        if command == "show":
            show(**arguments)
        elif (manifest := prepare(**arguments)) and (lack := shortcoming(arguments["out"], manifest)):
            say(f"error: {lack}", file=sys.stderr)
            return 1
    except (DataError, UserError) as e:
        say(f"error: {documents.in_words(str(e))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
