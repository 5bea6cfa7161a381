"""Rows of data files for evaluations, with their images: those that a training would use or hold out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from models.vision.images import ImageError, decode_image
from train.data.formats import Sample, read_samples
from train.data.rows import Row
from train.data.store import image_path, is_held_out
from train.errors import DataError, EvaluationError, RowError
from train.recipe import SourceRecipe

Fields = TypeVar("Fields", bound=BaseModel)
# Whether a sample takes part.
Wanted = Callable[[Sample], bool]


def held_out_rows(share: float) -> Wanted:
    """The rows that a training with `holdout: share` keeps apart. Raises EvaluationError for no share."""
    if not share:
        raise EvaluationError("--split held-out needs --holdout, the share that the training had")
    return lambda sample: is_held_out(sample.key, share)


def trained_rows(share: float) -> Wanted:
    """The rows that such a training trains on."""
    return lambda sample: not is_held_out(sample.key, share)


def all_rows(sample: Sample) -> bool:
    return True


def read_wanted(
    source: SourceRecipe, wanted: Wanted, faults: list[str], *, images: bool = True
) -> Iterator[tuple[Row, Sample, Path | None]]:
    """The wanted rows, each with the path of its image if it has one and `images` are wanted.

    A bad row is a DataError, or with `bad_rows: skip` one of the `faults`.
    """
    root = source.images.resolve() if source.images else None
    for row, sample in read_samples(source, "plain"):
        try:
            if isinstance(sample, RowError):
                raise sample
            if not wanted(sample):
                continue
            image = image_path(root, sample.image) if images and sample.image else None
        except RowError as error:
            fault(source, row, str(error), faults)
            continue
        yield row, sample, image


def check_image(path: Path) -> str | None:
    """What is wrong with an image file; None: nothing."""
    try:
        decode_image(path.read_bytes())
    except (ImageError, OSError) as error:
        return f"image {path}: {error}"
    return None


def fault(source: SourceRecipe, row: Row, reason: str, faults: list[str]) -> None:
    """Stop at a bad row or note it, as the source's policy says."""
    if source.bad_rows == "stop":
        raise DataError(row.file, row.line, f"{reason} (to go on without such rows: --bad-rows skip)")
    faults.append(f"{row.file}:{row.line}: {reason}")


def checked(kind: type[Fields], row: Row) -> Fields:
    """A row's fields as a pydantic model. Raises DataError, naming file, line and field."""
    if row.fault:
        raise DataError(row.file, row.line, row.fault)
    try:
        return kind.model_validate(row.value)
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(str(part) for part in found["loc"])
        shown = f", not {str(found['input'])[:60]!r}"
        raise DataError(row.file, row.line, f"{field or 'the row'}: {found['msg']}{shown}") from error


class ImageFolder:
    """Image files of a folder, each checked once."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._good: set[Path] = set()

    def path(self, row: Row, *names: str) -> Path:
        """The first of `names` that is there. Raises DataError where none is, or where it is no image."""
        missing = ""
        for name in names:
            try:
                path = image_path(self._root, name)
            except RowError as error:
                missing = missing or str(error)
                continue
            reason = None if path in self._good else check_image(path)
            if reason is not None:
                raise DataError(row.file, row.line, reason)
            self._good.add(path)
            return path
        raise DataError(row.file, row.line, missing)
