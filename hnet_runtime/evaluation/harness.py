"""An H-Net for lm-evaluation-harness (the extra `lm_eval`): log-likelihoods, rolling ones, and generation."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import numbers
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hnet_decoder import Decoder
from hnet_runtime import UserError
from hnet_runtime.checks import agreement
from hnet_runtime.evaluation.scoring import Likelihoods
from hnet_runtime.pages.progress_bar import Progress
from hnet_simple import HNetInference, Sampling, why_no_generation
from hnet_trainable import HNetConfig, HNetLM

BYTES_PER_TOKEN = 4.0  # tasks limit answers in tokens; a token of a common vocabulary is about four bytes of English
DEFAULT_TOKENS = 256  # lm_eval's default limit
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
UNDERSTOOD = {*LIMITS, "max_length", "until", "do_sample", "temperature", "top_k", "top_p", "min_p"}
STDERR_DRAWS = 1000  # bootstrap draws for standard errors of metrics that are not means


class Limit(NamedTuple):
    """The most bytes of an answer, and whether that is less than its task allows."""

    bytes: int
    is_shortened: bool


@functools.cache
def _generation_differs(config: str) -> str | None:
    return agreement.generation(HNetConfig.load(json.loads(config)))


class Answers:
    """The requests of the harness, answered on bytes without importing it. No answer depends on `batch`.

    `counts`: the number of requests, and of those that were shortened.
    """

    def __init__(self, model: HNetLM, context: int, batch: int, bytes_per_token: float = BYTES_PER_TOKEN):
        self.likelihoods = Likelihoods(model, context, batch)
        self.inference = HNetInference.from_training(model).eval()
        self.context, self.batch, self.bytes_per_token = context, batch, bytes_per_token
        self.counts: Counter[str] = Counter()
        self.ignored_options: set[str] = set()
        self.seconds_generating = 0.0

    def loglikelihood(self, requests: Sequence[tuple[Any, Any]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether greedy generation would produce it."""
        pairs = [(_text(a), _text(b)) for a, b in requests]
        self.counts["loglikelihoods"] += len(pairs)
        self.counts["loglikelihood_prompts_cut"] += sum(bool(a) and len(a) + len(b) > self.context for a, b in pairs)
        with Progress("log-likelihoods", len(pairs), "requests") as progress:
            self.likelihoods.advance = progress.advance
            return self.likelihoods.of_continuations(pairs)

    def loglikelihood_rolling(self, requests: Sequence[tuple[Any]]) -> list[float]:
        """For each text the log-likelihood of all its bytes."""
        texts = [_text(text) for (text,) in requests]
        self.counts["rolling"] += len(texts)
        self.counts["rolling_in_windows"] += sum(len(text) > self.context for text in texts)
        with Progress("log-likelihoods of texts", len(texts), "texts") as progress:
            self.likelihoods.advance = progress.advance
            return self.likelihoods.of_texts(texts)

    def generate_until(self, requests: Sequence[tuple[Any, dict[str, Any]]]) -> list[str]:
        """For each (prompt, options): the continuation up to the first text of `until`; greedy by default.

        Options are those of the harness: `until`, `do_sample`, `temperature`, `top_p`, `top_k`, and a limit in tokens
        under one of the names in LIMITS, or `max_length`, which includes the prompt. `bytes_per_token` converts it to
        bytes. It is shortened if prompt and answer would exceed the context. Prompts are never cut: raises UserError,
        before anything is generated, if some leave no room for an answer.
        """
        if reason := why_no_generation(self.inference.config):
            raise UserError(f"--tasks: these generate text; {reason}")
        if difference := _generation_differs(json.dumps(self.inference.config.to_dict())):
            raise UserError(f"--tasks: these generate text; {difference}")
        prompts = [_text(prompt) for prompt, _ in requests]
        samplings = [_sampling(options) for _, options in requests]
        stops = [[stop.encode() for stop in _stops(options)] for _, options in requests]
        limits = [self._limit(prompt, options) for prompt, (_, options) in zip(prompts, requests)]
        if full := [len(prompt) for prompt, limit in zip(prompts, limits) if limit.bytes < 1]:
            raise UserError(
                f"--tasks: {len(full)} of {len(prompts)} prompts leave no room for an answer (the longest has "
                f"{max(full):,} bytes, where --context is {self.context:,}); nothing was generated; use a larger "
                "--context or fewer examples (--num-fewshot)"
            )
        for _, options in requests:
            self.ignored_options |= options.keys() - UNDERSTOOD
        self.counts["generations"] += len(requests)
        self.counts["limits_shortened"] += sum(limit.is_shortened for limit in limits)

        began = time.perf_counter()
        answers = self._generate(prompts, samplings, stops, limits) if requests else []
        self.seconds_generating += time.perf_counter() - began
        return answers

    def _limit(self, prompt: bytes, options: dict[str, Any]) -> Limit:
        """The limit of one answer; less than one byte if the prompt leaves no room."""
        asked = next((options[name] for name in LIMITS if options.get(name) is not None), None)
        if asked is None and options.get("max_length") is not None:
            wanted = self._bytes("max_length", options["max_length"]) - len(prompt)
        else:
            name = next((name for name in LIMITS if options.get(name) is not None), LIMITS[0])
            wanted = self._bytes(name, DEFAULT_TOKENS if asked is None else asked)
        room = self.context - len(prompt)
        return Limit(min(wanted, room), wanted > room)

    def _bytes(self, name: str, tokens: Any) -> int:
        try:
            return math.ceil(max(1, int(tokens)) * self.bytes_per_token)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"--tasks: a task sets {name} to {tokens!r}; expected a number of tokens") from None

    def _generate(
        self, prompts: list[bytes], samplings: list[Sampling], stops: list[list[bytes]], limits: list[Limit]
    ) -> list[str]:
        """The answers, `batch` of them at a time. One that has met its stop text makes place for the next."""
        decoder = Decoder(self.inference, min(self.batch, len(prompts)))
        request: dict[int, int] = {}  # by the number of its text
        for n in sorted(range(len(prompts)), key=lambda n: len(prompts[n])):  # prompts that are read together are alike
            text = decoder.add(prompts[n], n, samplings[n], limits[n].bytes, valid_utf8=True)
            request[text] = n
        written, ends = [bytearray() for _ in prompts], [-1] * len(prompts)
        with Progress("generating", len(prompts), "answers") as progress:
            while decoder.busy:
                for event in decoder.drain():
                    n = request[event.text]
                    if ends[n] >= 0:  # written before it could be stopped
                        continue
                    if event.byte is not None:
                        written[n].append(event.byte)
                        self.counts["generated_bytes"] += 1
                    if found := [len(stop) for stop in stops[n] if written[n].endswith(stop)]:
                        ends[n] = len(written[n]) - max(found)
                        decoder.cancel(event.text)
                    elif event.is_last:
                        ends[n] = len(written[n])
                        self.counts["ended_at_limit"] += ends[n] == limits[n].bytes
                    progress.advance(ends[n] >= 0)
        # a stop text may begin inside a character, which is left out
        return [bytes(w[:end]).decode(errors="ignore") for w, end in zip(written, ends)]

    def report(self) -> dict[str, Any]:
        """The counts as results: the requests of each kind, and how many were shortened."""
        n = self.counts
        result: dict[str, Any] = {"context": self.context, "bytes_per_token": self.bytes_per_token}
        if n["loglikelihoods"]:
            cut = n["loglikelihood_prompts_cut"]
            result["loglikelihood"] = {"requests": n["loglikelihoods"], "prompts_cut_on_the_left": cut}
        if n["rolling"]:
            result["loglikelihood_rolling"] = {"requests": n["rolling"], "read_in_windows": n["rolling_in_windows"]}
        if n["generations"]:
            result["generate_until"] = {
                "requests": n["generations"],
                "ended_at_limit": n["ended_at_limit"],
                "limits_shortened_to_context": n["limits_shortened"],
                "bytes": n["generated_bytes"],
                "bytes_per_s": round(n["generated_bytes"] / max(self.seconds_generating, 1e-9), 1),
            }
        if self.ignored_options:
            result["ignored_options"] = sorted(self.ignored_options)
        return result


