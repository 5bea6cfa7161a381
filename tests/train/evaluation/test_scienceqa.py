"""ScienceQA's table by hand, what counts as an answer, and rows that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scripted_endpoint import Reply, answering, said

from train.data.formats import science_question
from train.errors import DataError, EvaluationError
from train.evaluation.scienceqa import COLUMNS, evaluate_scienceqa, read_letter, read_problems
from train.recipe import SourceRecipe

# subject, grade, hint, image, answer
PROBLEMS = {
    "1": ("natural science", "grade1", "Fish swim.", None, 0),
    "2": ("natural science", "grade6", "", "image.png", 1),
    "3": ("social science", "grade7", "", None, 1),
    "4": ("language science", "grade12", "See the text.", "image.png", 2),
    "5": ("language science", "grade3", "  ", None, 0),
}


@pytest.fixture
def source(tmp_path: Path) -> SourceRecipe:
    rows: dict[str, dict[str, Any]] = {}
    for id, (subject, grade, hint, image, answer) in PROBLEMS.items():
        rows[id] = {
            "question": f"Question {id}?",
            "choices": ["one", "two", "three"],
            "answer": answer,
            "hint": hint,
            "image": image,
            "subject": subject,
            "grade": grade,
            "split": "test",
        }
        if image:
            (tmp_path / "test" / id).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "test" / id / image)
    rows["6"] = rows["1"] | {"split": "train"}
    (tmp_path / "problems.json").write_text(json.dumps(rows, indent=1))
    return SourceRecipe(format="scienceqa", path=(tmp_path / "problems.json",), images=tmp_path, split="test")


def test_the_table_by_hand(source: SourceRecipe) -> None:
    answers = {"1": "The answer is (A)", "2": "The answer is (A)", "3": "(B) two", "4": "I see.", "5": "A"}
    asked: list[Any] = []

    def reply(body: dict[str, Any]) -> Reply:
        content = body["messages"][0]["content"]
        asked.append(content)
        text = content if isinstance(content, str) else content[0]["text"]
        return said(answers[text.removeprefix("Question: Question ")[0]])

    problems = read_problems(source)
    assert [problem.id for problem in problems] == list(PROBLEMS)
    with answering(reply) as endpoint:
        result = evaluate_scienceqa(problems, endpoint, 16)
    assert sum(isinstance(content, list) for content in asked) == 2  # with an image each
    assert science_question("Question 1?", "Fish swim.", ["one", "two", "three"]) in asked
    assert result.scores == {
        "Avg": 60.0,  # 1, 3 and 5 of five
        "NAT": 50.0,  # 1 of 1, 2
        "SOC": 100.0,  # 3
        "LAN": 50.0,  # 5 of 4, 5
        "TXT": 50.0,  # 1 of 1, 4
        "IMG": 0.0,  # none of 2, 4
        "NO": 100.0,  # 3, 5
        "G1-6": pytest.approx(200 / 3),  # 1, 5 of 1, 2, 5
        "G7-12": 50.0,  # 3 of 3, 4
        "problems": 5,
        "unread": 1,
    }
    assert [column for column in result.scores if column in COLUMNS] == list(COLUMNS)
    assert [(line["id"], line["read"], line["right"]) for line in result.predictions] == [
        ("1", "A", "A"),
        ("2", "A", "B"),
        ("3", "B", "B"),
        ("4", None, "C"),
        ("5", "A", "A"),
    ]


def test_text_only_shows_no_image_and_keeps_the_columns(source: SourceRecipe) -> None:
    blind = read_problems(source.model_copy(update={"images": None}), images=False)
    assert [problem.image for problem in blind] == [None] * 5
    assert [problem.columns for problem in blind] == [problem.columns for problem in read_problems(source)]
    assert [problem.id for problem in read_problems(source, limit=2)] == ["1", "2"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is (B)", "B"),
        ("The answer is B.", "B"),
        ("the answer is: (c).", "C"),
        ("It swims, so the answer is (A) fish.", "A"),
        (" (B) a rabbit", "B"),
        ("B. a rabbit", "B"),
        ("B) a rabbit", "B"),
        ("C", "C"),
        ("A rabbit", None),
        ("The answer is D", None),  # of three choices
        ("The answer is a fish", None),
        ("The answer is A fish", None),
        ("Both", None),
        ("", None),
    ],
)
def test_what_an_answer_chooses(answer: str, letter: str | None) -> None:
    assert read_letter(answer, 3) == letter


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subject": "magic"}, "subject: "),
        ({"grade": "grade13"}, "grade: "),
        ({"grade": 3}, "grade: "),
        ({"answer": 3}, "answer 3 is the index of none"),
        ({"choices": "ab"}, "'choices' is missing or no list"),
        ({"image": "gone.png"}, "is not in"),
        ({"image": "../../problems.json"}, "is not in|not a PNG"),
    ],
)
def test_bad_problems_are_named_by_line(change: dict[str, Any], reason: str, source: SourceRecipe) -> None:
    [file] = source.path
    rows = json.loads(file.read_text())
    rows["2"] |= change
    file.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + "}")
    with pytest.raises(DataError, match=rf"problems\.json:3: .*({reason})"):
        read_problems(source)


def test_a_split_without_problems_is_told(source: SourceRecipe) -> None:
    with pytest.raises(EvaluationError, match="no problem of the split 'tset'"):
        read_problems(source.model_copy(update={"split": "tset"}))
