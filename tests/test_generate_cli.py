"""What people type: generate, export, compare; the chunks they see; and the check behind `train.py -e generate`."""

import importlib.util
import io
import os
import re
import runpy
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from rich.color import Color, ColorSystem
from rich.console import Console
from test_simple import config_of, random_model

import hnet_decoder
from hnet_decoder import generate
from hnet_kernels import generation
from hnet_kernels.capture import why_no_compiler
from hnet_runtime import UserError
from hnet_runtime.checks import equivalence
from hnet_runtime.checks.equivalence import check, run
from hnet_runtime.pages import chunks
from hnet_runtime.pages.chunks import Printer, bars, render
from hnet_runtime.runs import weights
from hnet_simple import HNetInference
from hnet_trainable import HNetLM

ROOT = Path(__file__).parent.parent


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = config_of(["m1", ["T1m1", ["T1"], "m1"], "M1"], [32, 32, 64], window_size=[-1, 5, -1])
    weights.export(random_model(config, torch.float32), folder, "safetensors")
    return folder


# -------------------------------------------------------------------------------------------------------------- chunks


def flags(text: str) -> list[tuple[bool, bool]]:
    """'0' no chunk starts, '1' one of stage 0, '2' one of stage 1 too: a digit a byte."""
    return [(digit >= "1", digit >= "2") for digit in text]


def test_bars():
    assert bars(b"The cat", flags("2001100")) == "The| |cat"
    assert bars(b"abcd", flags("0212")) == "a‖b|c‖d"
    assert bars("né日".encode(), flags("110100")) == "n|é|日"
    assert bars(b"ab", [(), ()]) == "ab"
    with pytest.raises(ValueError):
        bars(b"abc", flags("11"))


def test_chunk_starts_inside_a_character():
    """A mark follows the character; the chunks after it count on."""
    assert bars("日本".encode(), flags("100001")) == "日本¦"
    assert bars("日本".encode(), flags("112010")) == "日¦¦本¦"
    pieces = chunks.pieces_of("日x".encode(), flags("1110"))
    assert [piece.counts for piece in pieces] == [(1, 0), (2, 0), (3, 0), (3, 0)]


@pytest.mark.parametrize(
    "data, shown",
    [
        (b"a\xffb", "a\\xffb"),
        (b"\xe6\x97", "\\xe6\\x97"),  # a character that never ends
        (b"\xe6\x97A", "\\xe6\\x97A"),
        (b"\xe6\xe6\x97\xa5", "\\xe6日"),
        (b"\x80\xc3\xa9\xc3", "\\x80é\\xc3"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),  # half of a surrogate pair
        (b"\x1b[31mred\x07\r\n\t", "\\x1b[31mred\\x07\\x0d\n\t"),
        ("\u202eabc\u2069\x9b".encode(), "\\u202eabc\\u2069\\x9b"),
        ("👩‍🚀🙂".encode(), "👩‍🚀🙂"),
        (b"[bold]x[/bold]:smile:", "[bold]x[/bold]:smile:"),
    ],
)
def test_what_is_no_text_is_shown_by_number(data, shown):
    quiet = [(False,)] * len(data)
    assert bars(data, quiet) == shown
    assert render(data, quiet).plain == shown
    for color_system in (None, "truecolor"):
        printed = io.StringIO()
        printer = Printer(Console(file=printed, color_system=color_system, force_terminal=True, width=20))
        for byte in data:
            printer.feed(byte, (False,))
        printer.close()
        if color_system is None:
            assert printed.getvalue() == shown + "\n"
        else:
            assert without_colours(printed.getvalue()) == shown.expandtabs() + "\n"  # rich expands tabs


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_character_is_printed_as_soon_as_it_is_whole():
    printed = io.StringIO()
    printer, seen = Printer(Console(file=printed, color_system=None)), []
    for byte in "aé🙂".encode():
        printer.feed(byte, (False,))
        seen.append(printed.getvalue())
    assert seen == ["a", "a", "aé", "aé", "aé", "aé", "aé🙂"]


