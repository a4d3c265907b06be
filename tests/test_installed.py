"""`pip install .`: the wheel has all files, and its commands work from any folder."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent

EACH_HELP = """
import importlib, sys
from pathlib import Path
from hnet_config import HNetConfig
wanted = HNetConfig.load(Path(sys.argv[1]) / "hnet_1stage_small.json")
for name in ("hnet_1stage_small", "hnet_1stage_small.json", "configs/hnet_1stage_small.json"):
    assert HNetConfig.load(name) == wanted
commands = dict(line.split("=") for line in sys.argv[2:])
for command, target in commands.items():
    module, function = target.split(":")
    sys.argv = [command, "--help"]
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        assert not end.code, (command, end.code)
    else:
        raise AssertionError(f"{command} --help did not end the process")
    print("HELPED", command)
here = Path(sys.modules["hnet_config"].__file__).parent
ours = [module for name, module in sys.modules.items() if name.startswith("hnet_") or name in ("fineweb", "__main__")]
assert all(here in Path(module.__file__).parents for module in ours if module.__file__), "not what was installed"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("hnet_kernels", "hnet_runtime", "hnet_transformers", "scripts", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(file, source)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    made = [sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", str(folder), str(source)]
    subprocess.run(made, check=True, capture_output=True, timeout=100)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def commands(installed: Path) -> dict[str, str]:
    (file,) = installed.glob("*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(file)
    return dict(parser["console_scripts"])


def test_the_wheel_holds_every_module_page_and_config(installed):
    rooms = ["hnet_runtime", *(f"hnet_runtime/{room.name}" for room in (ROOT / "hnet_runtime").glob("[a-z]*/"))]
    assert len(rooms) == 7
    for folder, name, pattern in (
        (".", ".", "*.py"),
        *((room, room, "*") for room in rooms),
        ("hnet_kernels", "hnet_kernels", "*"),
        ("hnet_transformers", "hnet_transformers", "*"),
        ("scripts", "hnet_scripts", "*.py"),
        ("configs", "hnet_configs", "*.json"),
    ):
        wanted = {path.name for path in (ROOT / folder).glob(pattern) if path.is_file() and path.suffix != ".pyc"}
        assert wanted and wanted <= {path.name for path in (installed / name).glob(pattern)}, name


def test_every_program_has_a_command(installed):
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"communication"}  # makes a table of the docs
    assert set(commands(installed)) == {f"hnet-{name}" for name in scripts | {"train", "prepare", "show"}}


def test_installed_commands_run_from_any_folder(installed, tmp_path):
    found = [f"{name}={target}" for name, target in commands(installed).items()]
    run = subprocess.run(
        [sys.executable, "-c", EACH_HELP, str(ROOT / "configs"), *found],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("HELPED") == len(found)
