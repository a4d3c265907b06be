"""Exact bits per byte of any text: documents -> rows -> batches -> the nats of every document -> a summary.

A row is read by the model at once and alone: packing rows into a batch changes only the speed. Every label of a
document (each byte of its text, then its end) is scored once. If a document is longer than the context, its rows
overlap, and each scores only the labels that no earlier row has scored.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fineweb
from hnet_runtime import UserError
from hnet_runtime.data.cuts import cuts_like
from hnet_runtime.distributed import World
from hnet_runtime.evaluation import boundaries
from hnet_runtime.evaluation.validation import LENGTH_BUCKETS
from hnet_trainable import BOS, EOS, Documents, HNetLM, StageOutput

CONTEXT = 8192  # bytes of a training document in the paper

# ---------------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """Byte pairs that the model reads alone, and which of them are scored."""

    inputs: np.ndarray  # uint8 (n,)
    labels: np.ndarray  # uint8 (n,), the byte after each input
    skip: int  # this many first labels are context and not scored
    start: int  # labels of the document before this row
    document: int
    document_bytes: int  # text bytes of the document


def windows(
    text: bytes, context: int, stride: int, document: int = 0, scored_from: int = 0, eos: bool = True
) -> Iterator[Row]:
    """Rows of at most `context` labels that score each label of `text` from `scored_from` on once.

    The first row has as much context as fits. Each later row scores up to `stride` more labels, with at least context -
    stride inputs before them. The last label is the document's end, unless `eos` is False.
    """
    pairs = np.frombuffer(bytes([BOS]) + text + bytes([EOS] * eos), np.uint8)
    n, scored = len(pairs) - 1, scored_from
    at = max(0, n - context if n - context <= scored_from else scored_from - (context - stride))
    while scored < n:
        stop = min(at + context, n)
        yield Row(pairs[at:stop], pairs[at + 1 : stop + 1], scored - at, at, document, len(text))
        scored, at = stop, at + stride


def labels_of(rows: Iterable[Row]) -> int:
    """The number of labels that the rows score."""
    return sum(len(row.labels) - row.skip for row in rows)


def first_documents(rows: Iterable[Row], limit: int) -> Iterator[Row]:
    """The rows of the first `limit` documents (0: all), where a document's rows are consecutive."""
    seen: set[int] = set()
    for row in rows:
        seen.add(row.document)
        if limit and len(seen) > limit:
            return
        yield row


def training_rows(stream: fineweb.ByteStream, limit: int | None) -> Iterator[Row]:
    """The rows of training's validation: those of `stream.slices_once(limit)`."""
    for slice_ in stream.slices_once(limit):
        ends = np.cumsum(slice_.row_lengths)[:-1]
        numbers = zip(*(x.tolist() for x in (slice_.offsets, slice_.documents, slice_.document_bytes)))
        for inputs, labels, of_row in zip(np.split(slice_.inputs, ends), np.split(slice_.labels, ends), numbers):
            yield Row(inputs, labels, 0, *of_row)


