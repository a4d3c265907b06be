"""Scoring text: windows, batches, processes, intervals, likelihoods, multiple choice, the evaluate command."""

import importlib.util
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import TWO_STAGES, build

import fineweb
import hnet_trainable
from hnet_kernels.dispatch import OPERATIONS
from hnet_runtime import UserError
from hnet_runtime.evaluation import choices, harness, scoring
from hnet_runtime.evaluation.scoring import Likelihoods, Tally, windows
from hnet_runtime.pages import progress_bar
from hnet_runtime.pages.reports import markdown
from hnet_runtime.runs import checkpoint, weights

ROOT = Path(__file__).parent.parent
ALONE = SimpleNamespace(rank=0, size=1)


def command(name: str):
    return script(name).main


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return build(hnet_trainable, TWO_STAGES).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    weights.export(model, folder, "safetensors", torch.float32)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """12 documents as files, prepared, and as rows with a language."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(1)
    words = {"en": ["one", "two", "three", "four"], "ru": ["один", "два", "три"], "ja": ["これ", "それ", "文字"]}
    rows = [{"text": " ".join(rng.choices(words[w], k=rng.randint(1, 40))), "lang": w} for w in [*words] * 4]
    (folder / "files").mkdir()
    for n, row in enumerate(rows):
        (folder / "files" / f"{n:02}.txt").write_text(row["text"])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fineweb.prepare(str(folder / "files"), folder / "data", holdout=0.5)
    return folder


# ---------------------------------------------------------------------------------------------------------------- rows


@given(st.binary(max_size=60), st.integers(1, 20), st.data())
def test_every_label_is_scored_once_with_its_context(text, context, data):
    stride, start = data.draw(st.integers(1, context)), data.draw(st.integers(0, len(text)))
    scored, whole = [], bytes([0xFE]) + text + b"\xff"
    for n, row in enumerate(windows(text, context, stride, scored_from=start)):
        assert len(row.inputs) == len(row.labels) <= context
        assert row.inputs.tobytes() == whole[row.start :][: len(row.inputs)]
        assert row.labels.tobytes() == whole[row.start + 1 :][: len(row.inputs)]
        scored += range(row.start + row.skip, row.start + len(row.labels))
        if n:
            assert row.skip >= context - stride
    assert scored == list(range(start, len(text) + 1))


def test_windows_of_a_known_text():
    rows = list(windows(b"abcdefg", 4, 2))
    assert [(row.inputs.tobytes(), row.labels.tobytes(), row.skip) for row in rows] == [
        (b"\xfeabc", b"abcd", 0),
        (b"bcde", b"cdef", 2),
        (b"defg", b"efg\xff", 2),
    ]
    (row,) = windows(b"long context|end", 6, 3, scored_from=13, eos=False)  # as much context as fits
    assert row.inputs.tobytes() == b"ext|en" and row.skip == 3
    assert row.labels.tobytes() == b"xt|end"


def test_a_score_is_the_models_own_probability(model):
    (row,) = windows(b"some text", 100, 100)
    ((nats, best),) = scoring.score(model, [row])
    ids = torch.tensor([0xFE, *b"some text"])
    logits = model(torch.nested.nested_tensor([ids], layout=torch.jagged)).logits.values()
    wanted = -logits.log_softmax(-1)[torch.arange(10), torch.tensor([*b"some text", 0xFF])]
    assert nats == pytest.approx(wanted.detach().numpy(), abs=1e-12)
    assert best.tolist() == (logits.argmax(-1) == torch.tensor([*b"some text", 0xFF])).tolist()


# -------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("stride", [16, 5])
def test_batches_change_nothing(model, stride):
    documents = [b"", b"a", b"some text, longer than a row of sixteen bytes" * 2, "日本語のテキスト".encode()]
    rows = [row for n, text in enumerate(documents) for row in windows(text, 16, stride, n)]
    one, all_at_once = (scoring.tally(model, rows, batch, ALONE) for batch in (1, 64))
    for a, b in zip(one.values(), all_at_once.values()):
        assert a.nats == pytest.approx(b.nats, abs=1e-9)
    assert [t.bytes for t in one.values()] == [len(text) for text in documents]
    single = scoring.tally(model, list(windows(documents[2], 16, stride, 2)), 7, ALONE)[2]
    assert single.nats == pytest.approx(one[2].nats, abs=1e-9)


def test_the_interval_is_that_of_a_bootstrap():
    """Its width against 4,000 resamples of 300 documents, whose own error is 1% (1 / sqrt(2 * 4000)); 5 times that."""
    rng = np.random.RandomState(0)
    sizes = rng.lognormal(6, 1, 300).astype(int)
    nats = sizes * rng.normal(0.7, 0.15, 300)
    empty = np.zeros(5)
    result = scoring.ratio([Tally(float(a), int(b), empty, empty, int(b)) for a, b in zip(nats, sizes)])
    draws = rng.randint(0, 300, (4000, 300))
    bpb = nats[draws].sum(1) / sizes[draws].sum(1) / math.log(2)
    low, high = result["ci95"]
    assert result["bpb"] == pytest.approx(nats.sum() / sizes.sum() / math.log(2))
    assert (high - low) / 2 == pytest.approx(1.96 * bpb.std(), rel=0.05)
    assert scoring.ratio([Tally(1.0, 2, empty, empty, 2)])["ci95"] is None


def test_groups_sum_to_the_whole(model):
    texts = {0: b"abc", 1: "слово".encode(), 2: b"x" * 300}
    rows = [row for n, text in texts.items() for row in windows(text, 64, 64, n)]
    tallies = scoring.tally(model, rows, 4, ALONE)
    result = scoring.summarise(tallies, {n: scoring.script_of(text) for n, text in texts.items()})
    assert result["by_label"].keys() == {"Latin", "Cyrillic"} and result["by_label"]["Latin"]["documents"] == 2
    for groups in ("by_label", "by_length", "by_position"):
        bits = sum(group["bpb"] * group["bytes"] for group in result[groups].values())
        assert bits == pytest.approx(result["bpb"] * result["bytes"])
    assert result["by_position"]["257 to 1,024"]["bytes"] == 300 - 256
    assert scoring.script_of(b"12 !") == "none" and scoring.script_of("漢字".encode()) == "Cjk"
    with pytest.raises(UserError, match="every document is empty"):
        scoring.summarise(scoring.tally(model, list(windows(b"", 8, 8)), 1, ALONE), {})


# -------------------------------------------------------------------------------------------------------- likelihoods


def test_likelihoods_add_up_in_any_batch(model):
    """log p(ab) = log p(a) + log p(b | a); what does not fit loses the front of its context."""
    a, b = b"ein Anfang, ", "日本".encode()
    for batch in (1, 7):
        scores = Likelihoods(model, 64, batch)
        (whole, only_a, empty) = scores.of_texts([a + b, a, b""])
        ((rest, _), (front, _), (nothing, greedy)) = scores.of_continuations([(a, b), (b"", a), (a, b"")])
        assert whole == pytest.approx(only_a + rest, abs=1e-9) and front == pytest.approx(only_a, abs=1e-9)
        assert (empty, nothing, greedy) == (0, 0, True)
        long = scores.of_continuations([(b"z" * 500 + b"context", b"end")])[0][0]
        (row,) = windows(b"z" * 500 + b"context" + b"end", 64, 32, scored_from=507, eos=False)
        assert len(row.inputs) == 64 and long == pytest.approx(-scoring.score(model, [row])[0][0][-3:].sum(), abs=1e-9)
        assert scores.of_texts([b"q" * 300])[0] < scores.of_texts([b"q" * 200])[0] < 0


def test_greedy_means_what_generation_does(model):
    """What greedy generation writes has the flag, and with its last byte changed it has not."""
    answers = harness.Answers(model, 128, 3)
    prompt = "once "
    text = "".join(answers.generate_until([(prompt, {"max_gen_toks": 12})]))
    ids = torch.tensor([0xFE, *(prompt + text).encode()])
    logits = model(torch.nested.nested_tensor([ids], layout=torch.jagged)).logits.values()
    greedy = bool((logits.argmax(-1)[len(prompt) : -1] == ids[len(prompt) + 1 :]).all())
    assert [flag for _, flag in answers.loglikelihood([(prompt, text), (prompt, text[:-1] + "#")])] == [greedy, False]


@pytest.mark.soak
def test_no_answer_of_the_harness_depends_on_the_batch(model):
    """Every kind of request, alone and with others of other lengths and settings."""
    texts = ["a", "some text", "日本語", "x" * 30, ""]
    pairs = [(a, b) for a in [*texts, "x" * 150] for b in ("next", "é")]
    until = [{"until": ["e"], "max_gen_toks": 5}, {"until": "t", "max_gen_toks": 900}]  # the latter to the context
    until += [{"do_sample": True, "temperature": 0.8, "max_gen_toks": 3}]
    prompts = [(text, options) for text in texts for options in until]
    results = []
    for batch in (1, 4, 64):
        answers = harness.Answers(model, 48, batch)
        results.append(
            (
                answers.loglikelihood(pairs),
                answers.loglikelihood_rolling([(text,) for text in texts]),
                answers.generate_until(prompts),
            )
        )
    for other in results[1:]:
        for (x, greedy), (y, also) in zip(results[0][0], other[0]):
            assert x == pytest.approx(y, abs=1e-9) and greedy == also
        assert results[0][1] == pytest.approx(other[1], abs=1e-9)
        assert results[0][2] == other[2]
    assert all("e" not in text for text in results[0][2][::3])


def test_answers_of_another_model_than_the_files_are_refused(model, monkeypatch):
    """As where a mixer's `step` differs from its `forward`, or lacks."""
    harness._generation_differs.cache_clear()
    step = hnet_trainable.Mamba2.step
    monkeypatch.setattr(hnet_trainable.Mamba2, "step", lambda *args: 2 * step(*args))
    with pytest.raises(UserError, match="differs from hnet_trainable.py: backbone"):
        harness.Answers(model, 8192, 1).generate_until([("a", {"max_gen_toks": 3})])
    harness._generation_differs.cache_clear()


