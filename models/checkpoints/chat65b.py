"""The chat-65B file of LLaMA-Adapter V2: bias, scale and norm tuning without prompts.

    layers.{i}.attention.w{q,k,v,o}_{bias,scale}, layers.{i}.feed_forward.w{1,2,3}_{bias,scale}
    layers.{i}.{attention_norm,ffn_norm}.weight, norm.weight

Its code computes y = W(x·s) + b, so a scale has the linear's input size, where the paper has s(Wx + b).
Files with and without the final norm are both valid: the repository's own filter leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.adapter_config import LINEARS, AdapterConfig, BaseSpec, LinearName, ScaleBiasConfig
from models.checkpoints.adapter_table import AdapterOptions, Entry, NameTable, linear_sizes
from models.checkpoints.reference import (
    BASE_WEIGHTS,
    LINEAR_KEYS,
    bias_entry,
    final_norm_entry,
    ignored,
    norm_entries,
)
from models.checkpoints.tensor_file import TensorFile


@dataclass(frozen=True)
class Chat65B:
    name: str = "chat-65b"
    options: frozenset[str] = frozenset()

    def matches(self, file: TensorFile) -> bool:
        return file.has(_key("wq", "scale"))

    def dimensions(self, file: TensorFile) -> dict[str, int]:
        layers = file.numbers(_key("wq", "scale"))
        last = layers[-1]
        return {
            "hidden_size": file.dim(_key("wq", "scale").format(i=last), 0, rank=1),
            "num_layers": last + 1,
            "intermediate_size": file.dim(_key("w1", "bias").format(i=last), 0, rank=1),
        }

    def config(self, file: TensorFile, base: BaseSpec, options: AdapterOptions) -> AdapterConfig:
        return AdapterConfig(
            base=base,
            norms=True,
            final_norm=file.has("norm.weight"),
            scale_bias=ScaleBiasConfig(scale="input", scale_targets=LINEARS, bias_targets=LINEARS),
            template="vicuna_v1",
        )

    def table(self, config: AdapterConfig) -> NameTable:
        base = config.base
        entries = [*norm_entries(base, "")]
        if config.final_norm:
            entries.append(final_norm_entry(base, ""))
        for name in LINEARS:
            size = (linear_sizes(base)[name][1],)
            layers = tuple(range(base.num_layers))
            entries.append(bias_entry(base, name, _key(name, "bias")))
            entries.append(Entry(f"scale.{name}", _key(name, "scale"), size, size, layers))
        return NameTable(tuple(entries), ignored=ignored(BASE_WEIGHTS))

    def unpack(self, file: TensorFile, config: AdapterConfig) -> TensorFile:
        return file

    def write(self, path: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
        torch.save({"model": tensors}, path)


CHAT_65B = Chat65B()


def _key(name: LinearName, part: str) -> str:
    return f"layers.{{i}}.{LINEAR_KEYS[name]}_{part}"
