"""Train with Muon for the matrices inside blocks, and AdamW for all other weights, in one process.

python examples/muon.py --data data/mine --steps 3

It takes the flags of train.py. To train with it always, let `make_optimizer` of train.py return `MuonAdamW(groups)`.
"""

import math
import sys

import torch
from torch import Tensor

import train
from hnet_runtime import commands
from hnet_runtime.runs.flags import read_config


def orthogonal(x: Tensor) -> Tensor:
    """Nearly U V^T of the singular value decomposition U S V^T of a matrix.

    Singular values above a hundredth of the matrix's norm become 0.6 to 1.25, smaller ones less. Five steps of
    the Newton-Schulz iteration of Muon, with its coefficients (kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = (x / x.norm().clamp_min(1e-12)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon with Nesterov momentum. Its updates have the size of AdamW's (arXiv 2502.16982), so one rate suits both."""

    def __init__(self, groups: list[dict], momentum: float = 0.95, betas=(0.9, 0.95), eps: float = 1e-8):
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                if p.grad is not None:
                    is_inside = p.ndim == 2 and ".layers." in name
                    update = self._muon(p, group) if is_inside else self._adamw(p, group)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _muon(self, p: Tensor, group: dict) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        update = orthogonal(p.grad.lerp(state["momentum"], group["momentum"]))
        return 0.2 * math.sqrt(max(p.shape)) * update.to(p.dtype)

    def _adamw(self, p: Tensor, group: dict) -> Tensor:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        state["step"] += 1
        n = state["step"].item()
        state["mean"].lerp_(p.grad, 1 - beta1)
        state["square"].lerp_(p.grad.square(), 1 - beta2)
        return state["mean"] / (1 - beta1**n) / ((state["square"] / (1 - beta2**n)).sqrt() + group["eps"])


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    train.make_optimizer = MuonAdamW
    return train.main(read_config(arguments))


if __name__ == "__main__":
    commands.run(main, output_may_fail=True)
