"""Where chunks begin: at which place in a word, how surprising the bytes are that open them, how sure the router is.

Counts are taken from rows and add up over slices, batches and processes; `summary` makes shares and means of the sums.
docs/EVALUATION.md says what each number means.
"""

from __future__ import annotations

import functools
import logging
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from hnet_runtime import UserError
from hnet_runtime.distributed import World
from hnet_runtime.pages.reports import write_atomically
from hnet_trainable import StageOutput

logger = logging.getLogger("hnet")

LETTERS = 5  # the last place of a letter is "this or a later one"
PLACES = ("space", *(f"letter_{n}" for n in range(1, LETTERS + 1)), "digit", "punctuation", "inside", "other")
IN_WORDS = {f"letter_{n}": f"letter {n}" for n in range(1, LETTERS)}
IN_WORDS |= {f"letter_{LETTERS}": f"letter {LETTERS} or later", "inside": "inside a character"}
SPACE, LETTER, DIGIT, PUNCTUATION, INSIDE, OTHER = (PLACES.index(PLACES[i]) for i in (0, 1, -4, -3, -2, -1))
NATS, ENTROPY, TOKENS = (len(PLACES) + i for i in range(3))  # columns of counts after those of the places


# --------------------------------------------------------------------------------------------------------- the places


@functools.cache
def _kind(code: int) -> int:
    """The place of a character, without the number of a letter."""
    character = chr(code)
    if character.isspace():
        return SPACE
    category = unicodedata.category(character)
    if category[0] == "L":
        return LETTER
    return DIGIT if category[0] == "N" else PUNCTUATION if category[0] in "PS" else OTHER


_ASCII = np.array([_kind(code) for code in range(128)] + [OTHER] * 128)


def places(byte_T: np.ndarray, first_T: np.ndarray) -> np.ndarray:
    """The place of each byte in its word, an index into PLACES, int64 (T,). first_T: which bytes begin a row.

    A letter is numbered from the last character that is none, or from the row's start. A character of several bytes has
    its place at its first byte; its other bytes are inside a character. Bytes that are not UTF-8 are `other`.
    """
    place_T = _ASCII[byte_T]
    is_next_T = (byte_T & 0xC0) == 0x80
    place_T[is_next_T] = INSIDE
    for low, high, more in ((0xC2, 0xDF, 1), (0xE0, 0xEF, 2), (0xF0, 0xF4, 3)):
        at = np.flatnonzero((byte_T >= low) & (byte_T <= high))
        at = at[at + more < len(byte_T)]
        for i in range(1, more + 1):
            at = at[is_next_T[at + i]]
        codes = byte_T[at].astype(np.int64) & (0x3F >> more)
        for i in range(1, more + 1):
            codes = codes << 6 | (byte_T[at + i] & 0x3F)
        known, which = np.unique(np.minimum(codes, 0x10FFFF), return_inverse=True)
        place_T[at] = np.array([_kind(int(code)) for code in known], np.int64)[which]
    at = np.flatnonzero(place_T != INSIDE)  # characters
    is_letter, first = place_T[at] == LETTER, first_T[at]
    number = np.cumsum(is_letter)
    before = np.maximum.accumulate(np.where(is_letter, np.where(first, number - 1, 0), number))
    place_T[at] += np.where(is_letter, np.minimum(number - before, LETTERS) - 1, 0)
    return place_T


# ----------------------------------------------------------------------------------------------------------- counting


def nothing_counted(stages: int) -> np.ndarray:
    """Counts of no rows, float64 (1 + S, places + 3).

    Row 0: bytes by place, and the sum of their nats. Row 1 + s: bytes that open a chunk of stage s, by place; their
    nats; and the sum of the entropies (in bits) of the stage's p, and their number.
    """
    return np.zeros((1 + stages, len(PLACES) + 3))


