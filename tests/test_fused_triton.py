"""The kernels of norm, pointwise, attention, router, boundaries and cross_entropy_triton.py, the scan's skip, and
gradients that are written into longer rows, all against the definitions in float64: outputs, and every gradient by
name.

Without a GPU they run under Triton's interpreter, in a separate process: this file, run as a script, prints what
`distances` finds. See test_ssd_triton.py.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hnet_kernels import boundaries, norm, pointwise, router, ssd  # noqa: E402
from hnet_kernels.conv import causal_conv_silu_backward_to  # noqa: E402
from hnet_kernels.gradients import PartialSums  # noqa: E402
from hnet_kernels.ssd import mamba2_scan_backward, mamba2_scan_forward, scan_backward  # noqa: E402
from hnet_trainable import StageOutput, ratio_loss  # noqa: E402

# the package exports operations under the names of their files
attention, cross_entropy = (importlib.import_module(f"hnet_kernels.{name}") for name in ("attention", "cross_entropy"))
AWKWARD = [1, 2, 63, 64, 65, 257]
EPS = 1e-5
# Elementwise float32, sums of up to some thousand terms of both signs: 1e-7 each, 1e-6 together; the scan's decays come
# from float32 sums of logs. bf16 rounds each output by 2^-9 = 2e-3, and operands of products, whose errors add up: the
# usual bound is 1e-2.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


class Inputs:
    """Random tensors on a device, in a dtype or in float32 (`wide`)."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device

    def __call__(self, *shape: int, wide: bool = False, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * scale
        return values.to(self.device, torch.float32 if wide else self.dtype)


def exact(x: Tensor) -> Tensor:
    return x.detach().double()


def gradients_in(sums: PartialSums) -> list[Tensor]:
    return [gradient for _, gradient in sums.total()]


def nan_like(x: Tensor, longer: int = 0) -> Tensor:
    """NaNs of x's shape, as parts of rows that are `longer`."""
    width = math.prod(x.shape[1:])
    rows = torch.full((len(x), width + 2 * longer), torch.nan, dtype=x.dtype, device=x.device)
    return rows[:, longer : longer + width].view(x.shape)


def add_norm_case(new: Inputs, T: int, D: int, first: bool) -> dict[str, tuple[Tensor, Tensor]]:
    delta, weight, dx = new(T, D), new(D), new(T, D)
    residual, dsum = (norm.split24(new(T, D, wide=True) * (not first), dx.dtype) for _ in "rd")
    sum_, x, scale = norm.add_norm_forward(None if first else residual, delta, weight, EPS)
    sums = PartialSums()
    slot, other = sums.slot(weight), sums.slot(weight)
    arguments = dx, None if first else dsum, sum_, scale, weight
    dboth, recomputed = norm.add_norm_backward(*arguments, slot)
    same, none = norm.add_norm_backward(*arguments, other, recompute_x=False)
    dweight, same_dweight = gradients_in(sums)
    assert none is None and torch.equal(same.high, dboth.high) and torch.equal(same_dweight, dweight)
    assert same.low is dboth.low is None or torch.equal(same.low, dboth.low)
    assert torch.equal(recomputed, x) and torch.equal(norm.recompute_norm(sum_, scale, weight), x)
    leaves = [exact(t).requires_grad_() for t in (norm.join24(*residual, torch.float32), delta, weight)]
    wide = leaves[0] + leaves[1]
    scales = (wide.square().mean(-1) + EPS).rsqrt()
    outputs = wide * scales[:, None] * leaves[2]
    loss = (outputs * exact(dx)).sum() + (wide * exact(norm.join24(*dsum, torch.float32))).sum()
    _, wanted_dboth, wanted_dweight = torch.autograd.grad(loss, leaves)
    for split, wanted in ((sum_, wide), (dboth, wanted_dboth)):
        # float32 does better, but 16 bits are stored, with a rounding error of at most 2^-16, except for a few values
        assert (exact(norm.join24(*split, torch.float32)) - wanted).norm() <= 1e-5 * wanted.norm()
    found = {"x": x, "scale": scale, "dboth": dboth.high, "dweight": dweight}
    return found, {"x": outputs, "scale": scales, "dboth": wanted_dboth, "dweight": wanted_dweight}


def gated_norm_case(new: Inputs, T: int, D: int):
    rows, y, weight, dx = new(T, 2 * D + 16), new(T, D), new(D), new(T, D)
    z = rows[:, 8 : 8 + D]
    x, scale = norm.gated_norm_forward(y, z, weight, EPS)
    dz, sums = nan_like(z, longer=8), PartialSums()
    slot, other = sums.slot(weight), sums.slot(weight)
    dy, recomputed = norm.gated_norm_backward(dx, y, z, scale, weight, dz, slot)
    first = dz.clone()
    only_dy, none = norm.gated_norm_backward(dx, y, z, scale, weight, dz.fill_(math.nan), other, recompute_x=False)
    dweight, same = gradients_in(sums)
    assert torch.equal(recomputed, x) and none is None
    assert all(map(torch.equal, (only_dy, dz, same), (dy, first, dweight)))
    assert torch.equal(norm.gated_norm_forward(y, z, weight, EPS, save_x=True)[0], x)
    leaves = [exact(t).requires_grad_() for t in (y, z, weight)]
    u = leaves[0] * torch.nn.functional.silu(leaves[1])
    scales = (u.square().mean(-1) + EPS).rsqrt()
    outputs = u * scales[:, None] * leaves[2]
    gradients = torch.autograd.grad(outputs, leaves, exact(dx))
    found = {"x": x, "scale": scale, "dy": dy, "dz": dz, "dweight": dweight}
    return found, {"x": outputs, "scale": scales} | dict(zip(("dy", "dz", "dweight"), gradients))


def swiglu_case(new: Inputs, T: int, inner: int):
    both, dh = new(T, 2 * inner, scale=3), new(T, inner)
    leaf = exact(both).requires_grad_()
    h = torch.nn.functional.silu(leaf[:, inner:]) * leaf[:, :inner]
    h_, (dboth, recomputed) = pointwise.swiglu_forward(both), pointwise.swiglu_backward(dh, both)
    same, none = pointwise.swiglu_backward(dh, both, recompute_h=False)
    assert none is None and torch.equal(same, dboth)
    assert torch.equal(recomputed, h_)
    found = {"h": h_, "dboth": dboth}
    return found, {"h": h, "dboth": torch.autograd.grad(h, leaf, exact(dh))[0]}


def to_float32_case(new: Inputs, *shape: int):
    x = new(*shape).to(torch.bfloat16)
    found = pointwise.to_float32(x)
    assert found.dtype == torch.float32
    return {"x": found}, {"x": exact(x)}


def cross_entropy_case(new: Inputs, T: int, V: int):
    logits, dloss = new(T, V, scale=5), torch.tensor(0.7, device=new.device)
    labels = torch.randint(V, (T,), generator=new.generator).to(new.device)
    logits[0, labels[0]] = 200.0  # a loss of zero
    leaf = exact(logits).requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    found = dict(zip(("loss", "lse"), cross_entropy.cross_entropy_forward(logits, labels)))
    assert {x.dtype for x in found.values()} == {torch.float32}
    found["dlogits"] = cross_entropy.cross_entropy_backward(dloss, logits, labels, found["lse"])
    gradient = torch.autograd.grad(0.7 * loss.sum(), leaf)[0]
    return found, {"loss": loss, "lse": leaf.logsumexp(-1), "dlogits": gradient}


def rotary_case(new: Inputs, lengths: list[int], H: int, P: int, R: int):
    T = sum(lengths)
    position = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).to(new.device)
    angles = torch.arange(max(lengths))[:, None] * 10000.0 ** (-torch.arange(R) / max(R, 1))
    tables = angles.cos().to(new.device), angles.sin().to(new.device)
    qkv, dqkv = new(T, 3, H, P), new(T, 3, H, P)
    leaf = exact(qkv).requires_grad_()
    cos, sin = (exact(t)[position][:, None, None] for t in tables)
    a, b, rest = leaf[:, :2, :, :R], leaf[:, :2, :, R : 2 * R], leaf[:, :2, :, 2 * R :]
    turned = torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1), leaf[:, 2:]], 1)
    gradient = torch.autograd.grad(turned, leaf, exact(dqkv))[0]
    found = {"qkv": pointwise.rotate_(qkv, *tables, position)}
    found["dqkv"] = pointwise.rotate_(dqkv, *tables, position, back=True)
    return found, {"dqkv": gradient, "qkv": turned}


