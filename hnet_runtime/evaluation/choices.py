"""Multiple-choice questions in the HellaSwag format, and a model's robustness to perturbations of their text.

The five perturbations are those of the Byte Latent Transformer (arXiv 2412.09871, section 6.1), which the H-Net paper
also uses. They change the prompt, the endings, or both, and the three accuracies are averaged. The robustness score is
the share of the accuracy above chance that remains, in percent:

    100 * (perturbed accuracy - chance) / (accuracy - chance)
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hnet_runtime import UserError
from hnet_runtime.evaluation.scoring import Likelihoods


class Question(NamedTuple):
    prompt: str
    endings: tuple[str, ...]
    answer: int


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a .jsonl file in the HellaSwag format: `ctx`, `endings`, `label` and optionally `activity_label`.

    Text is cleaned as usual in evaluations of HellaSwag: `[title]` becomes a full stop, other brackets are removed, and
    the activity's name comes before the context. Raises UserError with the file and the line.
    """
    questions = []
    try:
        lines = Path(path).read_bytes().split(b"\n")  # other line separators may be text
    except OSError as error:
        raise UserError(f"--choices {path}: can't be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            raw = json.loads(line.decode())
            label, endings = raw["label"], raw["endings"]
            if isinstance(label, float) or not isinstance(endings, list):
                raise ValueError
            label, endings = int(label), tuple(_clean(ending) for ending in endings)
            prompt = f"{raw['activity_label']}: {raw['ctx']}" if raw.get("activity_label") else raw["ctx"]
            questions.append(Question(_clean(prompt), endings, label))
            "".join([prompt, *endings]).encode()
        except KeyError as error:
            raise UserError(f"--choices {path}, line {number}: has no {error}; expected ctx, endings, label") from None
        except UnicodeError as error:
            raise UserError(f"--choices {path}, line {number}: not UTF-8 ({error.reason})") from None
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"--choices {path}, line {number}: expected a JSON object with a text ctx, a list of texts endings and "
                "a number label"
            ) from None
        if len(endings) < 2 or not 0 <= label < len(endings) or not all(endings):
            raise UserError(
                f"--choices {path}, line {number}: {len(endings)} endings and label {label}; expected two endings or "
                "more, none of them empty, and a label from 0 that is one of them"
            )
    if not questions:
        raise UserError(f"--choices {path}: holds no questions")
    return questions


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# ------------------------------------------------------------------------------------------------------- perturbations


def ant_speak(text: str, draw: random.Random) -> str:
    """Upper case, with a space between characters."""
    return " ".join(text.upper())


def drop(text: str, draw: random.Random) -> str:
    """Removes each character with probability 0.1."""
    return "".join(ch for ch in text if draw.random() >= 0.1)


def random_case(text: str, draw: random.Random) -> str:
    """Makes each character upper or lower case, with probability 0.5 each."""
    return "".join(ch.upper() if draw.random() < 0.5 else ch.lower() for ch in text)


def repeat(text: str, draw: random.Random) -> str:
    """Repeats each character with probability 0.2, one to four times with equal probability."""
    return "".join(ch * (1 + draw.randint(1, 4)) if draw.random() < 0.2 else ch for ch in text)


def upper_case(text: str, draw: random.Random) -> str:
    """Upper case."""
    return text.upper()


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "AntSpeak": ant_speak,
    "Drop": drop,
    "RandomCase": random_case,
    "Repeat": repeat,
    "UpperCase": upper_case,
}
PARTS = ("prompt", "endings", "both")


def perturbed(question: Question, name: str, part: str, key: str) -> Question:
    """The question with a perturbation of one part or both. `key` seeds the random draws of each text."""

    def change(text: str, which: object) -> str:
        return PERTURBATIONS[name](text, random.Random(f"{key} {name} {which}"))

    prompt, endings = question.prompt, question.endings
    if part != "endings":
        prompt = change(prompt, "prompt")
    if part != "prompt":
        endings = tuple(change(ending, n) or ending for n, ending in enumerate(endings))
    return Question(prompt, endings, question.answer)


# -------------------------------------------------------------------------------------------------------------- scores


def answers(model: Likelihoods, questions: list[Question]) -> tuple[list[bool], list[bool]]:
    """Whether each question is answered correctly: by the most likely ending, and by the most likely per byte."""
    pairs = [(q.prompt.encode(), f" {ending}".encode()) for q in questions for ending in q.endings]
    scores = iter(model.of_continuations(pairs))
    plain, per_byte = [], []
    for q in questions:
        logs = [next(scores)[0] for _ in q.endings]
        normed = [log / len(ending.encode()) for log, ending in zip(logs, q.endings)]
        plain.append(logs.index(max(logs)) == q.answer)
        per_byte.append(normed.index(max(normed)) == q.answer)
    return plain, per_byte


def work(questions: list[Question]) -> int:
    """The number of endings that `robustness` scores, of original and perturbed questions."""
    return sum(len(q.endings) for q in questions) * (1 + len(PERTURBATIONS) * len(PARTS))


def robustness(model: Likelihoods, questions: list[Question], seed: int = 0) -> dict[str, Any]:
    """Accuracies (per byte, in percent) unperturbed and under each perturbation and part, and the robustness scores.

    A score is None if the unperturbed accuracy is not above chance.
    """

    def accuracy(right: list[bool]) -> float:
        return 100 * sum(right) / len(right)

    plain, per_byte = answers(model, questions)
    chance = 100 * sum(1 / len(q.endings) for q in questions) / len(questions)
    result: dict[str, Any] = {"questions": len(questions), "chance": chance}
    result |= {"accuracy": accuracy(plain), "accuracy_per_byte": accuracy(per_byte), "perturbed": {}}
    above = result["accuracy_per_byte"] - chance
    for name in PERTURBATIONS:
        row = {}
        for part in PARTS:
            changed = [perturbed(q, name, part, f"{seed} {n}") for n, q in enumerate(questions)]
            row[part] = accuracy(answers(model, changed)[1])
        mean = sum(row.values()) / len(PARTS)
        result["perturbed"][name] = row | {"mean": mean, "score": 100 * (mean - chance) / above if above > 0 else None}
    scores = [row["score"] for row in result["perturbed"].values()]
    result["robustness"] = None if None in scores else sum(scores) / len(scores)
    return result
