"""Read a folder of shards: documents as text, and the slices that training gets.

python examples/read_shards.py data/mine
"""

import sys

from fineweb import ByteStream, load_manifest

folder = sys.argv[1]
for split, found in load_manifest(folder)["splits"].items():
    print(f"{split}: {found['documents']} documents, {found['text_bytes']:,} bytes, {len(found['shards'])} shards")

stream = ByteStream(folder, "train", slice_bytes=512)
piece = stream.slice(0)
for begin, length in zip(piece.row_lengths.cumsum() - piece.row_lengths, piece.row_lengths):
    row = piece.inputs[begin : begin + length].tobytes()
    print(f"a row of {length} inputs:", row.lstrip(b"\xfe").decode(errors="replace")[:60])
