"""Reads micro-batches from shards. fineweb.py makes shards from text.

    stream = ByteStream("DIR", slice_bytes=32768)   shards become micro-batches
    inputs, labels = stream.slice(0).nested("cuda")

`ByteStream` is a pure function of the shards, the seed and the sizes: to resume, only the step is needed.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import numpy as np

from hnet_config import BOS, EOS
from hnet_runtime import DataError
from hnet_runtime.data import documents
from hnet_runtime.data.cuts import Cutter

SPLITS = ("train", "validation")
MIXTURE_PART = re.compile(r"\s*(?P<path>.+?)\s*:\s*(?P<weight>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)\s*(,|$)", re.I | re.S)
MANIFEST, WORK = "manifest.json", ".work"
MB = 1 << 20
BLOCK_BYTES = 8 * MB  # unit of copying and hashing
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ANEW = "delete its folder and prepare it again"  # `prepare` leaves a finished folder as it is
SECTION_DOCUMENTS = 1 << 16  # documents of a section in the order by length


# ---------------------------------------------------------------------------------------------------------- files


def named(path: str | Path) -> str:
    return documents.in_words(os.fspath(path))


def say(*lines: str, file: TextIO | None = None) -> None:
    """Prints lines. Replaces characters that the output can't encode, and prints nothing if it has no reader."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        for line in lines:
            print(line.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
    except OSError:  # the reader is gone, which is no reason to stop; Python would try again at exit
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())


@contextlib.contextmanager
def atomic_file(path: Path, scratch: Path | None = None):
    """A binary file that appears as `path` only when it is complete and on disk; it is written as `scratch`."""
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb", buffering=MB) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError) and e.errno in FULL:
            raise disk_full(path, e) from e
        raise


def sync_folder(path: Path) -> None:
    """Makes renames in a folder survive a power failure."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def disk_full(path: Path, e: OSError) -> DataError:
    return DataError(f"{path}: no space to write it ({e.strerror}); free some and run the same command again")


def write_table(path: Path, header: dict, blocks: Iterable[bytes], scratch: Path | None = None) -> None:
    """Writes one line of JSON, then raw little-endian data: the format of indexes and runs."""
    with atomic_file(path, scratch) as f:
        f.write(json.dumps(header, separators=(",", ":")).encode() + b"\n")
        for block in blocks:
            f.write(block)


# -------------------------------------------------------------------------------------------------- shards, indexes


def write_index(shard: Path, starts: np.ndarray, sha256: str, scratch: Path | None = None, **extra) -> None:
    """Writes a shard's index. starts: int64 (documents + 1,): each document's BOS, then the size of the shard.

    The header ties the index to one state of the shard, by size and time; `crc32` protects the index itself.
    """
    stat, body = shard.stat(), starts.astype("<i8").tobytes()
    header = dict(bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256, crc32=zlib.crc32(body), **extra)
    write_table(shard.with_suffix(".index"), header, [body], scratch)


def read_index(shard: Path, header_only: bool = False) -> tuple[dict, np.ndarray | None]:
    """Header and starts of a shard's index. The header is empty if it is missing, damaged or older than the shard."""
    try:
        stat = shard.stat()
        with open(shard.with_suffix(".index"), "rb") as f:
            header = json.loads(f.readline(4096))
            if (header["bytes"], header["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
                if header_only:
                    return header, None
                if zlib.crc32(body := f.read()) == header["crc32"]:
                    return header, np.frombuffer(body, "<i8")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}, None


def _opened(shard: Path) -> int:
    """A descriptor to read a shard from. Raises DataError if it can't be opened."""
    try:
        return os.open(shard, os.O_RDONLY)
    except OSError as e:
        raise DataError(f"{named(shard)}: can't be read ({e.strerror})") from None


def _scan(shard: Path) -> tuple[np.ndarray, str]:
    """Starts and SHA-256 of a shard, from its bytes, read block by block."""
    found, position, digest = [], 0, hashlib.sha256()
    with open(_opened(shard), "rb") as f:
        while block := f.read(BLOCK_BYTES):
            digest.update(block)
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == BOS) + position)
            position += len(block)
    return np.concatenate([*found, [position]]).astype(np.int64), digest.hexdigest()


