"""What an edit of the model costs: milliseconds of a training step with each of the edits in tests/test_edits.py.

    python benchmarks/bench_edits.py --config configs/hnet_1stage_small.json --data DIR --edits 20

The unedited model comes first and last. An edit runs as a training run would run it: as graphs, as graphs with the
definition of one operation, or eagerly where the check before a run says so. Boundaries are forced at random at a rate
of --rate. Prints a JSON object for each edit.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import test_edits  # noqa: E402
import torch  # noqa: E402
from bench_train import force_boundaries  # noqa: E402
from ledger import append  # noqa: E402

import fineweb  # noqa: E402
import train  # noqa: E402
from hnet_runtime import distributed  # noqa: E402
from hnet_runtime.checks import agreement  # noqa: E402
from hnet_runtime.commands import Parser, run  # noqa: E402
from hnet_runtime.steps.flat_adamw import clipped_step  # noqa: E402
from hnet_runtime.steps.graphs import GraphedModel  # noqa: E402
from hnet_trainable import HNetConfig, parameter_groups  # noqa: E402


def measure(hnet: HNetConfig, args: argparse.Namespace, world: distributed.World, graphs: bool) -> dict[str, float]:
    """Median milliseconds of a step, GiB reserved, and the share of tokens that open a chunk."""
    config = train.TrainConfig(config=args.config, data=args.data, mbs=args.mbs, global_slices=1)
    model = distributed.build_model(hnet, world, torch.float32, 0, None, True)
    groups = distributed.optimizer_groups(parameter_groups(model, 3e-4, 0.1))
    make = train.make_optimizer
    steps = GraphedModel(model, torch.bfloat16, config.alpha, world, groups, captures=graphs, make_optimizer=make)
    draw = force_boundaries(steps.model, [args.rate] * hnet.num_stages, args.mbs)
    stream = fineweb.ByteStream(args.data, slice_bytes=args.mbs)
    torch.cuda.reset_peak_memory_stats()
    rounds = []
    for i in range(args.warmup + args.steps):
        draw()
        began = time.perf_counter()
        train.forward_backward(steps, list(stream.step(i, 1, 0, 1)), world)
        distributed.clip_in_optimizer(steps.optimizer, list(model.parameters()), 1.0, world)
        clipped_step(steps.optimizer)
        torch.cuda.synchronize()
        rounds.append(1000 * (time.perf_counter() - began))
    reserved = torch.cuda.max_memory_reserved() / 2**30
    return {"step_ms_median": statistics.median(rounds[args.warmup :]), "reserved_gib": reserved}


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/hnet_1stage_small.json", help="model config")
    parser.add_argument("--data", default="data/stdlib", help="folder made by fineweb.py prepare")
    parser.add_argument("--mbs", type=int, default=32768, help="bytes a step")
    parser.add_argument("--rate", type=float, default=0.18, help="share of tokens that open a chunk, at every stage")
    parser.add_argument("--edits", type=int, default=20, help="how many edits, spread over the list")
    parser.add_argument("--warmup", type=int, default=14, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=11, help="steps timed")
    parser.add_argument("--ledger", default="", help="record to add each edit to: benchmarks/ledger.jsonl")
    return parser


def main(argv: list[str]) -> None:
    args = arguments().parse_args(argv)
    world = distributed.start("cuda", 1)
    torch.set_float32_matmul_precision("high")
    fits = [name for name, change in test_edits.EDITS.items() if not change.config]
    chosen = fits[:: max(1, len(fits) // args.edits)]
    for name in [None, *chosen, None]:
        with test_edits.edits_undone() as set_:
            if name:
                test_edits.EDITS[name].make(set_)
            hnet = HNetConfig.load(args.config)
            differing = agreement.choose_implementations(world.device, torch.bfloat16, hnet)
            said = agreement.steps_as_graphs(hnet)
            found = {"edit": name or "none", "runs": "eager" if said else "graphs", "definitions": differing}
            times = measure(hnet, args, world, graphs=not said)
            print(json.dumps(found | times), flush=True)
            if args.ledger:
                slug = re.sub(r"\W+", "-", found["edit"])
                numbers = {"step_bytes": args.mbs, "waited_step_ms": times["step_ms_median"]}
                numbers |= {"reserved_gib": times["reserved_gib"], "definitions_count": len(differing)}
                how = {"config": Path(args.config).stem, "compile": "eager" if said else "graph"}
                append(args.ledger, f"edit/{how['config']}/{slug}", numbers, what=found["edit"], **how)
        gc.collect()
        torch.cuda.empty_cache()
    distributed.stop()


if __name__ == "__main__":
    run(main)
