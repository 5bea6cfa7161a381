"""Adapter files as other programs write them: zips of torch.save, safetensors, PEFT and LitGPT folders.

All of it is untrusted, pickles above all (`torch_files`). A file can make nobody allocate more than it
weighs itself: storages are views of the mapped file, and whoever takes tensors out first asks `check_size`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoints.fields import read_json
from models.checkpoints.torch_files import first_line, load_pickle, shown
from models.errors import CheckpointError

_WEIGHTS_OF_FOLDER = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "lit_model.pth.adapter_v2",
    "lit_model.pth.adapter",
)


@dataclass(frozen=True)
class TensorFile:
    """Named tensors, and what the file says of them beside.

    `config` is the `config` of a released 7B file or PEFT's `adapter_config.json`, `args` the command
    line of a training checkpoint. `path` is the weights file, `size` its bytes.
    """

    path: Path
    size: int
    tensors: Mapping[str, Tensor]
    config: Mapping[str, object] = field(default_factory=dict)
    args: Mapping[str, object] = field(default_factory=dict)

    def tensor(self, key: str) -> Tensor:
        """Raises CheckpointError where there is no such key."""
        if key not in self.tensors:
            raise CheckpointError(f"{self.path}: {key} is missing; fetch the file again or extract it anew")
        return self.tensors[key]

    def dim(self, key: str, axis: int, rank: int) -> int:
        """One size of a tensor that must have `rank` axes. Raises CheckpointError."""
        shape = self.tensor(key).shape
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(
                f"{self.path}: {key} has shape {list(shape)}, not {rank} axes of at least 1; "
                "the file is damaged or of another format"
            )
        return shape[axis]

    def numbers(self, pattern: str) -> list[int]:
        """The layers, ascending, that have a key of this pattern; `{i}` stands for the layer's number."""
        before, _, after = pattern.partition("{i}")
        key = re.compile(re.escape(before) + r"(0|[1-9][0-9]{0,2})" + re.escape(after))
        return sorted(int(match[1]) for name in self.tensors if (match := key.fullmatch(name)))

    def has(self, pattern: str) -> bool:
        return bool(self.numbers(pattern)) if "{i}" in pattern else pattern in self.tensors

    def check_size(self, keys: Iterable[str]) -> None:
        """Raises CheckpointError where these tensors, laid out in full, outweigh the file."""
        total = sum(self.tensors[key].numel() * self.tensors[key].element_size() for key in keys)
        if total > self.size:
            raise CheckpointError(
                f"{self.path}: declares {total} bytes of tensors in a file of {self.size} bytes; refused. "
                "Save contiguous tensors with torch.save or safetensors"
            )


def read_tensor_file(path: Path) -> TensorFile:
    """Open a file or folder. Reads no values yet. Raises CheckpointError, naming cause and remedy."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file or folder; give the path of an adapter")
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        return TensorFile(path, size, _read_safetensors(path))
    value = load_pickle(path)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: holds a {type(value).__name__}, not named tensors; give an adapter file"
        )
    if "model" not in value:
        return TensorFile(path, size, _checked(path, value))
    config = {} if value.get("config") is None else value["config"]
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: config is a {type(config).__name__}, not a dict; fetch it again")
    args = dict(vars(value["args"])) if isinstance(value.get("args"), argparse.Namespace) else {}
    return TensorFile(path, size, _checked(path, value["model"]), config, args)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated ({first_line(error)}); fetch the file again"
        ) from error


def _read_folder(folder: Path) -> TensorFile:
    file = next((folder / name for name in _WEIGHTS_OF_FOLDER if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder}: holds no adapter; expected adapter.json with adapter.safetensors, or one of "
            f"{', '.join(_WEIGHTS_OF_FOLDER)}"
        )
    opened = read_tensor_file(file)
    if not file.name.startswith("adapter_model."):
        return opened
    return TensorFile(file, opened.size, opened.tensors, config=read_json(folder / "adapter_config.json"))


def _checked(path: Path, model: object) -> dict[str, Tensor]:
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: model is a {type(model).__name__}, not a dict; fetch the file again")
    tensors = {}
    for key, value in model.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {shown(key)} is a {type(value).__name__}, not a tensor; save the tensors alone"
            )
        # Multimodal training checkpoints call the base `llma`; extracted files say `llama`.
        name = ".".join("llama" if part == "llma" else part for part in key.split("."))
        if name in tensors:
            raise CheckpointError(f"{path}: {name} comes twice; fetch the file again")
        tensors[name] = value.detach()
    return tensors
