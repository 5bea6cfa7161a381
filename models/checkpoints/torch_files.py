"""`.bin` and `.pth` files: pickles, and therefore opened with `weights_only` and never otherwise."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from models.errors import CheckpointError


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Name → tensor of a file that `torch.save` wrote, memory-mapped where its container allows it.

    Raises CheckpointError for a damaged file, for one that would run code, and for other contents.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; fetch the checkpoint again, with all its files")
    try:
        # The container from before torch 1.6 is one pickle stream, which cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, it is damaged or holds more than tensors, which could run code on loading "
            f"({_first_line(error)}); use a .safetensors or an unmodified weights file"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:
        raise CheckpointError(
            f"{file}: damaged or truncated ({_first_line(error)}); fetch it again"
        ) from error
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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