def test_prompts_are_kept_whole_and_limits_count_tokens(model, monkeypatch):
    """What the model is asked for, by the options that tasks of lm_eval give; the names are those that it knows."""
    asked = []
    add = lambda prompt, seed, sampling, limit, **_: asked.append((prompt, limit))  # noqa: E731
    monkeypatch.setattr(harness, "Decoder", lambda *_: SimpleNamespace(busy=False, add=add))
    prompt = "Problem: what do 5 apples cost? Grüße! Answer:"
    size = len(prompt.encode())
    for options, limit in (
        ({}, 256 * 4),  # lm_eval's own limit
        ({"max_gen_toks": 16}, 64),
        ({"max_new_tokens": 16}, 64),
        ({"max_tokens": 16}, 64),
        ({"max_completion_tokens": "16"}, 64),
        ({"max_tokens": 3, "max_gen_toks": 16}, 64),
        ({"max_gen_toks": None, "max_new_tokens": 16}, 64),
        ({"max_length": 100}, 400 - size),
        ({"max_gen_toks": 32768}, 8192 - size),
        ({"max_gen_toks": 2000}, 8000),
        ({"max_gen_toks": 2040}, 8192 - size),
    ):
        answers = harness.Answers(model, 8192, 16)
        assert answers.generate_until([(prompt, options | {"until": ["Q"]})]) == [""]
        assert asked.pop() == (prompt.encode(), limit) and not asked, options
    harness.Answers(model, 8192, 1, bytes_per_token=2.5).generate_until([(prompt, {"max_gen_toks": 3})])
    assert asked.pop()[1] == 8
    requests = [("x" * n, {"max_gen_toks": 4}) for n in (100, 101, 300, 96, 92)]
    with pytest.raises(UserError, match=r"3 of 5 prompts leave no room for an answer \(the longest has 300 bytes"):
        harness.Answers(model, 99, 16).generate_until(requests[:3] + [("", {})] * 2)
    assert not asked  # refused before anything is generated
    for options, words in (
        ({"max_gen_toks": "many"}, "sets max_gen_toks to 'many'; expected a number of tokens"),
        ({"do_sample": True, "top_p": 7}, "options can't be used .*top_p"),
    ):
        with pytest.raises(UserError, match=words):
            harness.Answers(model, 99, 16).generate_until([("a", options)])


