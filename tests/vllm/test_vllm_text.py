"""Adapters of text in vLLM answer as in the native engine, and the base as in bare vLLM."""

from __future__ import annotations

import pytest
from vllm import LLM
from vllm_support import LIMITS, Asked, Deployment, answers, check, mixed

pytestmark = pytest.mark.vllm


def test_base_requests_are_exactly_those_of_bare_vllm_and_mixed_ones_as_in_the_native_engine(
    deployment: Deployment,
) -> None:
    """One test, for an engine that ends takes vLLM's process groups along."""
    for_base = [Asked(request.tokens) for request in mixed(1, count=6)]  # whole in one step: the same sums
    llm = deployment.vllm()
    ours = deployment.ask(llm, for_base)
    requests = mixed(2)
    check(deployment, requests, deployment.ask(llm, requests))
    again = deployment.ask(llm, requests)
    check(deployment, requests, again)
    assert sum(answer.cached for answer in again) > 0

    bare = LLM(str(deployment.path), skip_tokenizer_init=True, max_model_len=256, block_size=32, **LIMITS)
    theirs = answers(bare, [{"type": "token", "prompt_token_ids": r.tokens} for r in for_base], for_base)
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]
    assert [answer.logprobs for answer in ours] == [answer.logprobs for answer in theirs]


def test_chunks_that_cut_the_placeholders_apart_change_nothing(deployment: Deployment) -> None:
    llm = deployment.vllm(max_num_batched_tokens=20, max_num_seqs=4)
    requests = mixed(3)
    for _ in range(2):
        found = deployment.ask(llm, requests)
        check(deployment, requests, found)
    assert sum(answer.cached for answer in found) > 0


def test_preempted_requests_start_again_and_end_alike(deployment: Deployment) -> None:
    llm = deployment.vllm(num_gpu_blocks_override=14)
    requests = [Asked(request.tokens[:20], request.adapter, max_tokens=60) for request in mixed(4)]
    check(deployment, requests, deployment.ask(llm, requests))
    preemptions = {metric.name: metric for metric in llm.get_metrics()}["vllm:num_preemptions"]
    assert preemptions.value > 0  # type: ignore[union-attr]


def test_more_adapters_than_slots_take_turns_without_a_prefix_cache(deployment: Deployment) -> None:
    llm = deployment.vllm(max_loras=1, max_cpu_loras=1, enable_prefix_caching=False)
    requests = mixed(5)
    found = deployment.ask(llm, requests)
    check(deployment, requests, found)
    assert not any(answer.cached for answer in found)
