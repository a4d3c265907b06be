"""README.md, docs/ and examples/ do what they say: commands run as printed, Python runs, links lead somewhere.

Each command runs in a folder of its own, where the files that the pages speak of exist: `my_texts/`, `data/mine`,
`runs/mine`. A command of train.py gets flags behind its own that make the run small, see `small`. A command that needs
more than that is in LISTED with the reason; one that is neither run nor listed fails the test.
"""

import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from processes import context, made_once, start_server

import hnet_config
from hnet_config import AttnConfig, ConfigError, HNetConfig, SSMConfig
from hnet_runtime.runs.flags import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
HISTORY = ("PERFORMANCE.md", "IDEAS_THAT_FAILED.md")  # they speak of files and flags of earlier versions
ELSEWHERE = ("CHANGING.md", "TRANSFORMERS.md")  # tests/test_changing.py and tests/test_transformers.py run their blocks
WITH_PYTHON = [page for page in PAGES if page.name not in ELSEWHERE]

LISTED = {  # commands that are not run here, by what they match, and why not
    r"^make (train|test|soak|audit|lint)\b": "installs packages, and takes minutes",
    r"^pip install|^python -m pip": "installs packages",
    r"^(python3? -m venv|source|\. )": "changes the shell of the reader",
    r"^git ": "changes the checkout of the reader",
    r"^(torchrun|hnet-train .*torchrun)": "starts several processes; tests/test_distributed.py runs such jobs",
    r"^(sbatch|srun|scontrol)\b": "needs Slurm",
    r"\bhf:|hf download": "needs a network",
    r"--tasks|--include-path": "needs the extra lm_eval; tests/test_scoring.py runs such tasks where it is installed",
    r"--form transformers|^lm_eval|^make test-transformers": "needs the extra transformers: tests/test_transformers.py",
    r"^(python -m )?pytest|^ruff": "tests and style, which run beside this",
    r"^find code |prepare code ": "needs packages that pip downloads; tests/test_fineweb.py prepares such folders",
    r"benchmarks/study\.py": "takes minutes on a GPU; tests/test_study.py makes a small study",
    r"benchmarks/recipe\.py": "takes minutes on a GPU; tests/test_recipe.py makes two small runs",
    r"bench_\w+\.py|benchmarks/(tune|audit)\.py|HNET_GPU=|nsys|ncu": "needs a GPU, or takes minutes",
    r"^(pkill|kill|nohup)\b": "acts on a process of the reader",
    r"--part \d+/\d+": "prepares one part of several; tests/test_fineweb.py runs them all",
}
PROGRAMS = r"python3?|torchrun|make|pip|git|source|sbatch|hnet-\w+|cat|grep|head|tail|bash|tensorboard|pytest|ruff"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) ")


# ------------------------------------------------------------------------------------------------------------- reading


class Command(NamedTuple):
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def fences(text: str):
    """(language, line number of the first line, lines) of each fenced block."""
    lines = text.splitlines()
    inside, language, begin = False, "", 0
    for n, line in enumerate(lines):
        if mark := re.match(r"\s*```(\S*)", line):
            if inside:
                yield language, begin + 1, lines[begin:n]
            inside, language, begin = not inside, mark[1], n + 1
    assert not inside, "a block is not closed"


def commands_of(text: str) -> list[tuple[int, str]]:
    """The commands of a page: every line of `sh` blocks, and the lines of indented blocks that begin with a program."""
    lines = text.splitlines()
    shell = {
        n
        for language, begin, block in fences(text)
        if language in ("sh", "bash")
        for n in range(begin, begin + len(block))
    }
    fenced = {n for _, begin, block in fences(text) for n in range(begin, begin + len(block))}
    found, n = [], 1
    while n <= len(lines):
        line = lines[n - 1]
        is_indented = line.startswith("    ") and n not in fenced and COMMAND.match(line.strip() + " ")
        if line.strip() and not line.strip().startswith("#") and (n in shell or is_indented):
            begin, command = n, line.strip()
            while command.endswith("\\"):
                n += 1
                command = f"{command[:-1].rstrip()} {lines[n - 1].strip()}"
            found.append((begin, re.sub(r"\s+# .*$", "", command)))
        n += 1
    return found