@pytest.mark.parametrize(
    "kind",
    [{"color_system": "standard"}, {"color_system": "windows"}, {"color_system": "truecolor", "no_color": True}],
    ids=lambda kind: "-".join(kind),
)
def test_chunks_are_seen_on_few_colours_and_on_none(kind):
    data, starts = b"The cat sat", flags("20011002100")
    printed, streamed = (Console(file=io.StringIO(), force_terminal=True, **kind) for _ in range(2))
    chunks.print_chunks(data, starts, printed)
    printer = Printer(streamed)
    for byte, opens in zip(data, starts):
        printer.feed(byte, opens)
    printer.close()
    assert printed.file.getvalue() == streamed.file.getvalue() == "The| |cat‖ |sat\n"
    assert chunks.legend(2, chunks.has_colours(printed)) == "| begins a chunk of stage 0, ‖ also one of stage 1"


def test_every_shade_is_another_one_of_256_colours():
    shades = [Color.parse(shade).downgrade(ColorSystem.EIGHT_BIT).number for hue in chunks.HUES for shade in hue]
    assert len(set(shades)) == 8


def test_text_is_whole_where_there_is_no_terminal():
    """No line is broken at rich's 80 columns, and tabs, markup and emoji codes stay what they are."""
    data = b"\tx = [bold] :smile: " + b"abcdefgh " * 300
    starts = [(True, False)] * len(data)
    console = Console(file=io.StringIO())
    chunks.print_chunks(data, starts, console)
    assert console.file.getvalue() == bars(data, starts) + "\n"
    printer = Printer(Console(file=io.StringIO()))
    for byte, opens in zip(data, starts):
        printer.feed(byte, opens)
    printer.close()
    assert printer.console.file.getvalue() == bars(data, starts) + "\n"


@pytest.mark.parametrize("encoding, shown", [("ascii", "a||\\u65e5!"), ("utf-8", "a‖日¦"), ("latin-1", "a||\\u65e5!")])
def test_bars_in_an_encoding_that_lacks_them(encoding, shown):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding))
    chunks.print_chunks("a日".encode(), flags("1210"), console)
    assert raw.getvalue().decode(encoding) == shown + "\n"


def test_colours_follow_the_stages():
    """Neighbouring chunks differ; hue by the innermost stage, shade by the outermost."""
    text = render(b"abcdef", flags("210121"))
    backgrounds = {text.plain[span.start : span.end]: span.style.bgcolor.name for span in text.spans}
    assert list(backgrounds) == ["a", "bc", "d", "e", "f"]
    hues = [next(n for n, shades in enumerate(chunks.HUES) if color in shades) for color in backgrounds.values()]
    assert hues == [1, 1, 1, 2, 2] and len(set(backgrounds.values())) == 4
    one = render(b"abcd", [(True,), (False,), (True,), (True,)])
    assert len({span.style.bgcolor.name for span in one.spans}) == 3
    three = render(b"abc", [(True, True, True), (True, True, False), (True, False, False)])
    assert [bool(span.style.underline) for span in three.spans] == [True, False, False]
    assert all("chunk" in str(chunks.legend(S)) for S in range(4))


def test_html_has_the_same_colours():
    shown = chunks.to_html("<a>é".encode(), flags("10110"))
    spans = re.findall(r'<span style="background: (#\w+); color: #\w+">(.*?)</span>', shown)
    text = render("<a>é".encode(), flags("10110"))
    assert [colour for colour, _ in spans[:2]] == [span.style.bgcolor.name for span in text.spans[:2]]
    assert [piece for _, piece in spans] == ["&lt;a", "&gt;", "é"]
    assert chunks.to_html(b"ab", [(), ()]).count("background") == 0


# --------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_models_agree(dtype):
    config = config_of(["m1t1", ["T1", ["M1"], "t1"], "M1"], [32, 32, 64], window_size=[11, 5, -1])
    printed = io.StringIO()
    assert run(config, dtype=dtype, length=90, console=Console(file=printed, width=100)), printed.getvalue()
    for words in ("encoder.layers.0", "routing_module", "dechunk", "lm_head", "stage 1: ", "greedy", "sampled"):
        assert words in printed.getvalue()


