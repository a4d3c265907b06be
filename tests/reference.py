"""A plain H-Net for one document, written from the paper: the definition against which the model is tested.

It shares no code with `hnet_trainable.py`: no packing, no NJT, no chunked scan, no backward of its own. `weights`: the
tensors of a state dict; `config`: the JSON keys. It is slow (quadratic) and meant for float64.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def ssd_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence of Mamba-2 in one document, step by step. x (L, H, P), dt (L, H), A (H,), B and C (L, N)."""
    h, ys = x.new_zeros(*x.shape[1:], B.shape[1]), []
    for t in range(len(x)):
        h = (dt[t] * A).exp()[:, None, None] * h + dt[t][:, None, None] * x[t][:, :, None] * B[t]
        ys.append(h @ C[t])
    return torch.stack(ys) if ys else torch.zeros_like(x)


def ssd_quadratic(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same as one masked product: y_i = sum_{j <= i} exp(sum_{j < k <= i} dt_k A) (C_i B_j) dt_j x_j."""
    total = (dt * A).cumsum(0).T  # (H, L)
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    decay = (total[:, :, None] - total[:, None, :]).masked_fill(later, -torch.inf).exp()
    return torch.einsum("hij,ij,jh,jhp->ihp", decay, C @ B.T, dt, x)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention in one document, (L, H, P) each; position i sees i - window..i, all before it for -1."""
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))
    hidden = (j > i) | ((j < i - window) if window >= 0 else torch.zeros(1, dtype=torch.bool))
    scores = torch.einsum("ihp,jhp->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhp->ihp", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def ema_loop(y: Tensor, p: Tensor) -> Tensor:
    """z_k = p_k y_k + (1 - p_k) z_{k-1} in one document, z = 0 before it."""
    z, zs = y.new_zeros(y.shape[1]), []
    for k in range(len(y)):
        z = p[k] * y[k] + (1 - p[k]) * z
        zs.append(z)
    return torch.stack(zs) if zs else torch.zeros_like(y)


def each_document(lengths: list[int], function, *tensors: Tensor) -> Tensor:
    """`function` on the rows of each document in turn."""
    return torch.cat([function(*rows) for rows in zip(*(t.split(lengths) for t in tensors))])


class Reference:
    def __init__(self, weights: dict[str, Tensor], config: dict):
        self.w, self.config = weights, config
        self.ssm = {"d_conv": 4, "d_state": 128, "expand": 2, **config.get("ssm_cfg", {})}
        self.depth = len(config["d_model"]) - 1
        self.rules: dict[int, Callable[[int], list[int]]] = {}

    def mamba2(self, x: Tensor, at: str) -> Tensor:
        w, N, inner = self.w, self.ssm["d_state"], self.ssm["expand"] * x.shape[1]
        H = inner // 64
        z, conv_in, dt = (x @ w[at + "in_proj.weight"].T).split([inner, inner + 2 * N, H], dim=1)
        width = self.ssm["d_conv"]
        conv_out = F.conv1d(
            F.pad(conv_in.T[None], (width - 1, 0)),
            w[at + "conv1d.weight"],
            w[at + "conv1d.bias"],
            groups=inner + 2 * N,
        )[0].T
        inputs, B, C = F.silu(conv_out).split([inner, N, N], dim=1)
        inputs = inputs.reshape(-1, H, 64)
        y = ssd_quadratic(inputs, F.softplus(dt + w[at + "dt_bias"]), -w[at + "A_log"].exp(), B, C)
        y = (y + w[at + "D"][:, None] * inputs).reshape(-1, inner)
        return rms_norm(y * F.silu(z), w[at + "norm.weight"]) @ w[at + "out_proj.weight"].T

    def rotary(self, x: Tensor, dim: int) -> Tensor:
        """As a complex product: dimension i of the first half is the real part, of the second the imaginary one."""
        angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))
        turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim]) * torch.exp(1j * angle)[:, None]
        return torch.cat([turned.real, turned.imag, x[..., dim:]], dim=-1)

    def attention(self, x: Tensor, at: str, s: int) -> Tensor:
        cfg = self.config["attn_cfg"]
        q, k, v = (x @ self.w[at + "Wqkv.weight"].T).reshape(len(x), 3, cfg["num_heads"][s], -1).unbind(1)
        q, k = (self.rotary(t, cfg["rotary_emb_dim"][s]) for t in (q, k))
        return attend(q, k, v, cfg["window_size"][s]).flatten(1) @ self.w[at + "out_proj.weight"].T

    def mlp(self, x: Tensor, at: str) -> Tensor:
        value, gate = (x @ self.w[at + "fc1.weight"].T).chunk(2, dim=1)
        return (value * F.silu(gate)) @ self.w[at + "fc2.weight"].T

    def stack(self, x: Tensor, layout: str, at: str, s: int) -> Tensor:
        letters = [a for a, n in re.findall("([a-zA-Z])([0-9]+)", layout) for _ in range(int(n))]
        for i, letter in enumerate(letters):
            here = f"{at}layers.{i}."
            normed = rms_norm(x, self.w[here + "norm1.weight"])
            x = x + (
                self.mamba2(normed, here + "mixer.") if letter in "mM" else self.attention(normed, here + "mixer.", s)
            )
            if letter in "MT":
                x = x + self.mlp(rms_norm(x, self.w[here + "norm2.weight"]), here + "mlp.")
        return rms_norm(x, self.w[at + "rmsnorm.weight"])

    def router(self, x: Tensor, at: str, s: int) -> Tensor:
        """p of each token, 1 for the first. self.rules has another router's 0 and 1, given the number of tokens."""
        if s in self.rules:
            return torch.tensor(self.rules[s](len(x)), dtype=x.dtype)
        q = F.normalize(x[:-1] @ self.w[at + "routing_module.q_proj_layer.weight"].T, dim=1)
        k = F.normalize(x[1:] @ self.w[at + "routing_module.k_proj_layer.weight"].T, dim=1)
        return torch.cat([x.new_ones(1), ((1 - (q * k).sum(1)) / 2).clamp(0, 1)])

    def stage(self, x: Tensor, layout: list, at: str, s: int, decisions: list) -> Tensor:
        outer = x.shape[1]
        if at + "pad_dimension" in self.w:
            x = torch.cat([x, self.w[at + "pad_dimension"].expand(len(x), -1)], dim=1)
        if s == self.depth:
            return self.stack(x, layout[0], at + "main_network.", s)[:, :outer]
        x = self.stack(x, layout[0], at + "encoder.", s)
        p = self.router(x, at, s)
        b = p.detach() > 0.5
        decisions.append((p, b))
        y = self.stage(x[b], layout[1], at + "main_network.", s + 1, decisions)
        z = ema_loop(y, p[b].clamp(1e-4, 1 - 1e-4))
        c = torch.where(b, p, 1 - p)
        ste = c + (1 - c).detach()
        proj = at + "residual_proj."
        x = z[b.cumsum(0) - 1] * ste[:, None] + x @ self.w[proj + "weight"].T + self.w[proj + "bias"]
        return self.stack(x, layout[2], at + "decoder.", s)[:, :outer]

    def __call__(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(L,) bytes of one document -> its logits (L, V), and (p, b) of each stage."""
        decisions: list[tuple[Tensor, Tensor]] = []
        table = self.w["embeddings.weight"]
        x = self.stage(table[ids], self.config["arch_layout"], "backbone.", 0, decisions)
        return x @ (table if self.config.get("tie_embeddings") else self.w["lm_head.weight"]).T, decisions
