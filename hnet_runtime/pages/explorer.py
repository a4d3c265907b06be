"""One HTML page, without network, that shows the chunks of a text by one or two models, and the bits of each byte."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from hnet_runtime.data.cuts import cuts_like
from hnet_runtime.evaluation import boundaries
from hnet_runtime.evaluation.scoring import pack, windows
from hnet_trainable import HNetLM

TEMPLATE = Path(__file__).with_name("explorer.html")


class Analysis(NamedTuple):
    """The results of a model for a text of T bytes."""

    bits: np.ndarray  # float32 (T,): bits to predict each byte from those before it
    starts: np.ndarray  # bool (S, T): whether the byte opens a chunk of stage s; the first byte always does
    p: np.ndarray  # float32 (S, T): boundary probability; NaN if the byte does not reach the stage


@torch.no_grad()
def analyse(model: HNetLM, text: bytes, context: int, stride: int) -> Analysis:
    """Runs `text` as one document; a longer text runs in rows of `context` bytes, of which `stride` are new.

    The model reads BOS first and always opens a chunk there; the first byte of the text is marked as its start. Bits
    have the position of the predicted byte, p and starts that of the byte that opens a chunk.
    """
    T, S = len(text), model.config.num_stages
    bits, starts, p = np.zeros(T, np.float32), np.zeros((S, T), bool), np.full((S, T), np.nan, np.float32)
    model.eval()
    for row in windows(text, context, stride):
        iids, labels = pack([row], next(model.parameters()).device)
        out = model(iids, None, cuts_like(iids, model.config))
        logits_TV = out.logits.values()
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        nats_T = F.cross_entropy(logits_TV, labels.values(), reduction="none").cpu().numpy()
        first, stop = row.start + row.skip, min(row.start + len(nats_T), T)  # bytes; the last label is the text's end
        bits[first:stop] = nats_T[row.skip :][: stop - first] / math.log(2)
        at = np.arange(len(nats_T)) + row.start - 1  # the index of each input byte; -1 is BOS
        for s, stage in enumerate(out.stages):
            p_T = stage.p_T.float().cpu().numpy()
            b_T = stage.b_T.cpu().numpy()
            new = at >= max(first - 1, 0)  # earlier rows had the inputs up to byte first - 2
            p[s, at[new]] = p_T[new]
            starts[s, at[new & b_T]] = True
            at = at[b_T]
    starts[:, :1] = True
    return Analysis(bits, starts, p)


def page(
    text: bytes,
    names: list[str],
    analyses: list[Analysis],
    targets: list[tuple[float | None, ...]],
    title: str,
    given_cuts: Sequence[bool] = (),
) -> str:
    """The page for one or two models, to whose `analyses` the other lists belong.

    targets: compression, one per stage, None for a rule. given_cuts: whether chunks depend on later bytes.
    """
    models = []
    for i, (name, (bits, starts, p), target) in enumerate(zip(names, analyses, targets)):
        S = len(starts)
        counts = [len(text), *starts.sum(1).tolist()]
        mask = sum((starts[s].astype(np.uint8) << s for s in range(S)), np.zeros(len(text), np.uint8))
        models.append(
            {
                "name": name,
                "stages": S,
                "bpb": float(bits.sum() / len(text)),
                "cuts": where_chunks_begin(text, analyses[i]),
                "given_cuts": any(given_cuts[i : i + 1]),
                "compression": [counts[s] / counts[s + 1] for s in range(S)],
                "target": list(target),
                "starts": _packed(mask),
                "bits": _packed(np.clip(np.round(bits * 1000), 0, 65535).astype("<u2")),
                # 65535: the byte does not reach the stage
                "p": [_packed(np.where(np.isnan(q), 65535, np.round(q * 65534)).astype("<u2")) for q in p],
            }
        )
    moved = [boundaries.moved(*masks) for masks in zip(*(a.starts for a in analyses))] if len(analyses) == 2 else []
    words = {name: boundaries.IN_WORDS.get(name, name) for name in boundaries.PLACES}
    shown = {"title": title, "models": models, "moved": moved, "places": words}
    data = json.dumps(shown | {"text": _packed(np.frombuffer(text, np.uint8))})
    parts = {"__TITLE__": html.escape(title), "__DATA__": data.replace("<", "\\u003c")}
    template = TEMPLATE.read_text(encoding="utf-8")
    content = re.sub("|".join(parts), lambda mark: parts[mark[0]], template)
    return content.encode(errors="backslashreplace").decode()  # a file name may not be text


def where_chunks_begin(text: bytes, analysis: Analysis) -> dict[str, Any]:
    """`boundaries.summary` of the text, without its first byte, where a chunk begins in any case."""
    first_T = np.arange(len(text)) == 0
    byte_T = np.frombuffer(text, np.uint8)
    return boundaries.summary(
        boundaries.count_bytes(byte_T, first_T, ~first_T, analysis.bits, analysis.starts, analysis.p)
    )


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
