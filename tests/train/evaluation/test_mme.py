"""MME's scores by hand, its rule for answers, and lines that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scripted_endpoint import Reply, answering, said

from train.errors import DataError, EvaluationError
from train.evaluation.mme import COGNITION, PERCEPTION, evaluate_mme, read_subtasks, read_yes_no

# subtask → the answers to both questions on each picture; right are "Yes" and "No"
ANSWERS = {
    "count": [("Yes", "No"), ("Yes", "yes"), ("no", "No"), ("Yes, two.", "no")],
    "OCR": [("yes", "no")],
    "code_reasoning": [("I see", "No"), ("No", "Yes")],
    "extra": [("Yes", "No")],
}


def write(folder: Path, answers: dict[str, list[tuple[str, str]]]) -> None:
    for subtask, pairs in answers.items():
        lines = []
        images = folder / "img" / subtask
        if subtask == "OCR":  # as some subtasks have it
            images /= "images"
        images.mkdir(parents=True)
        for i in range(len(pairs)):
            Image.new("RGB", (8, 8)).save(images / f"{i}.png")
            lines += [f"{i}.png\t{subtask} {i} {j}?\t{answer}\n" for j, answer in enumerate(("Yes", "No"))]
        (folder / f"{subtask}.txt").write_text("".join(lines))


def test_the_scores_by_hand(tmp_path: Path) -> None:
    write(tmp_path, ANSWERS)

    def reply(body: dict[str, Any]) -> Reply:
        subtask, picture, number = body["messages"][0]["content"][0]["text"].rstrip("?").split()
        return said(ANSWERS[subtask][int(picture)][int(number)])

    questions = read_subtasks(tmp_path, tmp_path / "img")
    with answering(reply) as endpoint:
        result = evaluate_mme(questions, endpoint, 8)
    rows = {row["subtask"]: row for row in result.scores}
    assert list(rows) == [
        "OCR",
        "code_reasoning",
        "count",
        "extra",
        "perception, 2 of 10 subtasks",
        "cognition, 1 of 4 subtasks",
    ]
    # six of eight questions, and both of two pictures in four
    count = {"subtask": "count", "score": 125.0, "acc": 75.0, "acc+": 50.0, "questions": 8, "unread": 0}
    assert rows["count"] == count
    assert rows["OCR"]["score"] == 200
    assert (rows["code_reasoning"]["acc"], rows["code_reasoning"]["unread"]) == (25.0, 1)
    sums = {name.partition(",")[0]: row for name, row in rows.items() if "," in name}
    assert sums["perception"]["score"] == 325.0
    assert sums["cognition"]["score"] == 25.0
    assert len(read_subtasks(tmp_path, tmp_path / "img", limit=1)) == 2 * len(ANSWERS)


def test_whole_sums_have_their_plain_names(tmp_path: Path) -> None:
    write(tmp_path, {name: [("yes", "no")] for name in (*PERCEPTION, *COGNITION)})
    questions = read_subtasks(tmp_path, tmp_path / "img")
    with answering(lambda body: said("yes")) as endpoint:
        result = evaluate_mme(questions, endpoint, 8)
    sums = {row["subtask"]: row["score"] for row in result.scores[-2:]}
    assert sums == {"perception": 500.0, "cognition": 200.0}  # half of the questions, no whole picture


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes", "yes"), ("no.", "no"), (" NO", "no"), ("I think yes", None), ("'yes", "yes"), ("", None)],
)
def test_the_first_letters_decide(answer: str, read: str | None) -> None:
    assert read_yes_no(answer) == read


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("0.png\tone?\tYes\n0.png\ttwo?\n", r"count\.txt:2: has 2 columns, not 3"),
        ("0.png\tone?\tYes\n0.png\ttwo?\tPerhaps\n", r"count\.txt:2: answer: "),
        ("0.png\tone?\tYes\n0.png\t\tNo\n", r"count\.txt:2: question: "),
        ("0.png\tone?\tYes\n", r"count\.txt:1: the image '0\.png' has 1 questions, not two"),
        ("0.png\ta\tYes\n0.png\tb\tNo\n0.png\tc\tNo\n", r"count\.txt:3: the image '0\.png' has 3 questions"),
        ("9.png\ta\tYes\n9.png\tb\tNo\n", r"count\.txt:2: the image 'count/9\.png' is not in"),
        ("../../x\ta\tYes\n../../x\tb\tNo\n", r"count\.txt:2: the image .* is not in"),
    ],
)
def test_bad_lines_are_named(lines: str, reason: str, tmp_path: Path) -> None:
    write(tmp_path, {"count": [("yes", "no")]})
    (tmp_path / "count.txt").write_text(lines)
    with pytest.raises(DataError, match=reason):
        read_subtasks(tmp_path, tmp_path / "img")


def test_no_files_and_empty_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"holds no SUBTASK\.txt"):
        read_subtasks(tmp_path / "nowhere", tmp_path)
    (tmp_path / "count.txt").write_text("")
    with pytest.raises(EvaluationError, match=r"count\.txt: holds no question"):
        read_subtasks(tmp_path, tmp_path)
