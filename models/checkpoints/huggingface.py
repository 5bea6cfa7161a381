"""Hugging Face folders: `config.json` with safetensors or `pytorch_model.bin` weights, sharded or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.fields import parse, read_json
from models.checkpoints.layout import BaseCheckpoint, Entry, NameTable, check_entries, name_entries
from models.checkpoints.torch_files import read_state_dict
from models.config import LinearRopeScaling, ModelConfig, RopeScaling
from models.errors import CheckpointError

NAMES = NameTable(
    layers="model.layers",
    layer_names={
        "self_attn.q_proj": "wq",
        "self_attn.k_proj": "wk",
        "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo",
        "mlp.gate_proj": "w1",
        "mlp.down_proj": "w2",
        "mlp.up_proj": "w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
    },
    top_names={"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "lm_head"},
)
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Single files first: an index may be left over beside them, never the other way round.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def open_huggingface(folder: Path) -> BaseCheckpoint:
    """Open a Hugging Face folder. Raises CheckpointError (see `base.open_base`)."""
    config = read_config(folder / "config.json")
    named = name_entries(_entries(folder), NAMES, _IGNORED)
    entries = check_entries(folder, config, named, NAMES)
    files = tuple(dict.fromkeys(entry.file for entry in entries.values()))
    return BaseCheckpoint(folder, "huggingface", config, entries, files)


def read_config(file: Path) -> ModelConfig:
    """The shape that a `config.json` describes. Raises CheckpointError for other architectures."""
    raw = read_json(file)
    architectures = raw.get("architectures") or [raw.get("model_type")]
    if raw.get("model_type", "llama") != "llama" or architectures not in (["LlamaForCausalLM"], ["llama"]):
        raise CheckpointError(
            f"{file}: architecture {architectures} of type {raw.get('model_type')!r}; only LLaMA "
            "(LlamaForCausalLM, model_type llama) is supported"
        )
    config = parse(_ConfigJson, raw, file)
    rope = config.rope_parameters or config.rope_scaling or _Rope.model_validate({})
    try:
        return ModelConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=rope.rope_theta or config.rope_theta,
            max_position_embeddings=rope.context(config.max_position_embeddings),
            tie_word_embeddings=config.tie_word_embeddings,
            rope_scaling=rope.scaling(),
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; use the file that belongs to the weights") from error


def write_huggingface(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `config.json` and `model.safetensors` of a base with default RoPE, in the tensors' type.

    `tensors` come under canonical names. The folder must exist.
    """
    assert config.rope_scaling is None, "no caller writes scaled RoPE"
    weights = {NAMES.original(name): tensor.contiguous() for name, tensor in tensors}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "hidden_act": "silu",
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": config.rope_theta,
                "max_position_embeddings": config.max_position_embeddings,
                "tie_word_embeddings": config.tie_word_embeddings,
                "attention_bias": False,
                "mlp_bias": False,
                "torch_dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
            },
            indent=2,
        )
        + "\n"
    )


_MOST_POSITIONS = 1 << 31  # beyond any real model: hostile numbers overflow nothing


class _Rope(BaseModel):
    """`rope_scaling`, or transformers 5's `rope_parameters`, which holds theta too."""

    rope_type: str = Field("default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: float | None = Field(None, gt=0, lt=float("inf"))
    factor: float | None = Field(None, ge=1)
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: int | None = Field(None, gt=0, lt=1 << 31)

    @model_validator(mode="after")
    def _known_and_complete(self) -> Self:
        if self.rope_type not in ("default", "linear", "llama3"):
            raise ValueError(f"type {self.rope_type!r}; only default, linear and llama3 are supported")
        if self.rope_type == "linear" and self.factor is None:
            raise ValueError("linear needs factor")
        if self.rope_type == "llama3" and None in self._llama3():
            raise ValueError(
                "llama3 needs factor, low_freq_factor, high_freq_factor and original_max_position_embeddings"
            )
        return self

    def _llama3(self) -> tuple[float | None, float | None, float | None, int | None]:
        return self.factor, self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings

    def context(self, positions: int) -> int:
        """What `max_position_embeddings` comes to: with linear scaling it is taken for the one of before."""
        if self.rope_type != "linear" or self.factor is None:
            return positions
        before = min(self.original_max_position_embeddings or positions, _MOST_POSITIONS)
        return int(min(before * self.factor, _MOST_POSITIONS))

    def scaling(self) -> RopeScaling | LinearRopeScaling | None:
        factor, low, high, original = self._llama3()
        if self.rope_type == "linear" and factor is not None:
            return LinearRopeScaling(factor)
        if factor is None or low is None or high is None or original is None or self.rope_type == "default":
            return None
        return RopeScaling(factor, low, high, original)


class _ConfigJson(BaseModel):
    """The fields we use. LLaMA-1's early files lack some, whose values were the defaults here."""

    vocab_size: int = Field(gt=0, le=1 << 24)
    hidden_size: int = Field(gt=0, le=1 << 20)
    intermediate_size: int = Field(gt=0, le=1 << 22)
    num_hidden_layers: int = Field(gt=0, lt=1024)
    num_attention_heads: int = Field(gt=0, le=1 << 12)
    num_key_value_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0, le=1 << 12)
    rms_norm_eps: float = Field(1e-6, gt=0)
    max_position_embeddings: int = Field(2048, gt=0)
    tie_word_embeddings: bool = False
    hidden_act: str = Field("silu", pattern="^(silu|swish)$")
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization_config: dict[str, Any] | None = None
    rope_theta: float = Field(10000.0, gt=0, lt=float("inf"))
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.attention_bias or self.mlp_bias:
            raise ValueError("attention_bias and mlp_bias must be false: LLaMA's linears have no bias")
        if self.quantization_config:
            raise ValueError(
                "quantization_config: quantised Hugging Face weights are not supported, only "
                "unquantised ones and GGUF files"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size is not a multiple of num_attention_heads, and head_dim is not given"
            )
        return self


def _entries(folder: Path) -> Iterator[Entry]:
    found = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: holds no weights ({', '.join(_WEIGHT_FILES)}); "
            "fetch the checkpoint again, with all its files"
        )
    indexed = found.name.endswith(".index.json")
    for file in _shards(found) if indexed else [found]:
        yield from _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once. It may name files of its own folder only."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing; fetch it again")
    suffix = ".safetensors" if ".safetensors." in index.name else ".bin"
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(
                f"{index}: weight_map names {name!r}, which is no {suffix} file of this folder"
            )
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _safetensors(file: Path) -> Iterator[Entry]:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; fetch the checkpoint again, with all its files")
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or truncated ({error}); fetch it again") from error
    for key in handle.keys():  # type: ignore[no-untyped-call] # noqa: SIM118 - no mapping
        shape = tuple(handle.get_slice(key).get_shape())  # type: ignore[no-untyped-call]
        yield Entry(key, file, shape, partial(handle.get_tensor, key))


def _pickled(file: Path) -> Iterator[Entry]:
    for key, tensor in read_state_dict(file).items():
        yield Entry(key, file, tuple(tensor.shape), tensor.detach)
