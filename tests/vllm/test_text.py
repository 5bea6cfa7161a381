"""Adapters of text in vLLM answer as in the native engine, and the base as in bare vLLM."""

from __future__ import annotations

import random

import pytest
from vllm import LLM
from vllm_support import LIMITS, TOLERANCE, Answer, Asked, Deployment, answers

pytestmark = pytest.mark.vllm

KINDS = (None, "poet", "cook", "tuned", "scaled", "low")


def mixed(seed: int, count: int = 12) -> list[Asked]:
    """Requests for the base and all adapters in turn, short and long."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 300) for _ in range(40)]
    return [
        Asked(
            shared[: rng.choice((0, 0, 40))] + [rng.randrange(3, 300) for _ in range(rng.randrange(1, 50))],
            KINDS[i % len(KINDS)],
        )
        for i in range(count)
    ]


def check(
    deployment: Deployment, requests: list[Asked], found: list[Answer], tolerance: float = TOLERANCE
) -> None:
    for request, ours, native in zip(requests, found, deployment.native(requests), strict=True):
        assert ours.tokens == native.tokens, request
        assert ours.logprobs == pytest.approx(native.logprobs, abs=tolerance)
        assert ours.logprobs == pytest.approx(deployment.exact(request, ours.tokens), abs=tolerance)


def test_base_requests_are_exactly_those_of_bare_vllm(deployment: Deployment) -> None:
    requests = [Asked(request.tokens) for request in mixed(1)]
    ours = deployment.ask(deployment.vllm(), requests)
    bare = LLM(str(deployment.path), skip_tokenizer_init=True, max_model_len=256, block_size=32, **LIMITS)
    theirs = answers(bare, [{"prompt_token_ids": r.tokens} for r in requests], requests)
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]
    assert [answer.logprobs for answer in ours] == [answer.logprobs for answer in theirs]


def test_a_mixed_batch_is_as_in_the_native_engine_and_cached_the_second_time(deployment: Deployment) -> None:
    llm = deployment.vllm()
    requests = mixed(2)
    check(deployment, requests, deployment.ask(llm, requests))
    again = deployment.ask(llm, requests)
    check(deployment, requests, again)
    assert sum(answer.cached for answer in again) > 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_chunks_that_cut_the_placeholders_apart_change_nothing(
    deployment: Deployment, prefix_caching: bool
) -> None:
    llm = deployment.vllm(max_num_batched_tokens=20, max_num_seqs=4, enable_prefix_caching=prefix_caching)
    requests = mixed(3)
    for _ in range(2):
        found = deployment.ask(llm, requests)
        check(deployment, requests, found)
    assert (sum(answer.cached for answer in found) > 0) == prefix_caching


def test_preempted_requests_start_again_and_end_alike(deployment: Deployment) -> None:
    llm = deployment.vllm(num_gpu_blocks_override=14)
    requests = [Asked(request.tokens[:20], request.adapter, max_tokens=60) for request in mixed(4)]
    check(deployment, requests, deployment.ask(llm, requests))
    preemptions = {metric.name: metric for metric in llm.get_metrics()}["vllm:num_preemptions"]
    assert preemptions.value > 0  # type: ignore[union-attr]


def test_more_adapters_than_slots_take_turns(deployment: Deployment) -> None:
    llm = deployment.vllm(max_loras=1, max_cpu_loras=1)
    requests = mixed(5)
    check(deployment, requests, deployment.ask(llm, requests))
