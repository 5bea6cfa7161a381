"""What an evaluation found: a table for people, JSON for programs, and every answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Scores = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """`scores` is one row of the table, or several; `about` says of what; `predictions`: every answer."""

    measure: str
    scores: Scores | Sequence[Scores]
    about: Mapping[str, Any] = field(default_factory=dict)
    predictions: Sequence[Mapping[str, Any]] = ()
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