def test_what_was_cut_is_counted(model):
    """Limits at, below and beyond the context: the prompt decides the answer, and a longer limit only adds to it."""
    written = []
    for tokens in (3, 40, 4000):
        answers = harness.Answers(model, 64, 2)
        written.append(answers.generate_until([("once ", {"max_gen_toks": tokens}), ("Grüße ", {"until": ["\0"]})])[0])
        report = answers.report()["generate_until"]
        assert report["requests"] == 2 and report["limits_shortened_to_context"] == 1 + (tokens > 3)
        assert 0 <= report["ended_at_limit"] <= 2 and report["bytes_per_s"] > 0
    assert written[1].startswith(written[0][:9]) and written[2] == written[1]
    assert len(written[0].encode()) <= 12 and len(written[2].encode()) <= 64 - 5
    answers = harness.Answers(model, 8, 4, bytes_per_token=1)
    texts = answers.generate_until(
        [("a", {"max_gen_toks": 2, "num_beams": 3}), ("a", {"max_gen_toks": 2, "until": "b"})]
    )
    assert answers.report()["generate_until"]["ended_at_limit"] == sum(len(text.encode()) == 2 for text in texts)
    assert answers.report()["ignored_options"] == ["num_beams"]
    answers.loglikelihood([("a" * 20, "b"), ("a", "b"), ("", "b" * 20), (1, 2)])  # tasks give numbers too
    answers.loglikelihood_rolling([("a" * 9,), (7,)])
    report = answers.report()
    assert report["loglikelihood"] == {"requests": 4, "prompts_cut_on_the_left": 1}
    assert report["loglikelihood_rolling"] == {"requests": 2, "read_in_windows": 1}


