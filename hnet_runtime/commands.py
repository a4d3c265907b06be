"""The code that all commands share: reading flags, printing mistakes, exiting. It imports no torch.

A command has `def main(argv)`. It begins with `options = parse(Options, argv, __doc__)` and imports torch only after
that, so that --help is fast. The file ends with `if __name__ == "__main__": run(main)`.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import gc
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO, TypeVar, get_type_hints

from hnet_runtime import DataError, RunFailed, UserError

Options = TypeVar("Options")

READER_GONE = 141  # the status that a shell reports for a process ended by SIGPIPE
INTERRUPTED = 130
BOM = b"\xef\xbb\xbf"  # some editors put it before UTF-8
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def parse(options: type[Options], argv: Sequence[str], about: str) -> Options:
    """The flags in `argv` as an instance of the dataclass `options`; `--help` shows `about` and ends the process.

    Paragraphs of `about` that have an indented line or a command (python, torchrun, hnet-...) are examples, whose
    lines are not joined. Raises UserError for flags that can't be used.
    """
    return read_flags(options, argv, description=_with_examples(about))


def read_flags(options: type[Options], argv: Sequence[str], **settings) -> Options:
    """`tyro.cli` with `settings`, which ends the process only for --help: wrong flags raise UserError, one sentence."""
    import tyro

    options, printed = with_joined_help(options), io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            found = tyro.cli(options, prog=prog(), args=list(argv), **settings)
    except SystemExit as ended:
        if ended.code != 2:
            raise
        raise UserError(_in_a_sentence(printed.getvalue(), _long_flags(options), argv)) from None
    sys.stderr.write(printed.getvalue())  # a warning, if anything
    _refuse_empty(found)
    return found


def _refuse_empty(found: Any) -> None:
    """Raises UserError for an empty argument, as a shell makes it of an unset variable; Path("") would be this folder.

    A flag that is empty by default, or None, may be empty.
    """
    import tyro

    types = get_type_hints(type(found), include_extras=True)
    for field in dataclasses.fields(found):
        value, about = getattr(found, field.name), getattr(types[field.name], "__metadata__", ())
        if field.default not in ("", None) and "" in (value if isinstance(value, tuple | list) else [value]):
            name = f"--{field.name.replace('_', '-')}"
            if tyro.conf.Positional in about:
                name = next(arg.metavar for arg in about if getattr(arg, "metavar", None)).strip("[ .]")
            raise UserError(f"{name} '': expected a value that is not empty (see --help)")


def _long_flags(options: type) -> list[str]:
    import tyro

    types = get_type_hints(options, include_extras=True)
    names = [name for name in types if tyro.conf.Positional not in getattr(types[name], "__metadata__", ())]
    names += [f"no-{name}" for name in names if types[name] is bool]
    return ["--" + name.replace("_", "-") for name in names]


def _in_a_sentence(printed: str, flags: Sequence[str], argv: Sequence[str]) -> str:
    """What tyro printed about wrong flags, a box of several lines, in one sentence."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in printed.splitlines()]
    lines = [line.strip("│")[1:].rstrip() for line in lines if line[:1] not in ("╭", "╰")] or [printed]
    lines = list(itertools.takewhile(lambda line: not line.startswith("──"), lines))  # without help
    text = " ".join(" ".join(lines).split())
    if text.startswith("Unrecognized options: "):
        unknown = text.removeprefix("Unrecognized options: ")
        known = [token for token in argv if f"{unknown}, ".startswith(f"{token}, ")]
        return _unknown(known[0] if known else unknown, flags, argv)
    if text.startswith("Missing from "):  # names have an indent of 4, their help one of 8
        names = [line.strip() for line in lines if re.match(" {4}[^ ]", line)]
        if len(names) > 1:
            return f"{' and '.join(names)} are missing (see --help)"
        what = " ".join(line.strip() for line in lines if line.startswith(" " * 8))
        what = what.removesuffix("(required)").strip().rstrip(".")
        return f"{names[0]} is missing: {what[:1].lower()}{what[1:]} (see --help)"
    if found := re.match(r"Missing value for argument '(?:[^-'][^']*|([^']*))'", text):
        if not found[1]:  # an unknown flag stands before the first argument
            token = next((token for token in argv if token[:2] == "--" and _name(token) not in flags), "")
            return _unknown(token, flags, argv) if token else f"{text} (see --help)"
        flag = _typed(found[1], argv)
        rest = argv[argv.index(flag) + 1 :] if flag in argv else []
        return f"{flag}: expected a value{f', or {flag}={rest[0]}' if rest else ''} (see --help)"
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*?),?\)\.", text):
        value, flag, choices = found.groups()
        return f"{_typed(flag, argv)} {value}: expected one of {choices.replace(chr(39), '')}"
    if found := re.match(r"Error parsing ([^ :]+): .*?(int\(\)|to float).*'(.*)'", text):
        flag, kind, value = found.groups()
        return f"{_typed(flag, argv)} {value}: expected a {'whole number' if kind == 'int()' else 'number'}"
    return f"{text} (see --help)"


