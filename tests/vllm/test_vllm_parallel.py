"""A model over two processes, two of them, and one of real size."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from vllm_engines import ask, events_of, settings, text_of
from vllm_support import Asked, Deployment, check, mixed

from models.adapter import base_spec
from models.adapter_config import AdapterConfig, PromptConfig
from models.pull import resolve_base
from server.settings import default_cache_dir
from server.worker.build import build
from server.worker.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm


def test_two_processes_share_heads_and_features(deployment: Deployment) -> None:
    llm = deployment.vllm(tensor_parallel_size=2)
    requests = mixed(6)
    check(deployment, requests, deployment.ask(llm, requests))
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.asyncio
async def test_two_copies_share_the_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own data parallelism: two engines, each with weights, cache and adapters of its own."""
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # copies are processes
    copies, native = build(settings(folder, "vllm", data_parallel=2)), build(settings(folder, "native"))
    assert isinstance(copies, VllmEngine)
    kinds = [("tiny", None), ("v1", None), ("v2", None), ("sees", "red"), ("sees", "navy"), ("7b", "red")]
    requests = [ask(f"Number {i}", *kinds[i % len(kinds)], max_tokens=20) for i in range(12)]
    for engine in (copies, native):
        await engine.start()
    try:
        for model in ("other", "v1"):  # loaded into both copies, and replaced there
            for engine in (copies, native):
                await engine.load_adapter("late", model)
            asked = [*requests, *(ask(f"Late {i}", "late") for i in range(4))]
            found = await asyncio.gather(*(events_of(copies, request) for request in asked))
            for request, events in zip(asked, found, strict=True):
                assert text_of(events) == text_of(await events_of(native, request))
        assert copies._vllm._stats._engines.keys() == {0, 1}
        assert copies.stats().running == copies.stats().kv_blocks_used == 0
    finally:
        for engine in (copies, native):
            await engine.stop()


@pytest.mark.weights
def test_smollm_answers_as_in_the_native_engine(tmp_path: Path) -> None:
    base = resolve_base("smollm2-135m", default_cache_dir())
    deployment = Deployment(base, tmp_path)
    spec = base_spec(deployment.base.config)
    config = AdapterConfig(base=spec, prompt=PromptConfig(length=10, layers=tuple(range(2, 30))))
    deployment.add("poet", config, 0)
    llm = deployment.vllm(kv_cache_memory_bytes=64 << 20)
    text = [504, 2365, 282, 4649, 314]
    requests = [Asked(text), Asked(text, "poet"), Asked(text * 20, "poet", 6)]
    # Gates as wild as these make thirty layers of float32 part by 3e-4 from float64, natively too.
    check(deployment, requests, deployment.ask(llm, requests), tolerance=1e-3)
