"""The explorer's page and the page of plots; those marked `browser` in a headless Chromium, driven over its pipe."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import TWO_STAGES, build
from test_scoring import ALONE, command

import hnet_trainable
from hnet_runtime import UserError
from hnet_runtime.evaluation import boundaries
from hnet_runtime.evaluation.validation import chunks_of
from hnet_runtime.flops import count_flops
from hnet_runtime.pages import explorer, plots
from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs import weights

ROOT = Path(__file__).parent.parent
ARTEFACTS = ROOT / "artefacts"
ALONE.device = torch.device("cpu")
TEXT = "def f(x):\n\treturn x + 1  # Grüße & <b>\n日本語のテキスト, русский текст, عربى 👩‍🚀\n"


@pytest.fixture(scope="module")
def model():
    return build(hnet_trainable, TWO_STAGES).eval()


def packed(text: str, kind: type = np.uint8) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def data_of(page: str, part: int = 1) -> dict:
    return json.loads(page.split('type="application/json">')[part].split("</script>")[0])


# ------------------------------------------------------------------------------------------------------------ explorer


@pytest.mark.parametrize("text", [TEXT.encode(), b"x", b"\x00\xff\xfe\xe6\x97"])
def test_the_page_holds_what_the_model_computed(model, text):
    analysis = explorer.analyse(model, text, 8192, 4096)
    assert np.array_equal(analysis.starts, np.stack(chunks_of(model, text, ALONE)))
    ids = torch.tensor([0xFE, *text])
    model.eval()
    out = model(torch.nested.nested_tensor([ids], layout=torch.jagged))
    bits = -out.logits.values().log_softmax(-1)[torch.arange(len(text)), ids[1:]].detach().numpy() / np.log(2)
    assert analysis.bits == pytest.approx(bits, abs=1e-5)
    assert analysis.p[0] == pytest.approx(out.stages[0].boundary_prob.values()[1:].detach().numpy(), abs=1e-6)
    reached = out.stages[0].boundary_mask.values()[1:].numpy()
    assert np.array_equal(~np.isnan(analysis.p[1]), reached)
    page = explorer.page(text, ["<a>"], [analysis], [(3.0, 3.0)], "</script><b>")
    (shown,) = data_of(page)["models"]
    assert packed(data_of(page)["text"]).tobytes() == text and shown["name"] == "<a>"
    assert np.array_equal(packed(shown["starts"]), analysis.starts[0] + 2 * analysis.starts[1])
    assert packed(shown["bits"], "<u2") == pytest.approx(bits * 1000, abs=0.51)
    row, nats = np.array([0xFE, *text], np.uint8), np.append(bits * np.log(2), 0)
    wanted = boundaries.summary(boundaries.count(row, np.array([len(row)]), nats, out.stages, 1)[0])  # as in evaluation
    for ours, theirs in zip(shown["cuts"]["stages"], wanted["stages"], strict=True):
        assert ours["places"] == theirs["places"] and ours["cuts"] == theirs["cuts"]
        for name in ("enrichment", "p_entropy"):
            exact = theirs[name]  # None for a text without a chunk to count
            assert ours[name] == (exact and pytest.approx(exact, rel=1e-4)), name  # the page's p and bits are float32
    assert page.count("</script>") == 2 and "http://" not in page and "https://" not in page  # needs no network


def test_a_long_text_is_read_in_rows_that_overlap(model):
    """Each byte's numbers are those of the row that first has it; those of the first row are those of one forward."""
    text = (TEXT * 4).encode()
    whole, rows = explorer.analyse(model, text, 8192, 4096), explorer.analyse(model, text, 64, 32)
    assert np.array_equal(whole.starts[:, :63], rows.starts[:, :63])
    assert rows.bits[:64] == pytest.approx(whole.bits[:64], abs=1e-6)
    assert np.isnan(rows.p[0]).sum() == 0 and (rows.bits > 0).all()
    second = explorer.analyse(model, text, 64, 32).p[0][63:95]
    (row,) = [row for row in explorer.windows(text, 64, 32) if row.start == 32]
    direct = model(explorer.pack([row], torch.device("cpu"))[0]).stages[0].boundary_prob.values().detach().numpy()
    assert second == pytest.approx(direct[32:64], abs=1e-6)


