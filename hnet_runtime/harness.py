"""An H-Net for lm-evaluation-harness (the extra `lm-eval`): log-likelihoods, rolling ones, and generation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from hnet_runtime import UserError
from hnet_runtime.scoring import Likelihoods, in_batches
from hnet_simple import HNetInference, Sampling, stream
from hnet_trainable import HNetLM


class Answers:
    """What the harness asks of a model, on bytes and without the harness. No answer depends on `batch`."""

    def __init__(self, model: HNetLM, context: int, batch: int):
        self.likelihoods = Likelihoods(model, context, batch)
        self.inference = HNetInference.from_training(model).eval()
        self.context, self.batch = context, batch

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): nats, and whether greedy generation would give the continuation."""
        return self.likelihoods.of_continuations([(a.encode(), b.encode()) for a, b in requests])

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """For each text the nats of all of it."""
        return self.likelihoods.of_texts([text.encode() for (text,) in requests])

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """For each (prompt, options): the continuation before the first of the texts in `until`, greedy unless asked.

        Options as the harness has them: `until`, `max_gen_toks` (bytes here; 256), `do_sample`, `temperature`, `top_p`,
        `top_k`. A prompt that is too long loses its beginning.
        """

        def settings(n: int) -> tuple[int, Sampling]:
            options = requests[n][1]
            sampled = options.get("do_sample", options.get("temperature", 0) > 0)
            temperature = options.get("temperature", 1.0) if sampled else 0.0
            sampling = Sampling(temperature, options.get("top_k", 0), options.get("top_p", 1.0))
            return max(4, options.get("max_gen_toks", 256)), sampling  # a character that is cut off needs up to 3

        answers = [""] * len(requests)
        alike = sorted(range(len(requests)), key=lambda n: str(settings(n)))
        for _, group in itertools.groupby(alike, key=settings):
            for some in in_batches(group, self.batch):
                for n, answer in zip(some, self._generate([requests[n] for n in some], some, *settings(some[0]))):
                    answers[n] = answer
        return answers

    def _generate(self, requests, seeds: list[int], max_bytes: int, sampling: Sampling) -> list[str]:
        room = max(1, self.context - max_bytes)
        prompts = [prompt.encode()[-room:] for prompt, _ in requests]
        stops = [options.get("until") or [] for _, options in requests]
        stops = [[until] if isinstance(until, str) else list(until) for until in stops]
        stops = [[stop.encode() for stop in until if stop] for until in stops]
        written, ends = [bytearray() for _ in requests], [-1] * len(requests)
        for emitted in stream(self.inference, prompts, max_bytes, sampling, seeds, valid_utf8=True):
            b = emitted.sequence
            if ends[b] >= 0:
                continue
            written[b].append(emitted.byte)
            ends[b] = min((at for stop in stops[b] if (at := written[b].find(stop)) >= 0), default=-1)
            if all(end >= 0 for end in ends):
                break
        return [bytes(w[:end] if end >= 0 else w).decode(errors="replace") for w, end in zip(written, ends)]


def harness_model(model: HNetLM, context: int, batch: int) -> Any:
    """An `lm_eval.api.model.LM` around `Answers`. Raises UserError where the harness isn't installed."""
    try:
        import lm_eval  # noqa: F401
        from lm_eval.api.model import LM
    except ImportError as error:
        message = "--tasks: lm-evaluation-harness is not installed; pip install -e '.[lm-eval]'"
        raise UserError(f"{message} ({error})") from None

    class HarnessModel(LM):
        def __init__(self):
            super().__init__()
            self.answers = Answers(model, context, batch)

        def loglikelihood(self, requests, **_):
            return self.answers.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests, **_):
            return self.answers.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests, **_):
            return self.answers.generate_until([request.args for request in requests])

    return HarnessModel()


def run_tasks(model: HNetLM, tasks: list[str], context: int, batch: int, limit: int | None) -> dict[str, Any]:
    """The harness's results by task: metric -> number. Raises UserError for a task it doesn't know."""
    adapter = harness_model(model, context, batch)
    import lm_eval
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    if unknown := [task for task in tasks if not known.match_tasks([task])]:
        raise UserError(f"--tasks {','.join(tasks)}: lm_eval knows no task {unknown[0]}; `lm_eval ls tasks` lists them")
    with torch.no_grad():
        out = lm_eval.simple_evaluate(model=adapter, tasks=tasks, limit=limit, task_manager=known, bootstrap_iters=0)
    keep = {}
    for task, values in out["results"].items():
        keep[task] = {k.removesuffix(",none"): v for k, v in values.items() if isinstance(v, int | float)}
    return keep
