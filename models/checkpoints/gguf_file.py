"""GGUF containers: finding, opening and their metadata. No torch here, as tokenizers need none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from models.errors import CheckpointError

_DAMAGED = (
    *(ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError),
    RecursionError,  # of arrays of arrays
)


def find_gguf(folder: Path) -> Path | None:
    """The one `.gguf` file of a folder, None if there is none. Raises CheckpointError for several."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder}: holds several models ({names}); give the path of one of them")
    return files[0] if files else None


class _Reader(GGUFReader):
    """Refuses numbers beyond the file's end, which its parent reads as none: it would count through an
    array of any length that a file claims."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
            raise ValueError("it claims more than it holds")
        return super()._get(offset, dtype, count, override_order)


def read_gguf(file: Path) -> GGUFReader:
    """The parsed and memory-mapped file. Raises CheckpointError for a damaged or truncated one."""
    try:
        # Copy-on-write rather than read-only, as torch has no read-only tensors; nothing is written.
        return _Reader(file, "c")
    except _DAMAGED as error:
        raise CheckpointError(
            f"{file}: damaged, truncated or no GGUF file ({error}); fetch it again"
        ) from error


def metadata(file: Path, reader: GGUFReader, prefix: str) -> dict[str, Any]:
    """The key-value pairs whose keys start with `prefix`. Raises CheckpointError for a damaged one."""
    pairs: dict[str, Any] = {}
    for key, field in reader.fields.items():
        if key.startswith(prefix):
            try:
                pairs[key] = field.contents()
            except (ValueError, IndexError, TypeError) as error:
                raise CheckpointError(f"{file}: {key} is damaged ({error}); fetch the file again") from error
    return pairs