def _typed(flag: str, argv: Sequence[str]) -> str:
    """Of the names of a flag, such as -e/--early-exit, the one on the command line."""
    names = flag.split("/")
    return next((name for name in names if name in argv), names[-1])


def _name(token: str) -> str:
    return token.partition("=")[0].replace("_", "-")


def _unknown(token: str, flags: Sequence[str], argv: Sequence[str]) -> str:
    """A sentence about a part of the command line that no flag takes."""
    if not token.startswith("-"):
        before = argv[argv.index(token) - 1] if token in argv[1:] else ""
        return f"{token}: {f'not expected after {before}' if before else 'no such argument'} (see --help)"
    name = _name(token)
    similar = [flag for flag in flags if len(name) > 3 and flag.startswith(name)]
    if not similar:
        similar = difflib.get_close_matches(name.lstrip("-"), [flag[2:] for flag in flags], cutoff=0.7)
        similar = [f"--{flag}" for flag in similar]
    also = f"; similar: {', '.join(similar[:3])}" if similar else ""
    return f"{token.partition('=')[0]}: no such flag{also} (see --help)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, one sentence, for arguments that can't be used."""

    def parse_args(self, args=None, namespace=None):
        self.argv = list(sys.argv[1:] if args is None else args)
        return super().parse_args(self.argv, namespace)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if getattr(found, action.dest, None) == "" != action.default:
                name = (action.option_strings or [action.dest])[0]
                raise UserError(f"{name} '': expected a value that is not empty (see --help)")
        return found, rest

    def flags(self) -> list[str]:
        """The long flags, also those of subcommands."""
        others = [action.choices.values() for action in self._actions if isinstance(action.choices, dict)]
        actions = [action for parser in (self, *itertools.chain(*others)) for action in parser._actions]
        return [flag for action in actions for flag in action.option_strings if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"unrecognized arguments: ([^ ]+)", message):
            raise UserError(_unknown(found[1], self.flags(), self.argv))
        if found := re.match(r"the following arguments are required: (.*)", message):
            missing = found[1].split(", ")
            raise UserError(f"{' and '.join(missing)} {'is' if len(missing) < 2 else 'are'} missing (see --help)")
        if found := re.match(r"argument ([^ ]+): invalid (\w+) value: '(.*)'", message):
            raise UserError(f"{found[1]} {found[3]}: expected a {'whole ' * (found[2] == 'int')}number")
        if found := re.match(r"argument ([^ ]+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            raise UserError(f"{found[2]}: expected {found[3].replace(chr(39), '').replace(', ', ' or ')} (see --help)")
        if found := re.match(r"argument ([^ ]+): expected one argument", message):
            raise UserError(f"{found[1]}: expected a value")
        raise UserError(f"{message} (see --help)")


def prog(of_checkout: str | None = None) -> str | None:
    """The name of the installed command that started this process, such as hnet-plot; else `of_checkout`."""
    name = os.path.basename(sys.argv[0])
    return name if name.startswith("hnet-") else of_checkout


def with_joined_help(options: type[Options]) -> type[Options]:
    """The dataclass, with the docstring of each field joined into one line as the field's help.

    tyro would keep the line breaks of the source in a docstring of several lines, and then wrap its lines once more.
    """
    import tyro

    with contextlib.suppress(OSError, TypeError):  # no source
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
        types = get_type_hints(options, include_extras=True)
        for field, docstring in itertools.pairwise(tree.body):
            match field, docstring:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    options.__annotations__[name] = Annotated[types[name], tyro.conf.arg(help=" ".join(text.split()))]
    return options


def _with_examples(about: str) -> str:
    """`about` with its examples indented, so that tyro does not change them, and each other paragraph in one line.

    An installed command shows its own name in the examples.
    """
    if prog():
        about = re.sub(r"\bpython scripts/(\w+)\.py", r"hnet-\1", about)
    paragraphs = re.split(r"\n\s*\n", about.strip("\n"))
    is_example = re.compile(r"^( |python |torchrun |hnet-)", re.MULTILINE)
    return "\n\n".join(
        textwrap.indent(textwrap.dedent(paragraph), "    ")
        if is_example.search(paragraph)
        else " ".join(paragraph.split())
        for paragraph in paragraphs
    )


def run(main: Callable[[list[str]], int | None], output_may_fail: bool = False, smaller: str = "") -> NoReturn:
    """Runs `main` on this process's arguments and ends the process with the status that it returns (None: 0).

    A mistake of the user (UserError, DataError, ConfigError) is one line on stderr, "error: ...", and status 2, or 1
    where a run failed. A file that can't be opened is a mistake, too. Memory that runs out is a line and status 1;
    `smaller` are the flags that need less of it. So is a connection that broke because another process of the job died.
    Ctrl-C is status 130. If the reader of stdout closes it, as in `| head`, the command ends silently with status 141:
    so write files before printing. With `output_may_fail` the command instead runs to its end and its output is
    dropped. Printing to stderr never ends a command. A character that the terminal's encoding lacks is printed as its
    number (\\u65e5).
    """
    with _safe_streams(output_may_fail):
        try:
            status = main(sys.argv[1:])
            sys.stdout.flush()
        except KeyboardInterrupt:
            status = INTERRUPTED
        except SystemExit as ended:
            if not isinstance(ended.__context__, BrokenPipeError):  # which rich turns into status 1
                raise
            _discard_stdout()
            status = READER_GONE
        except BrokenPipeError:
            if output_may_fail:  # then the error is not from stdout
                raise
            _discard_stdout()
            status = READER_GONE
        except OSError as error:
            if output_may_fail:
                raise
            if error.filename is not None:
                status = print_error(UserError(f"{error.filename}: can't be opened ({error.strerror})"))
            elif error.errno in _UNWRITABLE:
                _discard_stdout()
                status = print_error(UserError(f"the output can't be written ({error.strerror})"))
            else:
                raise
        except Exception as error:
            if isinstance(error, user_errors()):
                status = print_error(error)
            elif smaller and _is_out_of_memory(error):
                print_error(UserError(f"memory ran out; expected smaller {smaller}, or a machine with more memory"))
                status = 1
            elif reason := _why_disconnected(error):
                status = print_error(RunFailed(f"another process of the job died, or does not answer ({reason})"))
            else:
                raise
    sys.exit(status)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside, modules are imported without garbage collection, which takes a sixth of the time of importing torch.

    Later collections pass over all objects that exist by then, because modules stay to the end.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is an error of Python, numpy, or torch's allocator for a CPU or a GPU."""
    return isinstance(error, MemoryError) or bool(re.search("can't allocate memory|out of memory", str(error)))


def _why_disconnected(error: Exception) -> str:
    """What gloo or the store of a job of several processes says after one of them has died; else empty."""
    reasons = "Connection (?:reset|closed) by peer|Broken pipe|Connection was likely closed|Timed out waiting"
    is_one_of_many = isinstance(error, RuntimeError) and int(os.environ.get("WORLD_SIZE", 1)) > 1
    return "".join(re.findall(reasons, str(error))[:1]) if is_one_of_many else ""


def print_error(mistake: Exception) -> int:
    """Prints a mistake of the user to stderr in one write, and returns its exit status."""
    sys.stderr.write(f"error: {mistake}\n")
    return getattr(mistake, "status", 2)


def read_text(file: str, flag: str = "") -> bytes:
    """The bytes of a file with text for a model. Warns of what its author may not expect there: see `warn_of_bytes`.

    flag: the flag that named the file, for messages. Raises UserError if the file can't be read or is empty.
    """
    name = f"{flag} {file}".strip()
    try:
        text = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: can't be read ({error.strerror})") from None
    if not text:
        raise UserError(f"{name}: empty; expected at least one byte")
    warn_of_bytes(file, text)
    return text


def warn_of_bytes(name: str, text: bytes) -> None:
    """Prints to stderr what a model reads in the text of the file `name` that its author may not expect there."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        warn(f"{name}: byte {error.start} is not UTF-8; the model reads the bytes as they are")
    if b"\xfe" in text or b"\xff" in text:
        warn(f"{name}: holds a byte FE or FF, which to the model mean beginning and end of text")
    if text.startswith(BOM):
        warn(f"{name}: begins with a byte order mark, which the model reads as text")


def warn(what: str) -> None:
    """Prints a warning, one sentence, to stderr."""
    sys.stderr.write(f"warning: {what}\n")


def user_errors() -> tuple[type[Exception], ...]:
    """The exception classes for mistakes of the user; those of a module only if it has been imported."""
    others = {"hnet_config": "ConfigError", "hnet_kernels.dispatch": "KernelError"}
    found = [getattr(sys.modules[module], name) for module, name in others.items() if module in sys.modules]
    return (UserError, DataError, *found)


def unfailing(stream: TextIO) -> TextIO:
    """A text stream with the same destination that never raises: what can't be written is dropped."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # not a file of the operating system, as in tests
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    buffer = io.BufferedWriter(_Unfailing(descriptor, "w", closefd=False))
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)


class _Unfailing(io.FileIO):
    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def _safe_streams(output_may_fail: bool) -> Iterator[None]:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell (>&-)
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)
    before = sys.stdout, sys.stderr
    sys.stderr = unfailing(sys.stderr)
    if output_may_fail:
        sys.stdout = unfailing(sys.stdout)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stderr.flush()
        try:
            sys.stdout.flush()
        except OSError:  # else Python tries again at exit and prints an error
            _discard_stdout()
        sys.stdout, sys.stderr = before


def _discard_stdout() -> None:
    """Discards stdout's buffer, because writing it would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
