"""Measures speed and memory of the data pipeline, in three parts that run separately.

    python benchmarks/bench_data.py prepare SOURCE   MB/s of text from parquet to shards, memory per process
    python benchmarks/bench_data.py slices SOURCE    ms per slice from uncached shards of 1 GB
    python benchmarks/bench_data.py index            time and memory to open an index of 15 million documents

SOURCE is a source of `fineweb.py prepare`. Its text is repeated up to --gb, with each copy made distinct. Everything is
written to --work (by default a temporary folder in the current one), which should be on the disk to measure.
"""

import argparse
import cProfile
import hashlib
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ledger import append  # noqa: E402

from fineweb import BOS, ByteStream, load_manifest, prepare, write_index  # noqa: E402
from hnet_runtime.commands import Parser, run  # noqa: E402


def documents(folder: Path):
    for split in load_manifest(folder)["splits"].values():
        for shard in split["shards"]:
            yield from (folder / shard["file"]).read_bytes().split(bytes([BOS]))[1:]


def repeated_parquet(source: str, work: Path, gb: float) -> int:
    """Writes parquet files with 1,000 documents per row group and `gb` of text. Returns the bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prepare(source, work / "base", holdout=0)
    texts = [text.decode() for text in documents(work / "base")]
    (work / "parquet").mkdir()
    total, copy = 0, 0
    while total < gb * 1e9:
        table = pa.table({"id": range(len(texts)), "text": [f"copy {copy} " + text for text in texts]})
        pq.write_table(table, work / "parquet" / f"{copy:03d}.parquet", row_group_size=1000, compression="zstd")
        total, copy = total + table["text"].nbytes, copy + 1
    return total


def bench_prepare(args, work: Path) -> None:
    total = repeated_parquet(args.source, work, args.gb)
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(prepare, str(work / "parquet"), work / "profiled", processes=1)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
        return
    # An intermediate process, because a child's peak memory includes its parent's memory at its start.
    code = (
        "import resource, subprocess, sys, time; begin = time.perf_counter(); subprocess.run(sys.argv[1:], check=True);"
        "seconds = time.perf_counter() - begin; used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"
    )
    rows = []
    for repeat in range(args.repeats):
        command = [sys.executable, ROOT / "fineweb.py", "prepare", work / "parquet", "--out", work / f"out{repeat}"]
        line = [sys.executable, "-c", code, *command, "--processes", str(args.processes)]
        out = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append([float(number) for number in out.splitlines()[-1].split()])
    seconds, cpu, peak = zip(*rows)
    print(
        f"prepare: {total / 1e9:.2f} GB of text, {args.processes} processes: {', '.join(f'{t:.1f}' for t in seconds)} s"
    )
    print(f"prepare: median {total / 1e6 / statistics.median(seconds):.0f} MB/s, {statistics.median(cpu):.1f} s of CPU")
    print(f"prepare: the largest process took {max(peak):.0f} MiB")
    if args.ledger:
        numbers = {"text_bytes": total, "processes_count": args.processes, "prepare_s": statistics.median(seconds)}
        numbers |= {
            "mb_per_s": total / 1e6 / statistics.median(seconds),
            "cpu_s": statistics.median(cpu),
            "peak_mib": max(peak),
        }
        append(args.ledger, "data/prepare", numbers, what="text from parquet into shards, median")


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_slices(args, work: Path) -> None:
    repeated_parquet(args.source, work, args.gb)
    folder = work / "shards"
    prepare(str(work / "parquet"), folder, shard_bytes=1 << 30)
    stream = ByteStream(folder, slice_bytes=32768)
    forget(folder)
    begin = time.perf_counter()
    stream.slice(0)
    first = time.perf_counter() - begin
    cold, warm = [], []
    for i in range(1, 1 + args.slices):
        forget(folder)
        begin = time.perf_counter()
        stream.slice(i)
        middle = time.perf_counter()
        stream.slice(i)
        cold.append(1e3 * (middle - begin))
        warm.append(1e3 * (time.perf_counter() - middle))
    rows = statistics.mean(len(stream.slice(i).row_lengths) for i in range(50))
    sizes = ", ".join(f"{shard['bytes'] / 1e9:.2f}" for shard in load_manifest(folder)["splits"]["train"]["shards"])
    print(
        f"slices: 32,768 bytes, {rows:.0f} rows, from shards of {sizes} GB; the first of a shard {1e3 * first:.1f} ms"
    )
    numbers = {"first_ms": 1e3 * first, "slice_bytes": 32768}
    for name, times in (("cold", cold), ("warm", warm)):
        cuts = np.percentile(times, [50, 95, 100])
        numbers |= {f"{name}_ms": float(cuts[0]), f"{name}_longest_ms": float(cuts[2])}
        print(f"slices: {name}: median {cuts[0]:.3f} ms, 95% {cuts[1]:.3f} ms, longest {cuts[2]:.3f} ms")
    if args.ledger:
        append(
            args.ledger, "data/slices", numbers, what="a slice out of shards that the page cache holds, or not; medians"
        )


def bench_index(args, work: Path) -> None:
    """Shards are sparse files; only their indexes are real, for documents with FineWeb's mean of 3,000 bytes."""
    rng = np.random.default_rng(0)
    shards, left = [], args.documents
    while left:
        lengths = np.minimum(1 + rng.lognormal(7.4, 1.05, min(left, 21_000)).astype(np.int64), 1 << 20)
        starts = np.concatenate([[0], np.cumsum(lengths + 1)])
        path = work / f"train-{len(shards):05d}.shard"
        with open(path, "wb") as f:
            f.truncate(int(starts[-1]))
        sha256 = hashlib.sha256(path.name.encode()).hexdigest()
        write_index(path, starts, sha256)
        shards.append(dict(file=path.name, bytes=int(starts[-1]), documents=len(lengths), sha256=sha256))
        left -= len(lengths)
    (work / "manifest.json").write_text(json.dumps(dict(splits=dict(train=dict(shards=shards)))))
    for order in ("shuffle", "length"):
        code = (
            "import resource, sys, time; begin = time.perf_counter(); import fineweb;"
            "stream = fineweb.ByteStream(sys.argv[1], slice_bytes=32768, order=sys.argv[2]);"
            "opened = time.perf_counter(); corpus = stream._corpora[0]; epoch = 0;"
            "ids, before = corpus._layout(sys.argv[2], 0); corpus._section(sys.argv[2], 0, int(ids[0]));"
            "located = time.perf_counter(); peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024;"
            "print(f'index: {sys.argv[2]}: {stream.documents:,} documents, {stream.text_bytes / 1e9:.1f} GB, "
            "{len(corpus.paths)} shards: import and open {opened - begin:.2f} s, '"
            "f'first section {located - opened:.2f} s, peak {peak:.0f} MiB')"
        )
        subprocess.run([sys.executable, "-c", code, work, order], check=True, cwd=ROOT)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "slices", "index"))
    parser.add_argument("source", nargs="?", default="stdlib")
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--documents", type=int, default=15_000_000)
    parser.add_argument("--profile", action="store_true", help="prepare in one process, under a profiler")
    parser.add_argument("--ledger", default="", help="record to add prepare or slices to: benchmarks/ledger.jsonl")
    parser.add_argument("--work", type=Path, default=Path("."))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work, prefix=".bench-data-") as work:
        {"prepare": bench_prepare, "slices": bench_slices, "index": bench_index}[args.what](args, Path(work))


if __name__ == "__main__":
    run(main)
