"""The documents of one file: text, rows of JSON or parquet, compressed or not.

A reader yields the documents of a file, or of one piece of it, as (where, text). `where()` names the place in words.
text is bytes, or `LongText` where the file is too long to hold in memory. `reject(what, count)` gets one sentence about
what can't be read, and raises or counts.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from hnet_runtime import DataError

ROWS, TEXTS, PACKED = (".jsonl", ".ndjson", ".json", ".parquet"), (".txt", ".md", ".py"), (".gz", ".zst", ".bz2")
KINDS = ", ".join([*TEXTS, *ROWS]) + f" (all but .parquet also with {', '.join(PACKED)})"
MB = 1 << 20
BLOCK_BYTES = 8 * MB  # read at a time
WHOLE_BYTES = 32 * MB  # longer text files are read in blocks
VALUE_BYTES = 256 * MB  # longest element of a JSON array
BOM = codecs.BOM_UTF8
READ_ERRORS = (OSError, EOFError, zlib.error)

Document = tuple[Callable[[], str], "bytes | LongText"]
Reject = Callable[..., None]


def suffixes(name: str) -> str:
    """The suffix of a file's name in lower case, with the one before it if the last names a compression."""
    stem, dot, last = name.rpartition("/")[2].lower().rpartition(".")
    if not (stem and dot):
        return ""
    before = stem.rpartition(".") if f".{last}" in PACKED else ("", "", "")
    return (f".{before[2]}" if before[0] else "") + f".{last}"


def kind(name: str) -> str:
    """The suffix of a file that can be read, such as .json.gz; "" for other files."""
    found = suffixes(name)
    plain = "." + found.split(".")[1] if found else ""
    return found if plain in ROWS + TEXTS and (found == plain or plain != ".parquet") else ""


def has_rows(name: str) -> bool:
    """Whether a file has one document per row; else it is one document."""
    return kind(name).startswith(ROWS)


def is_divisible(name: str) -> bool:
    """Whether several processes can each read a piece of the file."""
    return kind(name) in (".jsonl", ".ndjson", ".parquet")


def in_words(path: str) -> str:
    """A path in a message: on one line, with its other bytes and control characters escaped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)
    return path if path.isprintable() else "".join(escaped)


def first_line(e: Exception) -> str:
    return str(e).strip().split("\n")[0][:200]


# -------------------------------------------------------------------------------------------------- opening files


class _Remote(io.RawIOBase):
    """A file on the Hub. Its failures are those of the network, and never skipped as bad input."""

    def __init__(self, path: str):
        from huggingface_hub import HfFileSystem

        self.path = path
        self.file = self._ask(lambda: HfFileSystem().open(path, "rb", block_size=BLOCK_BYTES))

    def _ask(self, question: Callable):
        try:
            return question()
        except Exception as e:
            raise DataError(f"{self.path}: the hub stopped answering ({first_line(e)}); run the command again") from e

    def readinto(self, buffer) -> int:
        data = self._ask(lambda: self.file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, *where) -> int:
        return self.file.seek(*where)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    seekable = readable


def _open(path: str) -> io.BufferedIOBase:
    """The bytes of the file; a file on the Hub is read from the Hub's cache if it is there."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import try_to_load_from_cache

    repo, _, rest = path.removeprefix("hf://datasets/").partition("@")
    commit, _, name = rest.partition("/")
    cached = try_to_load_from_cache(repo, name, repo_type="dataset", revision=commit)
    return open(cached, "rb") if isinstance(cached, str) else io.BufferedReader(_Remote(path), MB)


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[io.BufferedIOBase]:
    """The decompressed bytes of the file."""
    with _open(path) as raw:
        if path.lower().endswith(".gz"):
            with gzip.open(raw) as f:
                yield f
        elif path.lower().endswith(PACKED):
            import pyarrow as pa

            packed = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "bz2" if path[-1] == "2" else "zstd")
            with io.BufferedReader(packed, MB) as f:
                yield f
        else:
            yield raw


class LongText:
    """A long text file, which is not held in memory: iterates over its blocks, without a byte order mark."""

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes]:
        left = self.size
        with _unpacked(self.path) as f:
            block = f.read(BLOCK_BYTES).removeprefix(BOM)
            while block:
                left -= len(block)
                yield block
                block = f.read(BLOCK_BYTES)
        if left:
            raise DataError(f"{in_words(self.path)}: changed while it was being read; run the command again")


def digest(text: bytes | LongText) -> bytes:
    """The first 16 bytes of the text's SHA-256. Raises UnicodeDecodeError if it is not UTF-8."""
    if isinstance(text, bytes):
        text.decode()
        return hashlib.sha256(text).digest()[:16]
    found, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    for block in text:
        decoder.decode(block)
        found.update(block)
    decoder.decode(b"", final=True)
    return found.digest()[:16]


# ---------------------------------------------------------------------------------------------------- the readers


