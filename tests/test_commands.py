"""How commands start and end: --help, mistakes, closed outputs, full disks, characters that a terminal lacks."""

import gc
import json
import os
import pty
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hnet_runtime.commands import importing

ROOT = Path(__file__).parent.parent

COMMAND = """
import sys
import textwrap
from hnet_runtime import UserError
from hnet_runtime.commands import run

def main(argv):
    what, file = argv[:2]
    if what == "mistake":
        raise UserError("--flag 3: expected 4")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "help":
        print("usage")
        raise SystemExit(0)
    if what == "bug":
        raise ValueError("a bug")
    if what == "unreadable":
        open(file + "/nowhere")
    if what == "memory":
        bytearray(1 << 60)
    for n in range(30_000):
        print("a line of text", n, file=sys.stderr if what == "stderr" else sys.stdout)
    print("日本")
    open(file, "w").write("whole")
    return 3

run(main, "--may-fail" in sys.argv, smaller="--batch")
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("command") / "command.py"
    file.write_text(COMMAND, encoding="utf-8")
    return file


def shell(line: str, encoding: str = "utf-8") -> tuple[int, str]:
    """Exit status and output of a line of bash; for a pipe the status of its first command."""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}
    line = f"{line}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=60)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def test_statuses_and_what_is_said(command, tmp_path):
    file = tmp_path / "file"
    call = f"{sys.executable} {command}"
    assert shell(f"{call} mistake {file}") == (2, "error: --flag 3: expected 4\n")
    assert shell(f"{call} interrupt {file}") == (130, "")
    status, said = shell(f"{call} bug {file}")
    assert status == 1 and "ValueError: a bug" in said  # a bug of ours is no mistake of the user
    said = f"error: {file}/nowhere: can't be opened (No such file or directory)\n"
    assert shell(f"{call} unreadable {file}") == (2, said)
    said = "error: memory ran out; expected smaller --batch, or a machine with more memory\n"
    assert shell(f"{call} memory {file}") == (1, said)
    assert shell(f"{call} lines {file} > /dev/full") == (
        2,
        "error: the output can't be written (No space left on device)\n",
    )
    assert shell(f"{call} lines {file} >&-")[0] == 3 and file.read_text() == "whole"


def test_a_reader_that_goes(command, tmp_path):
    """Quiet in any case. What goes to stderr never ends a command; with output_may_fail, neither does stdout."""
    file = tmp_path / "file"
    call = f"{sys.executable} {command}"
    assert shell(f"{call} lines {file} | head -1") == (141, "a line of text 0\n") and not file.exists()
    assert shell(f"{call} lines {file} --may-fail 2>&1 | head -1") == (3, "a line of text 0\n") and file.exists()
    assert shell(f"{call} help {file} | sleep 0")[1] == ""
    file.unlink()
    assert shell(f"{call} stderr {file} 2>&1 >/dev/null | head -1") == (3, "a line of text 0\n") and file.exists()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_a_terminal_lacks(command, tmp_path, encoding):
    for flag in ("", "--may-fail"):
        status, said = shell(f"{sys.executable} {command} lines {tmp_path / 'file'} {flag} | tail -1", encoding)
        assert (status, said) == (3, "\\u65e5\\u672c\n")


# --------------------------------------------------------------------------------------------------------------- start

HELP = """
import contextlib, io, json, os, runpy, sys, time