def test_explore_as_a_command(model, tmp_path, capsys):
    weights.export(model, tmp_path / "m", "safetensors", torch.float32)
    (tmp_path / "text.bin").write_bytes(b"a\xff")
    (tmp_path / "empty.txt").write_text("")
    out = str(tmp_path / "page.html")
    command("explore")([str(tmp_path / "m"), str(tmp_path / "m"), "--text", str(tmp_path / "text.bin"), "--out", out])
    said = capsys.readouterr()
    assert "2 bytes of text" in said.out
    assert f"warning: {tmp_path / 'text.bin'}: byte 1 is not UTF-8; the model reads the bytes as they are" in said.err
    assert len(data_of(Path(out).read_text())["models"]) == 2
    assert data_of(Path(out).read_text())["moved"] == [0.0, 0.0], "the same model twice"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "m" / "model.safetensors", bare)
    for source, flags, words in (
        (tmp_path / "m", ["--text", str(tmp_path / "empty.txt")], "empty.txt: empty; expected at least one byte"),
        (tmp_path / "m", ["--text", str(tmp_path / "none.txt")], "none.txt: can't be read"),
        (tmp_path / "m", ["--out", str(tmp_path / "no" / "page.html")], "can't be written"),
        (tmp_path / "m", ["--context", "1"], "--context 1: expected 2 or more"),
        (tmp_path / "m", ["--config-other", "a"], "--config-other a: expected also a second model"),
        (bare, [], "no config.json beside the weights"),
    ):
        with pytest.raises(UserError, match=words):
            command("explore")([str(source), *flags])


def test_a_page_can_be_written_whatever_the_files_are_called(model, tmp_path):
    odd = os.fsdecode(b"caf\xe9 __DATA__ <b>")
    shown = "caf\\udce9 __DATA__ &lt;b&gt;"
    page = explorer.page(b"text", [odd], [explorer.analyse(model, b"text", 8, 4)], [(3.0, 3.0)], odd)
    assert shown in page.encode().decode() and data_of(page)["title"] == odd
    runs = [write_run(tmp_path / name, records(3)) for name in (odd, "$\\frac$", "_hidden")]
    command("plot")([*runs, "--out", str(tmp_path / "odd")])
    assert shown in (tmp_path / "odd.html").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- plots


def write_run(folder: Path, records: list[dict], tail: str = "") -> str:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return str(folder)


def records(n: int, stages: int = 1) -> list[dict]:
    rows = []
    for step in range(1, n + 1):
        row = {"step": step, "bpb": 8 / step, "lr": 1e-3, "mfu": None, "bytes_per_s": 1e5 + step, "grad_norm": 1.0}
        for s in range(stages):
            row |= {f"stage{s}_ratio_loss": 1.1, f"stage{s}_compression": 5.0 + s / step, f"stage{s}_target": 6.0}
        rows.append(row)
    return rows


