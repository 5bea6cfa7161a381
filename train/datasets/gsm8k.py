"""GSM8K's training set (openai/grade-school-math, MIT) as instructions. No public package holds it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from train.data.rows import read_rows
from train.errors import DataError

_CALCULATOR = re.compile(r"<<.*?>>")  # its notes for a calculator, such as 48/2=<<48/2=24>>24


def instructions(file: Path) -> Iterator[dict[str, str]]:
    """Alpaca's rows of the published `train.jsonl`. Raises DataError for a row that is none of it."""
    for row in read_rows(file):
        value = row.value if isinstance(row.value, dict) else {}
        question, answer = value.get("question"), value.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise DataError(
                file, row.line, row.fault or "has no question and answer; give GSM8K's train.jsonl"
            )
        yield {
            "instruction": question.strip(),
            "input": "",
            "output": _CALCULATOR.sub("", answer).strip(),
            "source": "openai/grade-school-math train",
            "licence": "MIT",
        }
