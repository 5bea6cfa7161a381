"""Opening a base model, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoints.fields import accessing
from models.checkpoints.gguf import open_gguf
from models.checkpoints.gguf_file import find_gguf
from models.checkpoints.huggingface import open_huggingface
from models.checkpoints.layout import BaseCheckpoint
from models.checkpoints.meta import open_meta
from models.errors import CheckpointError
from models.fingerprint import fingerprint
from models.llama import Llama

__all__ = ["BaseCheckpoint", "load_base", "open_base"]


def open_base(path: Path) -> BaseCheckpoint:
    """Open a Hugging Face folder, a Meta folder, a `.gguf` file or a folder with one `.gguf` file.

    Reads configuration and headers only. Raises CheckpointError, naming file, key and remedy, for
    what is no LLaMA base, is damaged, or lacks or exceeds the keys and shapes it should have.
    """
    with accessing(path):
        return _open(path)


def _open(path: Path) -> BaseCheckpoint:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder; give the path of a base model")
    if path.is_file():
        if path.suffix == ".gguf":
            return open_gguf(path)
        raise CheckpointError(f"{path}: not a base model; give a .gguf file or the folder of a checkpoint")
    if (path / "config.json").is_file():
        return open_huggingface(path)
    if (path / "params.json").is_file():
        return open_meta(path)
    gguf = find_gguf(path)
    if gguf is not None:
        return open_gguf(gguf)
    raise CheckpointError(
        f"{path}: holds neither config.json (Hugging Face) nor params.json (Meta) nor a .gguf file; "
        "give the folder of a LLaMA checkpoint"
    )


def load_base(path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Llama, str]:
    """A base in the given dtype, tensor by tensor, and its embedding's fingerprint.

    The fingerprint is of the checkpoint's own numbers, whatever they are rounded to here. Raises
    CheckpointError as `open_base` does.
    """
    checkpoint = open_base(path)
    prints: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint.tensors():
            if name == "embed.weight":
                prints.append(fingerprint(tensor))
            yield name, tensor

    base = Llama(checkpoint.config, dtype=dtype, device=device).load(tensors(), source=str(path))
    return base, prints[0]