def reindex(shard: Path, sha256: str) -> np.ndarray:
    """Starts of a shard whose index is missing or outdated. Verifies the shard, and writes the index if it can."""
    starts, found = _scan(shard)
    if found != sha256:
        raise DataError(f"{shard}: its contents changed after prepare wrote it; {ANEW}")
    with contextlib.suppress(OSError, DataError):  # with a read-only or full disk each start needs a scan
        write_index(shard, starts, sha256)
    return starts


def _how_to_prepare(source: Path) -> str:
    command = f"python fineweb.py prepare {named(shlex.quote(str(source)))} --out DIR"
    return f"prepare its text with `{command}`, then use --data DIR"


def load_manifest(folder: str | Path, needs: tuple[str, ...] = ("splits",)) -> dict:
    """The manifest of a prepared folder. Raises DataError if there is none or a shard's size contradicts it.

    needs: the keys that the caller reads.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise DataError(f"{named(folder)}: a file, not a prepared folder; {_how_to_prepare(folder)}")
        how = f"python fineweb.py prepare SOURCE --out {named(shlex.quote(str(folder)))}"
        raise DataError(f"{named(folder)}: no such folder; expected one made by `{how}`")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        shards = [(shard["file"], shard["bytes"], shard["documents"], shard["sha256"]) for shard in listed]
        if missing := [key for key in needs if key not in manifest]:
            raise KeyError(missing[0])
    except FileNotFoundError:
        if (folder / WORK).is_dir():
            what = f"an unfinished prepare (run its command again): it has no {MANIFEST}"
        else:
            what = f"not a prepared folder, as it has no {MANIFEST}; {_how_to_prepare(folder)}"
        raise DataError(f"{named(folder)}: {what}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{folder / MANIFEST}: damaged; {ANEW}") from None
    except OSError as e:
        raise DataError(f"{named(folder / MANIFEST)}: can't be read ({e.strerror})") from None
    for name, wanted, *_ in shards:
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size is None:
            raise DataError(f"{folder / name}: missing, though {MANIFEST} lists it; {ANEW}")
        if size != wanted:
            raise DataError(f"{folder / name}: torn, {size:,} bytes where {MANIFEST} says {wanted:,}; {ANEW}")
    return manifest


def fingerprint(shards: list[dict]) -> str:
    return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- ByteStream


@dataclass(frozen=True)
class Slice:
    """One micro-batch: T byte pairs in B rows. Each row is inside one document."""

    inputs: np.ndarray  # uint8 (T,); 0xFE where a document starts
    labels: np.ndarray  # uint8 (T,); the byte after each input, 0xFF where the document ends
    row_lengths: np.ndarray  # int64 (B,), sums to T
    documents: np.ndarray  # int64 (B,), number of the row's document in file order, unique over the stream
    document_bytes: np.ndarray  # int64 (B,), text bytes of that document
    offsets: np.ndarray  # int64 (B,), inputs of the document before this row; 0 where the row starts with BOS
    cuts: np.ndarray | None = None  # bool (T,), where a router is told to open chunks: see cuts.py

    @property
    def text_bytes(self) -> int:
        """The number of labels that are text: T less the ends of documents. The divisor of bits per byte."""
        return int(np.count_nonzero(self.labels != EOS))

    def nested(self, device="cpu"):
        """What `HNetLM.forward` takes: two int64 NJTs (B, j0), iids and labels, and the cuts if there are some.

        They have one offsets tensor; nothing waits for the device.
        """
        import torch

        from hnet_trainable import Documents

        pin = torch.device(device).type == "cuda"

        def put(array):
            tensor = torch.from_numpy(array)
            return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)

        offsets = put(np.concatenate([[0], np.cumsum(self.row_lengths)]))
        rows = Documents.between(offsets, int(self.row_lengths.min()), int(self.row_lengths.max()))
        values = [put(self.inputs).long(), put(self.labels).long()]
        if self.cuts is not None:
            values.append(put(self.cuts))
        return tuple(map(rows.nest, values))


def slice_numbers(step: int, global_slices: int, rank: int = 0, world: int = 1) -> range:
    """The slices of `rank` of `world` in a step: r, r+W, ... of [step*G, (step+1)*G). W must divide G."""
    if global_slices % world:
        raise DataError(f"{world} processes can't share {global_slices} slices a step evenly; use a divisor of that")
    return range(step * global_slices + rank, (step + 1) * global_slices, world)


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x):
    """The finalizer of splitmix64, a bijection of 64-bit words, on an int or in place on a uint64 array."""
    if isinstance(x, int):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return x ^ (x >> 31)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return x


def _permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64, that depends only on the key: the order of sorted distinct words."""
    state = 0
    for word in key:
        state = _mix((state + word + _GOLDEN) & _MASK)
    words = np.arange(1, n + 1, dtype=np.uint64)
    words *= np.uint64(_GOLDEN)
    words += np.uint64(state)
    return np.argsort(_mix(words))


