"""Train a model further on a prepared folder, in a loop of your own, and save it.

python examples/finetune.py runs/mine data/mine exported/tuned
"""

import sys

import torch

from fineweb import ByteStream
from hnet_runtime import commands
from hnet_runtime.runs.weights import export, load_training
from hnet_trainable import parameter_groups, training_loss


def main(arguments: list[str]) -> int | None:
    if len(arguments) != 3:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    run, data, out = arguments
    STEPS, RATE, SLICE_BYTES = 5, 1e-3, 512

    model = load_training(run, dtype=torch.float32)
    optimizer = torch.optim.AdamW(parameter_groups(model, RATE, weight_decay=0.1), betas=(0.9, 0.95))
    stream = ByteStream(data, "train", slice_bytes=SLICE_BYTES, seed=1)

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["multiplier"] * (1 - step / STEPS)
        iids, labels = stream.slice(step).nested()
        result = model(iids, labels)
        training_loss(result.ce, result.ratio_losses, alpha=0.03).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        compression = " ".join(f"{1 / stage.F.item():.1f}" for stage in result.stages)
        print(f"step {step + 1}: {result.ce.item():.3f} nats per byte, {compression} tokens per chunk")

    print("wrote", *export(model, out, form="safetensors"))


if __name__ == "__main__":
    commands.run(main)  # prints a mistake, such as a missing run, in one sentence