def test_plain_models_and_tied_ones_agree():
    assert run(config_of(["T1m1"], [32], tie_embeddings=True), console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def pair() -> tuple[HNetLM, HNetInference]:
    config = config_of(["m1t1", ["T1"], "M1"], [64, 64], window_size=[11, -1])
    model = equivalence.random_model(config, 0, "cpu", torch.float64)
    copy = HNetInference(config).double()
    copy.load_state_dict(model.state_dict())
    return model, copy


@pytest.mark.parametrize(
    "parameter, layer",
    [
        ("embeddings.weight", "embeddings"),
        ("backbone.encoder.layers.1.mixer.Wqkv.weight", "backbone.encoder.layers.1"),
        ("backbone.encoder.rmsnorm.weight", "backbone.encoder.rmsnorm"),
        ("backbone.routing_module.k_proj_layer.weight", "backbone.routing_module"),
        ("backbone.main_network.main_network.layers.0.mlp.fc2.weight", "backbone.main_network.main_network.layers.0"),
        ("backbone.residual_proj.bias", "backbone.dechunk"),
        ("backbone.decoder.layers.0.mixer.D", "backbone.decoder.layers.0"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_the_first_layer_that_disagrees_is_named(pair, parameter, layer):
    model, copy = pair
    weight = copy.get_parameter(parameter)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 1e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    report = check(model, copy, documents=(b"some text", b"x" * 30), new_bytes=2)
    assert report.first_disagreement == layer and not report.ok
    printed = io.StringIO()
    report.print(Console(file=printed))
    assert f"first to disagree: {layer}" in printed.getvalue()
    with torch.no_grad():
        weight.copy_(kept)
    assert check(model, copy, documents=(b"some text",), new_bytes=2).ok


def test_bfloat16_hides_no_small_mistake():
    """Weights of one layer that are 4% off, which rounding to 8 bits is not: the limit follows what rounding does."""
    config = config_of(["m1t1", ["T1"], "M1"], [64, 64], window_size=[11, -1])
    model = equivalence.random_model(config, 0, "cpu", torch.bfloat16)
    copy = HNetInference(config).bfloat16()
    copy.load_state_dict(model.state_dict(), assign=True)
    assert check(model, copy, new_bytes=1).ok
    layer = copy.backbone.encoder.layers[1].mixer.out_proj
    layer.weight = torch.nn.Parameter(layer.weight * 1.04)
    assert check(model, copy, new_bytes=1).first_disagreement == "backbone.encoder.layers.1"


def test_a_step_that_differs_is_found(pair, monkeypatch):
    """A window that only decoding ignores."""
    model, copy = pair
    right = generation.ring_slots
    monkeypatch.setattr(
        generation, "ring_slots", lambda tokens, window: right(tokens, window + 3 if window > 0 else -1)
    )
    report = check(model, copy, documents=(b"a" * 8, bytes(range(65, 95))), new_bytes=2)
    (row,) = [row for row in report.rows if row.layer == report.first_disagreement]
    assert row.layer == "backbone.encoder.layers.1" and row.prefill < 1e-9 < row.step
    monkeypatch.undo()
    assert check(model, copy, documents=(bytes(range(65, 95)),), new_bytes=2).ok


def test_continuations_are_compared(pair, monkeypatch):
    model, copy = pair
    made = hnet_decoder.generate

    def forgetful(*args, **options):
        texts = made(*args, **options)
        texts[0].continuation = texts[0].continuation[:-1] + b"\x00"
        return texts

    monkeypatch.setattr(equivalence, "generate", forgetful)
    report = check(model, copy, documents=(b"some text",), new_bytes=3)
    assert report.first_disagreement == "greedy continuation"
    # three bytes each by training, prefill and plain steps, which all find the last one wrong
    assert report.continuations == {"greedy": (3, 9), "sampled": (3, 9)}


def test_check_of_a_checkpoint(checkpoint, tmp_path):
    printed = io.StringIO()
    assert run(None, str(checkpoint), dtype=torch.float64, console=Console(file=printed))
    with pytest.raises(UserError, match="no such file"):
        run(None, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="expected a config or a checkpoint"):
        run(None)


def test_lovely_summaries_where_installed(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "lovely_tensors", types.SimpleNamespace(lovely=lambda t: f"lovely{t.ndim}"))
    printed = io.StringIO()
    check(*pair, documents=(b"text",), new_bytes=1).print(Console(file=printed, width=120))
    assert "lovely2" in printed.getvalue()


# ------------------------------------------------------------------------------------------------------------- scripts


def test_generate_writes_the_text(checkpoint, capfdbinary):
    command = [str(checkpoint), "--prompt", "Grüße", "--max-bytes", "30", "--seed", "4", "--past-eos"]
    script("generate").main(command)
    out = capfdbinary.readouterr().out
    model = weights.load_inference(checkpoint)
    (text,) = generate(model, ["Grüße"], max_bytes=30, seed=4, valid_utf8=True, stop_at_eos=False)
    assert out == text.data + b"\n" and out.decode()
    script("generate").main([*command, "--show", "chunks"])
    assert capfdbinary.readouterr().out.decode() == bars(text.data, text.starts) + "\n"
    script("generate").main([*command, "--samples", "2"])
    assert capfdbinary.readouterr().out.startswith(b"--- seed 4\n" + text.data + b"\n--- seed 5\n")


def test_generate_from_files(checkpoint, tmp_path, capfdbinary, monkeypatch):
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"ok \xfe\xe6\x97")
    command = [str(checkpoint), "--max-bytes", "5", "--temperature", "0", "--any-bytes", "--past-eos"]
    script("generate").main([*command, "--prompt-file", str(file)])
    captured = capfdbinary.readouterr()
    assert captured.out[:6] == b"ok \xfe\xe6\x97" and len(captured.out) == 12
    assert b"byte 3 is not UTF-8" in captured.err and b"byte FE or FF" in captured.err
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"from a pipe"), isatty=lambda: False))
    script("generate").main([*command, "--prompt-file", "-"])
    assert capfdbinary.readouterr().out.startswith(b"from a pipe")


