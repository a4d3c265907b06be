"""Computes the communication of a training step from the configs: the table of docs/SCALING.md, for three configs.

python scripts/communication.py --bytes-per-gpu 32768
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hnet_runtime import UserError
from hnet_runtime.commands import parse, run

if TYPE_CHECKING:
    from hnet_trainable import HNetConfig

ROOT = Path(__file__).parent.parent
NVLINK, NETWORK = 450e9, 50e9  # bytes/s per GPU and direction: NVLink 4 and 400 Gb/s InfiniBand, from data sheets
MATMUL = 400e12  # assumed FLOP/s of a step's matrix products, about half of their rate measured alone
LAYOUTS = (("2 GPUs", 2, 1, False), ("8 GPUs, one node", 8, 1, False), ("64 GPUs, FSDP over all", 64, 1, True))
LAYOUTS += (("64 GPUs, --replicate 8", 8, 8, False),)


@dataclass
class Options:
    """Bytes that a step sends over links and network, for three official configs."""

    bytes_per_gpu: int = 32768
    """Bytes of text per GPU and step."""


def row(config: "HNetConfig", layout: str, shards: int, replicate: int, crosses: bool, tokens: int) -> str:
    from hnet_runtime.distributed import traffic
    from hnet_runtime.flops import count_flops

    sent = traffic(config, shards, replicate)
    within, across = sent.gathers + sent.scatters, sent.replicas
    ms = 1000 * (within / (NETWORK if crosses else NVLINK) + across / NETWORK)
    lengths = [[tokens / n] for n in config.N_compress]
    compute_ms = 1000 * count_flops(config, lengths).matmul / MATMUL
    cells = (sent.gathers, sent.scatters, sent.replicas)
    return f"| {layout} | " + " | ".join(f"{x / 1e9:.2f}" for x in cells) + f" | {ms:.1f} | {compute_ms:.1f} |"


def main(argv: Sequence[str]) -> None:
    tokens = parse(Options, argv, __doc__).bytes_per_gpu
    if tokens < 1:
        raise UserError(f"--bytes-per-gpu {tokens}: expected 1 or more")
    import torch

    from hnet_trainable import HNetConfig, HNetLM

    for name in ("hnet_1stage_small", "hnet_1stage_L", "hnet_2stage_XL"):
        config = HNetConfig.load(name)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in HNetLM(config).parameters())
        print(f"\n{name}, {parameters / 1e6:,.0f} million parameters, {tokens:,} bytes per GPU and step\n")
        columns = (
            "weights gathered, GB",
            "gradients scattered, GB",
            "between replicas, GB",
            "ms on links",
            "ms to compute",
        )
        print("| | " + " | ".join(columns) + " |")
        print("|-|-|-|-|-|-|")
        for layout in LAYOUTS:
            print(row(config, *layout, tokens))


if __name__ == "__main__":
    run(main)