def test_runs_with_different_keys_and_a_torn_line_are_overlaid(tmp_path, capsys):
    a = write_run(tmp_path / "a", records(2500) + [{"step": 2501, "val_bpb": 1.5}], '{"step": 2502, "bp')
    b = write_run(tmp_path / "b", records(3, stages=2))
    (tmp_path / "b" / "config.json").write_text((ROOT / "configs" / "hnet_2stage_XL.json").read_text())
    command("plot")([a, b, "--out", str(tmp_path / "both")])
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG") and "both.html" in capsys.readouterr().out
    panels = {panel["title"]: panel for panel in data_of((tmp_path / "both.html").read_text())}
    curves = {curve["name"]: curve["points"] for panel in panels.values() for curve in panel["curves"]}
    assert curves["a: bpb"][0] == [1, 8.0] and curves["a: bpb"][-1] == [2500, 8 / 2500]
    assert len(curves["a: bpb"]) <= 1201 and curves["a: val bpb"] == [[2501, 1.5]]
    assert curves["b: stage 1 compression"][0] == [1, 6.0] and "a: stage 1 compression" not in curves
    assert "MFU" not in panels  # nobody has a number
    rates = [curves[f"b: stage {s} lr"][0][1] for s in range(3)]
    assert rates == pytest.approx([3.03e-3, 1.43e-3, 0.715e-3], rel=5e-3)  # eq. 11 for 2-stage XL
    command("plot")([b])
    assert (tmp_path / "b" / "plots.png").exists() and (tmp_path / "b" / "plots.html").exists()


def test_places_are_drawn_over_chance(tmp_path, no_png):
    rows = [{"step": step, "bpb": 2.0} for step in (1, 2)]
    rows[1] |= {"val_stage0_at_space": 0.3, "val_chance_space": 0.15, "val_stage0_at_digit": 0.1}
    rows[1] |= {"val_chance_digit": 0.001, "val_stage0_enrichment": 1.5, "val_stage0_moved": 0.25}
    command("plot")([write_run(tmp_path / "a", rows), "--out", str(tmp_path / "plots")])
    panels = data_of((tmp_path / "plots.html").read_text())
    curves = {curve["name"]: curve["points"] for panel in panels for curve in panel["curves"]}
    assert curves["val stage 0 times space"] == [[2, 2.0]] and curves["val stage 0 enrichment"] == [[2, 1.5]]
    assert curves["val stage 0 moved"] == [[2, 0.25]] and "val stage 0 times digit" not in curves, "too rare"


@pytest.fixture
def no_png(monkeypatch):
    """Pages alone: a PNG takes a second."""
    monkeypatch.setattr(plots, "write_png", lambda panels, path: None)


def test_every_curve_of_a_panel_has_a_colour_of_its_own(tmp_path, no_png):
    a, b = (write_run(tmp_path / name, records(n, stages=2)) for name, n in (("a", 90), ("b", 50)))
    for runs in ([a], [a, b]):
        command("plot")([*runs, "--out", str(tmp_path / "plots")])
        for panel in data_of((tmp_path / "plots.html").read_text()):
            colours = [curve["colour"] for curve in panel["curves"]]
            assert len(set(colours)) == len(colours), panel["title"]


def test_curves_are_smoothed_and_the_page_says_so(tmp_path, no_png):
    rows = records(200)
    for row in rows:
        row["bpb"] = 2 + row["step"] % 2
    command("plot")([write_run(tmp_path / "a", rows), "--out", str(tmp_path / "plots")])
    page = (tmp_path / "plots.html").read_text()
    assert "Curves are smoothed: a thick line is the mean of the last 5 steps" in page
    (curve,) = data_of(page)[0]["curves"]
    assert [value for _, value in curve["points"]] == [row["bpb"] for row in rows]  # each step's own, drawn faint
    assert curve["means"][:3] == pytest.approx([3, 2.5, 8 / 3])
    assert curve["means"][-2:] == pytest.approx([13 / 5, 12 / 5])
    command("plot")([write_run(tmp_path / "short", rows[:20])])
    assert "smoothed" not in (tmp_path / "short" / "plots.html").read_text()


def progressing(n: int, bytes_per_step: int, ms: float) -> list[dict]:
    rows = records(n)
    for row in rows:
        row |= {"bytes_seen": row["step"] * bytes_per_step, "step_ms": ms, "stage0_F": 0.2}
    return rows