COMMANDS = [Command(page.name, *found) for page in PAGES for found in commands_of(page.read_text(encoding="utf-8"))]
RUN = [command for command in COMMANDS if not any(re.search(pattern, command.text) for pattern in LISTED)]


def python_of(page: Path) -> list[tuple[int, str]]:
    return [
        (n, "\n".join(block)) for language, n, block in fences(page.read_text(encoding="utf-8")) if language == "python"
    ]


# ------------------------------------------------------------------------------------------------ a folder for commands

MICRO = {
    "arch_layout": ["m1", ["T1"], "m1"],
    "d_model": [32, 64],
    "d_intermediate": [0, 64],
    "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [2, 2], "rotary_emb_dim": [8, 16], "window_size": [31, -1]},
}
MICRO_2 = {
    "arch_layout": ["m1", ["m1", ["T1"], "m1"], "m1"],
    "d_model": [32, 32, 64],
    "d_intermediate": [0, 0, 64],
    "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [8, 8, 16], "window_size": [31, 31, -1]},
}
PREPARE = "python fineweb.py prepare my_texts/ --out data/mine"
TRAIN = "python train.py --data data/mine --save-dir runs/mine"
SENTENCE = "A chunk of text number {} holds some words, a comma, and a name such as Ada or Émile.\n"
QUESTION = {"ctx": "The dog", "endings": ["barks at the cat.", "flies over it."], "label": 0}


def small(arguments: list[str], steps: int | None = None) -> list[str]:
    """The arguments of train.py, and flags behind them that make a run of seconds of it.

    By default of 2 steps, or one more than the finished run of 4 has.
    """
    steps, stats = steps or (5 if "--resume" in arguments else 2), 2 if steps else 0
    text = " ".join(arguments)
    stages = 2 if re.search(r"2stage|-N [\d.]+-[\d.]+-", text) else 1
    given = ["-c", f"micro_{stages}.json", "--mbs", "256", "--global-slices", "1", "--steps", str(steps)]
    given += ["--val-slices", "2", "--sample-bytes", "8", "--device", "cpu", "--keep", "0"]
    given += ["--val-every", "0", "--stats-every", str(stats)]
    given += [] if "--data" in arguments else ["--data", "data/mine"]
    return arguments + given