def test_generate_interactive(checkpoint, capfdbinary, monkeypatch):
    """A line a prompt; an empty line is BOS alone; a prompt that can't be continued doesn't end the session.

    A Windows line end is no part of a prompt.
    """
    typed = b"first\r\n\n" + b"cut off \xe6\n" + b"last"
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(typed), isatty=lambda: True))
    script("generate").main([str(checkpoint), "--max-bytes", "1", "--past-eos"])
    captured = capfdbinary.readouterr()
    lines = captured.out.split(b"\n")
    assert lines[0][:5] == b"first" and len(lines[0]) == 6
    assert captured.out.count(b"last") == 1 and b"cut off" not in captured.out
    assert captured.err.count(b"prompt> ") == 5 and b"--max-bytes: 1; a prompt ends in a character" in captured.err
    assert captured.err.count(b"1 byte in ") == 3 and b"bytes/s" in captured.err


@pytest.mark.parametrize("samples", [1, 2])
def test_the_speed_is_that_of_the_steps(checkpoint, capfdbinary, monkeypatch, samples):
    """Of all of them, also those that run before the prompt is printed; reading the prompt does not count."""

    def slow(name: str, seconds: float) -> None:
        method = getattr(hnet_decoder.Decoder, name)
        monkeypatch.setattr(
            hnet_decoder.Decoder, name, lambda *args: [time.sleep(seconds), method(*args)][1], raising=True
        )

    slow("_run_step", 0.01)
    slow("prefill", 1.0)
    typed = types.SimpleNamespace(buffer=io.BytesIO(b"one\n\n"), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", typed)
    command = [str(checkpoint), "--max-bytes", "10", "--any-bytes", "--past-eos", "--device", "cpu"]
    script("generate").main([*command, "--samples", str(samples)])
    err = capfdbinary.readouterr().err.decode()
    told = re.findall(r"(\d+) bytes in ([\d.]+) s, ([\d,]+) bytes/s", err)
    assert len(told) == 2, err
    for size, seconds, speed in told:
        assert int(size) == 10 * samples and 0.1 <= float(seconds) < 1.0, err
        assert 10 < int(speed.replace(",", "")) <= 100 * samples, err


def test_prompts_of_a_windows_file(checkpoint, capfdbinary, monkeypatch):
    """A byte order mark before the first line, and line ends of two bytes, are no part of the prompts."""
    typed = b"\xef\xbb\xbffirst\r\nsecond\r\n"
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(typed), isatty=lambda: False))
    script("generate").main([str(checkpoint), "--max-bytes", "1", "--past-eos", "--temperature", "0"])
    out = capfdbinary.readouterr().out
    assert out.startswith(b"first") and b"\nsecond" in out and b"\r" not in out


