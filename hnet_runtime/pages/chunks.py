"""Text with its chunks shown in a terminal: colours where it has 256 or more, bars elsewhere.

A chunk of the innermost chunking stage has one hue, its neighbours others; the chunks of stage 0 in it alternate
between a lighter and a darker shade; with three stages or more, those in between alternate between underlined and not.

Bytes are shown as soon as they're known to be a whole character. A character has the style of its first byte: where a
chunk begins inside one, a mark (`¦`) follows it. What is no UTF-8, and what a terminal would obey (escapes, text
direction), is shown by its number: \\xff, \\u202e. The chunks are exact all the same.
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

from hnet_simple import UTF8_NEXT

# light and dark shade of a hue, apart for the colour-blind; black on them reads well on any terminal
HUES = (("#d6ecff", "#9ccbf5"), ("#ffe9bd", "#f7c35f"), ("#d3f2dc", "#8fd6ab"), ("#fbdcee", "#eda6cf"))
INSIDE = "¦"
BARS = "|‖⦀"  # before a chunk of stage 0, 1, 2; without colours
ASCII_BARS = str.maketrans({"‖": "||", "⦀": "|||", INSIDE: "!"})  # where the encoding lacks them
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they would reorder the line
_NEXT = UTF8_NEXT.tolist()


class Piece(NamedTuple):
    """A run of text to print, and what to print it in: `counts[s]` is the number of its chunk of stage s."""

    text: str
    counts: tuple[int, ...]
    opens: int  # how many stages, outermost first, begin a chunk here
    is_text: bool = True  # False for marks and for numbers that stand for bytes


class Chunks:
    """Cuts a stream of bytes into printable pieces. Feed it every byte with its chunk starts, then `close` it."""

    def __init__(self):
        self.pending: list[tuple[int, tuple[int, ...], int]] = []  # bytes of an unfinished character
        self.state, self.counts = 0, ()

    def feed(self, byte: int, starts: Sequence[bool]) -> list[Piece]:
        """The pieces that this byte completes: none inside a character, several where one turns out to be broken."""
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
        """What is left: bytes that never became a character, by their numbers."""
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
    """The character, or its number where printing it would do something else than show it."""
    obeyed = unicodedata.category(character) == "Cc" and character not in "\n\t"
    if not obeyed and character not in DIRECTIONS:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def style_of(piece: Piece) -> Style:
    """Hue, shade and underline by the numbers of the piece's chunks."""
    if not piece.counts:
        return Style(dim=not piece.is_text)
    underline = sum(piece.counts[1:-1]) % 2 == 1
    shade = HUES[piece.counts[-1] % len(HUES)][piece.counts[0] % 2 if len(piece.counts) > 1 else 0]
    return Style(color="#202020" if piece.is_text else "#a03030", bgcolor=shade, underline=underline)


def pieces_of(data: bytes, starts: Iterable[Sequence[bool]]) -> list[Piece]:
    """All pieces of a finished text. `starts`: for each byte, whether it opens a chunk of stage 0, 1, ..."""
    chunks = Chunks()
    pieces = [piece for byte, opens in zip(data, starts, strict=True) for piece in chunks.feed(byte, opens)]
    return pieces + chunks.close()


def render(data: bytes, starts: Iterable[Sequence[bool]]) -> Text:
    """The text in colours, for `rich` to print. ValueError unless there's one entry of `starts` for each byte.

    Masks, one for each stage, as `evaluation.validation.chunks_of` returns them, become `starts` by zip(*masks).
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
    """The text with a bar before each chunk but the first: | opens one of stage 0, ‖ also one of stage 1, and so on.

    A chunk that begins inside a character is marked `¦` after it.
    """
    return "".join(_barred(piece, first=not n) for n, piece in enumerate(pieces_of(data, starts)))


def _barred(piece: Piece, first: bool) -> str:
    bar = BARS[min(piece.opens, len(BARS)) - 1] if piece.opens and not first else ""
    return piece.text if piece.text == INSIDE and not piece.is_text else bar + piece.text


def has_colours(console: Console) -> bool:
    """Whether the console shows the shades of HUES: 16 colours have one for all of them, and NO_COLOR asks for none."""
    return console.color_system in ("256", "truecolor") and not console.no_color


def print_chunks(data: bytes, starts: Iterable[Sequence[bool]], console: Console | None = None) -> None:
    """Print a finished text and end the line: in colours where `has_colours`, else with bars in unbroken lines."""
    console = console or Console()
    if has_colours(console):
        console.print(render(data, starts), soft_wrap=True)
    else:
        _write(console, bars(data, starts) + "\n")


def _write(console: Console, text: str) -> None:
    """Past `rich`, which breaks lines at 80 columns where there is no terminal and makes spaces of tabs."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII_BARS).encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.file.write(text)
    console.file.flush()


class Printer:
    """Prints a stream byte by byte: in colours where the console has enough of them, else with bars."""

    def __init__(self, console: Console):
        self.console, self.chunks, self.is_first = console, Chunks(), True

    def feed(self, byte: int, starts: Sequence[bool]) -> None:
        """Print what this byte completes, at once."""
        self._print(self.chunks.feed(byte, starts))

    def close(self) -> None:
        """Print what is left and end the line."""
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
    """One line that says what the colours mean, or the bars."""
    if not stages:
        return "no chunks: the model has no chunking stage"
    if not colours:
        more = "".join(f", {bar} also one of stage {s}" for s, bar in enumerate(BARS[1:stages], 1))
        return f"{BARS[0]} begins a chunk of stage 0{more}" if more else f"{BARS[0]} begins a chunk"
    if stages == 1:
        return "each chunk has a colour of its own"
    between = "; underlined or not: the stages between" if stages > 2 else ""
    return f"colour: chunks of stage {stages - 1}; light or dark: chunks of stage 0 in them{between}"
