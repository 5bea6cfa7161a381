"""Writes an adapter as the LoRA folder that vLLM's own manager loads (`carriers`)."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from models.adaptation import vectors
from models.adapter import Adapter, lora_scaling
from models.vllm_plugin.carriers import (
    FINAL,
    GATES,
    LENGTH,
    LINEAR_FILES,
    LOW_RANK,
    PROMPT,
    ROWS,
    SEES,
    STATIC,
    VECTORS,
    Room,
    Span,
    columns,
    fact_rows,
    final_vectors,
    layer_vectors,
)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(adapter: Adapter, folder: Path, room: Room) -> None:
    """Write `folder`, of an adapter that `check_carried` lets pass, for an engine with this room.

    As `whole_folder` does.
    """

    def fill(place: Path) -> None:
        save_file(carried(adapter, room), place / _WEIGHTS)
        (place / _CONFIG).write_text(json.dumps(_peft_config()), encoding="utf-8")

    whole_folder(folder, fill)


def whole_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes into the one that it is given. It is whole, or not there.

    A folder that exists is left alone: name it by what is in it.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fill(beside)
        beside.chmod(0o755)
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():  # somebody else was quicker
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@torch.no_grad()
def carried(adapter: Adapter, room: Room) -> dict[str, Tensor]:
    """The tensors of the carriers by PEFT's names, float32."""
    config, gates_LH = adapter.config, adapter.gates().float()
    tensors: dict[str, Tensor] = {}
    for layer in range(config.base.num_layers):
        name = f"model.layers.{layer}.self_attn.{PROMPT}"
        facts = _prompt_facts(adapter, layer, gates_LH[layer])
        tensors |= _factors(name, _prompt_rows(adapter, layer), facts)
    tensors |= _low_rank(adapter)
    if Room.needed([config]).vectors:
        own = {key: value.float() for key, value in vectors(adapter).items()}
        spans = layer_vectors(config.base, input_scales=room.input_scales)
        for layer in range(config.base.num_layers):
            packed = _pack(_layer_parts(own, layer), spans)
            tensors |= _factors(f"model.layers.{layer}.{VECTORS}", packed, torch.zeros(1, ROWS))
        parts = {"has_norm": torch.ones(1), "final_norm": own["final_norm"][0]} if config.final_norm else {}
        packed = _pack(parts, final_vectors(config.base))
        tensors |= _factors(f"model.{FINAL}", packed, torch.zeros(1, ROWS))
    return tensors


def _peft_config() -> dict[str, object]:
    """With alpha equal to the rank, vLLM scales nothing."""
    modules = [PROMPT, VECTORS, FINAL, *(name.rpartition(".")[2] for name in LINEAR_FILES.values())]
    return {"peft_type": "LORA", "r": ROWS, "lora_alpha": ROWS, "target_modules": modules}


def _factors(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": a.contiguous(), f"{prefix}.lora_B.weight": b.contiguous()}


def _prompt_rows(adapter: Adapter, layer: int) -> Tensor:
    """Static prompt rows [R, C]; zeros where the layer has none."""
    prompt = adapter.config.prompt
    if prompt is None or layer not in prompt.layers:
        return torch.zeros(ROWS, adapter.config.base.hidden_size)
    return F.pad(adapter.prompt[prompt.layers.index(layer)].float(), (0, 0, 0, ROWS - prompt.length))


def _prompt_facts(adapter: Adapter, layer: int, gates_H: Tensor) -> Tensor:
    """B of the prompt carrier."""
    config, rows = adapter.config, fact_rows(len(gates_H))
    prompt, vision, lora = config.prompt, config.vision, config.lora
    facts = torch.zeros(rows * ROWS)
    facts[LENGTH] = config.max_prompt_len
    facts[SEES] = float(vision is not None and layer in vision.layers)
    facts[LOW_RANK] = float(lora is not None and lora.on_prompts)
    facts[STATIC] = float(prompt is not None and layer in prompt.layers)
    facts[GATES : GATES + len(gates_H)] = gates_H
    return facts.view(rows, ROWS)


def _low_rank(adapter: Adapter) -> dict[str, Tensor]:
    """LoRA's terms by PEFT's names, scaled, and padded to the rank that the folder's configuration says."""
    tensors: dict[str, Tensor] = {}
    for name, terms in adapter.lora.items():
        a_LRi = terms["a"].float()  # type: ignore[index]
        b_LoR = terms["b"].float() * lora_scaling(adapter.config)  # type: ignore[index]
        missing = ROWS - a_LRi.shape[1]
        for layer, (a_Ri, b_oR) in enumerate(zip(a_LRi, b_LoR, strict=True)):
            module = f"model.layers.{layer}.{LINEAR_FILES[name]}"  # type: ignore[index]
            tensors |= _factors(module, F.pad(a_Ri, (0, 0, 0, missing)), F.pad(b_oR, (0, missing)))
    return tensors


def _layer_parts(own: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    parts = {}
    for key, value_LF in own.items():
        if key == "final_norm":
            continue
        value = value_LF[layer]
        parts[key] = value - 1 if key.startswith("scale_") else value
    if "attention_norm" in own:
        parts["has_norms"] = torch.ones(1)
    return parts


def _pack(parts: dict[str, Tensor], spans: dict[str, Span]) -> Tensor:
    """The parts at their places, [R, columns]."""
    flat = torch.zeros(ROWS * columns(spans))
    for name, value in parts.items():
        start, end = spans[name]
        flat[start:end] = value
    return flat.view(ROWS, -1)
