"""What a base checkpoint holds, whatever its format: canonical names, shapes, and the checks on both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.checkpoints.mapped import drop_pages
from models.config import ModelConfig
from models.errors import CheckpointError

Format = Literal["huggingface", "gguf", "meta"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file, not read yet: its key there, its shape, and how to read it."""

    key: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class NameTable:
    """A format's names for LLaMA's weights, without `.weight`, to the canonical ones and back."""

    layers: str  # what comes before the layer's number
    layer_names: Mapping[str, str]
    top_names: Mapping[str, str]

    def canonical(self, key: str) -> str | None:
        """The canonical name of a file's key; None if no LLaMA weight is called that."""
        stem, dot, suffix = key.rpartition(".")
        if not dot or suffix != "weight":
            return None
        if stem in self.top_names:
            return f"{self.top_names[stem]}.weight"
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(0|[1-9][0-9]{{0,4}})\.(.+)", stem)
        if match is None or match[2] not in self.layer_names:
            return None
        return f"layers.{match[1]}.{self.layer_names[match[2]]}.weight"

    def original(self, name: str) -> str:
        """The format's key of a canonical name. Raises KeyError for a name that is not canonical."""
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".")
            return f"{self.layers}.{layer}.{_inverse(self.layer_names)[part]}.weight"
        return f"{_inverse(self.top_names)[stem]}.weight"


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {canonical: original for original, canonical in names.items()}


@dataclass(frozen=True)
class BaseCheckpoint:
    """An opened base: its configuration, and its tensors one at a time.

    Opening has already checked that every expected key is there in its shape and that no other is.
    `files` are those that the tensors are mapped from.
    """

    path: Path
    format: Format
    config: ModelConfig
    entries: Mapping[str, Entry]
    files: tuple[Path, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, in the file's own float type; quantised ones come as float32.

        Files are memory-mapped: a tensor is read when its turn comes, and read-only by convention. Its
        pages are given back before the next, so that memory never holds the file beside the model.
        Raises CheckpointError where a tensor cannot be read, is not of a float type, or holds NaN or
        infinity.
        """
        for name, entry in self.entries.items():
            try:
                tensor = entry.read()
            except CheckpointError:
                raise
            except (SafetensorError, RuntimeError, ValueError, OSError) as error:
                raise CheckpointError(
                    f"{entry.file}: {entry.key} cannot be read ({error}); fetch the file again"
                ) from error
            _check_values(entry, tensor)
            yield name, tensor
            drop_pages(self.files)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of each tensor of such a base, `[out, in]` for linears.

    The largest come first: their pages lie beside a model of which nothing else has been written yet.
    """
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "wq": (queries, hidden),
        "wk": (keys, hidden),
        "wv": (keys, hidden),
        "wo": (hidden, queries),
        "w1": (feed_forward, hidden),
        "w2": (hidden, feed_forward),
        "w3": (feed_forward, hidden),
        "attention_norm": (hidden,),
        "feed_forward_norm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, hidden)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (hidden,)
    return shapes


def name_entries(entries: Iterable[Entry], names: NameTable, ignored: re.Pattern[str]) -> dict[str, Entry]:
    """Entries by canonical name. Raises CheckpointError for a key that is unknown or comes twice."""
    named: dict[str, Entry] = {}
    for entry in entries:
        if ignored.fullmatch(entry.key):
            continue
        name = names.canonical(entry.key)
        if name is None:
            raise CheckpointError(
                f"{entry.file}: unexpected key {entry.key}; a LLaMA base has no such weight. "
                "Use an unmodified LLaMA-architecture checkpoint"
            )
        if name in named:
            raise CheckpointError(
                f"{entry.file}: {entry.key} is also in {named[name].file.name}; "
                "remove the file that does not belong to this checkpoint"
            )
        named[name] = entry
    return named


def check_entries(
    path: Path, config: ModelConfig, named: Mapping[str, Entry], names: NameTable
) -> dict[str, Entry]:
    """The named entries in the order of `expected_shapes`, each there and in its shape.

    A tied base may bring an `lm_head` all the same; it is the embedding again and is left out.
    """
    shapes = expected_shapes(config)
    missing = [names.original(name) for name in shapes if name not in named]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path}: {missing[0]}{more} missing; fetch the checkpoint again, with all its files"
        )
    extra = [name for name in named if name not in shapes and name != "lm_head.weight"]
    if extra:
        entry = named[extra[0]]
        raise CheckpointError(
            f"{entry.file}: unexpected key {entry.key}; the configuration says {config.num_layers} layers. "
            "Use the configuration that belongs to these weights"
        )
    for name, shape in shapes.items():
        entry = named[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: {entry.key} has shape {list(entry.shape)}, the configuration says "
                f"{list(shape)}. Use the configuration that belongs to these weights"
            )
    return {name: named[name] for name in shapes}


def half_rotated(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of wq or wk from the interleaved RoPE layout (pairs 2i, 2i+1) to the half-rotated (i, i+D/2)."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `half_rotated`."""
    rows, columns = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def rope_heads(name: str, config: ModelConfig) -> int | None:
    """The heads of a rotated linear's rows; None for weights that RoPE does not touch."""
    return {"wq": config.num_heads, "wk": config.num_kv_heads}.get(name.split(".")[-2])


def _check_values(entry: Entry, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"{entry.file}: {entry.key} is stored as {tensor.dtype}; "
            "use the unquantised checkpoint or a GGUF file"
        )
    # The extremes tell of NaN (which propagates) and infinity without a mask as large as the tensor.
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(
            f"{entry.file}: {entry.key} holds NaN or infinity; the file is damaged, fetch it again"
        )
