"""Metadata of untrusted files: JSON objects and their typed, bounded fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from models.errors import CheckpointError

_Model = TypeVar("_Model", bound=BaseModel)


@contextmanager
def accessing(path: Path, verb: str = "read") -> Iterator[None]:
    """What the system refuses, as for want of a permission or of room, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be {verb} ({error}); check path, permissions and room"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object of valid Unicode. Raises CheckpointError for any other."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # an escape may be half of a surrogate pair
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, not an object; fetch it again")
    return value


def parse(model: type[_Model], raw: dict[str, Any], file: Path) -> _Model:
    """`raw` as a `model`. Raises CheckpointError naming the file and the first field that is wrong."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(
            f"{file}: {first_fault(error)}; use the unmodified file that belongs to the weights"
        ) from error


def first_fault(error: ValidationError) -> str:
    """The first field that is wrong, and why."""
    first = error.errors()[0]
    field = "".join(f"{part}: " for part in first["loc"])
    return field + first["msg"].removeprefix("Value error, ")
