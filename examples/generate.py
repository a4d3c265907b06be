"""Continue prompts: a batch at once, and one as a stream of bytes.

python examples/generate.py runs/mine "The " "A chunk"
"""

import sys

from hnet_decoder import generate, stream
from hnet_runtime import commands
from hnet_runtime.runs.weights import load_inference
from hnet_simple import Sampling


def main(arguments: list[str]) -> int | None:
    if len(arguments) < 2:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    run, *prompts = arguments
    model = load_inference(run)

    for text in generate(model, prompts, max_bytes=40, sampling=Sampling(temperature=0.8), seed=1, valid_utf8=True):
        print(
            repr(text.text),
            "chunks of stage 0 start at",
            [i for i, starts in enumerate(text.starts) if starts[:1] == (True,)],
        )

    chunk = b""
    for emitted in stream(model, prompts[:1], max_bytes=40, seed=2, valid_utf8=True):
        if any(emitted.starts):  # a chunk is complete
            print(chunk.decode(errors="replace"), end="|", flush=True)
            chunk = b""
        chunk += bytes([emitted.byte])
    print(chunk.decode(errors="replace"))


if __name__ == "__main__":
    commands.run(main)  # prints a mistake, such as a missing run, in one sentence
