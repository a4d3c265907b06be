"""Validation: exact bits per byte of held-out text, and the positions of chunks."""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hnet_runtime.data.cuts import cuts_like
from hnet_runtime.data.stream import ByteStream
from hnet_runtime.distributed import World
from hnet_runtime.evaluation import boundaries
from hnet_trainable import BOS, EOS, Documents, HNetConfig, HNetLM

LENGTH_BUCKETS = (256, 1024, 4096, 16384)  # text bytes of the document: val_bpb_le_256, ..., val_bpb_longer


def bits_name(config: HNetConfig) -> str:
    """The name of bits per byte: `bpb`, or `bpb_given_cuts` where a router opens chunks by bytes that come later.

    Then the positions of chunks tell the model something of the bytes that it predicts.
    """
    return "bpb_given_cuts" if config.stages_not_causal else "bpb"


_WORD = np.ones(256, dtype=bool)  # letters, digits and everything beyond ASCII; not whitespace, punctuation, control
_WORD[:128] = [chr(b).isalnum() for b in range(128)]


def word_edges(iids: Tensor) -> Tensor:
    """Where text changes between {whitespace, punctuation} and other bytes: bool (T,), for an NJT of bytes (B, j).

    True at t if byte t - 1 and byte t differ in kind; false at the first byte of a row.
    """
    is_word = torch.from_numpy(_WORD).to(iids.device)[iids.values()]
    edge_T = is_word != is_word.roll(1)
    edge_T[iids.offsets()[:-1]] = False
    return edge_T


@torch.no_grad()
def validate(
    model: HNetLM, stream: ByteStream, world: World, limit: int | None, opens: list[list[np.ndarray]] | None = None
) -> dict[str, Any]:
    """Scores `limit` slices of a held-out split (None: all), every byte once. Called by every rank.

    opens: a list to which this rank appends, for each of its slices and each stage, which bytes open chunks.

    Returns `val_bpb` (bits per text byte; the ends of documents are predicted too, as in training),
    `val_bpb_le_<n>` by the length of the document, `val_bpb_at_<n>` by the position in it (each up to n bytes),
    `val_bytes`, each stage's compression, and for stage 0
    `val_edge_share` (share of boundaries at a word edge) over `val_edge_base` (share of positions at one; both
    without first bytes of rows); and what `boundaries.metrics` says of all stages. Where routers depend on later bytes,
    names have `bpb_given_cuts` in place of `bpb`.
    """
    model.eval()
    buckets, S = len(LENGTH_BUCKETS) + 1, model.config.num_stages
    sums = torch.zeros(2, buckets, dtype=torch.float64)  # nats and bytes by length of the document
    sums_at = torch.zeros(2, buckets, dtype=torch.float64)  # the same by position in it
    counts = torch.zeros(S + 1, dtype=torch.float64)  # tokens of each stage
    edges = torch.zeros(4, dtype=torch.float64)  # boundaries, those at edges, positions, those at edges
    of_cuts = torch.from_numpy(boundaries.nothing_counted(S))
    slices = list(stream.slices_once(limit)) if world.size == 1 else _same_number_each(stream, world, limit)
    for slice_, weight in ((p, 1.0) for p in slices) if world.size == 1 else slices:
        iids, labels, *cuts = slice_.nested(world.device)
        out = model(iids, None, *cuts)
        logits_TV = out.logits.values().to(torch.promote_types(out.logits.dtype, torch.float32))
        nats_T = F.cross_entropy(logits_TV, labels.values(), reduction="none").double().cpu()
        bucket_T = np.repeat(np.searchsorted(LENGTH_BUCKETS, slice_.document_bytes), slice_.row_lengths)
        starts = np.cumsum(slice_.row_lengths) - slice_.row_lengths
        at_T = np.arange(len(nats_T)) + np.repeat(slice_.offsets - starts, slice_.row_lengths) + 1
        is_text_T = torch.from_numpy(slice_.labels != EOS).double()
        for into, where_T in ((sums, bucket_T), (sums_at, np.searchsorted(LENGTH_BUCKETS, at_T))):
            into[0].index_add_(0, torch.from_numpy(where_T), nats_T * weight)
            into[1].index_add_(0, torch.from_numpy(where_T), is_text_T * weight)
        counts += weight * torch.tensor([len(nats_T), *(float(s.b_T.sum()) for s in out.stages)])
        if S:
            edge_T, b_T = word_edges(iids).cpu(), out.stages[0].b_T.cpu().clone()
            inner_T = torch.ones_like(b_T)
            inner_T[iids.offsets()[:-1].cpu()] = False
            b_T &= inner_T
            edges += weight * torch.tensor([b_T.sum(), (b_T & edge_T).sum(), inner_T.sum(), edge_T.sum()])
            more, starts = boundaries.count(slice_.inputs, slice_.row_lengths, nats_T.numpy(), out.stages)
            of_cuts += weight * torch.from_numpy(more)
            if opens is not None and weight:
                opens.append(starts)
    model.train()
    if world.size > 1:
        for t in (sums, sums_at, counts, edges, of_cuts):
            dist.all_reduce(t)
    bits = f"val_{bits_name(model.config)}"
    result = {bits: (sums[0].sum() / sums[1].sum() / math.log(2)).item(), "val_bytes": int(sums[1].sum())}
    for i, name in enumerate([f"le_{n}" for n in LENGTH_BUCKETS] + ["longer"]):
        for found, key in ((sums, f"{bits}_{name}"), (sums_at, f"{bits}_at_{name.removeprefix('le_')}")):
            if found[1, i]:
                result[key] = (found[0, i] / found[1, i] / math.log(2)).item()
    for s in range(S):
        result[f"val_stage{s}_compression"] = (counts[s] / counts[s + 1]).item()
    if S:
        result["val_edge_share"] = (edges[1] / edges[0].clamp_min(1)).item()
        result["val_edge_base"] = (edges[3] / edges[2].clamp_min(1)).item()
    return result | boundaries.metrics(of_cuts.numpy())


def _same_number_each(stream: ByteStream, world: World, limit: int | None):
    """This rank's slices with weight 1, then slices with weight 0 until all ranks have as many, as FSDP needs."""
    total = sum(1 for _ in range(0, stream.pairs_per_epoch, stream.slice_bytes))
    total = total if limit is None else min(limit, total)
    mine = list(stream.slices_once(limit, world.rank, world.size))
    yield from ((slice_, 1.0) for slice_ in mine)
    filler = next(iter(stream.slices_once(1)))
    yield from ((filler, 0.0) for _ in range(-(-total // world.size) - len(mine)))


@torch.no_grad()
def chunks_of(model: HNetLM, text: bytes, world: World) -> list[np.ndarray]:
    """The chunks of `text`, run as one document: for each stage a bool array (len(text),), True where a chunk begins.

    The model reads BOS before the first byte and always opens a chunk there; the first byte is marked as its start.
    """
    ids = torch.tensor([BOS, *text], device=world.device)
    offsets = torch.tensor([0, len(ids)], device=world.device)
    iids = Documents.between(offsets, len(ids), len(ids)).nest(ids)
    model.eval()
    stages = model(iids, None, cuts_like(iids, model.config)).stages
    model.train()
    opens, at = [], np.arange(len(ids))  # bytes that reach the current stage
    for stage in stages:
        at = at[stage.b_T.cpu().numpy()]
        mask = np.isin(np.arange(1, len(ids)), at)
        mask[:1] = True
        opens.append(mask)
    return opens
