"""LitGPT's `adapter` and `adapter_v2` files (`lit_model.pth.adapter`, `lit_model.pth.adapter_v2`).

    transformer.h.{i}.attn.adapter_wte.weight   [K, C]         layers from `adapter_start_layer` up
    transformer.h.{i}.attn.gating_factor        [1, 1, H, 1]   raw; [1, H, 1, 1] in older files

and in V2, which computes s(Wx + b) in every linear, the output head included:

    {transformer.h.{i}.{attn.{qkv,proj}, mlp.{fc_1,fc_2,proj}}, lm_head}.adapter_{bias,scale}
    transformer.h.{i}.{norm_1,norm_2}.weight, transformer.ln_f.weight

Up to 0.5.4 the fused query, key and value rows are grouped by key/value head, and V2 calls the fused
linear `attn.attn`. From 0.5.5 on they are all queries, all keys, all values, and it is `attn.qkv`; yet
up to 0.5.13 the prompts' rows are still cut as if grouped, which `projection: regrouped` reproduces. A
V1 file does not say which it is, hence the option. Rows follow Hugging Face's RoPE layout, as ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models.adapter_config import (
    LINEARS,
    AdapterConfig,
    BaseSpec,
    GateConfig,
    LinearName,
    PromptConfig,
    ScaleBiasConfig,
)
from models.checkpoints.adapter_table import AdapterOptions, Entry, NameTable, linear_sizes, static_prompts
from models.checkpoints.tensor_file import TensorFile
from models.errors import AdapterMismatch, CheckpointError

Projection = Literal["wk_wv", "regrouped"]

PROMPT = "transformer.h.{i}.attn.adapter_wte.weight"
GATE = "transformer.h.{i}.attn.gating_factor"
_FUSED: dict[Projection, str] = {
    "wk_wv": "transformer.h.{i}.attn.attn",
    "regrouped": "transformer.h.{i}.attn.qkv",
}
_QKV: tuple[LinearName, ...] = ("wq", "wk", "wv")
_LINEAR_KEYS: dict[LinearName, str] = {
    "wo": "attn.proj",
    "w1": "mlp.fc_1",
    "w2": "mlp.proj",
    "w3": "mlp.fc_2",
}
_PARTS = ("bias", "scale")
_FIRST_REGROUPED, _LAST_KNOWN = 5, 13  # of 0.5.x


@dataclass(frozen=True)
class LitGpt:
    name: str = "litgpt"
    options: frozenset[str] = frozenset({"litgpt"})

    def matches(self, file: TensorFile) -> bool:
        return file.has(PROMPT)

    def dimensions(self, file: TensorFile) -> dict[str, int]:
        last = file.numbers(PROMPT)[-1]
        gate = GATE.format(i=last)
        heads = max(file.dim(gate, axis, rank=4) for axis in (1, 2))
        return {
            "hidden_size": file.dim(PROMPT.format(i=last), 1, rank=2),
            "num_layers": last + 1,
            "num_heads": heads,
        }

    def config(self, file: TensorFile, base: BaseSpec, options: AdapterOptions) -> AdapterConfig:
        layers = file.numbers(PROMPT)
        length = file.dim(PROMPT.format(i=layers[-1]), 0, rank=2)
        if layers != list(range(layers[0], base.num_layers)) or length > 1024:
            raise CheckpointError(
                f"{file.path}: prompts of {length} rows in layers {layers}; expected every layer from the "
                "first to the top and at most 1024 rows; fetch the file again"
            )
        v2 = _is_v2(file)
        targets = LINEARS if v2 else ()
        return AdapterConfig(
            base=base,
            prompt=PromptConfig(length=length, layers=tuple(layers), projection=_projection(file, options)),
            gate=GateConfig(activation="raw"),
            norms=v2,
            final_norm=v2,
            head=v2,
            scale_bias=ScaleBiasConfig(
                scale="output" if v2 else "none", scale_targets=targets, bias_targets=targets
            ),
        )

    def table(self, config: AdapterConfig) -> NameTable:
        base, prompt = config.base, static_prompts(config)
        H, K, C = base.num_heads, prompt.length, base.hidden_size
        entries = [
            Entry("prompt", PROMPT, (K, C), (K, C), prompt.layers),
            Entry("gate", GATE, (1, 1, H, 1), (H,), prompt.layers, legacy=(1, H, 1, 1)),
        ]
        if config.head:
            entries += _v2_entries(base, _FUSED[prompt.projection])
        return NameTable(tuple(entries))

    def unpack(self, file: TensorFile, config: AdapterConfig) -> TensorFile:
        """Fused vectors apart, under `<key>.wq` and so on; the head cut to the base's vocabulary."""
        if not config.head:
            return file
        base, tensors, fused = config.base, dict(file.tensors), _FUSED[static_prompts(config).projection]
        size = (base.num_heads + 2 * base.num_kv_heads) * base.head_dim
        for part in _PARTS:
            for i in range(base.num_layers):
                key = f"{fused.format(i=i)}.adapter_{part}"
                if file.dim(key, 0, rank=1) != size:
                    raise AdapterMismatch(
                        f"{file.path}: {key} has {file.tensor(key).numel()} rows, the base {size}; serve it "
                        "on the base it was trained on"
                    )
                apart = _split(tensors.pop(key), base, static_prompts(config).projection)
                tensors |= {f"{key}.{name}": apart[name] for name in _QKV}
            tensors[f"lm_head.adapter_{part}"] = self._head(file, base, part)
        return replace(file, tensors=tensors)

    def write(self, path: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
        projection = static_prompts(config).projection
        if config.head:
            for part in _PARTS:
                for i in range(config.base.num_layers):
                    key = f"{_FUSED[projection].format(i=i)}.adapter_{part}"
                    apart = [tensors.pop(f"{key}.{name}") for name in _QKV]
                    tensors[key] = _join(apart, config.base, projection)
        torch.save({"model": tensors}, path)

    def _head(self, file: TensorFile, base: BaseSpec, part: str) -> Tensor:
        """LitGPT pads the vocabulary; what lies beyond the base's is never asked for."""
        key, vocab_size = f"lm_head.adapter_{part}", base.vocab_size or 0
        if file.dim(key, 0, rank=1) < vocab_size:
            raise AdapterMismatch(
                f"{file.path}: {key} has {file.tensor(key).numel()} rows, the base a vocabulary of "
                f"{vocab_size}; serve it on the base it was trained on"
            )
        return file.tensor(key)[:vocab_size]


LITGPT = LitGpt()


def _is_v2(file: TensorFile) -> bool:
    return file.has("lm_head.adapter_scale") or any(_fused_in(file))


def _fused_in(file: TensorFile) -> list[Projection]:
    return [projection for projection, key in _FUSED.items() if file.has(f"{key}.adapter_bias")]


def _projection(file: TensorFile, options: AdapterOptions) -> Projection:
    """How this file's LitGPT projected prompts: by V2's keys, or by the option."""
    found, stated = _fused_in(file), _stated(file, options.litgpt)
    if _is_v2(file) and len(found) != 1:
        raise CheckpointError(f"{file.path}: attn.qkv.adapter_bias is missing; fetch the file again")
    if not _is_v2(file) and stated is None:
        raise CheckpointError(
            f"{file.path}: LitGPT up to 0.5.4 and from 0.5.5 on read this file differently; say which made "
            "it, such as litgpt=0.5.13"
        )
    if found and stated not in (None, found[0]):
        raise CheckpointError(
            f"{file.path}: its keys are not those of LitGPT {options.litgpt}; leave out litgpt="
        )
    return found[0] if found else stated or "wk_wv"


def _stated(file: TensorFile, version: str | None) -> Projection | None:
    if version is None:
        return None
    match = re.fullmatch(r"0\.(\d{1,3})\.(\d{1,3})", version)
    number = (int(match[1]), int(match[2])) if match else (99, 0)
    if number > (5, _LAST_KNOWN):
        raise CheckpointError(
            f"{file.path}: litgpt={version} is not known here; 0.2.0 to 0.5.{_LAST_KNOWN} are"
        )
    return "regrouped" if number >= (5, _FIRST_REGROUPED) else "wk_wv"


def _v2_entries(base: BaseSpec, fused: str) -> list[Entry]:
    C, V, layers = (base.hidden_size,), (base.vocab_size or 0,), tuple(range(base.num_layers))
    entries = [
        Entry("attention_norm", "transformer.h.{i}.norm_1.weight", C, C, layers),
        Entry("feed_forward_norm", "transformer.h.{i}.norm_2.weight", C, C, layers),
        Entry("final_norm", "transformer.ln_f.weight", C, C),
    ]
    for part in _PARTS:
        entries.append(Entry(f"head_{part}", f"lm_head.adapter_{part}", V, V))
        for name in LINEARS:
            size = (linear_sizes(base)[name][0],)
            key = f"{fused}.adapter_{part}.{name}"
            if name not in _QKV:
                key = f"transformer.h.{{i}}.{_LINEAR_KEYS[name]}.adapter_{part}"
            entries.append(Entry(f"{part}.{name}", key, size, size, layers))
    return entries


def _split(fused: Tensor, base: BaseSpec, projection: Projection) -> dict[LinearName, Tensor]:
    """A fused vector [(H + 2G)·D] → that of wq, wk and wv."""
    G, D = base.num_kv_heads, base.head_dim
    R = base.num_heads // G
    if projection == "regrouped":
        parts = torch.split(fused, [G * R * D, G * D, G * D])
    else:
        parts = torch.split(fused.reshape(G, R + 2, D), [R, 1, 1], dim=1)
    return {name: part.flatten() for name, part in zip(_QKV, parts, strict=True)}


def _join(parts: list[Tensor], base: BaseSpec, projection: Projection) -> Tensor:
    """The inverse of `_split`."""
    if projection == "regrouped":
        return torch.cat(parts)
    G, D = base.num_kv_heads, base.head_dim
    return torch.cat([part.reshape(G, -1, D) for part in parts], dim=1).flatten()