def pack(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """(iids, labels): two int64 NJTs (B, j), one document per row."""
    lengths = [len(row.inputs) for row in rows]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    flat = [torch.from_numpy(np.concatenate(parts)).to(device).long() for parts in list(zip(*rows))[:2]]
    return tuple(map(Documents.between(offsets, min(lengths), max(lengths)).nest, flat))


def score(model: HNetLM, rows: list[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row the nats of its labels, float64 (n,), and whether each label is the most likely byte, bool (n,)."""
    nats_T, best_T, _ = _score(model, rows)
    ends = np.cumsum([len(row.inputs) for row in rows])[:-1]
    return list(zip(np.split(nats_T, ends), np.split(best_T, ends)))


@torch.no_grad()
def _score(model: HNetLM, rows: list[Row]) -> tuple[np.ndarray, np.ndarray, list[StageOutput]]:
    iids, labels = pack(rows, next(model.parameters()).device)
    out, labels_T = model(iids, None, cuts_like(iids, model.config)), labels.values()
    logits_TV = out.logits.values()
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    nats_T = F.cross_entropy(logits_TV, labels_T, reduction="none").double().cpu().numpy()
    return nats_T, (logits_TV.argmax(-1) == labels_T).cpu().numpy(), out.stages


def in_batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# ----------------------------------------------------------------------------------------------------------- documents


class Document(NamedTuple):
    text: bytes
    label: str = ""


def held_out(stream: fineweb.ByteStream) -> Iterator[Document]:
    """The complete documents of a prepared split, in file order."""
    text = bytearray()
    for slice_ in stream.slices_once():
        for labels in np.split(slice_.labels, np.cumsum(slice_.row_lengths)[:-1]):
            text += labels.tobytes()
            if text[-1] == EOS:
                yield Document(bytes(text[:-1]))
                text.clear()


def script_of(text: bytes) -> str:
    """The script of most letters in the first 4,000 characters, from Unicode's names: Latin, Cyrillic, Cjk."""
    letters = Counter(ch for ch in text[:16_000].decode(errors="ignore")[:4000] if ch.isalpha())
    scripts: Counter[str] = Counter()
    for letter, n in letters.items():
        scripts[unicodedata.name(letter, "none").split()[0].capitalize()] += n
    return scripts.most_common(1)[0][0] if scripts else "none"


# ------------------------------------------------------------------------------------------------------------- scoring


class Tally(NamedTuple):
    """Nats and bytes of a document's scored labels.

    nats_at, bytes_at: by position, in LENGTH_BUCKETS. length: text bytes of the document, scored or not.
    """

    nats: float
    bytes: int
    nats_at: np.ndarray
    bytes_at: np.ndarray
    length: int


def nothing(amount: float) -> None:
    """A progress callback that ignores its argument."""


def tally(
    model: HNetLM, rows: Iterable[Row], batch: int, world: World, advance: Callable[[float], None] = nothing
) -> dict[int, Tally]:
    """Scores all rows, `batch` at a time. Every rank passes the same rows and gets every document's tally.

    Ranks take batches in turn. The batches and the order of all sums do not depend on the number of ranks, and so the
    results have the same bits on one kind of device. advance: called with the number of labels that all ranks have
    scored, as estimated by this one.
    """
    return tally_with_cuts(model, rows, batch, world, advance)[0]


def tally_with_cuts(
    model: HNetLM, rows: Iterable[Row], batch: int, world: World, advance: Callable[[float], None] = nothing
) -> tuple[dict[int, Tally], np.ndarray]:
    """`tally`, and the counts of `boundaries.count` over all rows."""
    parts = []  # (number of the batch, document, its bytes, nats by position, text bytes by position)
    counted = [(-1, boundaries.nothing_counted(model.config.num_stages))]  # (number of the batch, its counts)
    model.eval()
    for n, some in enumerate(in_batches(rows, batch)):
        if n % world.size != world.rank:
            advance(labels_of(some))
            continue
        lengths, skips = (np.array(x) for x in zip(*((len(row.inputs), row.skip) for row in some)))
        nats_all, _, stages = _score(model, some)
        inputs = np.concatenate([row.inputs for row in some])
        counted.append((n, boundaries.count(inputs, lengths, nats_all, stages, skips)[0]))
        for row, nats_T in zip(some, np.split(nats_all, np.cumsum(lengths)[:-1])):
            at_T = np.searchsorted(LENGTH_BUCKETS, np.arange(row.start + row.skip, row.start + len(nats_T)) + 1)
            is_text_T = (row.labels != EOS)[row.skip :]
            sums = [np.bincount(at_T, w, len(LENGTH_BUCKETS) + 1) for w in (nats_T[row.skip :], is_text_T)]
            parts.append((n, row.document, row.document_bytes, *sums))
        advance(labels_of(some))
    if world.size > 1:
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, (parts, counted))
        parts, counted = (sorted(itertools.chain(*x), key=lambda part: part[0]) for x in zip(*everyone))
    nats: dict[int, Any] = defaultdict(float)
    text: dict[int, Any] = defaultdict(float)
    for _, document, _, nats_at, bytes_at in parts:
        nats[document] = nats[document] + nats_at
        text[document] = text[document] + bytes_at
    lengths = {document: length for _, document, length, *_ in parts}
    tallies = {d: Tally(float(nats[d].sum()), int(text[d].sum()), nats[d], text[d], lengths[d]) for d in sorted(nats)}
    return tallies, sum(counts for _, counts in counted)


def ratio(tallies: list[Tally]) -> dict[str, Any]:
    """`bpb` with `ci95`, its 95% interval over documents (None for fewer than 2), `documents` and `bytes`.

    Documents are assumed independent. bpb is a ratio of two sums over them; its standard error is that of the
    linearized ratio (the residuals nats_d - R bytes_d). The uncertainty of the weights is not included.
    """
    nats, size = np.array([t.nats for t in tallies]), np.array([t.bytes for t in tallies], float)
    n, R = len(tallies), nats.sum() / max(size.sum(), 1)
    bpb, interval = R / math.log(2), None
    if n > 1:
        error = math.sqrt(n / (n - 1) * np.square(nats - R * size).sum()) / size.sum() / math.log(2)
        interval = [bpb - 1.96 * error, bpb + 1.96 * error]
    return {"bpb": bpb, "ci95": interval, "documents": n, "bytes": int(size.sum())}


def summarise(tallies: dict[int, Tally], labels: dict[int, str]) -> dict[str, Any]:
    """`ratio` of all documents, and by label, length of the document and position in it.

    The length is that of the full document, also where only its beginning is scored.
    Raises UserError if no text byte was scored.
    """
    if not sum(t.bytes for t in tallies.values()):
        raise UserError("no text to score: every document is empty")
    by_label, by_length = defaultdict(list), defaultdict(list)
    inner = [f"{low + 1:,} to {high:,}" for low, high in itertools.pairwise(LENGTH_BUCKETS)]
    first, last = LENGTH_BUCKETS[0], LENGTH_BUCKETS[-1]
    lengths = [f"up to {first:,}", *inner, f"more than {last:,}"]
    positions = [f"1 to {first:,}", *inner, f"{last + 1:,} and later"]
    for d, t in tallies.items():
        by_label[labels.get(d, "")].append(t)
        by_length[int(np.searchsorted(LENGTH_BUCKETS, t.length))].append(t)
    result = ratio(list(tallies.values()))
    if any(by_label):
        result["by_label"] = {label: ratio(by_label[label]) for label in sorted(by_label)}
    result["by_length"] = {lengths[i]: ratio(by_length[i]) for i in sorted(by_length)}
    nats, size = (sum(column) for column in list(zip(*tallies.values()))[2:4])
    result["by_position"] = {
        name: {"bpb": a / b / math.log(2), "bytes": int(b)} for name, a, b in zip(positions, nats, size) if b
    }
    return result


def renamed(result: Any, name: str) -> Any:
    """A result with `name` in place of the key `bpb`, at every depth."""
    if not isinstance(result, dict):
        return result
    return {name if key == "bpb" else key: renamed(value, name) for key, value in result.items()}


# -------------------------------------------------------------------------------------------------------- likelihoods


class Likelihoods:
    """Log-likelihoods (nats) of continuations and of complete texts; documents begin with BOS, as in training.

    advance: called with the number of requests done.
    """

    def __init__(self, model: HNetLM, context: int = CONTEXT, batch: int = 16):
        self.model, self.context, self.batch = model.eval(), context, batch
        self.advance: Callable[[float], None] = nothing

    def of_continuations(self, pairs: list[tuple[bytes, bytes]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-likelihood, and whether each byte is the most likely one.

        The beginning of a context that is too long is cut off; a continuation that is too long is scored in windows.
        """
        requests = [windows(a + b, self.context, self.stride, 0, len(a), False) for a, b in pairs]
        return [(-float(nats), bool(best)) for nats, best in self._sums(requests)]

    def of_texts(self, texts: list[bytes]) -> list[float]:
        """For each text the log-likelihood of all its bytes, without its end."""
        requests = [windows(text, self.context, self.stride, eos=False) for text in texts]
        return [-float(nats) for nats, _ in self._sums(requests)]

    @property
    def stride(self) -> int:
        return max(1, self.context // 2)

    def _sums(self, requests: list[Iterator[Row]]) -> list[list]:
        """For each request the nats of its rows, and whether all their labels are the most likely bytes."""
        rows = [row._replace(document=i) for i, request in enumerate(requests) for row in request]
        rows.sort(key=lambda row: len(row.inputs))  # rows of a batch have similar lengths
        sums, left = [[0.0, True] for _ in requests], Counter(row.document for row in rows)
        self.advance(len(requests) - len(left))  # requests without labels to score
        for some in in_batches(rows, self.batch):
            for row, (nats_T, best_T) in zip(some, score(self.model, some)):
                sums[row.document][0] += nats_T[row.skip :].sum()
                sums[row.document][1] &= best_T[row.skip :].all()
                left[row.document] -= 1
            self.advance(sum(not left[i] for i in {row.document for row in some}))
        return sums
