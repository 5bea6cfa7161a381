"""What stops a training or an evaluation. Every message names the place and what to do."""

from __future__ import annotations

from pathlib import Path

from models.errors import ModelError


class TrainError(ModelError):
    """The training cannot start or go on; what was saved before is kept."""


class RecipeError(TrainError):
    """A recipe, or a `key=value` given with it, is wrong."""


class DataError(TrainError):
    """A data file cannot be read, or a row is bad and the policy is to stop."""

    def __init__(self, file: Path, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}")


class EvaluationError(ModelError):
    """An evaluation cannot be made."""


class RowError(ValueError):
    """One row of a data file is bad; the message is the reason. The policy decides what follows."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came while there was nothing to save yet."""
