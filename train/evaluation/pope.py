"""POPE (arXiv 2305.10355): whether a model sees objects that are not there, by questions of yes and no."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from train.data.rows import read_rows
from train.errors import EvaluationError
from train.evaluation.endpoint import Endpoint
from train.evaluation.results import Prediction, Result
from train.evaluation.samples import ImageFolder, checked

YesNo = Literal["yes", "no"]

_MEASURES = ("accuracy", "precision", "recall", "F1", "yes")


class _Fields(BaseModel):
    question_id: int | str
    image: str = Field(min_length=1)
    text: str = Field(min_length=1)
    label: YesNo


@dataclass(frozen=True, slots=True)
class Question:
    """`group`: the file's name, which is POPE's way of choosing objects: random, popular, adversarial."""

    group: str
    id: str
    text: str
    image: Path
    label: YesNo


def read_questions(files: Sequence[Path], images: Path, limit: int | None = None) -> list[Question]:
    """JSON lines of `question_id, image, text, label`, the first `limit` of each file.

    Raises DataError for a bad row or image, EvaluationError for no or two files of a name.
    """
    groups = [file.name.partition(".")[0] for file in files]
    if len(set(groups)) < len(groups):
        raise EvaluationError(f"two files are called alike ({', '.join(groups)}); rename one")
    folder, questions = ImageFolder(images), list[Question]()
    for file, group in zip(files, groups, strict=True):
        count = 0
        for row in read_rows(file):
            if count == limit:
                break
            fields = checked(_Fields, row)
            image = folder.path(row, fields.image)
            questions.append(Question(group, str(fields.question_id), fields.text, image, fields.label))
            count += 1
        if not count:
            raise EvaluationError(f"{file}: holds no question")
    return questions


def read_yes_no(answer: str) -> YesNo | None:
    """POPE's own rule: the first sentence says no if a word of it is "no" or "not".

    Any other answer counts as yes there; None is one that does not say yes either.
    """
    words = re.findall(r"\w+", answer.partition(".")[0].lower())
    if "no" in words or "not" in words:
        return "no"
    return "yes" if "yes" in words else None


def pope_scores(labels: Sequence[YesNo], read: Sequence[YesNo | None]) -> dict[str, float | int]:
    """Per cent, `yes` being what is to be found; `yes` in the table: the share of answers that say it."""
    said = [answer != "no" for answer in read]
    true = [label == "yes" for label in labels]
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    right = sum(a == b for a, b in zip(said, true, strict=True))
    values = (
        right / len(true),
        precision,
        recall,
        2 * precision * recall / (precision + recall) if hits else 0.0,
        sum(said) / len(said),
    )
    shares = {name: 100 * value for name, value in zip(_MEASURES, values, strict=True)}
    return {**shares, "questions": len(true), "unread": list(read).count(None)}


def evaluate_pope(questions: Sequence[Question], endpoint: Endpoint, max_tokens: int) -> Result:
    """A row per file, and their mean where there are several."""
    answers = endpoint.each(
        lambda question: endpoint.ask(question.text, question.image, max_tokens),
        questions,
        "questions",
        _prediction,
    )
    read = [read_yes_no(answer) for answer in answers]
    rows = []
    for group in dict.fromkeys(question.group for question in questions):
        mine = [i for i, question in enumerate(questions) if question.group == group]
        scores = pope_scores([questions[i].label for i in mine], [read[i] for i in mine])
        rows.append({"file": group, **scores})
    if len(rows) > 1:
        means = {name: sum(float(row[name]) for row in rows) / len(rows) for name in _MEASURES}
        counts = {name: sum(int(row[name]) for row in rows) for name in ("questions", "unread")}
        rows.append({"file": "mean", **means, **counts})
    return Result("pope", rows, predictions=list(map(_prediction, questions, answers)))


def _prediction(question: Question, answer: str) -> Prediction:
    return {
        "file": question.group,
        "question_id": question.id,
        "image": str(question.image),
        "text": question.text,
        "answer": answer,
        "read": read_yes_no(answer),
        "label": question.label,
    }
