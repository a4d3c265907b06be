"""The record of measurements: its entries are well-formed, and every page shows what they say."""

import json
import re
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ledger  # noqa: E402
import render  # noqa: E402

FILE = ledger.FILE
ENTRIES = ledger.read()


def wrong(entry: dict) -> str:
    """What is wrong with an entry, or nothing."""
    needed = ["source"] if "source" in entry else ["card", "commit", "commit_of", "torch", "command"]
    if missing := {"key", "date", *needed} - set(entry):
        return f"without {', '.join(sorted(missing))}"
    if date.fromisoformat(entry["date"]).isoformat() != entry["date"]:
        return f"date {entry['date']}"
    if ("source" in entry) == ("commit" in entry):
        return "expected either a source or a commit"
    if "commit" in entry and not re.fullmatch(r"[0-9a-f]{7,40}", entry["commit"]):
        return f"commit {entry['commit']}: expected that of a checkout without changes"
    if "commit" in entry and entry["commit_of"] not in ("code", "results"):
        return f"commit_of {entry['commit_of']}"
    end = f"/{ledger.short_name(entry['card'])}/{entry['date']}" if "card" in entry else ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+" + re.escape(end) + r"(-\d+)?", entry["key"]):
        return f"expected a key of words, ending in {end}"
    if re.search(r"(^|[ =])/", entry.get("command", "")):
        return "its command has a path of one machine"
    texts = {*ledger.TEXTS, "compile", "ac", "boundaries"}
    if odd := [name for name in texts & set(entry) if not isinstance(entry[name], str)]:
        return f"{odd[0]}: expected text"
    numbers = {name: value for name, value in entry.items() if name not in texts}
    for name, value in numbers.items():
        if not re.search(f"(^|_)({'|'.join(ledger.UNITS)})$", name):
            return f"{name}: expected a unit at the end of its name"
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, int | float) or not 0 <= one < 1e12:
                return f"{name} {one}: expected a number"
    return "" if numbers else "no number"


def test_entries_say_when_where_and_how_they_were_measured():
    assert {key: found for key, entry in ENTRIES.items() if (found := wrong(entry))} == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"date": "2026-01-03"}, "ending in /h200/2026-01-03"),
        ({"commit": "abc1234+"}, "without changes"),
        ({"commit": "unknown"}, "without changes"),
        ({"source": "a paper"}, "either"),
        ({"command": "python a.py --data /home/a"}, "path of one machine"),
        ({"step": 3.0}, "step: expected a unit"),
        ({"step_ms": "3"}, "step_ms 3: expected a number"),
        ({"step_ms": float("nan")}, "expected a number"),
        ({"what": 3}, "what: expected text"),
        ({"card": "NVIDIA H100 80GB HBM3"}, "ending in /h100/"),
    ],
)
def test_an_entry_that_lacks_something_is_found(change, words):
    assert wrong(entry(step_ms=3.0)) == "" and words in wrong(entry(step_ms=3.0) | change)
    assert wrong(entry()) == "no number"
    assert wrong({key: value for key, value in entry(step_ms=3.0).items() if key != "torch"}) == "without torch"


@pytest.mark.parametrize("file", render.outputs(), ids=lambda file: file.name)
def test_pages_and_drawings_show_what_the_ledger_says(file):
    wanted = render.outputs()[file]
    assert file.read_text(encoding="utf-8") == wanted, "run python benchmarks/render.py"


def test_no_figure_begins_a_line():
    """A line that begins with a comment would end the paragraph before it, in Markdown."""
    for page in render.pages():
        for line in page.read_text(encoding="utf-8").splitlines():
            mark = render.MARK.match(line.lstrip())
            assert not mark, f"{page.name}: {line}"


