"""GGUF files of the llama architecture, dequantised tensor by tensor."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from models.checkpoints.fields import parse
from models.checkpoints.gguf_file import metadata, read_gguf
from models.checkpoints.layout import (
    BaseCheckpoint,
    Entry,
    NameTable,
    check_entries,
    half_rotated,
    name_entries,
    rope_heads,
)
from models.config import ModelConfig, RopeScaling
from models.errors import CheckpointError

NAMES = NameTable(
    layers="blk",
    layer_names={
        "attn_q": "wq",
        "attn_k": "wk",
        "attn_v": "wv",
        "attn_output": "wo",
        "ffn_gate": "w1",
        "ffn_down": "w2",
        "ffn_up": "w3",
        "attn_norm": "attention_norm",
        "ffn_norm": "feed_forward_norm",
    },
    top_names={"token_embd": "embed", "output_norm": "norm", "output": "lm_head"},
)
_ROPE_FACTORS = "rope_freqs.weight"
_IGNORED = re.compile(rf"{re.escape(_ROPE_FACTORS)}|blk\.\d+\.attn_rot_embd\.weight")


def open_gguf(file: Path) -> BaseCheckpoint:
    """Open a GGUF file. Raises CheckpointError (see `base.open_base`)."""
    reader = read_gguf(file)
    named = name_entries([_entry(file, tensor) for tensor in reader.tensors], NAMES, _IGNORED)
    config = _config(file, reader, named)
    checked = check_entries(file, config, named, NAMES)
    return BaseCheckpoint(
        file,
        "gguf",
        config,
        {name: _rotated(name, entry, config) for name, entry in checked.items()},
        (file,),
    )


def _entry(file: Path, tensor: ReaderTensor) -> Entry:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return Entry(tensor.name, file, shape, partial(_read, file, tensor, shape))


def _read(file: Path, tensor: ReaderTensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return torch.from_numpy(np.asarray(tensor.data)).view(shape)
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        return torch.from_numpy(np.asarray(tensor.data)).view(torch.bfloat16).view(shape)
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{file}: {tensor.name} is of type {tensor.tensor_type.name}, which is not supported; "
            "quantise the model to Q8_0, Q6_K or Q4_K"
        ) from error
    return torch.from_numpy(values).view(shape)


def _rotated(name: str, entry: Entry, config: ModelConfig) -> Entry:
    """GGUF keeps wq and wk in the interleaved layout."""
    heads = rope_heads(name, config)
    if heads is None:
        return entry
    read = entry.read
    return Entry(entry.key, entry.file, entry.shape, lambda: half_rotated(read(), heads))


class _Params(BaseModel):
    """The keys we use, as llama.cpp's converter names them."""

    architecture: str = Field(alias="general.architecture")
    block_count: int = Field(alias="llama.block_count", gt=0, lt=1024)
    context_length: int = Field(alias="llama.context_length", gt=0)
    embedding_length: int = Field(alias="llama.embedding_length", gt=0, le=1 << 20)
    feed_forward_length: int = Field(alias="llama.feed_forward_length", gt=0, le=1 << 22)
    head_count: int = Field(alias="llama.attention.head_count", gt=0, le=1 << 12)
    head_count_kv: int | None = Field(None, alias="llama.attention.head_count_kv", gt=0)
    key_length: int | None = Field(None, alias="llama.attention.key_length", gt=0, le=1 << 12)
    rms_epsilon: float = Field(alias="llama.attention.layer_norm_rms_epsilon", gt=0)
    freq_base: float = Field(10000.0, alias="llama.rope.freq_base", gt=0, lt=float("inf"))
    rotated: int | None = Field(None, alias="llama.rope.dimension_count")
    rope_scaling: str = Field("none", alias="llama.rope.scaling.type")
    expert_count: int = Field(0, alias="llama.expert_count")
    split_count: int = Field(0, alias="split.count")

    @property
    def head_dim(self) -> int:
        return self.key_length or self.embedding_length // self.head_count

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.expert_count:
            raise ValueError("a mixture of experts; only dense LLaMA models are supported")
        if self.split_count > 1:
            raise ValueError("one part of several: merge them with llama.cpp's gguf-split --merge")
        if self.rotated not in (None, self.head_dim):
            raise ValueError(
                f"llama.rope.dimension_count {self.rotated} is not the head size {self.head_dim}"
            )
        if self.rope_scaling != "none":
            raise ValueError(
                f"llama.rope.scaling.type {self.rope_scaling!r}; only none and Llama 3's are supported"
            )
        return self


def _config(file: Path, reader: GGUFReader, named: dict[str, Entry]) -> ModelConfig:
    pairs = metadata(file, reader, "general.arch") | metadata(file, reader, "llama.")
    architecture = pairs.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file}: architecture {architecture!r}; only llama is supported")
    params = parse(_Params, pairs | metadata(file, reader, "split."), file)
    if "embed.weight" not in named:
        raise CheckpointError(f"{file}: {NAMES.original('embed.weight')} is missing; convert the model again")
    try:
        return ModelConfig(
            vocab_size=named["embed.weight"].shape[0],
            hidden_size=params.embedding_length,
            intermediate_size=params.feed_forward_length,
            num_layers=params.block_count,
            num_heads=params.head_count,
            num_kv_heads=params.head_count_kv or params.head_count,
            head_dim=params.head_dim,
            # Stored as float32; its shortest decimal form is the number that was meant.
            rms_norm_eps=float(str(np.float32(params.rms_epsilon))),
            rope_theta=params.freq_base,
            max_position_embeddings=params.context_length,
            tie_word_embeddings="lm_head.weight" not in named,
            rope_scaling=_rope_scaling(file, reader, params.freq_base, params.head_dim),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; convert the model to GGUF again") from error


def _rope_scaling(file: Path, reader: GGUFReader, theta: float, head_dim: int) -> RopeScaling | None:
    """Llama-3's scaling, which GGUF keeps as one factor per frequency.

    The greatest factor is `factor`; the other parameters are the same in all of Meta's releases, and
    the factors that they give must be those in the file.
    """
    tensor = next((tensor for tensor in reader.tensors if tensor.name == _ROPE_FACTORS), None)
    if tensor is None:
        return None
    factors = _read(file, tensor, (int(tensor.n_elements),)).double().numpy()
    scaling = RopeScaling(float(factors.max(initial=1.0)), 1.0, 4.0, 8192)
    expected = _llama3_factors(scaling, theta, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(f"{file}: {_ROPE_FACTORS} is not Llama-3's scaling; no other is supported")
    return scaling


def _llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> npt.NDArray[np.float64]:
    """What each RoPE frequency is divided by, `[head_dim / 2]`: 1 for high ones, `factor` for low ones."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
