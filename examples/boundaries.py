"""Show where a model divides a text, and how sure its router is.

    python examples/boundaries.py
    python examples/boundaries.py runs/mine "The quick brown fox"

Without a run the model has random weights.
"""

import torch

from hnet_runtime import commands
from hnet_runtime.runs.weights import load_training
from hnet_trainable import BOS, HNetConfig, HNetLM, init_weights


def main(arguments: list[str]) -> None:
    if arguments:
        model = load_training(arguments[0])
    else:
        model = init_weights(HNetLM(HNetConfig.load("hnet_1stage_tiny")), seed=0)
    text = (arguments[1] if len(arguments) > 1 else "H-Nets learn to divide text.").encode()

    iids = torch.nested.nested_tensor([torch.tensor([BOS, *text])], layout=torch.jagged)
    with torch.no_grad():
        stages = model(iids).stages

    position = torch.arange(len(text) + 1)  # the byte at which each token of the stage begins; BOS is 0
    # BOS opens a chunk. It is left out where it is alone in it.
    for s, stage in enumerate(stages):
        (p,), (b,) = stage.boundary_prob.unbind(), stage.boundary_mask.unbind()
        starts = position[b].tolist()
        ends = [*starts[1:], len(text) + 1]
        chunks = [
            (text[max(begin - 1, 0) : end - 1], x) for begin, end, x in zip(starts, ends, p[b].tolist()) if end > 1
        ]
        print(f"stage {s}: {len(text) / max(len(chunks), 1):.1f} bytes per chunk")
        print("  " + "|".join(chunk.decode(errors="replace") for chunk, _ in chunks))
        print("  p at the starts:", " ".join(f"{x:.2f}" for _, x in chunks))
        position = position[b]


if __name__ == "__main__":
    commands.run(main)  # prints a mistake, such as a missing run, in one sentence
