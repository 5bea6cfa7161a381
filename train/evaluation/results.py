"""What an evaluation found: a table for people, JSON for programs, and every answer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from train.errors import EvaluationError

Scores = Mapping[str, Any]
Prediction = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """`scores` is one row of the table, or several; `about` says of what; `predictions`: every answer."""

    measure: str
    scores: Scores | Sequence[Scores]
    about: Mapping[str, Any] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()
    digits: int = 2  # of the table's figures

    def table(self) -> str:
        """Markdown, aligned."""
        rows = [self.scores] if isinstance(self.scores, Mapping) else list(self.scores)
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [names, *([self._shown(row.get(name)) for name in names] for row in rows)]
        widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
        return "\n".join(
            "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def _shown(self, value: Any) -> str:
        return "" if value is None else f"{value:.{self.digits}f}" if isinstance(value, float) else str(value)

    def told(self, **about: Any) -> Result:
        """With more said of what was measured."""
        return replace(self, about={**about, **self.about})

    def as_json(self) -> str:
        return json.dumps(
            {"measure": self.measure, **self.about, "scores": self.scores}, indent=2, ensure_ascii=False
        )


def prediction_line(prediction: Prediction) -> str:
    """A lone surrogate in an answer needs the escape that JSON has for it: `errors="backslashreplace"`."""
    return json.dumps(prediction, ensure_ascii=False) + "\n"


class Kept(AbstractContextManager["Kept"]):
    """A file of predictions as they come, in no order. What it held before goes with the first one.

    An EvaluationError that leaves the context says that it has them.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: TextIO | None = None
        self._count = 0

    def add(self, prediction: Prediction) -> None:
        """Raises EvaluationError where it cannot be written."""
        try:
            if self._stream is None:
                self._stream = self._file.open("w", encoding="utf-8", errors="backslashreplace")
            self._stream.write(prediction_line(prediction))
            self._stream.flush()
        except OSError as error:
            raise EvaluationError(f"{self._file}: cannot be written ({error.strerror})") from error
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is None:
            return
        with contextlib.suppress(OSError):  # what a failed flush left to be written
            self._stream.close()
        if isinstance(error, EvaluationError):
            raise EvaluationError(f"{error}; {self._count} answers are kept in {self._file}") from error
