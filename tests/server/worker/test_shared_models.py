"""Settings of a model that several machines share: what cannot hold is refused before vLLM is looked for."""

from __future__ import annotations

import pytest

from server.serving import StartupError
from server.settings import WorkerSettings
from server.worker.build import build, follow

SHARED = {
    "engine": "vllm",
    "tensor_parallel": 4,
    "nnodes": 2,
    "master_addr": "10.0.0.1",
    "vllm_adapters": "prompts",
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tensor_parallel": 3}, "nnodes must divide tensor_parallel"),
        ({"node_rank": 2}, "node_rank must be below nnodes"),
        ({"master_addr": None}, "needs master_addr"),
        ({"vllm_adapters": "auto"}, "needs vllm_adapters prompts or all"),
        ({"engine": "native", "tensor_parallel": 1}, "the native engine has one device"),
    ],
)
def test_settings_that_cannot_hold_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        build(WorkerSettings(**SHARED | changes))  # type: ignore[arg-type]


def test_the_native_engine_follows_nobody() -> None:
    with pytest.raises(StartupError, match="use --engine vllm for node_rank"):
        follow(WorkerSettings(node_rank=1))
