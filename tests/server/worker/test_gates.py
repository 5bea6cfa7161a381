"""What an adapter tells people of itself is what it computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import random_adapter
from tiny_base import adapter_config, tiny_config, write_adapter, write_tiny_base

from models.adapter_config import AdapterConfig
from server.errors import NotFound
from server.settings import WorkerSettings
from server.worker.build import build_engine
from server.worker.gates import gates_of


@pytest.mark.parametrize("kind", ["v1", "v2", "sight"])
def test_gates_are_the_magnitudes_of_the_effective_ones(kind: str) -> None:
    config = adapter_config(kind)
    adapter = random_adapter(config)
    told = gates_of(adapter)
    assert (told.layers, told.heads) == (tiny_config().num_layers, tiny_config().num_heads)
    assert told.gated_layers == config.gated_layers
    effective = torch.tanh(adapter.gate) if config.gate.activation == "tanh" else adapter.gate
    for row, layer in enumerate(config.gated_layers):
        torch.testing.assert_close(torch.tensor(told.gates[layer]), effective[row].detach().abs())
    for layer in set(range(told.layers)) - set(config.gated_layers):
        assert set(told.gates[layer]) == {0.0}
    assert told.prompt_len == {"v1": 6, "v2": 4, "sight": 5}[kind]
    assert told.num_parameters == sum(tensor.numel() for tensor in adapter.state_dict().values())


def test_an_adapter_without_prompts_has_none() -> None:
    config = AdapterConfig(base=adapter_config("v1").base, norms=True, description="only norms")
    told = gates_of(random_adapter(config))
    assert (told.gated_layers, told.prompt_len, told.description) == ((), 0, "only norms")
    assert {gate for row in told.gates for gate in row} == {0.0}


async def test_the_engine_tells_them_of_adapters_only(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "tiny")
    write_adapter(tmp_path / "poet", "v1")
    settings = WorkerSettings(
        base=str(tmp_path / "tiny"), kv_cache_mib=1, adapters=(f"poet={tmp_path / 'poet'}",)
    )
    engine = build_engine(settings)
    await engine.start()
    try:
        assert (await engine.gates("poet")).variant == "V1 text"
        with pytest.raises(NotFound, match="base model"):
            await engine.gates("tiny")
        with pytest.raises(NotFound, match="nobody"):
            await engine.gates("nobody")
    finally:
        await engine.stop()
