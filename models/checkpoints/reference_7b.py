"""LLaMA-Adapter V2 multimodal 7B files: BIAS-7B, LORA-BIAS-7B (and v21), CAPTION-7B, training checkpoints.

Eight ViT blocks turn CLIP's tokens and ten queries into ten visual rows, which are added to the prompts
of all layers but the first. All norms are the adapter's own; wq, wo, w1, w2, w3 have biases, in the LORA
files every linear has a low-rank term without scaling, kept off the prompts' keys and values, and
`new_gate` multiplies tanh(gate). What is trained first, as caption files are, may lack biases, which are
then zero, and norms, which are then the base's.

The reference code reads images as BGR and conditions text-only requests on a zero image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.adapter_config import (
    LINEARS,
    AdapterConfig,
    BaseSpec,
    GateConfig,
    LinearName,
    LoraConfig,
    PromptConfig,
    ScaleBiasConfig,
    VisionConfig,
)
from models.checkpoints.adapter_table import (
    AdapterOptions,
    Entry,
    NameTable,
    Unused,
    linear_sizes,
    rope_heads,
    static_prompts,
    top_layers,
)
from models.checkpoints.reference import (
    BASE_WEIGHTS,
    LINEAR_KEYS,
    bias_entry,
    final_norm_entry,
    gate_entry,
    ignored,
    norm_entries,
)
from models.checkpoints.tensor_file import TensorFile
from models.errors import CheckpointError

GATE = "llama.layers.{i}.attention.gate"
NEW_GATE = "llama.layers.{i}.attention.new_gate"
BIASED: tuple[LinearName, ...] = ("wq", "wo", "w1", "w2", "w3")
_BLOCK_HEADS = 16
_MLP_RATIO = 4
_BLOCK = "visual_blocks.{i}.norm1.weight"
_NORMS = ("llama.norm.weight", *(f"llama.layers.{{i}}.{name}_norm.weight" for name in ("attention", "ffn")))


@dataclass(frozen=True)
class Reference7B:
    name: str = "reference-7b"
    options: frozenset[str] = frozenset({"color", "encoder"})

    def matches(self, file: TensorFile) -> bool:
        return file.has("visual_query.weight") and file.has("adapter_query.weight") and file.has(GATE)

    def dimensions(self, file: TensorFile) -> dict[str, int]:
        layers = file.numbers(GATE)
        found = {
            "hidden_size": file.dim("adapter_query.weight", 1, rank=2),
            "num_layers": layers[-1] + 1,
            "num_heads": file.dim(GATE.format(i=layers[-1]), 1, rank=4),
        }
        if file.has(_bias_key("w1")):
            found["intermediate_size"] = file.dim(_bias_key("w1").format(i=layers[-1]), 0, rank=1)
        return found

    def config(self, file: TensorFile, base: BaseSpec, options: AdapterOptions) -> AdapterConfig:
        vision = self._vision(file, base, options)
        rows = file.dim("adapter_query.weight", 0, rank=2)
        if rows % vision.num_tokens or rows // vision.num_tokens != len(vision.layers):
            raise CheckpointError(
                f"{file.path}: adapter_query.weight has {rows} rows, not {vision.num_tokens} (those of "
                f"visual_query.weight) for each of {len(vision.layers)} layers; fetch the file again"
            )
        lora = self._lora(file)
        biased = file.config.get("w_bias") is True or lora is not None
        has_norms = biased or any(map(file.has, _NORMS))
        return AdapterConfig(
            base=base,
            prompt=PromptConfig(length=vision.num_tokens, layers=vision.layers),
            gate=GateConfig(activation="tanh", new_gate=file.has(NEW_GATE)),
            norms=has_norms,
            final_norm=has_norms,
            scale_bias=ScaleBiasConfig(
                bias_targets=tuple(name for name in BIASED if biased or file.has(_bias_key(name)))
            ),
            lora=lora,
            vision=vision,
            template="alpaca",
        )

    def table(self, config: AdapterConfig) -> NameTable:
        base, prompt, lora = config.base, static_prompts(config), config.lora
        count, K, C = len(prompt.layers), prompt.length, base.hidden_size
        below = [i for i in range(base.num_layers) if i not in prompt.layers]
        gate = gate_entry(base, prompt.layers, "head", GATE)
        entries = [
            Entry("prompt", "adapter_query.weight", (count * K, C), (count, K, C)),
            gate,
            *((*norm_entries(base, "llama."), final_norm_entry(base, "llama.")) if config.norms else ()),
            *(bias_entry(base, name, _bias_key(name)) for name in config.scale_bias.bias_targets),
            *_vision_entries(config),
        ]
        unused = [Unused(GATE.format(i=i), gate.shape) for i in below]
        if config.gate.new_gate:
            entries.append(Entry("new_gate", NEW_GATE, (1, 1, 1, 1), (), prompt.layers))
            unused += [Unused(NEW_GATE.format(i=i), (1, 1, 1, 1)) for i in below]
        if lora:
            entries += [entry for name in lora.targets for entry in _lora_entries(base, name, lora.rank)]
        return NameTable(tuple(entries), tuple(unused), ignored(BASE_WEIGHTS))

    def unpack(self, file: TensorFile, config: AdapterConfig) -> TensorFile:
        return file

    def write(self, path: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
        lora = config.lora
        stated = {
            "w_bias": bool(config.scale_bias.bias_targets),
            "w_lora": lora is not None,
            "lora_rank": lora.rank if lora else 16,
        }
        torch.save({"model": tensors, "config": stated}, path)

    def _lora(self, file: TensorFile) -> LoraConfig | None:
        first = _lora_key("wq", 1)
        if not file.has(first) and file.config.get("w_lora") is not True:
            return None
        return LoraConfig(rank=file.dim(first.format(i=0), 0, rank=2), targets=LINEARS)

    def _vision(self, file: TensorFile, base: BaseSpec, options: AdapterOptions) -> VisionConfig:
        blocks, width = file.numbers(_BLOCK), file.dim("clip_proj.weight", 0, rank=2)
        length = file.dim("visual_query.weight", 0, rank=2)
        if not 0 < len(blocks) <= 64 or width % _BLOCK_HEADS or length > 1024:
            raise CheckpointError(
                f"{file.path}: {len(blocks)} visual_blocks of width {width} for {length} queries; expected 1 "
                f"to 64 blocks of a multiple of {_BLOCK_HEADS}, and at most 1024 queries; fetch it again"
            )
        return VisionConfig(
            encoder=options.encoder or "open_clip:ViT-L-14:openai",
            features="tokens",
            projector="query_blocks",
            fusion="add",
            layers=top_layers(base, max(1, base.num_layers - 1)),
            num_tokens=length,
            feature_dim=file.dim("clip_proj.weight", 1, rank=2),
            hidden_size=width,
            num_blocks=len(blocks),
            num_heads=_BLOCK_HEADS,
            color=options.color or "bgr",
            no_image="zero",
        )


REFERENCE_7B = Reference7B()


def _bias_key(name: LinearName) -> str:
    return f"llama.layers.{{i}}.{LINEAR_KEYS[name]}.bias"


def _lora_key(name: LinearName, part: int) -> str:
    module = LINEAR_KEYS[name].split(".")[0]
    return f"llama.layers.{{i}}.{module}.lora_{name}_l{part}.weight"


def _lora_entries(base: BaseSpec, name: LinearName, R: int) -> tuple[Entry, Entry]:
    out_size, in_size = linear_sizes(base)[name]
    layers = tuple(range(base.num_layers))
    a, b = (R, in_size), (out_size, R)
    return (
        Entry(f"lora.{name}.a", _lora_key(name, 1), a, a, layers),
        Entry(f"lora.{name}.b", _lora_key(name, 2), b, b, layers, heads=rope_heads(base, name)),
    )


def _vision_entries(config: AdapterConfig) -> list[Entry]:
    """The projector: input Linear and LayerNorm, queries, ViT blocks, output Linear and LayerNorm."""
    vision, C = config.vision, config.base.hidden_size
    if vision is None:
        raise CheckpointError("it needs a visual projector")
    E, F, n = vision.hidden_size, vision.feature_dim, vision.num_tokens
    entries = [Entry("vision.query", "visual_query.weight", (n, E), (n, E))]

    def affine(native: str, key: str, *weight: int) -> None:
        for part, shape in (("weight", weight), ("bias", weight[:1])):
            entries.append(Entry(f"vision.{native}.{part}", f"{key}.{part}", shape, shape))

    affine("input_proj", "clip_proj", E, F)
    affine("input_norm", "clip_proj_norm", E)
    for i in range(vision.num_blocks):
        ours, theirs = f"blocks.{i}", f"visual_blocks.{i}"
        affine(f"{ours}.norm1", f"{theirs}.norm1", E)
        affine(f"{ours}.attn.qkv", f"{theirs}.attn.qkv", 3 * E, E)
        affine(f"{ours}.attn.proj", f"{theirs}.attn.proj", E, E)
        affine(f"{ours}.norm2", f"{theirs}.norm2", E)
        affine(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", _MLP_RATIO * E, E)
        affine(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", E, _MLP_RATIO * E)
    affine("output_proj", "visual_proj", C, E)
    affine("output_norm", "visual_proj_norm", C)
    return entries
