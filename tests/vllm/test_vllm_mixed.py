"""The base, two text adapters and two images of a third one in one batch, in whatever way vLLM runs it."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_base import adapter_config, write_tiny_base
from vllm.config import CompilationMode
from vllm_support import HEAD_DIM, Asked, Deployment, check

from models.vllm_plugin.carriers import Room

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    folder = tmp_path_factory.mktemp("mixed")
    write_tiny_base(folder / "base", head_dim=HEAD_DIM)
    deployment = Deployment(folder / "base", folder / "exports", Room(vectors=True, images=True))
    for seed, (name, kind) in enumerate((("poet", "v1"), ("tuned", "v2"), ("sees", "sight"))):
        deployment.add(name, adapter_config(kind, HEAD_DIM), seed)
    return deployment


def requests(length: int, max_tokens: int = 12) -> list[Asked]:
    """All with the same text, so that nothing but the adapter and the image tells their blocks apart."""
    text = [3 + 7 * i % 290 for i in range(length)]
    kinds = ((None, None), ("poet", None), ("tuned", None), ("sees", None), ("sees", 1), ("sees", 2))
    return [Asked(text, adapter, max_tokens, image) for adapter, image in kinds]


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({}, True),
        ({"enable_prefix_caching": False}, False),
        ({"max_num_batched_tokens": 20}, True),
        ({"max_loras": 1, "max_cpu_loras": 1}, True),
    ],
    ids=["whole prompts, cached", "whole prompts", "chunks, cached", "one slot, cached"],
)
def test_each_gets_its_own_answer(deployment: Deployment, changes: dict[str, Any], cached: bool) -> None:
    llm = deployment.vllm(**changes)
    asked = requests(75)
    check(deployment, asked, deployment.ask(llm, asked))
    again = deployment.ask(llm, asked)
    check(deployment, asked, again)
    assert [answer.cached for answer in again] == [64 if cached else 0] * len(asked)


def test_two_attentions_a_layer_as_on_other_platforms_answer_alike(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.vllm_plugin.layers.reads_blocks", lambda *_: False)
    llm = deployment.vllm(max_num_batched_tokens=20)
    asked = requests(75)
    for _ in range(2):
        check(deployment, asked, deployment.ask(llm, asked))


def test_preempted_ones_start_again_and_end_alike(deployment: Deployment) -> None:
    llm = deployment.vllm(num_gpu_blocks_override=14)
    asked = requests(20, max_tokens=60)
    check(deployment, asked, deployment.ask(llm, asked))
    preemptions = {metric.name: metric for metric in llm.get_metrics()}["vllm:num_preemptions"]
    assert preemptions.value > 0  # type: ignore[union-attr]


def test_compiled(deployment: Deployment) -> None:
    """Whole, without breaks: vLLM traces once, and takes no graph with a break in it."""
    llm = deployment.vllm(enforce_eager=False)
    assert llm.llm_engine.vllm_config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    llm.apply_model(must_be_compiled)
    asked = requests(75)
    for _ in range(2):
        check(deployment, asked, deployment.ask(llm, asked))
    for_base = asked[:1] * 3  # then there is no prompt to attend to
    check(deployment, for_base, deployment.ask(llm, for_base))


def must_be_compiled(model: Any) -> None:
    """Just now, or before, and kept on disk."""
    assert model.model.compiled or model.model.aot_compiled_fn is not None
