"""Opening a base model, whatever its format."""

from __future__ import annotations

from pathlib import Path

from models.checkpoints.gguf import open_gguf
from models.checkpoints.gguf_file import find_gguf
from models.checkpoints.huggingface import open_huggingface
from models.checkpoints.layout import BaseCheckpoint
from models.checkpoints.meta import open_meta
from models.errors import CheckpointError

__all__ = ["BaseCheckpoint", "open_base"]


def open_base(path: Path) -> BaseCheckpoint:
    """Open a Hugging Face folder, a Meta folder, a `.gguf` file or a folder with one `.gguf` file.

    Reads configuration and headers only. Raises CheckpointError, naming file, key and remedy, for
    what is no LLaMA base, is damaged, or lacks or exceeds the keys and shapes it should have.
    """
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