def test_the_legend_comes_once(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "linux")
    typed = types.SimpleNamespace(buffer=io.BytesIO(b"a\nb\nc\n"), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", typed)
    script("generate").main([str(checkpoint), "--max-bytes", "1", "--past-eos"])
    captured = capsys.readouterr()
    assert without_colours(captured.out).count("begins a chunk of stage 0, ‖ also one of stage 1\n") == 1
    assert captured.err.count("bytes/s") == 3


@pytest.mark.parametrize("name", ["generate", "explore", "export", "compare"])
def test_a_reader_that_has_gone_ends_it_quietly(checkpoint, name, tmp_path, monkeypatch, capsys):
    """Status 141, without a word; the files that were asked for are there."""
    flags = {"generate": ["--prompt", "x", "--max-bytes", "3"], "explore": ["--out", str(tmp_path / "page.html")]}
    flags |= {"export": [str(tmp_path / "out")], "compare": ["--how-b", "prefill", "--prompt", "some text"]}
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))  # noqa: SIM115
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(checkpoint), *flags[name]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    sys.stdout.close()
    assert ended.value.code == 141 and "Error" not in capsys.readouterr().err
    made = {"explore": ["page.html"], "export": ["pt", "safetensors"]}
    assert sorted(path.name for path in (tmp_path / "out" if name == "export" else tmp_path).iterdir()) == made.get(
        name, []
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", "a", "--temperature", "-0.5"], "--temperature: -0.5; expected 0"),
        (["--prompt", "a", "--top-p", "0"], "--top-p: 0.0; expected more than 0"),
        (["--prompt", "a", "--top-p", "1.01"], "--top-p: 1.01"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k: -1"),
        (["--prompt", "a", "--min-p", "7"], "--min-p: 7.0"),
        (["--prompt", "a", "--max-bytes", "0"], "--max-bytes: 0; expected 1 or more"),
        (["--prompt", "a", "--samples", "0"], "--samples: 0"),
        (["--prompt", "a", "--max-bytes", "1" + 20 * "0"], "--max-bytes 1" + 20 * "0" + ": expected at most 16777216"),
        (["--prompt", "a", "--samples", "100000000"], "--samples 100000000: expected at most 4096"),
        (["--prompt", "a", "--top-k", str(2**63)], f"--top-k {2**63}: expected at most 256"),
        (["--prompt", "a", "--seed", str(2**64)], f"--seed {2**64}: expected less than 2**63"),
        (["--prompt", "a", "--prompt-file", "b"], "give one of them"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: can't be read (No such file or directory)"),
        (["--prompt", "a", "-c", "nowhere.json"], "nowhere.json: no such config file"),
    ],
)
def test_generate_says_what_is_wrong(checkpoint, flags, words):
    from hnet_trainable import ConfigError

    with pytest.raises((UserError, ConfigError)) as error:
        script("generate").main([str(checkpoint), *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.soak
def test_compiled_steps_write_the_same(checkpoint, capfdbinary):
    if reason := why_no_compiler():
        pytest.skip(reason)
    main, written = script("generate").main, []
    for flags in ([], ["--compile"]):
        main([str(checkpoint), "--prompt", "", "--max-bytes", "30", "--device", "cpu", *flags])
        out, err = capfdbinary.readouterr()
        written.append(out)
        assert (b"steps compiled in " in err) == bool(flags) and b"warning" not in err
    assert written[0] == written[1]


def test_without_a_compiler_compile_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("hnet_kernels.capture.why_no_compiler", lambda: "no-such-compiler")
    with pytest.raises(UserError, match=r"^--compile: torch.compile needs a C.*no-such-compiler.*\)$"):
        script("generate").main([str(checkpoint), "--prompt", "a", "--device", "cpu", "--compile"])


def test_long_prompt_is_warned_of(checkpoint, capfdbinary, monkeypatch):
    monkeypatch.setattr(hnet_decoder, "TRAINED_LENGTH", 20)
    script("generate").main([str(checkpoint), "--prompt", "x" * 19, "--max-bytes", "2"])
    assert b"warning: a prompt of 19 bytes and 2 more exceed the 20" in capfdbinary.readouterr().err


@pytest.mark.parametrize("name", ["generate", "export", "compare"])
def test_wrong_usage_is_status_2_without_traceback(name, tmp_path, monkeypatch, capsys):
    flags = {"generate": ["--prompt", "x"], "export": [str(tmp_path)], "compare": ["--how-b", "steps"]}[name]
    for argv, words in (
        ([str(tmp_path / "nothing"), *flags], f"error: {tmp_path / 'nothing'}: no such file or folder\n"),
        ([str(tmp_path), *flags, "--no-such-flag"], "no-such-flag"),
    ):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        captured = capsys.readouterr()
        assert ended.value.code == 2 and words in captured.err + captured.out
        assert "Traceback" not in captured.err


def test_export_command(checkpoint, tmp_path, capsys):
    script("export").main([str(checkpoint), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert capsys.readouterr().out.count("bytes\n") == 5
    both = [weights.load(tmp_path / "out" / form) for form in ("pt", "safetensors")]
    assert all(torch.equal(both[0].weights[name], both[1].weights[name]) for name in both[0].weights)
    assert both[0].config == both[1].config  # N_compress 1, 3, 9 is the default of two stages
    script("export").main([str(checkpoint), str(tmp_path / "one"), "--form", "pt"])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.pt", "model.pt.json"]


def test_an_export_of_both_forms_checks_both_folders_first(checkpoint, tmp_path):
    theirs = tmp_path / "out" / "safetensors"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("theirs")
    with pytest.raises(weights.CheckpointError, match="has a config.json that is of no export"):
        script("export").main([str(checkpoint), str(tmp_path / "out")])
    (theirs / "config.json").unlink()
    theirs.rmdir()
    theirs.touch()
    with pytest.raises(weights.CheckpointError, match="safetensors: a file; expected a folder"):
        script("export").main([str(checkpoint), str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["safetensors"]


def test_compare_command(checkpoint, tmp_path, capsys):
    compare = script("compare").main
    text = ["--prompt", "a text of Grüße", "--dtype", "float64", "--tolerance", "1e-9"]
    assert compare([str(checkpoint), *text, "--how-b", "steps", "--chunks"]) == 0
    assert compare([str(checkpoint), *text, "--how-a", "prefill", "--how-b", "steps"]) == 0
    assert "chunk starts of stage 1" in capsys.readouterr().out
    long = "tab\there " * 40
    assert compare([str(checkpoint), "--prompt", long, "--how-b", "prefill", "--chunks"]) == 0
    name, shown, *_ = capsys.readouterr().out.split("\n")  # not broken at 80 columns
    assert name == f"A: {checkpoint}, training" and re.sub("[|‖]", "", shown) == long
    other = random_model(config_of(["m1", ["T1"], "m1"], [32, 64]), torch.float32, salt="other")
    weights.export(other, tmp_path / "other", "pt")
    assert compare([str(checkpoint), str(tmp_path / "other"), *text]) == 1
    assert "bits per byte" in capsys.readouterr().out
    (tmp_path / "empty.txt").write_text("")
    for wrong, words in (
        (["--text", str(tmp_path / "no.txt")], "can't be read"),
        (["--text", str(tmp_path / "empty.txt")], "empty"),
        (["--how-b", "steps", "--config-b", "x"], "--config-b x: expected also a second model"),
        (["--text", "a", "--prompt", "b"], "give one of them"),
        (["--limit", "0"], "--limit: 0"),
        ([], "nothing to compare"),
    ):
        with pytest.raises(UserError, match=words):
            compare([str(checkpoint), *wrong])