def read(path: str, size: int, column: str, reject: Reject, piece: int = 0, pieces: int = 1) -> Iterator[Document]:
    """The documents of one file, or of one of `pieces` equal pieces of it, in order.

    size: that of the file in bytes. column: the column with the text of rows.
    """
    found = kind(path)
    if found == ".parquet":
        yield from _read_parquet(path, piece, pieces, column, reject)
    elif found.startswith(".json") and not found.startswith(".jsonl"):
        yield from _read_json(path, column, reject)
    elif found.startswith(ROWS):
        yield from _read_lines(path, size * piece // pieces, size * (piece + 1) // pieces, column, reject)
    else:
        try:
            with _unpacked(path) as f:
                text = f.read(WHOLE_BYTES + 1)
                if len(text) > WHOLE_BYTES:
                    whole = len(text) + sum(map(len, iter(lambda: f.read(BLOCK_BYTES), b"")))
                    text = LongText(path, whole - len(BOM) * text.startswith(BOM))
        except READ_ERRORS as e:
            reject(f"{in_words(path)}: can't be read ({_reason(e)})")
        else:
            yield lambda: in_words(path), text.removeprefix(BOM) if isinstance(text, bytes) else text


def _reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or first_line(e) or type(e).__name__


class _NotText(Exception):
    """The reason why a row has no text, in words."""


def _text_of(row: Any, column: str) -> bytes:
    """The text of a row of JSON; b"" for null."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    if not isinstance(row, dict):
        raise _NotText(f"it is {names.get(type(row), 'a number')}")
    if column not in row:
        raise _NotText(f"there is no {column!r}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise _NotText(f"it is {names.get(type(text), 'a number')}")
    try:
        return (text or "").encode()
    except UnicodeEncodeError:
        raise _NotText("half of a surrogate pair stands there alone") from None


def _expected(where: str, column: str, why: str) -> str:
    return f"{where}: expected a JSON object with text under {column!r} (--text-column), but {why}"


def _parse(line: bytes) -> Any:
    """The value of one line of JSON. Raises _NotText if it is not valid."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise _NotText(f"it is not UTF-8 ({e.reason} at byte {e.start})") from None
    except ValueError as e:
        raise _NotText(f"it is not JSON ({first_line(e)})") from None
    except RecursionError:
        raise _NotText("it is nested too deeply") from None


def _read_lines(path: str, start: int, stop: int, column: str, reject: Reject) -> Iterator[Document]:
    """The rows whose lines begin in bytes [start, stop) of the file; all rows if it is compressed."""
    packed, number, at = path.lower().endswith(PACKED), 0, start

    def where() -> str:
        before = 0
        if start:  # the lines of earlier pieces are counted only for a message
            with _open(path) as f:
                before = sum(f.read(min(MB, begin - done)).count(b"\n") for done in range(0, begin, MB))
        return f"{in_words(path)}, line {before + number}"

    try:
        with _unpacked(path) as f:
            if start:  # a line that began before `start` belongs to the previous piece
                f.seek(start - 1)
                at += len(f.readline()) - 1
            begin = at
            while (packed or at < stop) and (line := f.readline()):  # only \n ends a line: other separators may be text
                at, number = at + len(line), number + 1
                line = line.removeprefix(BOM)
                if not line.strip():
                    continue
                try:
                    text = _text_of(_parse(line), column)
                except _NotText as e:
                    reject(_expected(where(), column, str(e)))
                    continue
                yield where, text
    except READ_ERRORS as e:
        after = f"{where()}: the file can't be read after this line" if number else f"{in_words(path)}: can't be read"
        reject(f"{after} ({_reason(e)})")


def _read_json(path: str, column: str, reject: Reject) -> Iterator[Document]:
    """The rows of a .json file: the elements of one array, or lines."""
    try:
        shape = json_shape(path)
    except READ_ERRORS as e:
        reject(f"{in_words(path)}: can't be read ({_reason(e)})")
        return
    if shape == "lines":
        yield from _read_lines(path, 0, 1 << 62, column, reject)
        return
    if shape != "array":
        reject(f"{in_words(path)}: expected an array of JSON objects, or one on each line")
        return
    row = -1

    def where() -> str:
        return f"{in_words(path)}, row {row} (counted from 0)"

    try:
        with _unpacked(path) as f:
            for row, value in enumerate(_elements(f)):  # noqa: B007 (where() reads it)
                try:
                    text = _text_of(value, column)
                except _NotText as e:
                    reject(_expected(where(), column, str(e)))
                    continue
                yield where, text
    except (*READ_ERRORS, ValueError, RecursionError) as e:
        after = f"{where()}: the file can't be read after this row" if row >= 0 else f"{in_words(path)}: can't be read"
        reject(f"{after} ({_reason(e)})")


def json_shape(path: str) -> str:
    """The shape of a .json file by its beginning: "array" of rows, "lines" of rows, or "" for anything else."""
    with _unpacked(path) as f:
        line = b"\n"
        while line and not line.strip():
            line = f.readline(BLOCK_BYTES).removeprefix(BOM)
        line, more = line.strip(), b"\n"
        if line[:1] == b"[":
            inside = line[1:].lstrip()
            while more and not inside:
                more = f.readline(BLOCK_BYTES)
                inside = more.strip()
            return "array" if inside[:1] in (b"{", b"]") else ""
    try:
        return "lines" if not line or isinstance(_parse(line), dict) else ""
    except _NotText:
        return "lines" if len(line) >= BLOCK_BYTES else ""


def is_settings(path: str, column: str) -> bool:
    """Whether a .json file has no rows: like package.json, one object without the column, or another shape."""
    try:
        if (shape := json_shape(path)) != "lines":
            return not shape
        with _unpacked(path) as f:
            lines = [line for line in (f.readline(BLOCK_BYTES).strip() for _ in range(2)) if line]
        return len(lines) == 1 and len(lines[0]) < BLOCK_BYTES and column not in _parse(lines[0].removeprefix(BOM))
    except (*READ_ERRORS, _NotText):
        return False  # the reader will report the error


def _elements(f: io.BufferedIOBase) -> Iterator[Any]:
    """The elements of one JSON array, with a few megabytes in memory at a time. Raises ValueError if invalid."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    buffer, at, ended = "", 0, False

    def more() -> None:
        nonlocal buffer, at, ended
        block = f.read(max(MB, len(buffer) - at))  # doubled each time, so that a long element is parsed few times
        buffer, at, ended = buffer[at:] + utf8.decode(block, final=not block), 0, not block

    def mark() -> str:
        """The next character that is not white space; "" at the end."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer) or ended:
                return buffer[at : at + 1]
            more()

    mark()
    for number in itertools.count():
        at += 1  # past the bracket or the comma
        if number == 0 and mark() == "]":
            break
        mark()
        while True:
            try:
                value, end = decoder.raw_decode(buffer, at)
                break
            except ValueError:
                if ended or len(buffer) - at > VALUE_BYTES:
                    raise
                more()
        at = end
        yield value
        if (found := mark()) != ",":
            if found != "]":
                raise ValueError(f"expected a comma or a closing bracket, found {found or 'the end'!r}")
            break
    at += 1
    if mark():
        raise ValueError("more text after the closing bracket")


def _read_parquet(path: str, piece: int, pieces: int, column: str, reject: Reject) -> Iterator[Document]:
    """The rows of the row groups in one of `pieces` equal pieces, decoded a few megabytes at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = in_words(path)
    try:
        f = pq.ParquetFile(_open(path), pre_buffer=False, buffer_size=MB, page_checksum_verification=True)
        schema = f.schema_arrow
    except (pa.ArrowException, OSError) as e:
        if piece == 0:  # once per file, not per piece
            why = e.strerror if isinstance(e, PermissionError) else f"not a whole parquet file ({first_line(e)})"
            reject(f"{name}: {why}")
        return
    if wrong := _wrong_column(schema, column):
        if piece == 0:
            reject(f"{name}: {wrong}", max(1, f.metadata.num_rows))
        return
    field = schema.get_field_index(column)
    kind_of_text = schema.field(field).type
    groups = [f.metadata.row_group(group) for group in range(f.num_row_groups)]
    for group in range(len(groups) * piece // pieces, len(groups) * (piece + 1) // pieces):
        row, rows = sum(g.num_rows for g in groups[:group]), groups[group].num_rows
        last = row + rows - 1
        batch_rows = max(1, min(4096, rows * BLOCK_BYTES // max(1, groups[group].total_byte_size)))
        try:
            for batch in f.iter_batches(batch_rows, [group], [column], use_threads=False):
                texts = batch.column(batch.schema.get_field_index(column))  # `column` also selects `column.other`
                texts = texts.dictionary_decode() if pa.types.is_dictionary(kind_of_text) else texts
                for text in texts.cast(pa.large_binary()).to_pylist():
                    yield lambda: f"{name}, row {row} (counted from 0)", text or b""  # noqa: B023 (called at once)
                    row += 1
        except (pa.ArrowException, OSError) as e:
            reject(f"{name}, rows {row} to {last} (counted from 0): row group {group} is damaged ({first_line(e)})")


def _wrong_column(schema, column: str) -> str:
    """Why the column of a parquet file can't be read as text, in words; "" if it can."""
    import pyarrow as pa

    named = [field.type for field in schema if field.name == column]
    if not named:
        return f"no column {column!r}; --text-column must be one of {', '.join(schema.names) or '(none)'}"
    if len(named) > 1:
        return f"{len(named)} columns are named {column!r}; --text-column must name one"
    kind_of_text = named[0].value_type if pa.types.is_dictionary(named[0]) else named[0]
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    is_text += (pa.types.is_string_view, pa.types.is_binary_view, pa.types.is_null)  # null: rows without text
    if not any(check(kind_of_text) for check in is_text):
        return f"column {column!r} holds {named[0]}; --text-column must name a column of text"
    return ""
