"""PEFT `adaption_prompt` folders: V1 prompts in the top layers, one raw gate per layer.

    adapter_config.json, adapter_model.safetensors or .bin:
    base_model.model.model.layers.{i}.self_attn.adaption_prompt   [1, K, C]
    base_model.model.model.layers.{i}.self_attn.adaption_gate     [1]

PEFT multiplies the prompts' softmax by the gate itself, without tanh.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.adapter_config import AdapterConfig, BaseSpec, GateConfig, PromptConfig
from models.checkpoints.adapter_table import AdapterOptions, Entry, NameTable, static_prompts, top_layers
from models.checkpoints.tensor_file import TensorFile
from models.checkpoints.torch_files import shown
from models.errors import CheckpointError

PROMPT = "base_model.model.model.layers.{i}.self_attn.adaption_prompt"
GATE = "base_model.model.model.layers.{i}.self_attn.adaption_gate"


@dataclass(frozen=True)
class Peft:
    name: str = "peft"
    options: frozenset[str] = frozenset()

    def matches(self, file: TensorFile) -> bool:
        return file.has(PROMPT)

    def dimensions(self, file: TensorFile) -> dict[str, int]:
        last = file.numbers(PROMPT)[-1]  # layers count from the top, so the last is the base's last
        return {"hidden_size": file.dim(PROMPT.format(i=last), 2, rank=3), "num_layers": last + 1}

    def config(self, file: TensorFile, base: BaseSpec, options: AdapterOptions) -> AdapterConfig:
        layers = file.numbers(PROMPT)
        length = file.dim(PROMPT.format(i=layers[-1]), 1, rank=3)
        for field, default, wanted in (
            ("peft_type", None, "ADAPTION_PROMPT"),
            ("adapter_len", None, length),
            ("adapter_layers", None, len(layers)),
            ("target_modules", "self_attn", "self_attn"),
        ):
            found = default if file.config.get(field) is None else file.config[field]
            if not isinstance(found, int | str) or found != wanted:
                raise CheckpointError(
                    f"{file.path.parent / 'adapter_config.json'}: {field} is {shown(found)}, the weights say "
                    f"{wanted!r}; use the file that was saved with them"
                )
        if length > 1024:
            raise CheckpointError(f"{file.path}: prompts of {length} rows; at most 1024 are served")
        return AdapterConfig(
            base=base,
            prompt=PromptConfig(length=length, layers=top_layers(base, len(layers))),
            gate=GateConfig(per="layer", activation="raw"),
        )

    def table(self, config: AdapterConfig) -> NameTable:
        prompt = static_prompts(config)
        K, C = prompt.length, config.base.hidden_size
        return NameTable(
            (
                Entry("prompt", PROMPT, (1, K, C), (K, C), prompt.layers),
                Entry("gate", GATE, (1,), (), prompt.layers),
            )
        )

    def unpack(self, file: TensorFile, config: AdapterConfig) -> TensorFile:
        return file

    def write(self, path: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
        prompt = static_prompts(config)
        path.mkdir(parents=True, exist_ok=True)
        stated = {
            "peft_type": "ADAPTION_PROMPT",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "target_modules": "self_attn",
            "adapter_len": prompt.length,
            "adapter_layers": len(prompt.layers),
        }
        weights = path / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors makes it readable by its owner only
        (path / "adapter_config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


PEFT = Peft()
