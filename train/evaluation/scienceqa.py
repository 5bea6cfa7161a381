"""ScienceQA: accuracy of multiple choice, in the columns of the data set's own evaluation.

NAT, SOC, LAN are the subjects; TXT: the question has a text as context, IMG: an image, NO: neither; then
the grades. A question may be in TXT and in IMG. It is asked in the words that training uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from train.data.rows import Row
from train.errors import DataError, EvaluationError
from train.evaluation.endpoint import Endpoint
from train.evaluation.results import Prediction, Result
from train.evaluation.samples import all_rows, check_image, checked, read_wanted
from train.recipe import SourceRecipe

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LAST_LOW_GRADE = 6
_ANSWERS = (
    re.compile(r"(?i:answer is):?\s*\(([A-Za-z])\)"),
    re.compile(r"(?i:answer is):?\s*([A-Z])\s*(?:[.:,)]|$)"),
    re.compile(r"^\s*\(([A-Z])\)"),
    re.compile(r"^\s*([A-Z])\s*(?:[.:)]|$)"),  # a letter alone: "A cat" chooses nothing
)


class _Fields(BaseModel):
    """What the columns need besides what the reader checks."""

    subject: Literal["natural science", "social science", "language science"]
    grade: str = Field(pattern=r"^grade(1[0-2]|[1-9])$")
    answer: int
    choices: list[Any]
    hint: str | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """`answer` is a letter; `columns`: where it counts, besides the average."""

    id: str
    question: str
    image: Path | None
    choices: int
    answer: str
    columns: frozenset[str]


def read_problems(source: SourceRecipe, limit: int | None = None, *, images: bool = True) -> list[Problem]:
    """The first `limit` problems of the source's split; without `images` they are asked by text alone.

    Raises DataError for a bad row or image, EvaluationError where there is no problem.
    """
    problems: list[Problem] = []
    for row, sample, image in read_wanted(source, all_rows, [], images=images):
        if len(problems) == limit:
            break
        reason = check_image(image) if image is not None else None
        if reason is not None:
            raise DataError(row.file, row.line, reason)
        problems.append(_problem(row, sample.turns[0].content, image))
    if not problems:
        raise EvaluationError(
            f"{', '.join(map(str, source.path))}: no problem of the split {source.split!r}; correct --split"
        )
    return problems


def _problem(row: Row, question: str, image: Path | None) -> Problem:
    fields = checked(_Fields, row)
    hint = bool((fields.hint or "").strip())
    columns = {
        _SUBJECTS[fields.subject],
        "G1-6" if int(fields.grade.removeprefix("grade")) <= _LAST_LOW_GRADE else "G7-12",
        *(["TXT"] if hint else []),
        *(["IMG"] if fields.image else []),
        *([] if hint or fields.image else ["NO"]),
    }
    id, answer = row.key or f"{row.file.name}:{row.line}", chr(ord("A") + fields.answer)
    return Problem(id, question, image, len(fields.choices), answer, frozenset(columns))


def read_letter(answer: str, choices: int) -> str | None:
    """The choice that an answer names, as `The answer is (B)`, `(B) …`, `B.` or `B`; None: it names none."""
    for pattern in _ANSWERS:
        found = pattern.search(answer)
        if found:
            letter = found[1].upper()
            return letter if ord(letter) - ord("A") < choices else None
    return None


def accuracy_table(problems: Sequence[Problem], letters: Sequence[str | None]) -> dict[str, float | None]:
    """Per cent of right answers; a column without problems has None."""
    right = [letter == problem.answer for problem, letter in zip(problems, letters, strict=True)]
    table = {"Avg": _percent(right)}
    for column in COLUMNS:
        table[column] = _percent(
            hit for problem, hit in zip(problems, right, strict=True) if column in problem.columns
        )
    return table


def _percent(hits: Iterable[bool]) -> float | None:
    counted = list(hits)
    return 100 * sum(counted) / len(counted) if counted else None


def evaluate_scienceqa(problems: Sequence[Problem], endpoint: Endpoint, max_tokens: int) -> Result:
    """Ask and count. An answer that names no choice is wrong, and counted as `unread`."""
    answers = endpoint.each(
        lambda problem: endpoint.ask(problem.question, problem.image, max_tokens),
        problems,
        "problems",
        _prediction,
    )
    letters = [
        read_letter(answer, problem.choices) for problem, answer in zip(problems, answers, strict=True)
    ]
    counts = {"problems": len(problems), "unread": letters.count(None)}
    predictions = list(map(_prediction, problems, answers))
    return Result("scienceqa", accuracy_table(problems, letters) | counts, predictions=predictions)


def _prediction(problem: Problem, answer: str) -> Prediction:
    return {
        "id": problem.id,
        "image": str(problem.image) if problem.image else None,
        "answer": answer,
        "read": read_letter(answer, problem.choices),
        "right": problem.answer,
    }
