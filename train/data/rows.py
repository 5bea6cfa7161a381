"""Rows of data files, one at a time: JSON, JSON lines and TSV, plain or compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, TextIO, cast

from train.data.json_stream import stream_items
from train.errors import DataError, TrainError

_MAX_LINE = 64 << 20  # characters
_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it is. `key` is its name in a JSON object of rows; `fault` says why it is none."""

    file: Path
    line: int
    value: Any
    key: str | None = None
    fault: str | None = None


def read_rows(file: Path, member: str | None = None, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a file by its suffix: `.json` (`member`: the array under that key), `.jsonl`, `.tsv`, `.csv`.

    A line that cannot be read is a row with a `fault`. Raises DataError where nothing after it can be
    read either, TrainError where the file is not there or of no known kind.
    """
    suffixes = file.suffixes
    packed = suffixes[-1] if suffixes and suffixes[-1] in _OPENERS else ""
    kind = file.with_suffix("").suffix if packed else file.suffix
    with open_text(file, packed) as stream:
        match kind:
            case ".json":
                for item in stream_items(stream, file, member):
                    yield Row(file, item.line, item.value, item.key)
            case ".jsonl" | ".ndjson":
                yield from _lines(stream, file)
            case ".tsv" | ".csv":
                yield from _table(stream, file, columns)
            case _:
                raise TrainError(f"{file}: is neither .json, .jsonl, .tsv nor .csv, nor one compressed")


@contextmanager
def open_text(file: Path, packed: str) -> Iterator[TextIO]:
    """The file's text, unpacked on the way. Whatever a damaged file raises becomes a TrainError."""
    try:
        with (
            _OPENERS[packed](file) as stream,
            TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
        ):
            yield text
    except FileNotFoundError as error:
        raise TrainError(f"{file}: there is no such file; correct the path") from error
    except UnicodeDecodeError as error:
        raise TrainError(f"{file}: is not UTF-8 ({error}); convert it") from error
    except _damage() as error:
        raise TrainError(f"{file}: cannot be read ({error}); is it complete?") from error


def _plain(file: Path) -> IO[bytes]:
    return file.open("rb")


def _gzip(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb"))


def _bzip2(file: Path) -> IO[bytes]:
    return cast(IO[bytes], bz2.open(file, "rb"))


def _xz(file: Path) -> IO[bytes]:
    return cast(IO[bytes], lzma.open(file, "rb"))


def _zstd(file: Path) -> IO[bytes]:
    try:
        zstd = importlib.import_module(_ZSTD)
    except ImportError as error:
        raise TrainError(
            f"{file}: reading .zst needs {_ZSTD}; install llama-adapter-server[train]"
        ) from error
    return cast(IO[bytes], zstd.open(file, "rb"))


def _damage() -> tuple[type[Exception], ...]:
    """What the decompressors raise; zstd's own only once it was needed."""
    zstd = sys.modules.get(_ZSTD)
    return (OSError, EOFError, lzma.LZMAError, zlib.error, *((zstd.ZstdError,) if zstd else ()))


_OPENERS = {"": _plain, ".gz": _gzip, ".bz2": _bzip2, ".xz": _xz, ".zst": _zstd}


def _lines(stream: TextIO, file: Path) -> Iterator[Row]:
    number = 0
    while text := stream.readline(_MAX_LINE):
        number += 1
        if len(text) == _MAX_LINE:
            raise DataError(file, number, f"the line is longer than {_MAX_LINE} characters")
        if not text.strip():
            continue
        try:
            yield Row(file, number, json.loads(text))
        except (ValueError, RecursionError) as error:
            yield Row(file, number, None, fault=f"is not JSON: {error}")


def _table(stream: TextIO, file: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    """Tab-separated rows; the first line names the columns unless `columns` does."""
    table = csv.reader(stream, delimiter="\t", strict=True)
    names = list(columns) if columns else None
    while True:
        before = table.line_num
        try:
            values = next(table, None)
        except csv.Error as error:
            yield Row(file, before + 1, None, fault=f"is no row of a table: {error}")
            continue
        if values is None:
            return
        if not any(values):
            continue
        if names is None:
            names = values
        elif len(values) != len(names):
            yield Row(file, before + 1, None, fault=f"has {len(values)} columns, not {len(names)}")
        else:
            yield Row(file, before + 1, dict(zip(names, values, strict=True)))
