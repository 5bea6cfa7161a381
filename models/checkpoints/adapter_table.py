"""Name tables: where an adapter format keeps each native tensor, read both ways.

A format is one `AdapterFormat`. It tells from a file's keys what base and configuration the file needs;
from the configuration alone it lists its `Entry`s. Import and export are then the same table, read from
right to left or from left to right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.adapter_config import LINEARS, AdapterConfig, BaseSpec, LinearName, PromptConfig
from models.checkpoints.layout import half_rotated, interleaved
from models.checkpoints.tensor_file import TensorFile
from models.errors import AdapterMismatch, CheckpointError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class AdapterOptions:
    """What a file cannot say itself; None leaves it to the format's own rule.

    gate      whether gates pass through tanh or are used raw
    template  a name in `models.prompts`
    color     the order of an image's channels
    litgpt    the version of LitGPT that made the file, such as `0.5.13`
    length    rows of one layer's prompt, where a file has all layers' in one tensor
    encoder   the visual encoder, a name as in `VisionConfig`
    """

    gate: Literal["tanh", "raw"] | None = None
    template: str | None = None
    color: Literal["rgb", "bgr"] | None = None
    litgpt: str | None = None
    length: int | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class Entry:
    """One native tensor and its key in a file.

    native  name in docs/design.md
    key     in the file; with `{i}`, one key per layer of `layers` and the native tensor stacks them
    shape   in the file, of one key
    row     native shape of what one key holds
    heads   of wq or wk where the rows are in Meta's interleaved RoPE order; 0 elsewhere
    legacy  another shape that older files have the same numbers in
    """

    native: str
    key: str
    shape: tuple[int, ...]
    row: tuple[int, ...]
    layers: tuple[int, ...] = ()
    heads: int = 0
    legacy: tuple[int, ...] | None = None

    def file_keys(self) -> list[str]:
        return [self.key.format(i=i) for i in self.layers] if self.layers else [self.key]


@dataclass(frozen=True)
class Unused:
    """A tensor that a format has and never reads: ignored on import, written as zeros on export."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NameTable:
    """All of a format's tensors for one configuration; keys that match `ignored` are none of an adapter's."""

    entries: tuple[Entry, ...]
    unused: tuple[Unused, ...] = ()
    ignored: re.Pattern[str] | None = None

    def to_native(self, file: TensorFile) -> dict[str, Tensor]:
        """Native tensors of a file. Raises CheckpointError for a key too many or too few, for a wrong
        shape or type, and for NaN."""
        self._check_keys(file)
        file.check_size(key for entry in self.entries for key in entry.file_keys())
        return {entry.native: _read(entry, file) for entry in self.entries}

    def to_file(self, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The format's tensors, contiguous. Raises CheckpointError for native ones it has no place for."""
        extra = native.keys() - {entry.native for entry in self.entries}
        if extra:
            raise CheckpointError(f"no place for {_some(sorted(extra))}")
        tensors = {unused.key: torch.zeros(unused.shape) for unused in self.unused}
        for entry in self.entries:
            tensors |= _write(entry, native.get(entry.native))
        return tensors

    def _check_keys(self, file: TensorFile) -> None:
        wanted = {key for entry in self.entries for key in entry.file_keys()}
        known = wanted | {unused.key for unused in self.unused}
        missing = sorted(wanted - file.tensors.keys())
        if missing:
            raise CheckpointError(
                f"{file.path}: {_some(missing)} missing; fetch the file again or extract it anew"
            )
        extra = [
            key
            for key in file.tensors
            if key not in known and not (self.ignored and self.ignored.fullmatch(key))
        ]
        if extra:
            raise CheckpointError(
                f"{file.path}: {_some(extra)} unexpected in this format; an adapter with parts that are not "
                "understood is not loaded, remove them or convert the file"
            )


class AdapterFormat(Protocol):
    """One file format. `options` names those of `AdapterOptions` that it understands."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> frozenset[str]: ...

    def matches(self, file: TensorFile) -> bool:
        """Whether the keys are this format's."""

    def dimensions(self, file: TensorFile) -> dict[str, int]:
        """Fields of `BaseSpec` that the file's shapes tell. Raises CheckpointError."""

    def config(self, file: TensorFile, base: BaseSpec, options: AdapterOptions) -> AdapterConfig:
        """Raises CheckpointError where the file contradicts itself or leaves open what it must not."""

    def table(self, config: AdapterConfig) -> NameTable: ...

    def unpack(self, file: TensorFile, config: AdapterConfig) -> TensorFile:
        """The file as the table knows it, with fused tensors apart."""

    def write(self, path: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
        """Write the table's tensors into the format's container."""


def linear_sizes(base: BaseSpec) -> dict[LinearName, tuple[int, int]]:
    """(out, in) features of each linear of the base."""
    C, I = base.hidden_size, base.intermediate_size
    q, kv = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    sizes = ((q, C), (kv, C), (kv, C), (C, q), (I, C), (C, I), (I, C))
    return dict(zip(LINEARS, sizes, strict=True))


def rope_heads(base: BaseSpec, name: LinearName) -> int:
    """Heads on the rotated output rows of a linear, 0 where RoPE does not act."""
    return {"wq": base.num_heads, "wk": base.num_kv_heads}.get(name, 0)


def static_prompts(config: AdapterConfig) -> PromptConfig:
    """Raises CheckpointError for an adapter without static prompts."""
    if config.prompt is None:
        raise CheckpointError("it needs static prompts")
    return config.prompt


def top_layers(base: BaseSpec, count: int) -> tuple[int, ...]:
    return tuple(range(base.num_layers - count, base.num_layers))


def check_base(path: Path, dimensions: Mapping[str, int], base: BaseSpec) -> None:
    """Raises AdapterMismatch, naming each difference, where the file's shapes belong to another base."""
    wrong = [
        f"{name} {size} (the base has {getattr(base, name)})"
        for name, size in dimensions.items()
        if size != getattr(base, name)
    ]
    if wrong:
        raise AdapterMismatch(
            f"{path} was made for another base: {', '.join(wrong)}; serve it on the base it was trained on"
        )


def _read(entry: Entry, file: TensorFile) -> Tensor:
    rows = []
    for key in entry.file_keys():
        tensor = file.tensors[key]
        if tuple(tensor.shape) not in (entry.shape, entry.legacy):
            raise CheckpointError(
                f"{file.path}: {key} has shape {list(tensor.shape)}, expected {list(entry.shape)}; "
                "fetch the file again, or serve it on the base it was trained on"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{file.path}: {key} is {tensor.dtype}, not a floating-point tensor; save it as float32"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{file.path}: {key} holds NaN or infinite values; training diverged or the file is damaged"
            )
        rows.append(_rope(half_rotated, tensor.reshape(entry.row), entry.heads))
    return torch.stack(rows) if entry.layers else rows[0].clone()


def _write(entry: Entry, whole: Tensor | None) -> dict[str, Tensor]:
    stack = (len(entry.layers),) if entry.layers else ()
    if whole is None or tuple(whole.shape) != stack + entry.row:
        raise CheckpointError(f"it needs {entry.native} of shape {list(stack + entry.row)}")
    rows = whole.detach().unbind(0) if entry.layers else (whole.detach(),)
    return {
        key: _rope(interleaved, row, entry.heads).reshape(entry.shape).contiguous().clone()
        for key, row in zip(entry.file_keys(), rows, strict=True)
    }


def _rope(reorder: Callable[[Tensor, int], Tensor], row: Tensor, heads: int) -> Tensor:
    if not heads:
        return row
    return reorder(row.reshape(row.shape[0], -1), heads).reshape(row.shape)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{', '.join(keys[:3])}{more}"
