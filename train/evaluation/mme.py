"""MME (arXiv 2306.13394): two questions on each picture, one to be answered yes and one no.

A subtask's score is its accuracy over questions plus the share of pictures with both answers right
(acc+), each of 100; perception and cognition are sums over their subtasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from train.data.rows import Row, open_text
from train.errors import DataError, EvaluationError
from train.evaluation.endpoint import Endpoint
from train.evaluation.results import Prediction, Result
from train.evaluation.samples import ImageFolder, checked

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_MAX_LINE = 1 << 16  # characters
_FIELDS = ("image", "question", "answer")


class _Fields(BaseModel):
    image: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: Literal["yes", "no"]


@dataclass(frozen=True, slots=True)
class Question:
    subtask: str
    text: str
    image: Path
    answer: Literal["yes", "no"]


def read_subtasks(folder: Path, images: Path, limit: int | None = None) -> list[Question]:
    """`SUBTASK.txt` files of lines `image TAB question TAB answer`, the first `limit` pictures of each.

    Pictures lie in `images/SUBTASK` or `images/SUBTASK/images`. Raises DataError for a bad line, for a
    bad image, and for one that has not two questions; EvaluationError where there are no files.
    """
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise EvaluationError(f"{folder}: holds no SUBTASK.txt files; name the folder that does")
    return [question for file in files for question in _read_subtask(file, ImageFolder(images), limit)]


def _read_subtask(file: Path, images: ImageFolder, limit: int | None) -> list[Question]:
    subtask = file.stem
    pictures: dict[str, list[tuple[Row, _Fields]]] = {}
    for row in _rows(file):
        fields = checked(_Fields, row)
        pictures.setdefault(fields.image, []).append((row, fields))
    if not pictures:
        raise EvaluationError(f"{file}: holds no question")
    questions: list[Question] = []
    for name, pair in list(pictures.items())[:limit]:
        row = pair[-1][0]
        if len(pair) != 2:
            raise DataError(file, row.line, f"the image {name[:200]!r} has {len(pair)} questions, not two")
        path = images.path(row, f"{subtask}/{name}", f"{subtask}/images/{name}")
        questions += [Question(subtask, fields.question, path, fields.answer) for _, fields in pair]
    return questions


def _rows(file: Path) -> list[Row]:
    rows, number = [], 0
    with open_text(file, "") as stream:
        while line := stream.readline(_MAX_LINE):
            number += 1
            values = line.rstrip("\r\n").split("\t")
            if len(values) != len(_FIELDS):
                raise DataError(file, number, f"has {len(values)} columns, not {len(_FIELDS)}, by tabs")
            image, question, answer = values
            fields = {"image": image, "question": question, "answer": answer.strip().lower()}
            rows.append(Row(file, number, fields))
    return rows


def read_yes_no(answer: str) -> Literal["yes", "no"] | None:
    """MME's own rule: whichever the first four letters hold; None is a wrong answer."""
    head = answer.strip().lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else None


def mme_scores(right: Sequence[bool]) -> dict[str, float | int]:
    """Of one subtask, whose questions come in pairs of one picture each."""
    pairs = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    accuracy, both = 100 * sum(right) / len(right), 100 * sum(pairs) / len(pairs)
    return {"score": accuracy + both, "acc": accuracy, "acc+": both, "questions": len(right)}


def evaluate_mme(questions: Sequence[Question], endpoint: Endpoint, max_tokens: int) -> Result:
    """A row per subtask, then the sums; a sum that lacks subtasks says of how many it is."""
    answers = endpoint.each(
        lambda question: endpoint.ask(question.text, question.image, max_tokens),
        questions,
        "questions",
        _prediction,
    )
    read = [read_yes_no(answer) for answer in answers]
    rows: list[dict[str, Any]] = []
    for subtask in dict.fromkeys(question.subtask for question in questions):
        mine = [i for i, question in enumerate(questions) if question.subtask == subtask]
        scores = mme_scores([read[i] == questions[i].answer for i in mine])
        rows.append({"subtask": subtask, **scores, "unread": [read[i] for i in mine].count(None)})
    sums = [_sum(rows, name, parts) for name, parts in (("perception", PERCEPTION), ("cognition", COGNITION))]
    predictions = list(map(_prediction, questions, answers))
    return Result("mme", [*rows, *(row for row in sums if row)], predictions=predictions)


def _prediction(question: Question, answer: str) -> Prediction:
    return {
        "subtask": question.subtask,
        "image": str(question.image),
        "question": question.text,
        "answer": answer,
        "read": read_yes_no(answer),
        "right": question.answer,
    }


def _sum(rows: Sequence[dict[str, Any]], name: str, parts: Sequence[str]) -> dict[str, Any] | None:
    mine = [row for row in rows if row["subtask"] in parts]
    if not mine:
        return None
    told = name if len(mine) == len(parts) else f"{name}, {len(mine)} of {len(parts)} subtasks"
    counts = {key: sum(row[key] for row in mine) for key in ("questions", "unread")}
    return {"subtask": told, "score": sum(row["score"] for row in mine), **counts}
