"""Where the router `tokens:FILE` opens chunks, and how long the chunks of rules are in a text.

A tokenizer reads each row of a batch alone, as the model does. So cuts depend on the bytes of the row only: not on
packing, on the batch, or on the step at which a run was resumed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hnet_config import BOS, HNetConfig, parse_router
from hnet_runtime import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hnet_runtime.data.stream import ByteStream

Cutter = Callable[[np.ndarray, np.ndarray], np.ndarray]  # bytes uint8 (T,), row lengths (B,) -> bool (T,)
MEASURED_BYTES, MEASURED_SLICES = 1 << 20, 256  # at most so much training text, to count the chunks of a rule


def cutter(config: HNetConfig) -> Cutter | None:
    """What finds the cuts of a batch for this config; None if its routers find chunks themselves.

    Raises UserError if the caller must give the cuts, or a tokenizer cannot be used.
    """
    stages = config.stages_by_cuts
    if not stages:
        return None
    s, router = stages[-1], config.routers[stages[-1]]
    name, _, file = router.partition(":")
    if name != "tokens":
        raise UserError(
            f"routers: {router} for stage {s} is told from Python where chunks begin (`cuts` of HNetLM.forward); no "
            "command can do that"
        )
    return functools.partial(cuts_of_rows, tokenizer(file))


@functools.cache
def tokenizer(file: str) -> Callable[[str], Iterable[int]]:
    """A function from a text to the numbers of the characters at which the file's tokenizer begins tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            "routers: tokens needs the package tokenizers, which is not installed; pip install tokenizers"
        ) from None
    try:
        found = Tokenizer.from_file(file)
    except Exception as error:  # the library raises Exception itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"routers: {file} is no tokenizer of the package tokenizers ({reason})") from None
    found.no_truncation()
    found.no_padding()

    def starts(text: str) -> Iterable[int]:
        return (first for first, last in found.encode(text, add_special_tokens=False).offsets if last > first)

    return starts


def fingerprint(config: HNetConfig) -> str | None:
    """Changes with the bytes of the config's tokenizer; None without one."""
    files = [Path(router.partition(":")[2]) for router in config.routers if router.startswith("tokens:")]
    return hashlib.sha256(files[0].read_bytes()).hexdigest()[:16] if files else None


def cuts_of_rows(starts: Callable[[str], Iterable[int]], bytes_T: np.ndarray, row_lengths: np.ndarray) -> np.ndarray:
    """bool (T,): the bytes of rows at which tokens begin, and the first byte of each row.

    BOS is not read by the tokenizer. A byte that is no UTF-8, as where a row begins inside a character, is read as
    U+FFFD.
    """
    cuts_T = np.zeros(len(bytes_T), bool)
    for low, high in itertools.pairwise([0, *np.cumsum(row_lengths).tolist()]):
        cuts_T[low] = True
        low += int(bytes_T[low] == BOS)
        data = bytes_T[low:high].tobytes()
        try:
            text = data.decode()
            place_C = np.flatnonzero(bytes_T[low:high] & 0xC0 != 0x80)
        except UnicodeDecodeError:
            text = data.decode(errors="surrogateescape")  # one character for each such byte
            lengths = [1 if "\udc80" <= c <= "\udcff" else len(c.encode()) for c in text]
            place_C = np.cumsum([0, *lengths[:-1]])
            text = "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text)
        cuts_T[low + place_C[np.fromiter(starts(text), np.int64)]] = True
    return cuts_T


def cuts_like(iids: Tensor, config: HNetConfig) -> Tensor | None:
    """The `cuts` of `HNetLM.forward` for an NJT of bytes (B, j), on its device. Raises UserError as `cutter` does."""
    import torch

    from hnet_trainable import nested_like

    if (cut := cutter(config)) is None:
        return None
    cuts_T = cut(iids.values().to("cpu", torch.uint8).numpy(), iids.offsets().diff().cpu().numpy())
    return nested_like(torch.from_numpy(cuts_T).to(iids.device), iids)


def with_measured_rate(config: HNetConfig, stream: ByteStream) -> tuple[HNetConfig, str | None]:
    """The config with the bytes per chunk that a rule of stage 0 makes of training text in N_compress; and a sentence.

    Counts the chunks of some slices that are evenly spaced over the stream's text, so every start of a run finds the
    same. Changes nothing for `learned`, and for `stride:K`, whose rate is in the config.
    """
    import torch

    from hnet_trainable import Packing

    if not config.num_stages or config.is_learned[0]:
        return config, None
    kind, argument = parse_router(config.routers[0], 0)
    if kind.fixes_rate:
        return config, None
    rule, read, chunks = kind(0, argument), 0, 0
    for slice_ in stream.slices_once(max(1, min(MEASURED_SLICES, MEASURED_BYTES // stream.slice_bytes))):
        iids, _, *cuts = slice_.nested()
        packing = Packing.of(iids, 0, iids.values(), *(x.values() for x in cuts))
        read += len(iids.values())
        chunks += int(rule(torch.empty(len(iids.values()), 0), packing).sum())
    rate = round(read / chunks, 2)
    ratios = [rate, *config.target_ratios[1:]]
    numbers = [round(n, 4) for n in itertools.accumulate([1, *ratios], lambda a, b: a * b)]
    found = HNetConfig.load(config.to_dict(), N_compress=numbers)
    before, after = ("-".join(f"{n:g}" for n in c.N_compress) for c in (config, found))
    return found, (
        f"{config.routers[0]}: {rate:g} bytes per chunk in {read / 1e6:.1f} MB of the training text, so N_compress is "
        f"{after} instead of {before}"
    )