def inside(folder: Path, file: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Becomes the process of a command."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(descriptor, number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str((folder / file).parent), str(ROOT)]
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def start(folder: Path, command: str, steps: int | None = None) -> tuple[int | None, str]:
    """Runs a command in a folder; returns its status and what it printed."""
    words = shlex.split(command, comments=True)
    if words[0] in ("cat", "grep", "head", "tail"):
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    environment = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "hnet-train":
        words = ["python", "train.py", *words[1:]]
    elif words[0] in ("hnet-prepare", "hnet-show"):
        words = ["python", "fineweb.py", words[0].removeprefix("hnet-"), *words[1:]]
    elif words[0].startswith("hnet-"):
        words = ["python", f"scripts/{words[0].removeprefix('hnet-')}.py", *words[1:]]
    assert words[0] == "python", f"{command}: this test cannot run {words[0]}; see LISTED"
    assert not set(words) & {"|", ">", "&&", ";", "&", "<"}, f"{command}: this test runs no shell; see LISTED"
    file, arguments = words[1], words[2:]
    for word in arguments:
        assert not word.startswith("configs/") or (folder / word).exists(), f"{command}: there is no {word}"
    if file == "train.py":
        arguments = small(arguments, steps)
        if "--resume" not in arguments and "--save-dir" in arguments:
            shutil.rmtree(folder / arguments[arguments.index("--save-dir") + 1], ignore_errors=True)
    if file == "fineweb.py" and arguments[0] == "prepare":
        shutil.rmtree(folder / arguments[arguments.index("--out") + 1], ignore_errors=True)
        arguments += ["--processes", "1"]
    start_server()
    log = folder / "printed"
    log.unlink(missing_ok=True)
    process = context.Process(target=inside, args=(folder, file, arguments, environment, log), daemon=True)
    process.start()
    process.join(240)
    status = process.exitcode
    if status is None:
        process.kill()
    return status, log.read_text(encoding="utf-8", errors="replace")


def succeed(folder: Path, command: str, steps: int | None = None) -> str:
    status, printed = start(folder, command, steps)
    assert status == 0, f"{command}\nended with status {status}:\n{printed[-3000:]}"
    return printed


def lay_out(folder: Path) -> None:
    """What a checkout has, and the texts that the pages speak of."""
    names = ["train.py", "fineweb.py", "configs", "scripts", "examples", "benchmarks"]
    for name in names:
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_texts").mkdir()
    texts = ["".join(SENTENCE.format(n * m) for m in range(1 + n % 6)) for n in range(40)]
    for n, text in enumerate(texts):
        (folder / "my_texts" / f"{n}.txt").write_text(text, encoding="utf-8")
    for name in ("article.txt", "prompt.txt"):
        (folder / name).write_text(texts[0], encoding="utf-8")
    rows = [json.dumps({"text": text, "language": "en" if n % 2 else "fr"}) + "\n" for n, text in enumerate(texts[:6])]
    (folder / "texts.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "hellaswag_val.jsonl").write_text((json.dumps(QUESTION) + "\n") * 3, encoding="utf-8")
    (folder / "micro_1.json").write_text(json.dumps(MICRO))
    (folder / "micro_2.json").write_text(json.dumps(MICRO_2))


def prepare(folder: Path) -> None:
    """The corpus and the finished run of the pages, by the commands of docs/GETTING_STARTED.md."""
    lay_out(folder)
    succeed(folder, PREPARE)
    succeed(folder, TRAIN, steps=4)
    for name in ("data/code", "data/prose", "data/corpus", "data/fineweb-edu"):
        shutil.copytree(folder / "data" / "mine", folder / name)
    for name in ("RUN", "RUN_A", "RUN_B", "runs/a", "runs/b"):
        shutil.copytree(folder / "runs" / "mine", folder / name)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, worker_id) -> Path:
    return made_once(tmp_path_factory, worker_id, "docs", prepare)


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    """A copy for one test; what a command writes is seen by no other."""
    return Path(shutil.copytree(prepared, tmp_path / "checkout", symlinks=True))


# --------------------------------------------------------------------------------------------------------------- tests


def test_every_page_has_been_read():
    assert len(COMMANDS) > 30 and len(RUN) > 15, "the commands are found"


@pytest.mark.parametrize("command", dict.fromkeys(command.text for command in RUN))
def test_a_command_runs_as_printed(command, folder):
    succeed(folder, command)


def test_a_command_that_fails_is_noticed(folder):
    status, printed = start(folder, "python scripts/generate.py runs/nothing --prompt x")
    assert status == 2 and "runs/nothing: no such file or folder" in printed


@pytest.mark.parametrize("pattern", LISTED)
def test_what_is_listed_is_still_printed_somewhere(pattern):
    assert any(re.search(pattern, command.text) for command in COMMANDS), "take it out of the list"


def test_the_fixtures_commands_are_those_of_the_first_page():
    page = (ROOT / "docs" / "GETTING_STARTED.md").read_text(encoding="utf-8")
    found = [text for _, text in commands_of(page)]
    assert any(text.startswith(PREPARE) for text in found) and any(text.startswith(TRAIN) for text in found)


@pytest.mark.parametrize("page", [page.name for page in WITH_PYTHON if python_of(page)])
def test_python_of_a_page_runs(page, folder):
    """All of a page in one process, one block after the other."""
    (path,) = (p for p in WITH_PYTHON if p.name == page)
    blocks = [f"# {page}, line {n}\n{block}\n" for n, block in python_of(path)]
    (folder / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    succeed(folder, "python page.py")


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", [path.name for path in EXAMPLES])
def test_an_example_runs_as_its_first_lines_say(example, folder):
    text = (ROOT / "examples" / example).read_text(encoding="utf-8")
    found = [line.strip() for line in text.split('"""')[1].splitlines() if line.strip().startswith("python ")]
    assert found, "its docstring has the command"
    for command in found:
        assert command.split()[1] == f"examples/{example}"
        assert len(succeed(folder, command).splitlines()) >= 1


@pytest.mark.parametrize("example", [path.name for path in EXAMPLES if path.name != "boundaries.py"])
def test_an_example_without_arguments_shows_its_usage(example):
    """boundaries.py runs without arguments."""
    called = [sys.executable, str(ROOT / "examples" / example)]
    done = subprocess.run(
        called, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and f"python examples/{example}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command, said",
    [
        ("score.py nowhere none.txt", "none.txt: can't be read (No such file or directory)"),
        ("score.py nowhere /dev/null", "/dev/null: empty; expected at least one byte"),
        ("score.py nowhere {example}", "nowhere: no such file or folder"),
        ("read_shards.py nowhere", "nowhere: no such folder; expected one made by "),
        ("finetune.py nowhere nowhere out", "nowhere: no such file or folder"),
        ("generate.py nowhere text", "nowhere: no such file or folder"),
        ("boundaries.py nowhere", "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_in_an_example_is_one_sentence(command, said):
    name, *arguments = command.format(example=EXAMPLES[0]).split()
    called = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(called, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- links

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|(?:src|href|srcset)=\"([^\"\s]+)")


def outside_code(text: str) -> str:
    text = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    names = set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{found[name]}" if found[name] else name)
    return names


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_links_lead_somewhere(page):
    (path,) = (p for p in PAGES if p.name == page)
    for match in LINK.finditer(outside_code(path.read_text(encoding="utf-8"))):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{page}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page}: {target}"


def test_every_page_can_be_reached():
    linked = set()
    for page in PAGES:
        for match in LINK.finditer(outside_code(page.read_text(encoding="utf-8"))):
            target = (match[1] or match[2]).partition("#")[0]
            linked.add((page.parent / target).resolve())
    assert [page.name for page in PAGES if page.name != "README.md" and page.resolve() not in linked] == []


@pytest.mark.parametrize("page", [page.name for page in PAGES if page.name not in HISTORY])
def test_files_and_flags_exist(page):
    """What stands in backticks and looks like a file or flag of ours is one; no path of a machine stands anywhere."""
    text = next(p for p in PAGES if p.name == page).read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|Users|mnt)/\S*", text)
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|sh|html|jsonl))`", text):
        is_ours = name.split("/")[0] in {path.name for path in ROOT.iterdir()} - {"data", "runs"}
        assert not is_ours or (ROOT / name).exists(), f"{page}: {name}"
    sources = [ROOT / "train.py", ROOT / "fineweb.py", ROOT / "pyproject.toml", ROOT / "tests" / "test_docs.py"]
    sources += [*(ROOT / "scripts").iterdir(), *(ROOT / "benchmarks").glob("*.py"), ROOT / "hnet_runtime/runs/flags.py"]
    known = "".join(path.read_text(encoding="utf-8") for path in sources if path.is_file())
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)):
        bare = flag.removeprefix("no-")
        is_a_field = re.search(rf"^    {bare.replace('-', '_')}: ", known, re.MULTILINE)
        assert is_a_field or f'"--{flag}"' in known or flag in OF_OTHERS, f"{page}: --{flag}"


OF_OTHERS = {  # flags of programs that are not ours
    *("nproc-per-node", "nnodes", "rdzv-backend", "rdzv-id", "rdzv-endpoint", "max-restarts", "no-python"),
    *("signals-to-handle", "gpus-per-node", "nodes", "help", "stat", "check", "no-deps", "no-compile", "target"),
}


def test_training_page_names_every_flag():
    text = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(TrainConfig):
        assert f"`--{field.name.replace('_', '-')}" in text, field.name


def test_metrics_that_are_named_are_written(prepared):
    """The table of metrics.jsonl in docs/TRAINING.md."""
    text = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`[a-z0-9_`, ]+) \|", text.partition("## Read metrics.jsonl")[2].partition("\n## ")[0], re.MULTILINE
    )
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    records = [json.loads(line) for line in (prepared / "runs/mine/metrics.jsonl").read_text().splitlines()]
    written = {
        re.sub(r"^stage\d+_", "stage0_", re.sub(r"_p_0\.\d", "_p_0", re.sub(r"_le_\d+", "_le_256", key)))
        for record in records
        for key in record
    }
    assert len(named) > 20
    on_a_gpu_or_when = {
        "val_stage0_moved",
        "peak_gib",
        "reserved_gib",
        "save_ms",
        "graphs_captured",
        "recomputed_micro_batches",
    }
    assert named - written <= on_a_gpu_or_when, named - written


