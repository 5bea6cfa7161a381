"""A model over two processes, and one of real size."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_support import Asked, Deployment, check, mixed

from models.adapter import base_spec
from models.adapter_config import AdapterConfig, PromptConfig
from models.pull import resolve_base
from server.settings import default_cache_dir

pytestmark = pytest.mark.vllm


def test_two_processes_share_heads_and_features(deployment: Deployment) -> None:
    llm = deployment.vllm(tensor_parallel_size=2)
    requests = mixed(6)
    check(deployment, requests, deployment.ask(llm, requests))
    llm.llm_engine.engine_core.shutdown()


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
