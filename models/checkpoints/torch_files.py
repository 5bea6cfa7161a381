"""What `torch.save` wrote: pickles, and therefore opened with `weights_only` and never otherwise.

One class beside tensors and containers is allowed by name, the `argparse.Namespace` of a training
checkpoint's `args`. A file can make nobody allocate more than it weighs: records of a zip must be stored
as `torch.save` stores them, storages are views of the mapped file, and of what `weights_only` lets a pickle
call only what plain tensors need is let through (`pickle_check`).
"""

from __future__ import annotations

import argparse
import pickle
import reprlib
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from models.checkpoints.pickle_check import check_pickle
from models.errors import CheckpointError

_DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError),
    zipfile.BadZipFile,
)
_LEGACY_PICKLES = 5  # a number, a version, sizes of the machine's types, the value, its storages' names
_END, _LOCATOR, _END_64 = b"PK\5\6", b"PK\6\7", b"PK\6\6"  # of a zip, from its last record back


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Name → tensor of a base's `.bin` or `.pth`, memory-mapped where its container allows it.

    Raises CheckpointError for what `load_pickle` refuses, and for other contents than named tensors.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; fetch the checkpoint again, with all its files")
    state = load_pickle(file, legacy=True)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{file}: holds a {type(state).__name__}, not named tensors; use a weights file"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: {shown(key)} is a {type(value).__name__}, not a tensor; use a file of weights alone"
            )
    return state


def load_pickle(file: Path, *, legacy: bool = False) -> object:
    """Tensors, containers and `argparse.Namespace` on the CPU, the tensors memory-mapped.

    `legacy` also takes torch's container from before 1.6, one pickle stream, which cannot be mapped.
    Raises CheckpointError for a damaged file, for a zip that torch did not write, and for anything that
    could run code.
    """
    zipped = zipfile.is_zipfile(file)
    if not zipped and not legacy:
        raise CheckpointError(
            f"{file}: not a file of torch.save since torch 1.6 (a zip), or truncated; fetch it again, or "
            "save it anew with torch.save"
        )
    try:
        if zipped:
            _check_zip(file)
        _check_pickles(file, zipped)
        with torch.serialization.safe_globals([argparse.Namespace]):
            value: object = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused; beside tensors it holds what could run code on loading, or it is damaged "
            f"({first_line(error)}). Save the tensors alone, best as safetensors"
        ) from error
    except _DAMAGED as error:
        raise CheckpointError(
            f"{file}: damaged or truncated ({first_line(error)}); fetch the file again"
        ) from error
    return value


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def shown(value: object) -> str:
    """A value from a file as a sentence has it, which is short whatever it holds."""
    return repr(value[:200]) if isinstance(value, str) else reprlib.repr(value)[:200]


def _check_zip(file: Path) -> None:
    """torch.save stores records uncompressed and apart, so that they can never outweigh the file."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if not _has_plain_directory(file):
        raise CheckpointError(
            f"{file}: its zip directory is not where torch.save puts it, or the file is damaged; refused. "
            "Save it anew with torch.save"
        )
    declared, size = sum(record.file_size for record in records), file.stat().st_size
    packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or declared > size:
        name = packed.filename if packed else "its records"
        raise CheckpointError(
            f"{file}: {name} would unpack to more than the file holds ({declared} of {size} bytes), as "
            "torch.save never writes it; refused. Save it anew with torch.save"
        )


def _has_plain_directory(file: Path) -> bool:
    """Whether the directory ends where the records begin that tell of it, and those end the file.

    Readers look for it in different ways: in another file torch's could find one that was not checked.
    """
    end, locator, end_64 = 22, 20, 56
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size - end - locator - end_64))
        tail = stream.read().rjust(end + locator + end_64, b"\0")
    length, start = struct.unpack("<II", tail[-end:][12:20])
    ends_at, plain = size - end, tail[-end:].startswith(_END)
    if tail[end_64:].startswith(_LOCATOR):
        length, start = struct.unpack("<QQ", tail[40:end_64])
        ends_at -= locator + end_64
        plain &= tail.startswith(_END_64) and struct.unpack("<Q", tail[end_64 + 8 :][:8])[0] == ends_at
    return plain and start + length == ends_at


def _check_pickles(file: Path, zipped: bool) -> None:
    """All that torch will read."""
    with file.open("rb") as stream:
        pickles: list[IO[bytes]] = [stream] * _LEGACY_PICKLES
        if zipped:
            pickles = [BytesIO(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl"))]
        for part in pickles:
            check_pickle(file, part)
