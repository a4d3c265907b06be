"""Bits per byte of some files, each read as one document.

python examples/score.py runs/mine article.txt prompt.txt
"""

import math
import sys

import torch

from hnet_runtime import commands
from hnet_runtime.runs.weights import load_training
from hnet_trainable import BOS, EOS


def main(arguments: list[str]) -> int | None:
    if len(arguments) < 2:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    run, *files = arguments
    texts = [commands.read_text(file)[:8192] for file in files]
    model = load_training(run).eval()

    documents = [torch.tensor([BOS, *text, EOS]) for text in texts]
    iids = torch.nested.nested_tensor([document[:-1] for document in documents], layout=torch.jagged)
    with torch.no_grad():
        logits = model(iids).logits  # all files in one batch; none sees another
    for file, text, document, logits_of_file in zip(files, texts, documents, logits.unbind()):
        nats = torch.nn.functional.cross_entropy(logits_of_file.float(), document[1:], reduction="sum").item()
        print(f"{file}: {nats / math.log(2) / len(text):.3f} bits per byte, {len(text):,} bytes")


if __name__ == "__main__":
    commands.run(main)  # prints a mistake, such as a missing run, in one sentence
