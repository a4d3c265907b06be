"""Shows text with its chunks in a terminal: in colours if it has 256 or more, else with bars.

A chunk of the innermost chunking stage has one hue, different from its neighbours. The chunks of stage 0 inside it
alternate between a lighter and a darker shade. With three stages or more, the chunks of the middle stages alternate
between underlined and not.

Bytes are shown as soon as they form a complete character. A character has the style of its first byte; if a chunk
begins inside it, a mark (`¦`) follows. Bytes that are not UTF-8, and characters that control a terminal (escapes, text
direction), are shown as numbers: \\xff, \\u202e. The chunks stay exact.
"""

from __future__ import annotations

import html
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.style import Style
from rich.text import Text

from hnet_kernels.sampling import UTF8_NEXT

# light and dark shades of hues, distinguishable for the colour-blind and readable with black text
HUES = (("#d6ecff", "#9ccbf5"), ("#ffe9bd", "#f7c35f"), ("#d3f2dc", "#8fd6ab"), ("#fbdcee", "#eda6cf"))
INSIDE = "¦"
BARS = "|‖⦀"  # before a chunk of stage 0, 1, 2, without colours
ASCII_BARS = str.maketrans({"‖": "||", "⦀": "|||", INSIDE: "!"})  # if the encoding lacks them
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they would reorder the line
_NEXT = UTF8_NEXT.tolist()


class Piece(NamedTuple):
    """A piece of text in one style: `counts[s]` is the number of its chunk of stage s."""

    text: str
    counts: tuple[int, ...]
    opens: int  # the number of stages, outermost first, that begin a chunk here
    is_text: bool = True  # False for marks and for numbers of bytes


class Chunks:
    """Cuts a stream of bytes into printable pieces. `feed` it every byte with its chunk starts, then `close` it."""

    def __init__(self):
        self.pending: list[tuple[int, tuple[int, ...], int]] = []  # bytes of an unfinished character
        self.state, self.counts = 0, ()

    def feed(self, byte: int, starts: Sequence[bool]) -> list[Piece]:
        """The pieces that this byte completes: none inside a character, several after an invalid one."""
        self.counts = tuple(n + bool(s) for n, s in zip(self.counts or (0,) * len(starts), starts))
        opens = sum(map(bool, starts))
        pieces, then = [], _NEXT[self.state][byte]
        if then < 0 and self.pending:
            pieces, then = self.close(), _NEXT[0][byte]
        self.pending.append((byte, self.counts, opens))
        if then < 0:
            return pieces + self.close()
        self.state = then
        return pieces if then else pieces + self._character()

    def close(self) -> list[Piece]:
        """The remaining bytes, which form no character, as numbers."""
        pieces = [Piece(f"\\x{byte:02x}", counts, opens, False) for byte, counts, opens in self.pending]
        self.pending, self.state = [], 0
        return pieces

    def _character(self) -> list[Piece]:
        (_, counts, opens), *rest = self.pending
        character = bytes(byte for byte, _, _ in self.pending).decode()
        self.pending = []
        shown = _shown(character)
        pieces = [Piece(shown, counts, opens, shown == character)]
        return pieces + [Piece(INSIDE, now, cut, False) for _, now, cut in rest if cut]


def _shown(character: str) -> str:
    """The character, or its number if printing it would not show it."""
    obeyed = unicodedata.category(character) == "Cc" and character not in "\n\t"
    if not obeyed and character not in DIRECTIONS:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def style_of(piece: Piece) -> Style:
    """Hue, shade and underline for the chunk numbers of a piece."""
    if not piece.counts:
        return Style(dim=not piece.is_text)
    underline = sum(piece.counts[1:-1]) % 2 == 1
    shade = HUES[piece.counts[-1] % len(HUES)][piece.counts[0] % 2 if len(piece.counts) > 1 else 0]
    return Style(color="#202020" if piece.is_text else "#a03030", bgcolor=shade, underline=underline)


