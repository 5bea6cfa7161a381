"""A training's output folder: one training at a time, and files that are whole or as they were."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from train.errors import TrainError

_LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder and keep other trainings out of it. Raises TrainError where one is in it.

    Whatever ends the process gives it free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / _LOCK, timeout=0):
            yield
    except Timeout as error:
        raise TrainError(
            f"{folder}: another training writes there; end it, or choose another output"
        ) from error


def write_whole(file: Path, parts: Iterable[str]) -> None:
    """Write beside the file and rename, so that a full disk takes nothing that was there."""
    beside = file.with_name(f".{file.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a folder, whose files are on disk before its name is: a power cut leaves no half of it."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
