"""How commands end: mistakes, readers that go, full disks, characters that a terminal lacks; and how they start."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COMMAND = """
import sys
from hnet_runtime import UserError
from hnet_runtime.commands import run

def main(argv):
    what, file = argv[:2]
    if what == "mistake":
        raise UserError("--flag 3: expected 4")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "bug":
        raise ValueError("a bug")
    for n in range(30_000):
        print("a line of text", n, file=sys.stderr if what == "stderr" else sys.stdout)
    print("日本")
    open(file, "w").write("whole")
    return 3

run(main, "--may-fail" in sys.argv)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("command") / "command.py"
    file.write_text(COMMAND, encoding="utf-8")
    return file


def shell(line: str, encoding: str = "utf-8") -> tuple[int, str]:
    """Status and output of a line of bash; the status of its first command, where it is a pipe."""
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
    file.unlink()
    assert shell(f"{call} stderr {file} 2>&1 >/dev/null | head -1") == (3, "a line of text 0\n") and file.exists()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_a_terminal_lacks(command, tmp_path, encoding):
    for flag in ("", "--may-fail"):
        status, said = shell(f"{sys.executable} {command} lines {tmp_path / 'file'} {flag} | tail -1", encoding)
        assert (status, said) == (3, "\\u65e5\\u672c\n")
