"""POPE's table by hand, its rule for answers, and rows that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scripted_endpoint import Reply, answering, said
from train_files import write_lines

from train.errors import DataError, EvaluationError
from train.evaluation.pope import evaluate_pope, read_questions, read_yes_no


def write(folder: Path, name: str, labels: list[str]) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    rows = [
        {"question_id": i, "image": "a.png", "text": f"{name} {i}?", "label": label}
        for i, label in enumerate(labels)
    ]
    return write_lines(folder / f"{name}.jsonl", rows)


def test_the_table_by_hand(tmp_path: Path) -> None:
    files = [
        write(tmp_path, "random", ["yes", "yes", "yes", "no", "no"]),
        write(tmp_path, "popular", ["yes", "no"]),
    ]
    answers = {
        # three found of which two are there; of three that are there two found
        "random": ["Yes, there is.", "yes", "No.", "Certainly", "There is not one. Yes."],
        "popular": ["no", "No, there is none"],
    }

    def reply(body: dict[str, Any]) -> Reply:
        name, number = body["messages"][0]["content"][0]["text"].rstrip("?").split()
        return said(answers[name][int(number)])

    questions = read_questions(files, tmp_path)
    with answering(reply) as endpoint:
        result = evaluate_pope(questions, endpoint, 8)
    random, popular, mean = result.scores
    assert random == {
        "file": "random",
        "accuracy": pytest.approx(60),
        "precision": pytest.approx(200 / 3),
        "recall": pytest.approx(200 / 3),
        "F1": pytest.approx(200 / 3),
        "yes": pytest.approx(60),
        "questions": 5,
        "unread": 1,
    }
    assert popular == {
        "file": "popular",
        "accuracy": pytest.approx(50),
        "precision": 0,
        "recall": 0,
        "F1": 0,
        "yes": 0,
        "questions": 2,
        "unread": 0,
    }
    assert (mean["file"], mean["accuracy"], mean["questions"]) == ("mean", pytest.approx(55), 7)
    assert [line["read"] for line in result.predictions] == ["yes", "yes", "no", None, "no", "no", "no"]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("NO!", "no"),
        ("There is not. Yes", "no"),
        ("Yes. No", "yes"),
        ("Nothing", None),
        ("yes or no", "no"),
        ("", None),
    ],
)
def test_the_first_sentence_decides(answer: str, read: str | None) -> None:
    assert read_yes_no(answer) == read


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question_id": 2, "image": "a.png", "text": "?", "label": "maybe"}, "label: "),
        ({"question_id": 2, "image": "a.png", "label": "yes"}, "text: "),
        ({"question_id": [2], "image": "a.png", "text": "?", "label": "yes"}, "question_id"),
        ({"question_id": 2, "image": "gone.png", "text": "?", "label": "yes"}, "is not in"),
        ({"question_id": 2, "image": "bad.png", "text": "?", "label": "yes"}, "not a PNG"),
        (["no object"], "the row"),
    ],
)
def test_bad_rows_are_named_by_line(row: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    good = {"question_id": 1, "image": "a.png", "text": "?", "label": "no"}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = write_lines(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        read_questions([file], tmp_path)
    assert len(read_questions([file], tmp_path, limit=1)) == 1


def test_broken_lines_empty_files_and_twins_are_told(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"broken\.jsonl:1: is not JSON"):
        read_questions([tmp_path / "broken.jsonl"], tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="holds no question"):
        read_questions([tmp_path / "empty.jsonl"], tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(EvaluationError, match="two files are called alike"):
        read_questions([tmp_path / "x.jsonl", tmp_path / "b" / "x.jsonl"], tmp_path)
