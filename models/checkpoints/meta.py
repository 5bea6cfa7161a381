"""Meta folders: `params.json` and `consolidated.NN.pth`, any number of model-parallel shards."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from models.checkpoints.fields import parse, read_json
from models.checkpoints.layout import (
    BaseCheckpoint,
    Entry,
    NameTable,
    check_entries,
    half_rotated,
    name_entries,
    rope_heads,
)
from models.checkpoints.torch_files import read_state_dict
from models.config import ModelConfig, RopeScaling
from models.errors import CheckpointError

NAMES = NameTable(
    layers="layers",
    layer_names={
        "attention.wq": "wq",
        "attention.wk": "wk",
        "attention.wv": "wv",
        "attention.wo": "wo",
        "feed_forward.w1": "w1",
        "feed_forward.w2": "w2",
        "feed_forward.w3": "w3",
        "attention_norm": "attention_norm",
        "ffn_norm": "feed_forward_norm",
    },
    top_names={"tok_embeddings": "embed", "norm": "norm", "output": "lm_head"},
)
_IGNORED = re.compile(r"rope\.freqs")
_SPLIT_BY_COLUMNS = ("wo", "w2")  # model parallelism splits the other linears by rows


def open_meta(folder: Path) -> BaseCheckpoint:
    """Open a Meta folder. Raises CheckpointError (see `base.open_base`)."""
    params = parse(_Params, read_json(folder / "params.json"), folder / "params.json")
    files = _shard_files(folder)
    shards = [read_state_dict(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if shard.keys() != shards[0].keys():
            key = min(shard.keys() ^ shards[0].keys())
            raise CheckpointError(f"{file}: {key} is not in every shard; fetch the checkpoint again")
    parts = [
        Entry(key, files[0], (), partial(_join, key, [shard[key] for shard in shards], params.dim))
        for key in shards[0]
    ]
    named = {
        name: Entry(part.key, part.file, _joined_shape(part, shards, params.dim), part.read)
        for name, part in name_entries(parts, NAMES, _IGNORED).items()
    }
    config = _config(folder, params, named)
    checked = check_entries(folder, config, named, NAMES)
    entries = {name: _rotated(name, entry, config) for name, entry in checked.items()}
    return BaseCheckpoint(folder, "meta", config, entries, tuple(files))


class _Params(BaseModel):
    """`params.json`. Meta's files do not tell the context length; `max_position_embeddings` may be added."""

    dim: int = Field(gt=0, le=1 << 20)
    n_layers: int = Field(gt=0, lt=1024)
    n_heads: int = Field(gt=0, le=1 << 12)
    n_kv_heads: int | None = Field(None, gt=0)
    norm_eps: float = Field(gt=0)
    rope_theta: float = Field(10000.0, gt=0, lt=float("inf"))
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = Field(None, ge=1)
    high_freq_factor: float = Field(4.0, gt=0)
    max_position_embeddings: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.use_scaled_rope and self.rope_scaling_factor is None:
            raise ValueError(
                "use_scaled_rope without rope_scaling_factor, which Meta's models do not share: "
                "add the key, 8 for Llama 3.1, 32 for Llama 3.2"
            )
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        return self

    def context(self) -> int:
        """What the released models were trained on; LLaMA-1's 2048 where LLaMA-2 looks the same."""
        if self.max_position_embeddings:
            return self.max_position_embeddings
        if self.use_scaled_rope:
            return 131072
        return 8192 if self.rope_theta >= 500000 else 2048

    def scaling(self) -> RopeScaling | None:
        if self.rope_scaling_factor is None or not self.use_scaled_rope:
            return None
        return RopeScaling(self.rope_scaling_factor, 1.0, self.high_freq_factor, 8192)


def _shard_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{folder}: params.json without consolidated.*.pth; fetch the checkpoint again")
    for index, file in enumerate(files):
        if file.name != f"consolidated.{index:02d}.pth":
            raise CheckpointError(
                f"{folder}: consolidated.{index:02d}.pth is missing before {file.name}; fetch all shards"
            )
    return files


def _split_axis(key: str, shape: torch.Size, dim: int) -> int | None:
    """Which axis of a weight the shards split; None for the norms, which each shard holds whole.

    LLaMA 1 and 2 split the embedding by columns, LLaMA 3 by rows: its width tells which.
    """
    if len(shape) != 2:
        return None
    if key == "tok_embeddings.weight":
        return 0 if shape[1] == dim else 1
    return 1 if key.split(".")[-2] in _SPLIT_BY_COLUMNS else 0


def _join(key: str, parts: list[Tensor], dim: int) -> Tensor:
    axis = _split_axis(key, parts[0].shape, dim)
    return parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)


def _joined_shape(entry: Entry, shards: list[dict[str, Tensor]], dim: int) -> tuple[int, ...]:
    shapes = {shard[entry.key].shape for shard in shards}
    if len(shapes) > 1:
        raise CheckpointError(
            f"{entry.file}: {entry.key} has other shapes in other shards; fetch all shards of one checkpoint"
        )
    shape = list(shapes.pop())
    axis = _split_axis(entry.key, torch.Size(shape), dim)
    if axis is not None:
        shape[axis] *= len(shards)
    return tuple(shape)


def _config(folder: Path, params: _Params, named: dict[str, Entry]) -> ModelConfig:
    """What `params.json` says, with the sizes it leaves to a formula or to the tokenizer from the weights."""
    for name in ("embed.weight", "layers.0.w1.weight"):
        if name not in named or len(named[name].shape) != 2:
            raise CheckpointError(f"{folder}: {NAMES.original(name)} missing; fetch the checkpoint again")
    try:
        return ModelConfig(
            vocab_size=named["embed.weight"].shape[0],
            hidden_size=params.dim,
            intermediate_size=named["layers.0.w1.weight"].shape[0],
            num_layers=params.n_layers,
            num_heads=params.n_heads,
            num_kv_heads=params.n_kv_heads or params.n_heads,
            head_dim=params.dim // params.n_heads,
            rms_norm_eps=params.norm_eps,
            rope_theta=params.rope_theta,
            max_position_embeddings=params.context(),
            tie_word_embeddings="lm_head.weight" not in named,
            rope_scaling=params.scaling(),
        )
    except ValueError as error:
        raise CheckpointError(
            f"{folder / 'params.json'}: {error}; use the file that came with the weights"
        ) from error


def _rotated(name: str, entry: Entry, config: ModelConfig) -> Entry:
    heads = rope_heads(name, config)
    if heads is None:
        return entry
    read = entry.read
    return Entry(entry.key, entry.file, entry.shape, lambda: half_rotated(read(), heads))