def own_tasks(folder: Path) -> list[dict]:
    """Tasks of lm_eval's three kinds on a file of ours, also written as a file of YAML (which JSON is) for each."""
    rows = [{"q": f"one {i} ", "a": ["two", "three", "four"], "gold": i % 3} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    data |= {"test_split": "test", "fewshot_split": "test", "doc_to_text": "{{q}}"}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{a}}", "doc_to_target": "{{gold}}"}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"}
    written = {"output_type": "generate_until", "doc_to_target": "x"}
    written |= {"generation_kwargs": {"until": ["e"], "max_new_tokens": 9}}
    tasks = [
        data | {"task": name, "metric_list": [{"metric": metric}], **kind}
        for name, metric, kind in (
            ("mc", "acc", choice),
            ("r", "bits_per_byte", rolling),
            ("g", "exact_match", written),
        )
    ]
    (folder / "tasks").mkdir()
    for task in tasks:
        (folder / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(task))
    return tasks


def test_tasks_of_ones_own_as_a_command(saved, tmp_path, capsys):
    """From a folder and from files with spaces between; with standard errors and counts; and data that isn't there."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = own_tasks(tmp_path)
    flags = ["--device", "cpu", "--context", "64", "--out", str(tmp_path / "out")]
    command("evaluate")([str(saved), "--include-path", str(tmp_path / "tasks"), *flags])
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert "text" not in result and result["tasks"].keys() == {"mc", "r", "g"}
    assert result["tasks"]["mc"].keys() == {"acc", "acc_stderr"}  # and no sample_len
    p = result["tasks"]["mc"]["acc"]
    assert result["tasks"]["mc"]["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 5))
    how = result["harness"]
    assert how["lm_eval"] == lm_eval.__version__ and how["bytes_per_token"] == 4 and how["context"] == 64
    assert how["loglikelihood"] == {"requests": 18, "prompts_cut_on_the_left": 0}
    assert how["generate_until"]["requests"] == 6 and how["generate_until"]["limits_shortened_to_context"] == 0
    assert "ended at their limit" in capsys.readouterr().out
    files = ", ".join(str(tmp_path / "tasks" / f"{name}.yaml") for name in ("mc", "g"))
    command("evaluate")([str(saved), "--tasks", files, "--num-fewshot", "2", "--limit", "3", *flags[:2]])
    page = capsys.readouterr().out
    assert "| mc | acc |" in page and "9 log-likelihoods" in page and "3 answers" in page
    tasks[0]["dataset_kwargs"]["data_files"]["test"] += ".gone"
    (tmp_path / "gone.yaml").write_text(json.dumps(tasks[0]))
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "none").mkdir()
    for flags, words in (
        (["--tasks", str(tmp_path / "gone.yaml")], "gone.yaml: its data can't be fetched"),
        (["--tasks", str(tmp_path / "broken.yaml")], "broken.yaml: lm_eval can't load it"),
        (["--include-path", str(tmp_path / "none")], "none: holds no tasks"),
        (["--include-path", str(tmp_path / "nowhere")], "nowhere: no such file or folder"),
        (["--include-path", str(tmp_path / "tasks" / "g.yaml"), "--context", "5"], "6 of 6 prompts leave no room"),
        (["--include-path", str(tmp_path / "tasks"), "--num-fewshot", "99"], "lm_eval stopped"),
    ):
        with pytest.raises(UserError, match=words) as error:
            command("evaluate")([str(saved), *flags, "--device", "cpu"])
        assert "\n" not in str(error.value)


def test_the_harness_itself_where_it_is_installed(model, tmp_path):
    """Tasks of its three kinds on a file of ours, at two batch sizes; and a task that it doesn't know."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    tasks, nothing_else = own_tasks(tmp_path), TaskManager(include_defaults=False)
    results = []
    for batch in (1, 4):
        adapter = harness.harness_model(model, 64, batch)
        out = lm_eval.simple_evaluate(model=adapter, tasks=tasks, bootstrap_iters=0, task_manager=nothing_else)
        out = out["results"]
        results.append([out["mc"]["acc,none"], out["r"]["bits_per_byte,none"], out["g"]["exact_match,none"]])
    assert results[0] == pytest.approx(results[1], abs=1e-9)
    texts = [f"one {i} ".encode() for i in range(6)]
    nats = -sum(Likelihoods(model, 64).of_texts(texts))
    assert results[0][1] == pytest.approx(nats / math.log(2) / sum(map(len, texts)))
    with pytest.raises(UserError, match="lm_eval knows no task no_such_task"):
        harness.run_tasks(model, ["no_such_task"], 64, 2, None)