def test_runs_can_be_laid_over_each_other_by_bytes_time_and_flops(tmp_path, no_png):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write_run(a, progressing(2500, 1000, 500))
    write_run(b, progressing(10, 9000, 2000))
    write_run(c, records(5))  # which tells steps alone
    for run in (a, b):
        shutil.copy(ROOT / "configs" / "hnet_1stage_tiny.json", run / "config.json")
    command("plot")([str(a), str(b), str(c), "--out", str(tmp_path / "all")])
    page = (tmp_path / "all.html").read_text()
    tables = {table["name"]: table for table in data_of(page, 2)}
    assert tables["c"] == {"name": "c", "steps": [1, 2, 3, 4, 5], "bytes": None, "seconds": None, "flops": None}
    config = hnet_trainable.HNetConfig.load("hnet_1stage_tiny")
    for name, size, seconds in (("a", 1000, 0.5), ("b", 9000, 2)):
        table = tables[name]
        flops = count_flops(config, [[size], [size / 5]]).matmul
        assert len(table["steps"]) <= 1201 and table["steps"][-1] == {"a": 2500, "b": 10}[name]
        assert table["bytes"] == [step * size for step in table["steps"]]
        assert table["seconds"] == pytest.approx([step * seconds for step in table["steps"]])
        assert table["flops"] == pytest.approx([step * flops for step in table["steps"]])
        run = [table["name"] for table in data_of(page, 2)].index(name)
        steps = {step for panel in data_of(page) for c in panel["curves"] if c["run"] == run for step, _ in c["points"]}
        assert steps == set(table["steps"])  # the page finds each point of a curve in its own run's table


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / "nothing").mkdir()
    torn = write_run(tmp_path / "torn", [], '{"step": 1')
    broken = write_run(tmp_path / "broken", records(1), "[]\n")
    for run, words in (
        (tmp_path / "nothing", "nothing/metrics.jsonl: no such file"),
        (torn, "torn/metrics.jsonl: holds no whole record yet"),
        (broken, "broken/metrics.jsonl, line 2: expected a JSON object with a step"),
        (write_run(tmp_path / "bare", [{"step": 1}]), "hold nothing to plot"),
    ):
        with pytest.raises(UserError, match=words):
            command("plot")([str(run)])
    with pytest.raises(UserError, match="--out .*/: expected a name in that folder"):
        command("plot")([torn, "--out", f"{tmp_path}/"])


# ------------------------------------------------------------------------------------------------------------- browser