def pieces_of(data: bytes, starts: Iterable[Sequence[bool]]) -> list[Piece]:
    """All pieces of a complete text. `starts`: for each byte, whether it opens a chunk of stage 0, 1, ..."""
    chunks = Chunks()
    pieces = [piece for byte, opens in zip(data, starts, strict=True) for piece in chunks.feed(byte, opens)]
    return pieces + chunks.close()


def render(data: bytes, starts: Iterable[Sequence[bool]]) -> Text:
    """The text in colours, for `rich`. Raises ValueError unless `starts` has one entry per byte.

    zip(*masks) makes `starts` from one mask per stage, which `evaluation.validation.chunks_of` returns.
    """
    runs = itertools.groupby(pieces_of(data, starts), style_of)
    return Text.assemble(*(("".join(piece.text for piece in run), style) for style, run in runs))


def to_html(data: bytes, starts: Iterable[Sequence[bool]]) -> str:
    """The text in the same colours as `render`, as HTML that needs no style sheet."""
    out = []
    for style, run in itertools.groupby(pieces_of(data, starts), style_of):
        line = "; text-decoration: underline" if style.underline else ""
        ground = f"background: {style.bgcolor.name}; color: {style.color.name}{line}" if style.bgcolor else ""
        out.append(f'<span style="{ground}">{html.escape("".join(piece.text for piece in run))}</span>')
    return f'<div style="white-space: pre-wrap; font: 14px/1.7 monospace">{"".join(out)}</div>'


def bars(data: bytes, starts: Iterable[Sequence[bool]]) -> str:
    """The text with a bar before each chunk except the first: | for stage 0, ‖ also for stage 1, and so on.

    A chunk that begins inside a character is marked by `¦` after it.
    """
    return "".join(_barred(piece, first=not n) for n, piece in enumerate(pieces_of(data, starts)))


def _barred(piece: Piece, first: bool) -> str:
    bar = BARS[min(piece.opens, len(BARS)) - 1] if piece.opens and not first else ""
    return piece.text if piece.text == INSIDE and not piece.is_text else bar + piece.text


def has_colours(console: Console) -> bool:
    """Whether the console can show the shades of HUES, which needs more than 16 colours and no NO_COLOR."""
    return console.color_system in ("256", "truecolor") and not console.no_color


def print_chunks(data: bytes, starts: Iterable[Sequence[bool]], console: Console | None = None) -> None:
    """Prints a complete text and ends the line: in colours if `has_colours`, else with bars in unbroken lines."""
    console = console or Console()
    if has_colours(console):
        console.print(render(data, starts), soft_wrap=True)
    else:
        _write(console, bars(data, starts) + "\n")


def _write(console: Console, text: str) -> None:
    """Prints without `rich`, which breaks lines at 80 columns without a terminal and replaces tabs by spaces."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII_BARS).encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.file.write(text)
    console.file.flush()


class Printer:
    """Prints a stream byte by byte: in colours if the console has enough of them, else with bars."""

    def __init__(self, console: Console):
        self.console, self.chunks, self.is_first = console, Chunks(), True

    def feed(self, byte: int, starts: Sequence[bool]) -> None:
        """Prints what this byte completes, at once."""
        self._print(self.chunks.feed(byte, starts))

    def close(self) -> None:
        """Prints the rest and ends the line."""
        self._print(self.chunks.close())
        _write(self.console, "\n")

    def _print(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if has_colours(self.console):
                self.console.print(Text(piece.text, style=style_of(piece)), end="", soft_wrap=True)
            else:
                _write(self.console, _barred(piece, self.is_first))
            self.is_first = False


def legend(stages: int, colours: bool = True) -> str:
    """One line that explains the colours or the bars."""
    if not stages:
        return "no chunks: the model has no chunking stage"
    if not colours:
        more = "".join(f", {bar} also one of stage {s}" for s, bar in enumerate(BARS[1:stages], 1))
        return f"{BARS[0]} begins a chunk of stage 0{more}" if more else f"{BARS[0]} begins a chunk"
    if stages == 1:
        return "each chunk has a colour of its own"
    between = "; underlined or not: the stages between" if stages > 2 else ""
    return f"colour: chunks of stage {stages - 1}; light or dark: chunks of stage 0 in them{between}"
