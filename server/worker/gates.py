"""What an adapter shows of itself to people: how strongly each layer and head hears its prompts."""

from __future__ import annotations

import torch

from models.adapter import Adapter
from server.worker.messages import AdapterGates


def gates_of(adapter: Adapter) -> AdapterGates:
    config = adapter.config
    with torch.inference_mode():
        gates_LH = adapter.gates().float().abs().tolist()
    return AdapterGates(
        layers=config.base.num_layers,
        heads=config.base.num_heads,
        gates=tuple(tuple(row) for row in gates_LH),
        gated_layers=config.gated_layers,
        variant=config.variant,
        prompt_len=config.max_prompt_len,
        num_parameters=sum(parameter.numel() for parameter in adapter.parameters()),
        description=config.description,
    )
