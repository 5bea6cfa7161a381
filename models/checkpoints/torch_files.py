"""What `torch.save` wrote: pickles, and therefore opened with `weights_only` and never otherwise.

One class beside tensors and containers is allowed by name, the `argparse.Namespace` of a training
checkpoint's `args`. A file can make nobody allocate more than it weighs: records of a zip must be stored
as `torch.save` stores them, and storages are views of the mapped file.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from models.errors import CheckpointError

_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError)


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
                f"{file}: {key!r} is a {type(value).__name__}, not a tensor; use a file of weights alone"
            )
    return state


def load_pickle(file: Path, *, legacy: bool = False) -> object:
    """Tensors, containers and `argparse.Namespace` on the CPU, the tensors memory-mapped.

    `legacy` also takes torch's container from before 1.6, one pickle stream, which cannot be mapped.
    Raises CheckpointError for a damaged file, for a zip that torch did not write, and for anything that
    could run code.
    """
    zipped = zipfile.is_zipfile(file)
    if zipped:
        _check_zip(file)
    elif not legacy:
        raise CheckpointError(
            f"{file}: not a file of torch.save since torch 1.6 (a zip), or truncated; fetch it again, or "
            "save it anew with torch.save"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            value: object = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
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


def _check_zip(file: Path) -> None:
    """torch.save stores records uncompressed and apart, so that they can never outweigh the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{file}: damaged or truncated ({first_line(error)}); fetch the file again"
        ) from error
    declared, size = sum(record.file_size for record in records), file.stat().st_size
    packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or declared > size:
        name = packed.filename if packed else "its records"
        raise CheckpointError(
            f"{file}: {name} would unpack to more than the file holds ({declared} of {size} bytes), as "
            "torch.save never writes it; refused. Save it anew with torch.save"
        )