# -------------------------------------------------------------------------------------------------------------- configs

CONFIG = (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of docs/CONFIG.md."""
    section = CONFIG.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return rows[1:]


def test_config_page_has_every_key_with_its_default_and_bound():
    keys = {}
    for section, kind in (("", HNetConfig), ("ssm_cfg.", SSMConfig), ("attn_cfg.", AttnConfig)):
        keys |= {f"{section}{field.name}": field.default for field in dataclasses.fields(kind)}
    rows = {row[0].strip("`"): row for row in rows_of("All keys")}
    assert rows.keys() == keys.keys()
    for key, default in keys.items():
        shown, checked = rows[key][2], rows[key][4]
        if isinstance(default, int):
            assert shown == json.dumps(default), key
        else:
            needed = default is dataclasses.MISSING or key.startswith("attn_cfg")
            assert (shown == "required") == needed, key
        if key in hnet_config.MAX_VALUES and "rotary" not in key:  # the size of a head is less
            assert f"{hnet_config.MAX_VALUES[key]:,}" in checked, key
    for bound in (hnet_config.MAX_LAYERS, hnet_config.MAX_STAGES, hnet_config.MAX_PARAMETERS):
        assert f"{bound:,}" in CONFIG


def test_keys_that_are_required_are():
    whole = json.loads((ROOT / "configs" / "hnet_1stage_tiny.json").read_text())
    for key, *_, default, _, _ in rows_of("All keys"):
        section, _, name = key.strip("`").rpartition(".")
        raw = json.loads(json.dumps(whole))
        (raw[section] if section else raw).pop(name, None)
        if default == "required":
            with pytest.raises(ConfigError, match=name):
                HNetConfig.load(raw)
        else:
            HNetConfig.load(raw)


def test_config_page_shows_the_file_and_counts_of_our_configs():
    shown = next(block for language, _, block in fences(CONFIG) if language == "json")
    assert "\n".join(shown).strip() == (ROOT / "configs" / "hnet_1stage_tiny.json").read_text().strip()
    rows = {row[0].strip("`"): row for row in rows_of("Choose one of our configs")}
    assert rows.keys() == {path.stem for path in hnet_config.CONFIGS.glob("*.json")}
    for name, row in rows.items():
        config = HNetConfig.load(name)
        assert row[1:3] == [str(config.num_stages), f"{config.count_parameters():,}"]


@pytest.mark.parametrize("change, message", [row for row in rows_of("What is refused")])
def test_what_the_config_page_says_is_refused(change, message):
    with pytest.raises(ConfigError) as error:
        HNetConfig.load("hnet_1stage_tiny", **json.loads(change.strip("`")))
    assert str(error.value).removeprefix("hnet_1stage_tiny: ").startswith(message.partition("` ...")[0].strip("`"))


def test_the_citation_can_be_read():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [cited[key] for key in ("title", "version", "license")] == [
        project[key] for key in ("name", "version", "license")
    ]
    (paper,) = cited["references"]
    assert "2507.07955" in paper["url"] and [author["family-names"] for author in paper["authors"]] == [
        "Hwang",
        "Wang",
        "Gu",
    ]


def test_messages_that_the_training_page_explains_are_those_of_the_code():
    text = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8").partition("## When a run does not start")[2]
    messages = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    files = [ROOT / "train.py", ROOT / "fineweb.py", *(ROOT / "hnet_runtime").rglob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    source = source.replace("{what} differs", "the text in --data differs")
    assert len(messages) >= 5 and [message for message in messages if message not in source] == []


def test_the_table_of_traffic_is_what_the_script_prints(folder):
    text = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
    table = text[text.index("hnet_2stage_XL, 1,603 million") : text.index("Predictions from this table")]
    printed = succeed(folder, "python scripts/communication.py")
    assert table.count("GPUs") == 4 and table.strip() in printed


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_rows_of_a_table_have_as_many_cells_as_its_head(page):
    text = next(p for p in PAGES if p.name == page).read_text(encoding="utf-8")
    for table in re.findall(r"^(?:\|.*\n)+", text + "\n", re.MULTILINE):
        cells = [len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, table