def test_without_the_harness_the_install_command_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[lm-eval\]'"):
        harness.run_tasks(model, ["arc_easy"], 64, 1, None)


# ----------------------------------------------------------------------------------------------------- multiple choice


def test_perturbations_on_fixed_examples():
    text = "The cat sat, Grüße!"
    seeded = {name: change(text, random.Random(3)) for name, change in choices.PERTURBATIONS.items()}
    assert seeded["AntSpeak"] == "T H E   C A T   S A T ,   G R Ü S S E !"
    assert seeded["UpperCase"] == "THE CAT SAT, GRÜSSE!"
    draw = random.Random(3)
    assert seeded["Drop"] == "".join(ch for ch in text if draw.random() >= 0.1) and len(seeded["Drop"]) < len(text)
    assert choices.perturbed(choices.Question("ab", ("c", "d"), 1), "UpperCase", "prompt", "k") == ("AB", ("c", "d"), 1)
    assert choices.perturbed(choices.Question("ab", ("c", "d"), 1), "UpperCase", "endings", "k") == (
        "ab",
        ("C", "D"),
        1,
    )
    assert choices.perturbed(choices.Question("ab", ("c", "d"), 1), "AntSpeak", "both", "k") == ("A B", ("C", "D"), 1)


def test_perturbations_keep_to_their_rates():
    """20,000 characters; the bounds are 5 standard deviations of the binomial counts."""
    text, draw = "abcdefghij" * 2000, random.Random(0)
    within = lambda count, p: abs(count - 20_000 * p) < 5 * math.sqrt(20_000 * p * (1 - p))  # noqa: E731
    assert within(20_000 - len(choices.drop(text, draw)), 0.1)
    cased = choices.random_case(text, draw)
    assert cased.lower() == text and within(sum(ch.isupper() for ch in cased), 0.5)
    runs = [len(list(run)) for _, run in itertools.groupby(choices.repeat(text, draw))]
    assert len(runs) == 20_000 and within(sum(n > 1 for n in runs), 0.2)
    assert set(runs) == {1, 2, 3, 4, 5} and all(within(runs.count(n), 0.05) for n in (2, 3, 4, 5))


class ReadsLowerCase:
    """Prefers the ending 'right' as it is written here; all else is the same to it, so that the first one wins."""

    def of_continuations(self, pairs):
        return [((-1.0 if b == b" right" else -2.0) * (len(b) - 1), False) for _, b in pairs]


def test_robustness_of_a_model_that_is_known():
    questions = []
    for n in range(8):
        endings = tuple("right" if i == n % 4 else f"wrong {i}" for i in range(4))
        questions.append(choices.Question(f"p{n}", endings, n % 4))
    result = choices.robustness(ReadsLowerCase(), questions)
    assert result["accuracy_per_byte"] == 100 and result["chance"] == 25
    assert result["perturbed"]["UpperCase"] == {
        "prompt": 100,
        "endings": 25,
        "both": 25,
        "mean": 50,
        "score": pytest.approx(100 / 3),
    }
    assert result["robustness"] == pytest.approx(sum(r["score"] for r in result["perturbed"].values()) / 5)
    wrong = [question._replace(answer=(question.answer + 1) % 4) for question in questions]
    assert choices.robustness(ReadsLowerCase(), wrong)["robustness"] is None


def questions_file(folder: Path) -> Path:
    raw = {"activity_label": "Cooking", "ctx": "A man [header] cooks [title] He", "label": "1"}
    raw["endings"] = ["runs.", "stirs [substeps] the pot.", "sleeps.", "flies."]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(raw | {"label": n}) for n in ("1", 0, 3)) + "\n\n")
    return folder / "questions.jsonl"