class _Section(NamedTuple):
    """Consecutive documents of an order; document d has the section's pairs [bounds[d], bounds[d+1])."""

    documents: np.ndarray  # int64 (n,), global numbers
    shards: np.ndarray  # int (n,)
    starts: np.ndarray  # int64 (n,), where BOS is in its shard
    bounds: np.ndarray  # int64 (n + 1,)


class _File:
    """An open shard, which is closed when the cache drops it."""

    def __init__(self, path: Path, fd: int):
        self.path, self.fd = path, fd

    def __del__(self, close=os.close):
        close(self.fd)

    def announce(self, offset: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, length: int) -> np.ndarray:
        data = np.frombuffer(os.pread(self.fd, length, offset), np.uint8)
        if len(data) < length:
            raise DataError(f"{self.path}: became shorter while it was being read; {ANEW}")
        return data


class Corpus:
    """One split of one prepared folder. Reads pairs in file order, in an epoch's order, or by length.

    A document of n bytes has n + 1 pairs and takes n + 1 bytes of its shard, so pairs are counted in shard bytes.
    """

    def __init__(self, folder: Path, split: str, seed: int = 0):
        manifest = load_manifest(folder)
        shards = manifest["splits"].get(split, {"shards": []})["shards"]
        self.folder, self.seed = folder, int(seed)
        self.paths = [folder / shard["file"] for shard in shards]
        self.hashes = [shard["sha256"] for shard in shards]
        self.sizes = np.array([shard["bytes"] for shard in shards], np.int64)
        self.counts = np.array([shard["documents"] for shard in shards], np.int64)
        self.first = np.cumsum(self.counts) - self.counts  # the number of each shard's first document
        self.pairs, self.documents = int(self.sizes.sum()), int(self.counts.sum())
        self.fingerprint = fingerprint(shards)
        if not self.documents:
            n = sum(shard["documents"] for part in manifest["splits"].values() for shard in part["shards"])
            why = "--holdout 0 kept it without" if _without_validation(manifest) else "prepare it from more text"
            raise DataError(f"{named(folder)}: no {split} documents among its {n}; {why}")
        indexed = [read_index(path, header_only=True)[0].get("sha256") for path in self.paths]
        if stale := [i for i, sha256 in enumerate(self.hashes) if sha256 != indexed[i]]:
            self._reindex(stale)
        self._file = functools.lru_cache(maxsize=64)(lambda shard: _File(self.paths[shard], _opened(self.paths[shard])))
        self._layout = functools.lru_cache(maxsize=4)(self._make_layout)
        self._section = functools.lru_cache(maxsize=4)(self._make_section)

    def _reindex(self, stale: list[int]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        if (size := self.sizes[stale].sum()) > 1e9:
            say(f"{named(self.folder)}: checks {size / 1e9:.1f} GB of shards that are newer than their indexes")
        with ThreadPoolExecutor() as pool:  # hashing and comparing release the GIL
            list(pool.map(lambda i: len(reindex(self.paths[i], self.hashes[i])), stale))

    def starts(self, shard: int) -> np.ndarray:
        """The starts of a shard's documents and its size, int64 (documents + 1,)."""
        starts = read_index(self.paths[shard])[1]
        if starts is None:
            starts = reindex(self.paths[shard], self.hashes[shard])
        if len(starts) != self.counts[shard] + 1 or starts[-1] != self.sizes[shard]:
            raise DataError(f"{self.paths[shard]}: its index doesn't match {MANIFEST}; {ANEW}")
        return starts

    @functools.cached_property
    def _by_length(self) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers, uint32, by increasing length, then in file order; and the pairs of each section."""
        lengths = np.concatenate([np.diff(self.starts(shard)) for shard in range(len(self.paths))])
        order = np.argsort(lengths, kind="stable").astype(np.uint32)
        return order, np.add.reduceat(lengths[order], np.arange(0, len(order), SECTION_DOCUMENTS))

    def _make_layout(self, order: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sections of an epoch, in order, and the pairs before each, int64 (sections + 1,)."""
        if order == "length":
            sizes = self._by_length[1]
            ids = np.arange(len(sizes))
        else:
            ids = _permutation(len(self.paths), self.seed, epoch) if order == "shuffle" else np.arange(len(self.paths))
            sizes = self.sizes[ids]
        return ids, np.concatenate([[0], np.cumsum(sizes)])

    def _make_section(self, order: str, epoch: int, i: int) -> _Section:
        if order == "length":
            documents = self._by_length[0][i * SECTION_DOCUMENTS :][:SECTION_DOCUMENTS].astype(np.int64)
            shards = np.searchsorted(self.first, documents, side="right") - 1
            starts, lengths = np.empty_like(documents), np.empty_like(documents)
            for shard in np.unique(shards):
                mine, table = np.flatnonzero(shards == shard), self.starts(shard)
                local = documents[mine] - self.first[shard]
                starts[mine], lengths[mine] = table[local], table[local + 1] - table[local]
        else:
            table = self.starts(i)
            local = np.arange(len(table) - 1)
            if order == "shuffle":
                local = _permutation(len(local), self.seed, epoch, i)
            documents, shards = local + self.first[i], np.broadcast_to(np.int64(i), len(local))
            starts, lengths = table[local], table[local + 1] - table[local]
        return _Section(documents, shards, starts, np.concatenate([[0], np.cumsum(lengths)]))

    def read(self, start: int, count: int, max_doc: int, order: str) -> Slice:
        """Reads pairs [start, start + count) of the infinite sequence of epochs."""
        inputs, labels, rows, done = np.empty(count, np.uint8), np.empty(count, np.uint8), [], 0
        while done < count:  # one turn per section
            epoch, p = divmod(start + done, self.pairs)
            epoch = epoch if order == "shuffle" else 0  # other orders are the same in every epoch
            ids, before = self._layout(order, epoch)
            j = int(np.searchsorted(before, p, side="right")) - 1
            section, p = self._section(order, epoch, int(ids[j])), p - int(before[j])
            stop = min(p + count - done, int(section.bounds[-1]))
            a, b = np.searchsorted(section.bounds, (p + 1, stop)) - (1, 0)  # documents [a, b) have pairs [p, stop)
            reads = []
            for d in range(a, b):
                low, high = (int(bound) for bound in section.bounds[d : d + 2])
                text = (self._file(int(section.shards[d])), int(section.starts[d]), int(section.documents[d]))
                reads.append((*text, high - low, max(p, low) - low, min(stop, high) - low))
            for file, where, _, _, begin, end in reads:  # all of them first, so that a slow disk reads them at once
                file.announce(where + begin, end - begin)
            for file, where, document, pairs, begin, end in reads:
                text = file.read(where + begin, end - begin + (end < pairs))  # with the last label, unless it is EOS
                if begin == 0 and text[0] != BOS:
                    raise DataError(f"{file.path}: changed while it was being read; {ANEW}")
                n = end - begin
                inputs[done : done + n] = text[:n]
                labels[done : done + n - 1] = text[1:n]
                labels[done + n - 1] = text[n] if end < pairs else EOS
                edges = [begin, *range(begin - begin % max_doc + max_doc, end, max_doc), end]
                rows += [(high - low, document, pairs - 1, low) for low, high in itertools.pairwise(edges)]
                done += n
        return Slice(inputs, labels, *np.array(rows, np.int64).T.copy())


class ByteStream:
    """An infinite sequence of slices from prepared folders; slice i is a pure function of the arguments and i.

    folder: a folder made by `prepare`, or a weighted mixture "a:0.7,b:0.3". Each slice of a mixture comes
        from one folder, in a fixed rotation of 10,000 slices that is as even as the weights allow; each folder has
        its own epochs.
    slice_bytes: T, pairs per slice. max_doc: longest row; a longer document continues in further rows, without BOS.
    order: "shuffle" draws an order of shards and of documents within them from (seed, epoch); "length" takes short
        documents first, in the same order in every epoch.
    cutter: finds the cuts of each slice, see cuts.py.

    pairs_per_epoch, text_bytes, documents: totals over the folders. slices_in_all: the slices of `slices_once`.
    fingerprint: changes with any shard's bytes.
    Raises DataError for a folder that is missing, unfinished, empty, damaged or changed.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        slice_bytes: int,
        max_doc: int = 8192,
        seed: int = 0,
        order: Literal["shuffle", "length"] = "shuffle",
        cutter: Cutter | None = None,
    ):
        if split not in SPLITS:
            raise DataError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
        if order not in ("shuffle", "length"):
            raise DataError(f"order {order!r}: expected shuffle or length")
        if slice_bytes < 1 or max_doc < 1:
            raise DataError(f"slice_bytes {slice_bytes} and max_doc {max_doc} must be at least 1")
        self.slice_bytes, self.max_doc, self.order, self.cutter = slice_bytes, max_doc, order, cutter
        mixture = _parse_mixture(folder)
        self._corpora = [Corpus(path, split, seed) for path, _ in mixture]
        self._weights = [weight for _, weight in mixture]
        self._rotation = _rotation(self._weights)
        self.pairs_per_epoch = sum(corpus.pairs for corpus in self._corpora)
        self.documents = sum(corpus.documents for corpus in self._corpora)
        self.slices_in_all = sum(-(-corpus.pairs // slice_bytes) for corpus in self._corpora)
        self.text_bytes = self.pairs_per_epoch - self.documents
        prints = [corpus.fingerprint for corpus in self._corpora]
        mixed = json.dumps([prints, self._weights]).encode()
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256(mixed).hexdigest()[:16]

    def slice(self, i: int) -> Slice:
        """Slice i >= 0: pairs [iT, (i+1)T). Epochs follow each other without a gap, also within a slice."""
        if i < 0:
            raise IndexError(f"slice {i}: expected a number from 0")
        turn, r = divmod(i, len(self._rotation[0]))
        which, nth, per_turn = (int(column[r]) for column in self._rotation)
        return self._read(which, (turn * per_turn + nth) * self.slice_bytes, self.slice_bytes, self.order)

    def step(self, k: int, global_slices: int, rank: int = 0, world: int = 1) -> Iterator[Slice]:
        """The slices of step k for `rank` of `world`: see `slice_numbers`."""
        return map(self.slice, slice_numbers(k, global_slices, rank, world))

    def slices_once(self, limit: int | None = None, rank: int = 0, world: int = 1) -> Iterator[Slice]:
        """Every pair of the split exactly once, in file order, T at a time; the last slice of a folder may be shorter.

        limit: only that many slices, evenly spaced and the same each time. Ranks take turns.
        """
        T, counts = self.slice_bytes, [-(-corpus.pairs // self.slice_bytes) for corpus in self._corpora]
        total = sum(counts)
        taken = total if limit is None else min(limit, total)
        for n in range(rank, taken, world):
            c, at = 0, n * total // taken
            while at >= counts[c]:
                at, c = at - counts[c], c + 1
            yield self._read(c, at * T, min(T, self._corpora[c].pairs - at * T), "file")

    def require(self, pairs: int) -> None:
        """Raises DataError if a batch of so many pairs would contain a pair twice."""
        for corpus, weight in zip(self._corpora, self._weights):
            if corpus.pairs < (need := int(pairs * weight)):
                less = f"{corpus.pairs:,} bytes are less than one batch ({need:,})"
                raise DataError(f"{corpus.folder}: {less}; use more text, or fewer or shorter slices")

    def _read(self, which: int, start: int, count: int, order: str) -> Slice:
        slice_ = self._corpora[which].read(start, count, self.max_doc, order)
        slice_.documents[:] += sum(corpus.documents for corpus in self._corpora[:which])
        if self.cutter is None:
            return slice_
        return dataclasses.replace(slice_, cuts=self.cutter(slice_.inputs, slice_.row_lengths))


def validation_stream(
    folder: str | Path, *, slice_bytes: int, max_doc: int = 8192, cutter: Cutter | None = None
) -> ByteStream | None:
    """The validation stream of folders, as `ByteStream` takes them; None if none of them has held-out text.

    Folders prepared with --holdout 0 are left out, and logged.
    """
    mixture, without = [], []
    for path, weight in _parse_mixture(folder):
        if _without_validation(load_manifest(path)):
            without.append(named(path))
        else:
            mixture.append((path, weight))
    if without:
        how = (
            f"validates on {', '.join(named(path) for path, _ in mixture)} alone"
            if mixture
            else "trains without validation"
        )
        logging.getLogger("hnet").info(f"{how}: {', '.join(without)} prepared with --holdout 0")
    sizes = {"slice_bytes": slice_bytes, "max_doc": max_doc}
    return ByteStream(mixture, "validation", **sizes, cutter=cutter) if mixture else None


def _without_validation(manifest: dict) -> bool:
    """Whether a prepared folder has no validation split because of --holdout 0."""
    asked = manifest.get("plan", {}).get("options", {}).get("holdout")
    return asked == 0 and not manifest["splits"].get("validation", {}).get("shards")


def _parse_mixture(folder: str | Path | list[tuple[Path, float]]) -> list[tuple[Path, float]]:
    """Folders and their shares, which sum to 1."""
    if isinstance(folder, list):
        total = sum(weight for _, weight in folder)
        return [(path, weight / total) for path, weight in folder]
    text = str(folder)
    if os.path.exists(text) or not ("," in text or ":" in text):
        return [(Path(text), 1.0)]
    mixture, at = [], 0
    while at < len(text) and (part := MIXTURE_PART.match(text, at)):  # a path may contain commas and colons
        mixture.append((Path(part["path"]), float(part["weight"])))
        at = part.end()
    total = sum(weight for _, weight in mixture)
    if at < len(text) or any("," in str(path) and not os.path.isdir(path) for path, _ in mixture):
        mixture = []
    bad = [(path, f"{weight:g}") for path, weight in mixture if not 0 < weight < math.inf]
    bad += [(path, f"{weight:g}") for path, weight in mixture if weight < 1e-4 * total]
    for part in [] if mixture else text.split(","):
        path, _, weight = part.strip().rpartition(":")
        if os.path.isdir(part.strip()):
            bad.append((part.strip(), ""))
        elif os.path.isdir(path) and not MIXTURE_PART.fullmatch(part):
            bad.append((path, weight))
    if bad:
        path, weight = bad[0]
        what = f"{named(path)} has {f'the weight {weight}' if weight else 'no weight'}"
        expected = "a number above 0, at least a 10,000th of their sum, such as a:0.7,b:0.3"
        raise DataError(f"--data {text!r}: {what}; expected {expected}")
    if not mixture:
        raise DataError(f"--data {text!r}: no such folder; expected one, or several with weights, such as a:0.7,b:0.3")
    return [(path, weight / total) for path, weight in mixture]


def _rotation(weights: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per slice of a rotation: its folder, its number among that folder's slices; and the slices of each folder."""
    if len(weights) == 1:
        return np.zeros(1, int), np.zeros(1, int), np.ones(1, int)
    turn = 10_000
    exact = np.array(weights) * turn
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: turn - counts.sum()]] += 1
    which = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    # The slices of a folder are evenly spaced over the rotation, and the folders interleaved
    order = np.argsort((2 * nth + 1) / (2 * counts[which]), kind="stable")
    return which[order], nth[order], counts[which[order]]
