"""The folders in which vLLM is given adapters, without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import CONFIGS, random_adapter

from models.adapter import base_spec
from models.adapter_config import AdapterConfig, PromptConfig
from models.vllm_plugin.carriers import EVERYTHING
from server.worker.frontend import ServedModel
from server.worker.messages import ModelInfo
from server.worker.sight import LoadedAdapter
from server.worker.vllm_engine import VllmEngine


class Refuses:
    """In vLLM's place: it finds the folder, and cannot use it."""

    healthy = True

    def __init__(self) -> None:
        self.found: list[str] = []

    async def add_adapter(self, name: str, folder: Path) -> Any:
        self.found = names(folder.parent)
        raise RuntimeError("no room for it")

    def stop(self) -> None: ...


def names(folder: Path | str) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


async def test_of_an_adapter_that_vllm_does_not_take_no_folder_is_left() -> None:
    vllm, none = Refuses(), None
    made = VllmEngine(vllm, none, none, none, [], room=EVERYTHING, max_requests=8)  # type: ignore[arg-type]
    prompt = PromptConfig(length=3, layers=(1,))
    adapter = random_adapter(AdapterConfig(base=base_spec(CONFIGS["gqa"]), prompt=prompt))
    info = ModelInfo("poet", "adapter", "poet", "base", 0, 64)
    with pytest.raises(RuntimeError, match="no room for it"):
        await made._take(ServedModel(info, LoadedAdapter(("poet", 1), adapter)))
    assert vllm.found == ["1-poet"]
    assert names(made._exports.name) == []
    await made.stop()