def test_questions_in_the_hellaswag_format(tmp_path):
    questions = choices.read_questions(questions_file(tmp_path))
    assert [q.answer for q in questions] == [1, 0, 3]
    assert questions[0].prompt == "Cooking: A man cooks. He" and questions[0].endings[1] == "stirs the pot."
    for text, words in (
        ("{}", "line 1: has no 'label'"),
        ('{"label": 1, "endings": ["a", "b"]}', "has no 'ctx'"),
        (
            '{"ctx": "a", "label": 2, "endings": ["a", "b"]}',
            "line 1: 2 endings and label 2; expected two endings or more",
        ),
        ('{"ctx": "a", "label": "x", "endings": ["a", "b"]}', "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"ctx": "a", "label": 1, "endings": "ab"}', "expected a JSON object"),
        ('{"ctx": "a", "label": 1.5, "endings": ["a", "b"]}', "expected a JSON object"),
        ('{"ctx": "\\ud800", "label": 1, "endings": ["a", "b"]}', "line 1: not UTF-8"),
        ("\n", "holds no questions"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(UserError, match=words):
            choices.read_questions(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="can't be read"):
        choices.read_questions(tmp_path / "none.jsonl")
    rows = [{"ctx": f"Water{mark} is", "endings": ["wet.", f"in {mark}it."], "label": 0} for mark in "\u2028\x85\x0c"]
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row, end in zip(rows, ("\n", "\r\n", "\n")))
    (tmp_path / "marks.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    questions = choices.read_questions(tmp_path / "marks.jsonl")
    assert [q.prompt for q in questions] == [row["ctx"] for row in rows]
    assert questions[0].endings[1] == "in \u2028it."
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        choices.read_questions(tmp_path / "bad.jsonl")


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_on_one_and_two_processes(saved, texts, tmp_path, capsys):
    """The same numbers at any batch size; on two processes the same to the last digit."""
    flags = ["--context", "32", "--stride", "24", "--device", "cpu"]
    results = []
    for batch in ("1", "64"):
        out = tmp_path / f"batch{batch}"
        command("evaluate")([str(saved), "--data", str(texts / "data"), "--batch", batch, "--out", str(out), *flags])
        results.append(json.loads(out.with_suffix(".json").read_text())["text"])
    assert results[0]["bpb"] == pytest.approx(results[1]["bpb"], abs=1e-5)  # float32 sums in another order
    assert results[0]["ci95"][0] < results[0]["bpb"] < results[0]["ci95"][1]
    assert "| all |" in (tmp_path / "batch1.md").read_text() and "stride 24 bytes" in capsys.readouterr().out
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [str(ROOT / "scripts" / "evaluate.py"), str(saved), "--data", str(texts / "data"), "--batch", "1", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "--out", str(tmp_path / "two")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two.json").read_text())["text"] == results[0]


@pytest.fixture
def left_out(tmp_path) -> Path:
    """A folder with one file of text and one other file."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text")
    (tmp_path / "texts" / "b.bin").write_bytes(b"no text")
    return tmp_path / "texts"


def test_files_left_out_are_named_once(saved, left_out, capsys):
    """Though the text is read twice, to know the number of bytes."""
    command("evaluate")([str(saved), "--data", str(left_out), "--device", "cpu"])
    said = capsys.readouterr().err
    assert said.count("takes 1 file (1 .txt)") == said.count("leaves out 1 file: .bin") == 1


@pytest.mark.soak
def test_files_left_out_are_named_by_one_process(saved, left_out):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [str(ROOT / "scripts" / "evaluate.py"), str(saved), "--data", str(left_out), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("takes 1 file (1 .txt)") == done.stderr.count("leaves out 1 file: .bin") == 1


def test_groups_and_places_that_are_not_there_are_named(saved, texts, tmp_path):
    for flags, said in (
        (["--by", "nolabel"], r"line 1: .*'nolabel' \(--by\)"),
        (["--out", str(tmp_path / "none" / "x")], "--out .*none is no folder that can be written to"),
    ):
        with pytest.raises(UserError, match=said):
            command("evaluate")([str(saved), "--data", str(texts / "rows.jsonl"), *flags, "--device", "cpu"])


def test_groups_by_label_and_by_script(saved, texts, tmp_path, capsys):
    for by, names in (("lang", {"en", "ja", "ru"}), ("script", {"Latin", "Cyrillic", "Hiragana"})):
        flags = ["--data", str(texts / "rows.jsonl"), "--by", by, "--out", str(tmp_path / by), "--limit", "9"]
        command("evaluate")([str(saved), *flags, "--device", "cpu"])
        text = json.loads((tmp_path / f"{by}.json").read_text())["text"]
        assert text["by_label"].keys() >= names and text["documents"] == 9
        assert "| ru |" in capsys.readouterr().out or by == "script"
    files = ["--data", str(texts / "files"), "--out", str(tmp_path / "files")]
    command("evaluate")([str(saved), *files, "--device", "cpu"])
    rows = ["--data", str(texts / "rows.jsonl"), "--out", str(tmp_path / "rows")]
    command("evaluate")([str(saved), *rows, "--device", "cpu"])
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["text"] for name in ("files", "rows"))
    assert ours["bpb"] == pytest.approx(theirs["bpb"], abs=1e-6)


def test_a_limit_keeps_the_rows(saved, texts, monkeypatch, capsys):
    """Of the run's own text: the first documents, in the rows of training. By group and of the other split too."""
    trained = {"data": str(texts / "data"), "mbs": 40, "max_doc": 32, "val_slices": 0}
    monkeypatch.setattr(checkpoint, "train_config_of", lambda source: trained)
    evaluate = script("evaluate")

    def text_of(*flags: str):
        return evaluate.text_to_score(evaluate.parse(evaluate.Options, ["run", *flags], ""))

    rows = list(text_of().rows())
    assert rows[0].document == 0 and len({row.document for row in rows}) > 3
    for flags, wanted in (
        (("--limit", "3"), [row for row in rows if row.document < 3]),
        (("--limit", "999"), rows),
        (("--by", "script"), rows),
        (("--by", "script", "--limit", "1"), [row for row in rows if row.document < 1]),
    ):
        text = text_of(*flags)
        limit = f", of the first {flags[-1]} documents at most" if "--limit" in flags else ""
        assert text.how["rows"] == text_of().how["rows"] + limit and text.labels_in_all() == scoring.labels_of(wanted)
        for row, other in zip(text.rows(), wanted, strict=True):
            assert row.inputs.tobytes() == other.inputs.tobytes() and row[2:] == other[2:]
    assert set(text_of("--by", "script").groups.values()) <= {"Latin", "Cyrillic", "Hiragana", "Cjk"}
    train = [row.labels.tobytes() for row in text_of("--split", "train").rows()]
    assert train and not {row.labels.tobytes() for row in rows} & set(train)

    monkeypatch.setattr(progress_bar, "SECONDS", 0)
    evaluate.main([str(saved), "--limit", "2", "--device", "cpu", "--batch", "1"])
    captured = capsys.readouterr()
    assert (
        "bytes, in rows of up to 32, of the first 2 documents at most. Each" in captured.out
        and "bytes/s" in captured.out
    )
    lines = [line for line in captured.err.splitlines() if line.startswith("bits per byte: ")]
    assert len(lines) > 1 and "s left" in lines[0] and lines[-1].startswith("bits per byte: 100%, ")


def test_the_slices_are_counted(saved, texts, monkeypatch):
    """Those that are scored, where --val-slices of the run asks for more than the text has."""
    evaluate, trained = script("evaluate"), {"data": str(texts / "data"), "max_doc": 32}
    monkeypatch.setattr(checkpoint, "train_config_of", lambda source: trained)
    for mbs, asked in ((40, 64), (40, 0), (40, 2), (40, 1), (1 << 20, 64)):
        trained |= {"mbs": mbs, "val_slices": asked}
        total = sum(1 for _ in fineweb.ByteStream(texts / "data", "validation", slice_bytes=mbs).slices_once())
        text = evaluate.text_to_score(evaluate.parse(evaluate.Options, ["run"], ""))
        scored = min(asked or total, total)
        slices = f"{scored} of {total} slice{'s' * (total > 1)} of up to {mbs:,} bytes"
        assert text.how["rows"] == f"as in training: {slices}, in rows of up to 32"
        assert sum(len(row.labels) for row in text.rows()) <= scored * mbs
    assert total == 1


def test_an_edited_definition_is_evaluated(saved, tmp_path, monkeypatch):
    """Of the operation whose fast implementation runs on CPUs, too."""
    smooth, found = OPERATIONS["smooth"], []
    (tmp_path / "rows.jsonl").write_text('{"text": "some words to cut into chunks"}\n' * 2, "utf-8")
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--out", str(tmp_path / "out")]
    plain = smooth.definition
    for factor in (1, 2):
        monkeypatch.setattr(smooth, "definition", lambda *args, factor=factor: factor * plain(*args))
        monkeypatch.setattr(smooth, "uses_definition", False)  # set by the check, and back at the end
        command("evaluate")([str(saved), *flags])
        found.append(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["text"]["bpb"])
        assert smooth.uses_definition == (factor == 2)
    assert found[0] != found[1]


def test_results_are_utf8_and_whole_when_the_reader_has_gone(saved, tmp_path):
    """A process whose locale is ASCII and whose stdout and stderr nobody reads."""
    (tmp_path / "rows.jsonl").write_text('{"text": "日本語", "lang": "日本語"}\n{"text": "b", "lang": "Ü"}\n', "utf-8")
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--by", "lang", "--out", str(tmp_path / "out"), "--device", "cpu"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    called = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), str(saved), *flags]
    assert subprocess.run(called, stdout=writer, stderr=writer, env=environment).returncode == 141
    os.close(writer)
    assert "| 日本語 |" in (tmp_path / "out.md").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result["text"]["by_label"].keys() == {"日本語", "Ü"}


def test_multiple_choice_as_a_command(saved, tmp_path, capsys):
    flags = ["--choices", str(questions_file(tmp_path)), "--limit", "2", "--out", str(tmp_path / "out")]
    command("evaluate")([str(saved), *flags, "--device", "cpu"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert "text" not in result and result["choices"]["questions"] == 2
    assert set(result["choices"]["perturbed"]) == {"AntSpeak", "Drop", "RandomCase", "Repeat", "UpperCase"}
    assert "| AntSpeak |" in capsys.readouterr().out


def test_mistakes_end_in_one_sentence(saved, texts, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\xff")
    (tmp_path / "half.jsonl").write_text('{"text": "a", "lang": "en"}\n{"text": "b"}\n')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    for source, flags, words in (
        (saved, [], "--data: name the text"),
        (saved, ["--data", "nowhere"], "nowhere: no such file"),
        (saved, ["--data", str(tmp_path / "empty.txt")], "every document is empty"),
        (saved, ["--data", str(tmp_path / "binary.txt")], "binary.txt: not UTF-8"),
        (saved, ["--data", str(bare)], "bare: no text in it; expected files of .txt, .*model.safetensors"),
        (saved, ["--data", str(tmp_path / "half.jsonl"), "--by", "lang"], "half.jsonl, line 2: .*'lang'"),
        (saved, ["--data", str(texts / "files"), "--by", "lang"], "00.txt: has no 'lang'"),
        (saved, ["--data", str(texts / "data"), "--by", "lang"], "prepared folders keep no labels"),
        (saved, ["--context", "8", "--stride", "9"], "--stride 9: expected at most"),
        (saved, ["--batch", "0"], "--batch 0: expected 1 or more"),
        (saved, ["--batch", 23 * "9"], "--batch 9{23}: expected less than"),
        (saved, ["--out", f"{tmp_path}/"], "--out .*/: expected a name in that folder"),
        (saved, ["--text-column", "body"], "--text-column body: expected also --data"),
        (saved, ["--data", str(texts / "data"), "--text-column", "body"], "--text-column body: .* is prepared"),
        (saved, ["--tasks", " ,"], "names no task"),
        (saved, ["--num-fewshot", "3"], "--num-fewshot 3: expected also --tasks"),
        (saved, ["--bytes-per-token", "3"], "--bytes-per-token 3.0: expected also --tasks"),
        (saved, ["--seed", "3"], "--seed 3: expected also --choices"),
        (saved, ["--choices", "a", "--stride", "3"], "--stride 3: expected also --data"),
        (saved, ["--tasks", "a", "--by", "script"], "--by script: expected also --data"),
        (saved, ["--data", str(texts / "files"), "--split", "train"], "--split train: .* is not prepared"),
        (saved, ["--data", str(texts / "files"), "--text-column", "body"], "--text-column body: .* has no rows"),
        (saved, ["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot -1: expected 0 or more"),
        (saved, ["--tasks", "a", "--bytes-per-token", "0"], "--bytes-per-token 0.0: expected more than 0"),
        (bare, ["--data", "x"], "no config.json beside the weights"),
    ):
        with pytest.raises((UserError, fineweb.DataError), match=words) as error:
            command("evaluate")([str(source), *flags, "--device", "cpu"])
        assert "\n" not in str(error.value)


def test_a_text_of_one_byte(saved, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    command("evaluate")([str(saved), "--data", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out")])
    text = json.loads((tmp_path / "out.json").read_text())["text"]
    assert (text["bytes"], text["documents"], text["ci95"]) == (1, 1, None) and text["bpb"] > 0


def test_a_page_of_markdown_holds_every_part():
    result = {"checkpoint": "C", "dtype": "float32", "device": "cpu", "seconds": 1}
    metrics = {"acc": 0.25, "acc_stderr": 0.125, "em,strict": 1, "em_stderr,strict": 0.5, "alone": 2}
    page = markdown(result | {"tasks": {"arc|easy": metrics}})
    assert page.startswith("# C\n") and "| arc/easy | acc | 0.2500 | 0.1250 |" in page
    assert "| arc/easy | em,strict | 1.0000 | 0.5000 |" in page and "| arc/easy | alone | 2.0000 |  |" in page