def _text(value: Any) -> bytes:
    """The bytes of a task's text, which may be a number. Half a surrogate pair becomes a question mark."""
    return str(value).encode(errors="replace")


def _stops(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [str(stop) for stop in ([until] if isinstance(until, str) else until) if stop]


def _sampling(options: dict[str, Any]) -> Sampling:
    try:
        temperature = options.get("temperature")
        is_drawn = options.get("do_sample")
        if is_drawn is None:
            is_drawn = float(temperature or 0) > 0
        given = {name: float(options[name]) for name in ("top_p", "min_p") if options.get(name) is not None}
        if not is_drawn:
            return Sampling(0.0)
        return Sampling(1.0 if temperature is None else float(temperature), int(options.get("top_k") or 0), **given)
    except (TypeError, ValueError) as error:
        raise UserError(f"--tasks: a task's generation options can't be used ({error})") from None


# --------------------------------------------------------------------------------------------------------- the harness


def harness_model(model: HNetLM, context: int, batch: int, bytes_per_token: float = BYTES_PER_TOKEN) -> Any:
    """An `lm_eval.api.model.LM` around `Answers`. Raises UserError if the harness isn't installed."""
    try:
        import lm_eval  # noqa: F401
        from lm_eval.api.model import LM
    except ImportError as error:
        message = "--tasks: lm-evaluation-harness is not installed; pip install -e '.[lm-eval]'"
        raise UserError(f"{message} ({error})") from None

    class HarnessModel(LM):
        def __init__(self):
            super().__init__()
            self.answers, self.is_answering = Answers(model, context, batch, bytes_per_token), False

        def _answer(self, call: Callable, requests) -> list:
            self.is_answering = True
            answers = call([request.args for request in requests])
            self.is_answering = False
            return answers

        def loglikelihood(self, requests, **_):
            return self._answer(self.answers.loglikelihood, requests)

        def loglikelihood_rolling(self, requests, **_):
            return self._answer(self.answers.loglikelihood_rolling, requests)

        def generate_until(self, requests, **_):
            return self._answer(self.answers.generate_until, requests)

    return HarnessModel()


def run_tasks(
    model: HNetLM,
    tasks: Sequence[str],
    context: int,
    batch: int,
    limit: int | None,
    bytes_per_token: float = BYTES_PER_TOKEN,
    num_fewshot: int | None = None,
    include_path: str = "",
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The harness's results by task (metric -> value, with standard errors), and how they were computed.

    tasks: names, patterns of names, or files. If empty, all tasks of `include_path`, a file or folder with tasks beside
    those of the harness. Raises UserError for a task that is unknown or can't be loaded.
    """
    adapter = harness_model(model, context, batch, bytes_per_token)
    import lm_eval

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no forks for bootstrap: with torch they may hang
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
        known, names = _find_tasks(tasks, include_path)
        try:
            with torch.no_grad():
                out = lm_eval.simple_evaluate(
                    model=adapter,
                    tasks=names,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    task_manager=known,
                    bootstrap_iters=STDERR_DRAWS,
                    log_samples=False,
                )
        except UserError:
            raise
        except Exception as error:
            if adapter.is_answering:
                raise
            raise UserError(f"--tasks {','.join(names)}: lm_eval stopped ({_reason(error)})") from error
    metrics = {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, numbers.Real) and "," in name  # without a filter's name it is not a metric: sample_len
        }
        for task, values in out["results"].items()
    }
    how: dict[str, Any] = {"lm_eval": lm_eval.__version__, "limit": limit} | adapter.answers.report()
    how["num_fewshot"] = {task: n for task, n in out["n-shot"].items() if isinstance(n, int)}
    for task, n in how["num_fewshot"].items():
        if num_fewshot is not None and n != num_fewshot:
            print(
                f"warning: --num-fewshot {num_fewshot}: the task {task} does not let it be changed from {n}",
                file=sys.stderr,
            )
    return metrics, how


def _find_tasks(tasks: Sequence[str], include_path: str) -> tuple[Any, list[str]]:
    """A manager of the harness's tasks and those of `include_path`; and the names selected by `tasks`."""
    from lm_eval.tasks import TaskManager

    class Known(TaskManager):
        def load(self, task_list):
            """Loads tasks as the harness does, but errors become one sentence that names the task."""
            loaded: dict[str, dict] = {"tasks": {}, "groups": {}, "group_map": {}}
            for task in task_list:
                try:
                    part = super().load([task])
                except Exception as error:
                    raise UserError(f"--tasks {task}: {_why_not_loaded(error)}") from error
                for name in loaded:
                    loaded[name] |= part.get(name) or {}
            for name, task in loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise UserError(f"--tasks {name}: it runs code that the model writes, which isn't supported")
                if getattr(task, "MULTIMODAL", False):
                    raise UserError(f"--tasks {name}: it needs images or sound; expected a task of text")
            return loaded

    folder, own = Path(include_path), []
    if include_path:
        if not folder.exists():
            raise UserError(f"--include-path {include_path}: no such file or folder")
        if not tasks and folder.is_file():
            own = [str(folder)]
        elif not tasks:
            own = TaskManager(include_path=include_path, include_defaults=False).all_subtasks
            if not own:
                raise UserError(f"--include-path {include_path}: holds no tasks; expected .yaml files of lm_eval")
        folder = folder.parent if folder.is_file() else folder
    # reading the harness's own tasks takes seconds, and tasks from files do not need them
    by_name = any(not Path(task).is_file() for task in tasks)
    known = Known(include_path=str(folder) if include_path else None, include_defaults=by_name)
    names = list(own)
    for task in tasks:
        found = [task] if Path(task).is_file() else known.match_tasks([task])
        if not found:
            raise UserError(f"--tasks {','.join(tasks)}: lm_eval knows no task {task}; `lm_eval ls tasks` lists them")
        names += [name for name in found if name not in names]
    return known, names


def _why_not_loaded(error: Exception) -> str:
    from datasets.exceptions import DatasetsError

    is_absent = isinstance(error, OSError | DatasetsError) or "cache" in str(error).lower()
    if is_absent or type(error).__module__.partition(".")[0] in ("httpx", "requests", "huggingface_hub"):
        return (
            f"its data can't be fetched ({_reason(error)}); where there is no network, run it once where there is one "
            "and copy the cache (HF_HOME)"
        )
    return f"lm_eval can't load it ({_reason(error)})"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