told = {}
for path in sys.argv[1:]:
    out, sys.argv = io.StringIO(), [path, "--help"]
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    told[os.path.basename(path)] = out.getvalue(), time.process_time() - began
heavy = sorted({"torch", "numpy", "datasets", "pyarrow", "matplotlib", "hnet_trainable"} & set(sys.modules))
print(json.dumps([told, heavy]))
"""


@pytest.fixture(scope="module")
def helps() -> tuple[dict[str, tuple[str, float]], list[str]]:
    """The output of each script's --help, its seconds, and the heavy modules that it imported."""
    scripts = sorted(str(path) for path in (ROOT / "scripts").glob("*.py"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    called = [sys.executable, "-c", HELP, *scripts]
    done = subprocess.run(called, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


FLAGS = '''
import dataclasses, sys
from hnet_runtime.commands import parse

@dataclasses.dataclass
class Options:
    """Of no use."""

    flag: str = ""
    """A sentence that begins in one line of the source and
    ends in the next."""

parse(Options, ["--help"], "A paragraph of\\ntwo lines.\\n\\npython scripts/plot.py runs/a\\n    draws")
'''


@pytest.mark.parametrize("started_as", ["plot.py", "hnet-plot"])
def test_help_joins_the_lines_of_a_paragraph_and_keeps_examples(tmp_path, started_as):
    """It shows the name with which the command was started."""
    file = tmp_path / started_as
    file.write_text(FLAGS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    said = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=True).stdout
    assert "A sentence that begins in one line of the source and ends in the next." in said
    assert "A paragraph of two lines." in said and "\n        draws\n" in said
    example = "hnet-plot" if started_as == "hnet-plot" else "python scripts/plot.py"
    assert f"\n    {example} runs/a\n" in said
    assert said.startswith("usage: hnet-plot [-h]") == (started_as == "hnet-plot")


def test_help_imports_nothing_heavy(helps):
    told, heavy = helps
    assert heavy == [] and len(told) >= 7


def test_help_has_the_examples_as_lines(helps):
    for name, (text, _) in helps[0].items():
        assert "usage: " in text and "options" in text, name
        assert " STR " not in text.split("-h, --help")[0], f"{name}: a positional argument says what it is"
        docstring = (ROOT / "scripts" / name).read_text(encoding="utf-8").split('"""')[1]
        examples = next(part for part in docstring.split("\n\n") if f"python scripts/{name}" in part)
        examples = textwrap.dedent(examples.strip("\n")).splitlines()
        shown = [line.rstrip() for line in text.splitlines()]
        at = next(n for n, line in enumerate(shown) if line.strip() == examples[0].strip())
        indent = shown[at].index("p")
        assert [line[indent:] for line in shown[at : at + len(examples)]] == examples, name
        assert indent and all(len(line) <= 90 for line in shown[at : at + len(examples)]), name


# ------------------------------------------------------------------------------------------------------------ terminal


def on_a_terminal(program: str, talk: Callable[[int], None], streams: str = "in out err") -> str:
    """The output of a Python program on a terminal, to whose other end `talk` writes."""
    master, slave = pty.openpty()
    ends = [slave if name in streams.split() else subprocess.DEVNULL for name in ("in", "out", "err")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "TERM": "xterm"}
    called = [sys.executable, "-c", program]
    process = subprocess.Popen(called, stdin=ends[0], stdout=ends[1], stderr=ends[2], env=environment)
    os.close(slave)
    talk(master)
    said = bytearray()
    try:
        while block := os.read(master, 4096):
            said += block
    except OSError:  # the program has ended
        pass
    os.close(master)
    assert process.wait(30) == 0, said
    return said.decode(errors="replace")


def test_prompts_are_edited_and_remembered():
    """Left twice and a letter between; the line before again with the arrow up; a byte that is no UTF-8."""
    pytest.importorskip("readline")
    program = "import generate\nfor line in generate.lines(): print('GOT', line)"

    def talk(master: int) -> None:
        for typed in (b"abc\x1b[D\x1b[DX\n", b"\x1b[A!\n", "é\n".encode(), b"\x04"):
            time.sleep(0.1)  # as a person would, after the prompt
            os.write(master, typed)

    said = on_a_terminal(program, talk)
    assert "GOT b'aXbc'" in said and "GOT b'aXbc!'" in said and f"GOT {'é'.encode()!r}" in said
    piped = on_a_terminal(program, lambda master: os.write(master, b"abc\n\x04"), "in err")
    assert piped.count("prompt> ") == 2  # on stderr where stdout is a file or a pipe


@pytest.mark.parametrize("total", [300, None])
def test_progress_on_a_terminal(total):
    program = f"""
import time
from hnet_runtime.pages.progress_bar import Progress
with Progress("scoring", {total}, "bytes") as progress:
    for _ in range(3):
        progress.advance(100)
        time.sleep(0.15)
"""
    said = on_a_terminal(program, lambda master: None, "err")
    assert "scoring" in said and "bytes/s" in said and ("100%" in said) == (total is not None)


def test_progress_elsewhere_is_a_line_now_and_then(monkeypatch, capsys):
    from hnet_runtime.pages import progress_bar

    with progress_bar.Progress("scoring", 300, "bytes") as bar:
        bar.advance(100)
    assert capsys.readouterr().err == ""  # not before ten seconds
    monkeypatch.setattr(progress_bar, "SECONDS", 0)
    for total, words in ((300, "scoring: 33%, "), (None, "scoring: 100 bytes, ")):
        with progress_bar.Progress("scoring", total, "bytes") as bar:
            bar.advance(100)
        said = capsys.readouterr().err
        assert said.startswith(words) and "bytes/s" in said and said.count("\n") == 1
    with progress_bar.Progress("scoring", 300, "bytes", shown=False) as bar:
        bar.advance(100)
    assert capsys.readouterr().err == ""


def test_every_command_begins_a_mistake_alike(tmp_path):
    """Those that are scripts of their own: the others share `run`."""
    for command, *flags in (
        ("fineweb.py", "prepare", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")),
        ("train.py", "--steps", "0"),
        ("scripts/evaluate.py", str(tmp_path / "nowhere")),
    ):
        done = subprocess.run([sys.executable, str(ROOT / command), *flags], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr[:7], done.stderr.count("\n")) == (2, "error: ", 1), (command, done.stderr)


@pytest.mark.parametrize(
    "command, said",
    [
        ("train.py --stpes 5", "--stpes: no such flag; similar: --steps (see --help)"),
        ("train.py --resh --zzz", "--resh: no such flag; similar: --reshard (see --help)"),
        ("train.py --steps ten", "--steps ten: expected a whole number"),
        ("train.py --lr=3x", "--lr 3x: expected a number"),
        ("train.py -e generat", "-e generat: expected one of no, generate, dumpparams"),
        ("train.py --steps 5 6", "6: not expected after 5 (see --help)"),
        ("train.py foo", "foo: no such argument (see --help)"),
        ("train.py --prompt -x", "--prompt: expected a value, or --prompt=-x (see --help)"),
        ("train.py --config-file", "--config-file: expected a value"),
        (
            "scripts/generate.py",
            "RUN is missing: a run or checkpoint of train.py, a .pt or .safetensors file or its folder, or "
            "hf:owner/name (see --help)",
        ),
        ("scripts/generate.py --max_byte 4", "--max_byte: no such flag; similar: --max-bytes (see --help)"),
        ("scripts/export.py", "RUN and OUT are missing (see --help)"),
        ("scripts/export.py run out --form foo", "--form foo: expected one of both, pt, safetensors, transformers"),
        ("scripts/evaluate.py run --num-fewshot q", "--num-fewshot q: expected a whole number"),
        ("fineweb.py", "expected prepare or show, with what to work on (see --help)"),
        ("fineweb.py prepaer", "prepaer: expected prepare or show (see --help)"),
        ("fineweb.py prepare text", "--out is missing (see --help)"),
        ("fineweb.py prepare text --out a --holdout q", "--holdout q: expected a number"),
        ("fineweb.py prepare text --out a --txt-column q", "--txt-column: no such flag; similar: --text-column"),
        ("fineweb.py prepare text --out a --shard-bytes 1", "--shard-bytes 1: expected 4096 or more"),
        ("scripts/compare.py a b --tolerance nan", "--tolerance nan: expected 0 or more"),
        ("scripts/compare.py a b --tolerance=-1", "--tolerance -1.0: expected 0 or more"),
        ("benchmarks/audit.py 7.0", "7.0: expected compute capabilities of 8.0, 8.6"),
        ("benchmarks/ledger.py --foo", "benchmarks/ledger.py is no command; expected python benchmarks/render.py"),
        *(
            (f"benchmarks/{name}.py {first}--foo 1", "--foo: no such flag")
            for name, first in (
                ("bench_data", "slices "),
                ("bench_train", ""),
                ("bench_decode", ""),
                ("bench_scaling", ""),
                ("bench_ssd", ""),
                ("bench_edits", ""),
                ("bench_versions", "here "),
                ("render", ""),
            )
        ),
        ("benchmarks/bench_train.py --steps 0", "--steps 0: expected 1 or more"),
        ("benchmarks/bench_train.py --data nowhere --device cpu", "nowhere: no such folder"),
        ("benchmarks/study.py --lr inf", "--lr inf: expected a finite number"),
        ("benchmarks/recipe.py --seconds nan", "--seconds nan: expected a finite number"),
        ("fineweb.py prepare text more --out a", "more: not expected after text (see --help)"),
        ("scripts/export.py run ''", "OUT '': expected a value that is not empty (see --help)"),
        ("scripts/plot.py run ''", "RUN '': expected a value that is not empty (see --help)"),
        ("scripts/match.py a --runs ''", "--runs '': expected a value that is not empty (see --help)"),
        ("scripts/explore.py run --out=", "--out '': expected a value that is not empty (see --help)"),
        ("train.py --data ''", "--data '': expected a value that is not empty (see --help)"),
        ("train.py --config-file=", "--config-file '': expected a value that is not empty (see --help)"),
        ("fineweb.py prepare text --out ''", "--out '': expected a value that is not empty (see --help)"),
        ("fineweb.py show ''", "folder '': expected a value that is not empty (see --help)"),
    ],
)
def test_wrong_usage_is_one_sentence(command, said):
    """The sentence names the flag and what was expected, however narrow the terminal is and in what it can colour."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "60", "FORCE_COLOR": "1"}
    called = [sys.executable, *shlex.split(command)]
    done = subprocess.run(called, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1, done.stderr


def test_imports_run_without_garbage_collection():
    """And collections after them pass over what they made."""
    before = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
