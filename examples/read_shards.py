"""Read a folder of shards: documents as text, and the slices that training gets.

python examples/read_shards.py data/mine
"""

import sys

from fineweb import ByteStream, load_manifest

if len(sys.argv) != 2:
    print(__doc__.strip(), file=sys.stderr)
    sys.exit(2)
folder = sys.argv[1]
for split, found in load_manifest(folder)["splits"].items():
    shards = len(found["shards"])
    print(
        f"{split}: {found['documents']} documents, {found['text_bytes']:,} bytes, {shards} shard{'s' * (shards != 1)}"
    )

stream = ByteStream(folder, "train", slice_bytes=512)
piece = stream.slice(0)
for begin, length in zip(piece.row_lengths.cumsum() - piece.row_lengths, piece.row_lengths):
    row = piece.inputs[begin : begin + length].tobytes()
    print(f"a row of {length} inputs:", row.lstrip(b"\xfe").decode(errors="replace")[:60])