def attention_case(new: Inputs, lengths: list[int], H: int, P: int, window: int = -1, empty: int = 3):
    """With empty documents between others and at the end."""
    T = sum(lengths)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    cu = torch.cat([ends[:1], ends, ends[-1:].repeat(empty)]).to(new.device)
    qkv, do = new(T, 3, H, P), new(T, H, P)
    order = attention.tile_order(qkv, P, cu)
    attended = attention.packed_attention(qkv, cu, max(lengths), window, order)
    dqkv = attention.packed_attention_backward(do, qkv, attended, window, order)
    leaf = exact(qkv).requires_grad_()
    o = attention.attention_definition(*leaf.unbind(1), cu, window)
    wanted = {"o": o} | dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaf, exact(do))[0].unbind(1)))
    return {"o": attended.o_THP} | dict(zip(("dq", "dk", "dv"), dqkv.unbind(1))), wanted


def tile_order_case(new: Inputs, lengths: list[int], empty: int = 3):
    """The kernel's list, if there is one: all tiles, in the order of decreasing tiles before them."""
    ends = torch.tensor([0, *lengths, *[0] * empty]).cumsum(0)
    tiles = [(-j, b) for b, n in enumerate(lengths) for j in range(-(-n // 64))]
    wanted = [(ends[b], ends[b + 1], ends[b] - 64 * less) for less, b in sorted(tiles)]
    wanted += [(0, 0, 0)] * (-(-sum(lengths) // 64) + len(lengths) + empty - len(wanted))
    wanted = torch.tensor(wanted, dtype=torch.float64, device=new.device).T
    found = attention.tile_order(new(sum(lengths), 16), 16, ends.to(new.device, torch.int32))
    assert found is not None
    return {"tiles": found}, {"tiles": wanted}


def router_case(new: Inputs, lengths: list[int], D: int):
    T = sum(lengths)
    position = torch.cat([torch.arange(n) for n in lengths]).to(new.device)
    q, k, dp = new(T, D), new(T, D), new(T, wide=True)
    q[0] = 0  # no direction
    p = router.boundary_forward(q, k, position)
    dq, dk = router.boundary_backward(dp, q, k, position)
    leaves = [exact(t).requires_grad_() for t in (q, k)]
    unit = [torch.nn.functional.normalize(t, dim=-1) for t in leaves]
    wanted = torch.where(position == 0, 1.0, (1 - (unit[0].roll(1, 0) * unit[1]).sum(-1)) / 2)
    gradients = torch.autograd.grad(wanted, leaves, exact(dp))
    # q[0]: 1e12 times the rest, as the definition's clamp of its length has it; compared by itself
    rest = [torch.cat([t[1:], t[:1] * 1e-12]) for t in (dq.double(), gradients[0])]
    return {"p": p, "dq": rest[0], "dk": dk}, {"p": wanted, "dq": rest[1], "dk": gradients[1]}


def chunks_case(new: Inputs, lengths: list[int], zeros: int, spare: int, forced: bool = False):
    """With `zeros` tokens of padding, space for `spare` more chunks than tokens, and empty documents."""
    lengths, N = [0, *lengths, 0, 0], 3.5
    tokens, T = sum(lengths), sum(lengths) + zeros
    C, B = T + spare, len(lengths)
    position = torch.cat([torch.arange(n, dtype=torch.int32) for n in (*lengths, zeros)]).to(new.device)
    ends = torch.tensor([0, *lengths], device=new.device).cumsum(0)
    p = new(T, wide=True).sigmoid().masked_fill(position == 0, 1.0)
    opens = new(T, wide=True) > 1 if forced else p > 0.5  # forced: not where a document begins, and where none is
    dtypes = dict.fromkeys(boundaries.Chunks._fields, torch.int64) | {"b_T": torch.bool, "p_T": p.dtype}
    dtypes |= dict.fromkeys(("cu_seqlens", "position_C"), torch.int32)
    sizes = dict(zip(dtypes, (T + 1, T, T, C, B + 1, C, 2)))
    to = {name: torch.full((n,), 7, dtype=dtypes[name], device=new.device) for name, n in sizes.items()}
    to["shares"] = torch.full((2, 2), 7.0, device=new.device)[:, 1]
    to, cu = boundaries.Chunks(**to), ends.to(torch.int32)
    boundaries.find_chunks(p, opens, position, cu, to)
    leaf = exact(p).requires_grad_()
    b = torch.cat([(opens | (position == 0))[:tokens], torch.zeros(zeros, dtype=torch.bool, device=new.device)])
    F, G = b[:tokens].double().mean(), leaf[:tokens].mean()
    # as G's gradient in training; that of p is no less than dp
    (dmean,) = torch.autograd.grad(
        0.3 * tokens * ratio_loss(StageOutput(None, None, F, G, None), N), G, retain_graph=True
    )
    dp = new(T, wide=True)
    found = to._asdict() | {"dp": boundaries.add_mean_gradient(dp, dmean.float(), cu)}
    inside, starts = torch.nn.functional.pad(b.cumsum(0), (1, 0))[ends], b.nonzero().squeeze(1)
    places = [*(torch.arange(n) for n in inside.diff().tolist()), torch.arange(C - len(starts))]
    wanted = {
        "p_T": torch.nn.functional.pad(exact(p), (0, 1)),
        "b_T": b,
        "chunk_T": b.cumsum(0) - 1,
        "start_C": torch.nn.functional.pad(starts, (0, C - len(starts)), value=T),
        "cu_seqlens": inside,
        "position_C": torch.cat(places).to(new.device),
        "counts": torch.stack([inside[-1], inside.diff().max()]),
        "shares": torch.stack([F, G]),
        "dp": exact(dp) + torch.autograd.grad(G, leaf, dmean, retain_graph=True)[0],
    }
    return found, {name: exact(x) for name, x in wanted.items()}


def gather_rows_case(new: Inputs, T: int, D: int, E: int):
    """E = 0: without pad."""
    place = torch.randint(T, (2 * T,), generator=new.generator).to(new.device)
    x, pad = new(T, D), new(E) if E else None
    wanted = torch.cat([x[place], *([pad.expand(2 * T, -1)] if E else [])], 1)
    return {"rows": router.gather_rows(x, place, pad)}, {"rows": exact(wanted)}


def upsample_case(new: Inputs, T: int, C: int, D: int, spare: int):
    """With `spare` rows of z that no token reads."""
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(T - 1, generator=new.generator)[: C - 1] + 1])
    start = start.sort().values.to(new.device)
    chunk = torch.bucketize(torch.arange(T, device=new.device), start, right=True) - 1
    z, residual, dout = new(C + spare, D, wide=True), new(T, D, wide=True), new(T, D)
    scale = new(T, wide=True)
    start = torch.nn.functional.pad(start, (0, spare), value=T)
    out = router.upsample_forward(z, scale, chunk, residual, new.dtype)
    dscale, dz = router.upsample_backward(dout, z, scale, chunk, start)
    leaves = [exact(t).requires_grad_() for t in (scale, z)]
    wanted = leaves[1][chunk] * leaves[0][:, None] + exact(residual)
    gradients = torch.autograd.grad(wanted, leaves, exact(dout))
    same_dscale, same_dz = router.upsample_backward(dout, z, scale, chunk, start, z)  # over what it read
    assert same_dz is z and torch.equal(same_dscale, dscale) and torch.equal(z, dz)
    return {"out": out, "dscale": dscale, "dz": dz}, {"out": wanted} | dict(zip(("dscale", "dz"), gradients))


def scan_case(new: Inputs, lengths: list[int], H: int, N: int, K: int = 4, spread: float = 1, A_log: float = 0):
    """Mamba-2's scan and its convolution, with gradients that are parts of longer rows."""
    T, P = sum(lengths), 64
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=new.device)
    position = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).to(new.device)
    rows, dy, D = new(T, H * P + 2 * N), new(T, H, P), new(H, wide=True)
    raw = new(T, H + 8, scale=spread)[:, 8:]
    bias_H, A_log = new(H, wide=True) - 2, new(H, wide=True) + A_log
    split = [H * P, N, N]
    x, B, C = rows.split(split, -1)
    x = x.unflatten(-1, (H, P))
    out, draw, dconv = nan_like(rows), nan_like(raw, longer=8), nan_like(rows, longer=8)
    dx, dB, dC = out.split(split, -1)
    y, kept = mamba2_scan_forward(x, raw, bias_H, A_log, B, C, D, cu, save=True)
    out = dx.unflatten(-1, (H, P)), dB, dC, draw
    sums = PartialSums()
    mamba2_scan_backward(dy, x, raw, bias_H, A_log, B, C, D, cu, out, sums.slot(A_log, bias_H, D), kept)
    dA_log, dbias_H, dD = gradients_in(sums)
    gain = kept[0][2][:, :T].T if kept else torch.nn.functional.softplus(exact(raw) + exact(bias_H))
    weight, bias, dafter = new(rows.shape[1], 1, K), new(rows.shape[1]), new(T, rows.shape[1])
    causal_conv_silu_backward_to(dconv, dafter, rows, weight, bias, position, sums.slot(weight, bias))
    dweight, dbias = gradients_in(sums)
    found = {"y": y, "dx": dx, "draw": draw, "dbias_H": dbias_H, "dA_log": dA_log}
    found |= {"dB": dB, "dC": dC, "dD": dD}
    found |= {"dbefore": dconv, "dweight": dweight, "dbias": dbias}
    leaves = [exact(t).requires_grad_() for t in (x, raw, bias_H, A_log, B, C, D)]
    x_, raw_, bias_, A_log_, B_, C_, D_ = leaves
    dt_, A_ = torch.log1p((raw_ + bias_).exp()), -A_log_.exp()
    wanted_y = ssd(x_, dt_, A_, B_, C_, cu) + D_[:, None] * x_
    gradients = torch.autograd.grad(wanted_y, leaves, exact(dy))
    wanted = dict(zip(("dx", "draw", "dbias_H", "dA_log", "dB", "dC", "dD"), gradients))
    wanted["y"] = wanted_y
    errors = gain.double() / dt_.detach() - 1  # however small dt is
    found["dt"], wanted["dt"] = 1 + 10 * errors, torch.ones_like(errors)
    wanted["dx"] = wanted["dx"].flatten(1)
    convolved = [exact(t) for t in (dafter, rows, weight, bias)]
    before = torch.empty_like(convolved[1])
    causal_conv_silu_backward_to(before, *convolved, position, sums.slot(*convolved[2:]))
    dweight, dbias = gradients_in(sums)
    wanted |= {"dbefore": before, "dweight": dweight, "dbias": dbias}
    # dA is a sum of terms that cancel: its errors are relative to them, as test_ssd_triton.py explains
    x_, dt_, A_, B_, C_ = (t.detach() for t in (x_, dt_, A_, B_, C_))
    _, dgain, dlog_a, *_ = scan_backward(exact(dy), x_, dt_, dt_ * A_, B_, C_, cu)
    terms = (dlog_a.abs() * dt_ + dgain.abs() * dt_**2).sum(0) * A_
    return found, wanted, {"dA_log": terms.norm().item()}


def add_rows_case(new: Inputs, T: int, D: int, spare: int):
    """With zeros for the last row, named `spare` times, as for unused chunks; x has longer rows."""
    place = torch.cat([torch.randperm(T, generator=new.generator)[: T // 2], torch.full((spare,), T)]).to(new.device)
    x, rows = new(T + 1, D), new(len(place), D + 8)[:, :D]
    rows[T // 2 :] = 0
    wanted = exact(x).clone().index_add_(0, place, exact(rows))
    return {"x": router.add_rows_(x, place, rows)}, {"x": wanted}


def sum_rows_case(new: Inputs, L: int, N: int, D: int, turned: tuple[int, int] = (1, 1)):
    from hnet_kernels.norm_triton import sum_rows

    parts, (K, W) = new(L, N, D, wide=True), turned
    sums = exact(parts).sum(1)
    wanted = torch.cat([sums[:, : K * W].view(L, K, W).mT.flatten(1), sums[:, K * W :]], 1)
    return {"sums": sum_rows(parts, new.dtype, turned)}, {"sums": wanted}


CASES = {
    "add_norm": lambda new: add_norm_case(new, 75, 48, first=False),
    "add_norm, a stack's first": lambda new: add_norm_case(new, 33, 64, first=True),
    "add_norm, one row": lambda new: add_norm_case(new, 1, 64, first=False),
    "add_norm, no rows": lambda new: add_norm_case(new, 0, 64, first=False),
    "gated_norm, no rows": lambda new: gated_norm_case(new, 0, 64),
    "gated_norm": lambda new: gated_norm_case(new, 75, 80),
    "swiglu": lambda new: swiglu_case(new, 33, 1100),
    "to float32": lambda new: to_float32_case(new, 33, 77),
    "cross entropy": lambda new: cross_entropy_case(new, 75, 256),
    "cross entropy, other classes": lambda new: cross_entropy_case(new, 9, 77),
    "rotary": lambda new: rotary_case(new, [1, 2, 40], H=3, P=24, R=6),
    "rotary of whole heads": lambda new: rotary_case(new, [9], H=1, P=8, R=4),
    "rotary, no rows": lambda new: rotary_case(new, [0], H=2, P=8, R=4),
    "no rotary": lambda new: rotary_case(new, [9], H=2, P=8, R=0),
    "tile order": lambda new: tile_order_case(new, [*AWKWARD, 640]),
    "attention": lambda new: attention_case(new, AWKWARD, H=2, P=16),
    "attention in a window": lambda new: attention_case(new, [1, 200, 65], H=1, P=32, window=63),
    "attention in a wide window": lambda new: attention_case(new, [290, 130], H=1, P=16, window=150),
    "attention, heads of 48": lambda new: attention_case(new, [70, 3], H=2, P=48),
    "attention to itself and the one before": lambda new: attention_case(new, [130], H=1, P=16, window=1, empty=0),
    "attention, no rows": lambda new: attention_case(new, [0], H=2, P=16),
    "router": lambda new: router_case(new, AWKWARD[:4], D=48),
    "chunks": lambda new: chunks_case(new, [*AWKWARD, 3000], zeros=70, spare=58),
    "chunks, no zeros": lambda new: chunks_case(new, [5, 1, 1018], zeros=0, spare=0),
    "chunks, forced": lambda new: chunks_case(new, [1023, 1, 2000], zeros=1, spare=1100, forced=True),
    "chunks, many documents": lambda new: chunks_case(new, [1, 2] * 600, zeros=1000, spare=8),
    "chunks, one token": lambda new: chunks_case(new, [1], zeros=0, spare=127),
    "rows taken": lambda new: gather_rows_case(new, 33, D=96, E=0),
    "rows taken and padded": lambda new: gather_rows_case(new, 33, D=64, E=24),
    "numbers taken": lambda new: gather_rows_case(new, 50, D=1, E=0),
    "rows added": lambda new: add_rows_case(new, 50, D=96, spare=5),
    "numbers added": lambda new: add_rows_case(new, 50, D=1, spare=0),
    "upsample": lambda new: upsample_case(new, 90, 30, D=48, spare=0),
    "upsample, filled up": lambda new: upsample_case(new, 33, 9, D=64, spare=5),
    "sums of rows": lambda new: sum_rows_case(new, L=3, N=130, D=77),
    "sums of rows, turned": lambda new: sum_rows_case(new, L=4, N=9, D=5 * 24, turned=(4, 24)),
    "sums of one row": lambda new: sum_rows_case(new, L=2, N=1, D=16),
    "sums of no rows": lambda new: sum_rows_case(new, L=2, N=0, D=16),
    "scan": lambda new: scan_case(new, AWKWARD, H=2, N=16),
    "scan, gains from 1e-9 to 20": lambda new: scan_case(new, [40, 30], H=3, N=16, spread=8, A_log=-12),
}
WITHOUT_DEFINITION = {"tile order", *(name for name in CASES if name.startswith("sums of"))}
LARGE = {
    "add_norm, large": lambda new: add_norm_case(new, 5000, 1536, first=False),
    "gated_norm, large": lambda new: gated_norm_case(new, 5000, 3072),
    "swiglu, large": lambda new: swiglu_case(new, 3000, 2688),
    "cross entropy, large": lambda new: cross_entropy_case(new, 32768, 256),
    "rotary, large": lambda new: rotary_case(new, [*AWKWARD, 3000], H=16, P=64, R=16),
    "tile order, large": lambda new: tile_order_case(new, [7, 5000, *AWKWARD, 3000, 30, 4999] * 9),
    "attention, large": lambda new: attention_case(new, [*AWKWARD, 1475, 1024], H=16, P=64),
    "attention in a window, large": lambda new: attention_case(new, [3000, 1], H=8, P=64, window=1023),
    "attention, heads of 96": lambda new: attention_case(new, [700, 300], H=4, P=96),
    "attention in a window, heads of 96": lambda new: attention_case(new, [1, 700, 300], H=2, P=96, window=100),
    "attention, heads of 128": lambda new: attention_case(new, [700, 300], H=4, P=128),
    "router, large": lambda new: router_case(new, [*AWKWARD, 3000], D=512),
    "chunks, more blocks than a program looks at at once": lambda new: chunks_case(
        new, [*AWKWARD, 300_000] * 5, zeros=70_000, spare=58
    ),
    "rows taken and padded, large": lambda new: gather_rows_case(new, 5000, D=1024, E=512),
    "upsample, large": lambda new: upsample_case(new, 4000, 700, D=768, spare=68),
    "upsample, more chunks than a grid's second axis": lambda new: upsample_case(new, 70_000, 66_000, D=64, spare=0),
    "sums of rows, large": lambda new: sum_rows_case(new, L=55, N=396, D=2048),
    "sums of rows, turned, large": lambda new: sum_rows_case(new, L=4, N=512, D=5 * 2304, turned=(4, 2304)),
    "scan, large": lambda new: scan_case(new, [*AWKWARD, 3000], H=16, N=128),
}


def distances(name: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    new_empty = Tensor.new_empty

    def poisoned(*args, **options):
        out = new_empty(*args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    Tensor.new_empty = poisoned
    try:
        found, wanted, *sizes = (CASES | LARGE)[name](Inputs(dtype, device))
    finally:
        Tensor.new_empty = new_empty
    assert set(found) == set(wanted)
    found = {key: exact(found[key]) for key in found}
    sizes = {key: wanted[key].norm().item() for key in wanted} | (sizes[0] if sizes else {})
    # where all is zero, or there is nothing, all has to be
    return {key: (found[key] - wanted[key]).norm().item() / (sizes[key] or 1e-30) for key in found}


def check(found: dict[str, float], tolerance: float, case: str = "") -> None:
    wrong = {name: distance for name, distance in found.items() if not distance <= tolerance}  # NaN is wrong too
    assert found and not wrong, (case, found)


@given(st.floats(width=32))
@example(1 + 2**-8).via("a tie")
@example(2.0**-149).via("next to zero")
def test_split24_keeps_16_significant_bits(number):
    x = torch.tensor(number)
    y = norm.join24(*norm.split24(x, torch.bfloat16), torch.float32)
    if x.abs() < 2.0**127:
        bound = 2**-15 if norm.split24(x, torch.bfloat16).low == 127 else 2**-16
        assert (exact(x) - exact(y)).abs() <= bound * exact(x).abs().clamp_min(
            torch.finfo(torch.float32).smallest_normal
        )
    else:  # too large values may become infinite; nan stays nan
        assert y.isnan() if x.isnan() else y.abs() >= 2.0**127 and y.sign() == x.sign()


def test_interpreted_kernels_match_the_definition():
    """All cases in one test, so that one process runs the interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    interpreted = json.loads(run.stdout)
    assert set(interpreted) == set(CASES)
    for name in CASES:
        check(interpreted[name], TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_DEFINITION])
def test_definitions_match_autograd(name):
    """In float32 on the CPU, where definitions run."""
    check(distances(name, torch.float32, "cpu"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["add_norm", "add_norm, a stack's first"])
def test_definitions_in_bfloat16_match_autograd(name):
    """Its kernel is tested on a GPU: Triton's interpreter truncates to bfloat16 instead of rounding."""
    check(distances(name, torch.bfloat16, "cpu"), TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_on_gpu(name, dtype):
    tolerance = TOLERANCE[dtype]
    if ("attention" in name or "tile order" in name) and dtype == torch.float32:
        pytest.skip("the kernels take 16 bits")
    if "scan" in name and dtype == torch.float32:
        tolerance = 5e-5  # see test_ssd_triton.py: decays of up to e^-20 a token
    check(distances(name, dtype, "cuda"), tolerance)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    for module in (
        boundaries,
        cross_entropy,
        norm,
        pointwise,
        router,
        *(importlib.import_module(f"hnet_kernels.{n}") for n in ("ssd", "conv")),
        attention,
    ):
        module.use_fast = lambda operation, device, dtype, reason: dtype != torch.float64
    print(json.dumps({name: distances(name, torch.float32, "cpu") for name in CASES}))