class Chromium:
    """A headless Chromium with one tab, spoken to over its debugging pipe (messages of JSON, each ended by NUL)."""

    def __init__(self, profile: Path):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def keep_pipes() -> None:  # Chromium reads from 3 and writes to 4
            os.dup2(theirs_in, 103), os.dup2(theirs_out, 104)
            os.dup2(103, 3), os.dup2(104, 4)

        flags = (
            f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile} --no-first-run"
        )
        self.process = subprocess.Popen(
            ["chromium", *flags.split(), "--window-size=1280,900", "about:blank"],
            preexec_fn=keep_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.inbox, self.outbox, self.number, self.events = os.fdopen(ours_in, "rb"), ours_out, 0, []
        self.session = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(1280, 900)

    def call(self, method: str, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.outbox, json.dumps(message).encode() + b"\0")
        while True:
            buffer = bytearray()
            while (byte := self.inbox.read(1)) not in (b"\0", b""):
                buffer += byte
            assert buffer, f"Chromium ended during {method}"
            answer = json.loads(buffer)
            if answer.get("id") == self.number:
                assert "result" in answer, answer
                return answer["result"]
            self.events.append(answer)

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, path: Path) -> None:
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.until(f"location.href === '{path.as_uri()}' && document.documentElement?.dataset.ready === 'yes'")

    def evaluate(self, script: str):
        out = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out
        return out["result"].get("value")

    def until(self, script: str) -> None:
        """Waits for what the page does by itself; the limit only ends a test that would hang."""
        limit = time.monotonic() + 120
        while not self.evaluate(script):
            assert time.monotonic() < limit, script
            time.sleep(0.02)

    def key(self, key: str, shift: bool = False) -> None:
        common = {"key": key, "modifiers": 8 if shift else 0} | ({"text": key} if len(key) == 1 else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def hover(self, selector: str) -> None:
        box = self.evaluate(f"(r => [r.left + r.width / 2, r.top + r.height / 2])({selector}.getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def shot(self, name: str) -> None:
        ARTEFACTS.mkdir(exist_ok=True)
        image = self.call("Page.captureScreenshot", format="png")["data"]
        (ARTEFACTS / f"{name}.png").write_bytes(base64.b64decode(image))

    def complaints(self) -> list:
        """Errors and warnings on the console, exceptions, and requests that left the machine."""
        wrong = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        console = [e for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        wrong += [e for e in console if e["params"]["type"] in ("error", "warning", "assert")]
        wrong += [
            e for e in self.events if e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] != "verbose"
        ]
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return wrong + [e for e in sent if not e["params"]["request"]["url"].startswith(("file:", "data:"))]

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(30)
        self.inbox.close(), os.close(self.outbox)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed; .ci/run installs it")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


CHUNKS = """(cell => [0, 1].map(s => [...cell.querySelectorAll(`.c[data-stage="${s}"]`)]
    .map(e => [+e.dataset.a, +e.dataset.b])))(document.querySelectorAll('.cell')[%d])"""


def write_page(model, folder: Path, text: str, *more) -> Path:
    """A page of `model` and `more` models."""
    analyses = [explorer.analyse(m, text.encode(), 8192, 4096) for m in (model, *more)]
    names = ["runs/first", "runs/second"][: len(analyses)]
    path = folder / "page.html"
    path.write_text(explorer.page(text.encode(), names, analyses, [(3.0, 3.0)] * len(analyses), "a text"))
    return path


@pytest.mark.browser
def test_the_dom_shows_the_models_chunks_exactly(model, browser, tmp_path):
    """Ranges of bytes of both stages in both panes, the text itself, nesting, and nothing on the console."""
    other = build(hnet_trainable, TWO_STAGES, seed=1).eval()
    browser.open(write_page(model, tmp_path, TEXT, other))
    browser.until("document.querySelectorAll('.cell i').length > 0")
    for pane, m in enumerate((model, other)):
        for s, mask in enumerate(chunks_of(m, TEXT.encode(), ALONE)):
            edges = [*np.flatnonzero(mask).tolist(), len(TEXT.encode())]
            assert browser.evaluate(CHUNKS % pane)[s] == [list(pair) for pair in zip(edges, edges[1:])]
        assert browser.evaluate(f"document.querySelectorAll('.cell')[{pane}].textContent") == TEXT
    nested = "[...document.querySelectorAll('.c[data-stage=\"0\"]')].every(e => e.parentElement.dataset.stage === '1')"
    assert browser.evaluate(nested)
    said = browser.evaluate("document.querySelector('.names').textContent")
    masks = [np.stack(chunks_of(m, TEXT.encode(), ALONE)) for m in (model, other)]
    for s in range(2):
        share = (masks[0][s] != masks[1][s]).sum() / (masks[0][s].sum() + masks[1][s].sum())
        assert f"stage {s}: {100 * share:.1f}% of the cuts of A and B are in only one of them" in said
    assert said.count("surprisal of the bytes that open chunks") == 4 and "letter 5 or later" in said
    assert browser.complaints() == []


@pytest.mark.browser
def test_hover_keys_and_views(model, browser, tmp_path):
    browser.open(write_page(model, tmp_path, TEXT))
    browser.until("document.querySelectorAll('.cell i').length > 0")
    analysis = explorer.analyse(model, TEXT.encode(), 8192, 4096)
    at = TEXT.index("日")
    byte = len(TEXT[:at].encode())
    browser.hover(f"document.querySelector('i[data-c=\"{at}\"]')")
    shown = browser.evaluate("document.getElementById('tip').textContent")
    assert "U+65E5" in shown and f"byte {byte}" in shown and "E6" in shown and "97" in shown and "A5" in shown
    for t in range(byte, byte + 3):
        assert f"{analysis.p[0, t]:.3f}" in shown and f"{analysis.bits[t]:.2f}" in shown
    where = "+document.querySelector('i.cursor').dataset.c"
    browser.key("ArrowRight"), browser.key("ArrowRight"), browser.key("ArrowRight")
    assert browser.evaluate(where) == 2
    browser.key("Home")
    starts = np.flatnonzero(analysis.starts[0])
    characters = [len(TEXT.encode()[:t].decode(errors="ignore")) for t in starts]
    browser.key("ArrowRight", shift=True)
    assert browser.evaluate(where) == characters[1]
    browser.key("]")
    assert browser.evaluate(where) >= characters[1]
    browser.key("End")
    assert browser.evaluate(where) == len(TEXT) - 1
    for number, view in (("2", "heat"), ("3", "heat"), ("1", "chunks")):
        browser.key(number)
        assert browser.evaluate("document.querySelector('.cell').className") == f"cell {view}"
        assert browser.evaluate("document.querySelectorAll('button[aria-pressed=true]').length") == 1
    browser.key("?")
    assert browser.evaluate("document.getElementById('help').open")
    assert browser.complaints() == []


@pytest.mark.browser
def test_two_hundred_kilobytes(browser, tmp_path):
    """Only what is near the window is cut into elements; the end is reached by key, and the text is whole."""
    rng, text = np.random.RandomState(0), (TEXT * 2000)[:180_000]
    size = len(text.encode())
    assert size > 200_000
    starts = np.stack([rng.rand(size) < 0.2] * 2)
    starts[1] &= rng.rand(size) < 0.3
    starts[:, 0] = True
    made = explorer.Analysis(rng.exponential(2, size).astype("f4"), starts, rng.rand(2, size).astype("f4"))
    path = tmp_path / "long.html"
    path.write_text(explorer.page(text.encode(), ["a", "b"], [made, made], [(3.0, 3.0)] * 2, "long"))
    browser.open(path)
    browser.until("document.querySelectorAll('.cell i').length > 0")
    for key in ("End", "2", "Home", "End"):
        browser.key(key)
        browser.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    assert browser.evaluate("+document.querySelector('i.cursor').dataset.c") == len(text) - 1
    assert browser.evaluate("document.querySelectorAll('*').length") < 60_000
    left = "[...document.querySelectorAll('.cell:first-child')].map(e => e.textContent).join('')"
    assert browser.evaluate(f"{left}.length") == len(text.encode("utf-16-le")) // 2
    assert browser.complaints() == []


@pytest.mark.browser
def test_screenshots(browser, tmp_path):
    """For people to look at: each view of two models, and of bytes that are no text."""
    models = [build(hnet_trainable, TWO_STAGES, seed=seed).eval() for seed in (0, 1)]
    text = Path(__file__).read_text()[:2500] + TEXT
    browser.open(write_page(models[0], tmp_path, text, models[1]))
    browser.until("document.querySelectorAll('.cell i').length > 0")
    for number, name in enumerate(("chunks", "surprise", "boundary-0", "boundary-1", "difference"), 1):
        browser.key(str(number))
        browser.hover("document.querySelector('i[data-c=\"90\"]')")
        browser.shot(f"explorer-{name}")
    browser.open(write_page(models[0], tmp_path, text))
    browser.until("document.querySelectorAll('.cell i').length > 0")
    browser.shot("explorer-one")
    assert browser.complaints() == []


@pytest.mark.browser
def test_the_page_of_plots(browser, tmp_path):
    runs = [write_run(tmp_path / "a", records(300)), write_run(tmp_path / "b", records(40, stages=2))]
    command("plot")([*runs, "--out", str(tmp_path / "both")])
    browser.open(tmp_path / "both.html")
    panels = data_of((tmp_path / "both.html").read_text())
    assert browser.evaluate("document.querySelectorAll('figure').length") == len(panels)
    for kind, wanted in (("curve", lambda c: True), ("faint", lambda c: c["means"])):
        drawn = browser.evaluate(
            f"[...document.querySelectorAll('figure')].map(f => f.querySelectorAll('polyline.{kind}').length)"
        )
        assert drawn == [len([c for c in panel["curves"] if wanted(c)]) for panel in panels]
    browser.hover("document.querySelector('figure svg')")
    assert "at step 1" in browser.evaluate("document.querySelector('.key').textContent")
    browser.shot("plots")
    assert browser.complaints() == []


HOVER = """(x => { const svg = document.querySelector('figure svg'), r = svg.getBoundingClientRect();
    svg.dispatchEvent(new MouseEvent('mousemove', {clientX: r.left + (52 + x * (460 - 52 - 20)) / 460 * r.width}));
    return [...document.querySelector('.key').children].map(e => e.textContent); })(%f)"""


@pytest.mark.browser
def test_the_page_shows_each_runs_own_value_at_the_step_under_the_mouse(browser, tmp_path):
    write_run(tmp_path / "long", progressing(101, 1000, 500))
    write_run(tmp_path / "short", progressing(21, 9000, 2000))
    for run in ("long", "short"):
        shutil.copy(ROOT / "configs" / "hnet_1stage_tiny.json", tmp_path / run / "config.json")
    command("plot")([str(tmp_path / "long"), str(tmp_path / "short"), "--out", str(tmp_path / "both")])
    browser.open(tmp_path / "both.html")
    for step in (1, 7, 21):
        values = browser.evaluate(HOVER % ((step - 1) / 100))
        own = f"{8 / step:.4g}"
        assert values[0].startswith(f"long: bpb {own} mean") and values[1].startswith(f"short: bpb {own}")
        assert values[2] == f"at step {step}" and "(" not in "".join(values)
    values = browser.evaluate(HOVER % 0.59)
    assert values[0].startswith("long: bpb 0.1333 mean") and values[1:] == ["short: bpb - (ends at 21)", "at step 60"]
    choose = "(s => { s.value = '%s'; s.dispatchEvent(new Event('change')); return s.options.length; })(axis)"
    assert browser.evaluate(choose % "bytes") == 4
    values = browser.evaluate(HOVER % 0)  # at the long run's first thousand bytes the short one had had no step
    assert values[0].endswith("(step 1)") and values[1] == "short: bpb - (begins at 9 kB)", values
    assert "at 1 kB" in values[-1]
    values = browser.evaluate(HOVER % 1)
    assert values[0] == "long: bpb - (ends at 101 kB)" and values[1] == f"short: bpb {8 / 21:.4g} (step 21)"
    for axis, unit in (("seconds", "s"), ("flops", "TFLOP")):
        browser.evaluate(choose % axis)
        assert browser.evaluate(HOVER % 0.5)[-1].endswith(f" {unit}")
        browser.shot(f"plots-{axis}")
    assert browser.complaints() == []


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    """The scratch file of a living writer stays: two processes may draw the same plots."""
    path, other = tmp_path / "plots.png", tmp_path / ".plots.png.notes.png"
    other.write_text("mine")
    program = (
        "import os, signal, sys; from pathlib import Path; from hnet_runtime.pages.reports import write_atomically\n"
    )
    program += "kill = lambda scratch: scratch.write_text('half') and os.kill(os.getpid(), signal.SIGKILL)\n"
    program += "write_atomically(Path(sys.argv[1]), kill)"
    assert subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT).returncode == -signal.SIGKILL
    (left,) = [file for file in tmp_path.iterdir() if file != other]

    def write(scratch: Path) -> None:
        scratch.write_text("outer")
        write_atomically(path, lambda inner: inner.write_text("inner"))
        assert path.read_text() == "inner" and scratch.exists() and not left.exists()

    write_atomically(path, write)
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, path.name] and path.read_text() == "outer"
