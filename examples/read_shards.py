"""Read a folder of shards: documents as text, and the slices that training gets.

python examples/read_shards.py data/mine
"""

import sys

from fineweb import ByteStream, load_manifest
from hnet_runtime import commands


def main(arguments: list[str]) -> int | None:
    if len(arguments) != 1:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    folder = arguments[0]
    for split, found in load_manifest(folder)["splits"].items():
        shards = f"{len(found['shards'])} shard{'s' * (len(found['shards']) != 1)}"
        print(f"{split}: {found['documents']} documents, {found['text_bytes']:,} bytes, {shards}")

    stream = ByteStream(folder, "train", slice_bytes=512)
    piece = stream.slice(0)
    for begin, length in zip(piece.row_lengths.cumsum() - piece.row_lengths, piece.row_lengths):
        row = piece.inputs[begin : begin + length].tobytes()
        print(f"a row of {length} inputs:", row.lstrip(b"\xfe").decode(errors="replace")[:60])


if __name__ == "__main__":
    commands.run(main)  # prints a mistake, such as a missing run, in one sentence