def count(
    byte_T: np.ndarray, row_lengths: np.ndarray, nats_T: np.ndarray, stages: Sequence[StageOutput], skips: Any = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(counts of these rows, for each stage which bytes open its chunks, bool (T,)).

    byte_T: the rows' inputs. nats_T: of the label after each input; the label of t - 1 is the byte at t. So the first
    byte of a row, where a chunk must begin, is not counted. skips: the first so many labels of each row are context,
    and their bytes are not counted either.
    """
    T, ends = len(byte_T), np.cumsum(row_lengths)
    starts = ends - row_lengths
    first_T = np.zeros(T, bool)
    first_T[starts] = True
    at_T = np.arange(T) - np.repeat(starts, row_lengths)
    counted_T = at_T > np.repeat(np.broadcast_to(skips, len(row_lengths)), row_lengths)
    opens, probabilities, at = [], [], np.arange(T)  # at: the first byte of each token of the stage
    for stage in stages:
        p_T, opens_T = np.full(T, np.nan), np.zeros(T, bool)
        p_T[at] = stage.p_T.detach().double().cpu().numpy()
        at = at[stage.b_T.cpu().numpy()]
        opens_T[at] = True
        opens.append(opens_T)
        probabilities.append(p_T)
    surprise_T = np.concatenate([np.zeros(1), nats_T[:-1]])
    return count_bytes(byte_T, first_T, counted_T, surprise_T, opens, probabilities), opens


def count_bytes(
    byte_T: np.ndarray,
    first_T: np.ndarray,
    counted_T: np.ndarray,
    surprise_T: np.ndarray,
    opens: Sequence[np.ndarray],
    p: Sequence[np.ndarray],
) -> np.ndarray:
    """The counts of bytes, of which first_T begin a row and counted_T count.

    surprise_T: -log of each byte's probability. For each stage, opens: which bytes open a chunk; p: the boundary
    probability, NaN where a byte does not reach the stage.
    """
    counts, place_T = nothing_counted(len(opens)), places(byte_T, first_T)
    for row, where_T in zip(counts, (counted_T, *(counted_T & opens_T for opens_T in opens))):
        row[: len(PLACES)] += np.bincount(place_T[where_T], minlength=len(PLACES))
        row[NATS] += surprise_T[where_T].sum()
    for row, p_T in zip(counts[1:], p):
        known = p_T[counted_T & ~np.isnan(p_T)].astype(np.float64)
        for q in (known, 1 - known):
            row[ENTROPY] -= (q * np.log2(q, where=q > 0, out=np.zeros_like(q))).sum()
        row[TOKENS] += len(known)
    return counts


def summary(counts: np.ndarray) -> dict[str, Any]:
    """Shares and means of counts: `chance`, the share of all bytes by place, and for each of `stages`:

    places: the share of its chunks that begin at each place. enrichment: the mean surprisal of bytes that open a chunk
    over that of all bytes. p_entropy: the mean entropy of p in bits. None where there is nothing to divide by.
    """
    n = len(PLACES)
    mean = _over(counts[0, NATS], counts[0, :n].sum())
    found = []
    for row in counts[1:]:
        found.append(
            {
                "enrichment": _over(_over(row[NATS], row[:n].sum()), mean),
                "p_entropy": _over(row[ENTROPY], row[TOKENS]),
                "cuts": int(row[:n].sum()),
                "places": _shares(row[:n]),
            }
        )
    return {"chance": _shares(counts[0, :n]), "stages": found}


def _shares(by_place: np.ndarray) -> dict[str, float]:
    return dict(zip(PLACES, (by_place / max(by_place.sum(), 1)).tolist()))


def _over(a: float | None, b: float | None) -> float | None:
    return float(a / b) if a is not None and b else None


def metrics(counts: np.ndarray) -> dict[str, float]:
    """`summary` by names of metrics.jsonl: `val_stage0_enrichment`, `val_stage0_at_space`, `val_chance_space`, ..."""
    found = summary(counts)
    record = {f"val_chance_{name}": share for name, share in found["chance"].items()} if found["stages"] else {}
    for s, stage in enumerate(found["stages"]):
        record |= {f"val_stage{s}_{name}": stage[name] for name in ("enrichment", "p_entropy")}
        record |= {f"val_stage{s}_at_{name}": share for name, share in stage["places"].items()}
    return {name: value for name, value in record.items() if value is not None}


# ------------------------------------------------------------------------------------------------- cuts that have moved


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """The share of all cuts of two masks that only one of them has: 0 if they are equal, 1 if no cut is in both."""
    return float((before != after).sum() / max(before.sum() + after.sum(), 1))


class CutHistory:
    """The cuts of a run's validations, stored in its folder, so that the next one can say how many have moved.

    Cuts are kept as far back as a checkpoint from which the run can resume, so that a resumed run has the same numbers.
    """

    def __init__(self, folder: Path, step: int, world: World):
        """step: at which the run starts or resumes; cuts of later steps belong to steps that will be done again."""
        self.folder, self.world = folder / "cuts", world
        if world.is_main:
            for later in [path for at, path in self._stored() if at > step]:
                later.unlink(missing_ok=True)

    def update(self, step: int, opens: list[list[np.ndarray]], oldest: int = 0) -> dict[str, float]:
        """`val_stage0_moved`, ... since the validation before, if it saw the same text; stores the new cuts.

        opens: for each slice of this rank and each stage, which bytes open chunks. oldest: the earliest step from which
        the run can resume. Called by every rank; the main one gets the numbers.
        """
        if self.world.size > 1:
            everyone: list[Any] = [None] * self.world.size
            dist.all_gather_object(everyone, opens)
            size = self.world.size
            opens = [everyone[i % size][i // size] for i in range(sum(map(len, everyone)))]
        if not self.world.is_main or not opens or not opens[0]:
            return {}
        masks = {f"stage{s}": np.concatenate(stage) for s, stage in enumerate(zip(*opens))}
        earlier = [(at, path) for at, path in self._stored() if at < step]
        found = {}
        for name, old in (_read(earlier[-1][1]) if earlier else {}).items():
            mask = masks.get(name)
            if mask is not None and len(old) == -(-len(mask) // 8):
                found[f"val_{name}_moved"] = moved(np.unpackbits(old, count=len(mask)).astype(bool), mask)

        def write(scratch: Path) -> None:
            with open(scratch, "wb") as f:
                np.savez_compressed(f, **{name: np.packbits(mask) for name, mask in masks.items()})

        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / f"step_{step:08d}.npz", write)
        except (OSError, UserError) as error:  # no reason to end a run before its checkpoint
            reason = error if isinstance(error, UserError) else f"{self.folder}: {error.strerror}"
            logger.warning("%s; the next validation does not say how many cuts have moved", reason)
        for _, path in [(at, path) for at, path in self._stored() if at <= oldest][:-1]:
            path.unlink(missing_ok=True)
        return found

    def _stored(self) -> list[tuple[int, Path]]:
        files = [path for path in self.folder.glob("step_*.npz") if path.stem[5:].isdigit() and path.is_file()]
        return sorted((int(path.stem[5:]), path) for path in files)


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # torn, or of another version
        return {}