def test_pages_cite_the_ledger():
    for page in ("README.md", "docs/PERFORMANCE.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(render.MARK.findall(text)) > 3
        assert len(render.MARK.findall(text)) == text.count("<!-- ledger:") == text.count("<!-- end -->")


def test_the_drawing_is_svg_with_a_point_for_each_version():
    for scheme in render.COLOURS:
        tree = ElementTree.parse(ROOT / "docs" / "images" / f"speed-{scheme}.svg")
        points = [e for e in tree.iter("{http://www.w3.org/2000/svg}circle") if len(e)]
        assert len(points) == len(render.curve(ENTRIES))
        assert all(0 < float(e.get(axis)) < limit for e in points for axis, limit in (("cx", 880), ("cy", 380)))


def test_raw_results_are_those_that_pages_and_code_cite():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("hnet_kernels/*.py"), FILE]
    text = "\n".join(path.read_text(encoding="utf-8") for path in texts)
    results = ROOT / "benchmarks" / "results"
    there = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    cited = set(re.findall(r"(?:h[12]00|cpu)-20\d\d-\d\d-\d\d(?:-\d+)?/\w[\w.]*\w", text))
    assert cited - there == set() and there - cited == set()


def entry(**more) -> dict:
    head = {"key": "train/a/graph/h200/2026-01-02", "date": "2026-01-02", "card": "NVIDIA H200", "commit": "abc1234"}
    return head | {"commit_of": "code", "torch": "2.11", "command": "python a.py"} | more


def test_marks_become_what_their_entries_say():
    entries = {
        "a/b": entry(step_ms=31.69, bytes_per_s=1.034e6, config="small"),
        "c/d": entry(step_ms=[1.0, 2.5], config="XL"),
        "e/f": entry(step_ms=29.0),
    }
    page = "It takes <!-- ledger: a/b as step_ms -->9 ms<!-- end -->, or <!-- ledger: c/d as step_ms --><!-- end -->.\n"
    page += "All took <!-- ledger: a/b e/f as step_ms --><!-- end -->.\n"
    page += "<!-- ledger: a/b c/d as training -->\nold\n<!-- end -->\n"
    text = render.rendered(page, entries)
    assert text.startswith("It takes <!-- ledger: a/b as step_ms -->31.7 ms<!-- end -->, or ")
    assert "-->1.0 to 2.5 ms<!-- end -->." in text and "-->29.0 to 31.7 ms<!-- end -->." in text
    rows = text.split(" as training -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    assert rows[0] == "| Config | Code | Step | Speed | Measured |" and rows[1] == "|-|-|-|-|-|"
    assert "| 31.7\u00a0ms | 1.03\u00a0MB/s | 2026-01-02, H200, at `abc1234` |" in rows[2] and len(rows) == 4
    assert render.rendered(text, entries) == text


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("x/y as step_ms", "x/y: no entry"),
        ("a/b as none", "expected one of training"),
        ("a/b a/b as launches_count", "a field of each entry"),
        ("a/b a/b as commit", "a number in each entry"),
    ],
)
def test_a_mark_that_names_nothing_is_refused(mark, words):
    with pytest.raises(ValueError, match=words):
        render.rendered(f"<!-- ledger: {mark} -->1<!-- end -->", {"a/b": entry(step_ms=1.0)})


def test_a_benchmark_adds_an_entry_with_a_key_of_its_own(tmp_path, monkeypatch):
    file = tmp_path / "ledger.jsonl"
    argv = [
        str(ROOT / "benchmarks" / "bench_x.py"),
        "--data",
        "/home/somebody/corpus",
        "--ledger",
        str(file),
        "--mbs=8",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    numbers = {"step_ms": 31.69812, "mfu_percent": float("nan"), "reserved_gib": None, "chunks_percent": [18.0]}
    keys = [ledger.append(file, "train/small/graph", numbers, what="a step", config="small") for _ in range(3)]
    assert [key.removeprefix(keys[0]) for key in keys] == ["", "-2", "-3"]
    entries = ledger.read(file)
    assert list(entries) == keys
    added = entries[keys[0]]
    assert added["step_ms"] == 31.698 and added["chunks_percent"] == [18.0]
    assert not {"mfu_percent", "reserved_gib"} & set(added)
    assert added["command"] == "python benchmarks/bench_x.py --data corpus --mbs=8"
    assert added["what"] == "a step" and added["date"] == date.today().isoformat()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{"], ":1: expected a JSON object"),
        (["[1]"], "with a key"),
        ([json.dumps(entry())] * 2, ":2: key train/a/.* already"),
    ],
)
def test_a_damaged_ledger_is_named_by_line(tmp_path, lines, words):
    file = tmp_path / "ledger.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=words):
        ledger.read(file)


def test_short_names_of_cards():
    for name, short in (("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("CPU, 2 cores, x86_64", "cpu")):
        assert ledger.short_name(name) == short
