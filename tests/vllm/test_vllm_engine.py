"""vLLM behind the worker's `Engine` contract: the events are those of the native engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from support import random_adapter
from tiny_base import adapter_config
from vllm.v1.engine.exceptions import EngineDeadError
from vllm_engines import ask, both, end_of, events_of, scores_of, settings, text_of
from vllm_support import HEAD_DIM, TOLERANCE, low_rank

from models.checkpoints.native import save_adapter
from server.errors import ApiError, InvalidRequest, NotFound, ServerFailure, Timeout, Unavailable
from server.worker.build import build
from server.worker.engine_api import Engine
from server.worker.messages import (
    Delta,
    Event,
    Failed,
    Grammar,
    Scheduled,
    Started,
    TextPrompt,
    TokenPrompt,
    ToolSchema,
)
from server.worker.vllm_engine import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def engines(folder: Path) -> tuple[Engine, Engine]:
    return build(settings(folder, "vllm")), build(settings(folder, "native"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(engines: tuple[Engine, Engine]) -> AsyncGenerator[tuple[Engine, Engine], None]:
    for engine in engines:
        await engine.start()
    yield engines
    for engine in engines:
        await engine.stop()


REQUESTS = {
    "base": ask("Hello, who are you?"),
    "v1": ask("Hello, who are you?", "v1"),
    "v2": ask("Hello, who are you?", "v2"),
    "a picture": ask("What is this?", "sees", "red", logprobs=1),
    "another picture": ask("What is this?", "sees", "navy", logprobs=1),
    "no picture": ask("What is this?", "sees", logprobs=1),
    "released form": ask("What is this?", "7b", "red", logprobs=1),
    "released form without picture": ask("What is this?", "7b", logprobs=1),
    "early fusion": ask("What is this?", "early", "red", logprobs=1),
    "early fusion without picture": ask("What is this?", "early", logprobs=1),
    "scored without picture": ask(TextPrompt("the quick"), "sees", prompt_logprobs=0, max_tokens=1),
    "scored with picture": ask(TextPrompt("the quick"), "sees", "red", prompt_logprobs=0, max_tokens=1),
    "penalised with picture": ask("a a a", "sees", "red", repetition_penalty=1.5),
    "logprobs": ask("It is", "v1", logprobs=3),
    "prompt": ask(TextPrompt("the quick brown fox jumps"), "v1", prompt_logprobs=2, logprobs=0, max_tokens=1),
    "only scored": ask(TextPrompt("the quick brown fox"), "v2", prompt_logprobs=0, max_tokens=0),
    "repetition": ask("a a a a a a", "v1", repetition_penalty=1.5),
    "penalties": ask("a a a a", frequency_penalty=1.0, presence_penalty=0.5, max_tokens=30),
    "bias": ask("a", "v2", logit_bias={5: 100.0}, max_tokens=3),
    "ends": ask("a", "v1", ignore_eos=False, max_tokens=200),
    "least": ask("a", ignore_eos=False, min_tokens=4, logit_bias={2: 30.0}),
    "least, where nothing ends": ask("a", min_tokens=4, logit_bias={2: 30.0}, logprobs=0),
    "scored and penalised": ask(
        TextPrompt("b b"),
        "v1",
        prompt_logprobs=0,
        logprobs=0,
        repetition_penalty=9.0,
        logit_bias={0: 12.0},
        max_tokens=1,
    ),
    "scored with picture and penalised": ask(
        TextPrompt("b b"),
        "sees",
        "red",
        prompt_logprobs=0,
        logprobs=0,
        repetition_penalty=9.0,
        logit_bias={0: 12.0},
        max_tokens=1,
    ),
    "whole context": ask(TokenPrompt(tuple(range(3, 303))), "v1", max_tokens=None),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_events_are_those_of_the_native_engine(started: tuple[Engine, Engine], name: str) -> None:
    ours, native = await both(started, REQUESTS[name])
    assert isinstance(ours[0], Started)
    assert isinstance(ours[1], Scheduled)
    assert ours[0] == native[0]
    assert text_of(ours) == text_of(native)
    assert [token for token, _ in scores_of(ours)] == [token for token, _ in scores_of(native)]
    assert [score for _, score in scores_of(ours)] == pytest.approx(
        [score for _, score in scores_of(native)], abs=TOLERANCE
    )
    assert end_of(ours).finish_reason == end_of(native).finish_reason
    assert replace(end_of(ours).usage, cached_tokens=0) == replace(end_of(native).usage, cached_tokens=0)


async def test_a_stop_string_ends_the_answer_and_vllms_request(started: tuple[Engine, Engine]) -> None:
    text = text_of(await events_of(started[0], ask("Hello", "v1", max_tokens=40)))
    stop = text[5:8]
    ours, native = await both(started, ask("Hello", "v1", max_tokens=400, stop=(stop,)))
    assert text_of(ours) == text_of(native) == text[: text.index(stop)]
    assert end_of(ours).finish_reason == "stop"
    await idle(started[0])


async def test_requests_at_once_are_mixed(started: tuple[Engine, Engine]) -> None:
    kinds = [("tiny", None), ("v1", None), ("v2", None), ("sees", "red"), ("sees", "navy"), ("7b", "red")]
    requests = [ask(f"Number {i}", *kinds[i % len(kinds)], max_tokens=20) for i in range(12)]
    mixed = await asyncio.gather(*(events_of(started[0], request) for request in requests))
    for request, events in zip(requests, mixed, strict=True):
        assert text_of(events) == text_of(await events_of(started[1], request))


async def test_whoever_leaves_frees_the_blocks(started: tuple[Engine, Engine]) -> None:
    engine = started[0]
    async with aclosing(engine.generate(ask("Hello", "v1", max_tokens=400))) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    await idle(engine)
    assert engine.stats().kv_blocks_used == 0


async def idle(engine: Engine) -> None:
    """Return once nothing runs; the engine's process says so after its next step."""
    for _ in range(500):
        if engine.stats().running == 0:
            break
        await asyncio.sleep(0.01)
    assert engine.stats().running == 0


async def test_a_deadline_ends_the_request(started: tuple[Engine, Engine]) -> None:
    request = replace(ask("Hello", max_tokens=400), timeout_seconds=0.2)
    with pytest.raises(Timeout):
        await events_of(started[0], request)


async def test_an_adapter_replaced_under_its_name_answers_at_once_as_itself(
    started: tuple[Engine, Engine], folder: Path
) -> None:
    """The prompt's blocks are cached for the one before; they must not be met."""
    request = ask(TokenPrompt(tuple(range(3, 103))), "poet", max_tokens=20)
    source = folder / "adapters" / "poet"
    answers = []
    for name in ("v1", "other"):
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(folder / "adapters" / name, source)
        for engine in started:
            await engine.load_adapter("poet", "poet")
        ours, native = await both(started, request)
        assert text_of(ours) == text_of(native)
        again, _ = await both(started, request)
        assert text_of(again) == text_of(ours)
        assert end_of(again).usage.cached_tokens > 0
        answers.append(text_of(ours))
    assert answers[0] != answers[1]
    for engine in started:
        await (await engine.unload_adapter("poet"))
        with pytest.raises(NotFound):
            await events_of(engine, request)


async def test_what_does_not_fit_is_refused_in_the_same_words(started: tuple[Engine, Engine]) -> None:
    for request in (
        ask(TokenPrompt(tuple(range(3, 303))), max_tokens=300),
        ask(TokenPrompt((100000,))),
        ask("a", logit_bias={100000: 1.0}),
    ):
        sentences = []
        for engine in started:
            with pytest.raises(ApiError) as refused:
                await events_of(engine, request)
            sentences.append((type(refused.value), refused.value.message))
        assert sentences[0] == sentences[1]


async def test_what_vllm_takes_for_no_request_is_the_clients_mistake(started: tuple[Engine, Engine]) -> None:
    """Nothing that the API lets pass; were there anything, it would not be a server's error."""
    with pytest.raises(InvalidRequest, match="vLLM cannot do this: temperature"):
        await events_of(started[0], ask("a", "v1", temperature=3.0))


async def test_every_seed_repeats_itself(started: tuple[Engine, Engine]) -> None:
    """Also -1, which vLLM takes for none."""
    for seed in (-1, -(2**63), 0, 2**63 - 1):
        request = ask("a", "v1", temperature=1.5, seed=seed, max_tokens=20)
        first, second = [text_of(await events_of(started[0], request)) for _ in range(2)]
        assert first == second


async def test_numbers_that_overflow_end_their_own_request_only(
    started: tuple[Engine, Engine], folder: Path
) -> None:
    wild = random_adapter(adapter_config("v1", HEAD_DIM))
    with torch.no_grad():
        wild.prompt.copy_(wild.prompt.sign() * 3e38)
    save_adapter(wild, folder / "adapters" / "wild")
    for engine in started:
        await engine.load_adapter("wild", "wild")
    requests = [ask("Hello", "wild"), *(ask(f"Hello {i}", "v1", max_tokens=20) for i in range(3))]
    found = await asyncio.gather(*(events_of(started[0], one) for one in requests), return_exceptions=True)
    native = [await events_of(started[1], request) for request in requests]
    assert isinstance(found[0], ServerFailure)
    assert isinstance(native[0][-1], Failed)
    assert found[0].message == native[0][-1].message
    assert [text_of(events) for events in found[1:]] == [text_of(events) for events in native[1:]]
    for engine in started:
        await (await engine.unload_adapter("wild"))


async def test_an_engine_that_died_takes_no_adapter(
    started: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> None:
        raise EngineDeadError

    assert isinstance(started[0], VllmEngine)
    monkeypatch.setattr(started[0]._vllm._llm, "add_lora", die)
    with pytest.raises(Unavailable):
        await started[0].load_adapter("late", "v1")
    assert "late" not in [model.id for model in started[0].models()]


async def test_an_adapter_on_its_way_when_the_engine_dies_is_not_waited_for(
    started: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM itself never answers then."""
    assert isinstance(started[0], VllmEngine)
    vllm = started[0]._vllm._llm

    async def die(*_: object) -> None:
        monkeypatch.setattr(vllm.engine_core.resources, "engine_dead", True)
        await asyncio.Event().wait()

    monkeypatch.setattr(vllm, "add_lora", die)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(started[0].load_adapter("late", "v1"), 10)
    assert "late" not in [model.id for model in started[0].models()]


async def test_what_vllm_does_not_take_is_left_on_no_machine(
    started: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise ValueError("no room for it")

    async def call(method: str, args: tuple[object, ...]) -> None:
        called.append(method)

    called: list[str] = []
    assert isinstance(started[0], VllmEngine)
    vllm = started[0]._vllm
    monkeypatch.setattr(vllm, "_shared", True)
    monkeypatch.setattr(vllm._llm, "collective_rpc", call)
    monkeypatch.setattr(vllm._llm, "add_lora", refuse)
    with pytest.raises(ValueError, match="no room for it"):
        await started[0].load_adapter("late", "v1")
    assert called == ["hold_adapter", "drop_adapter"]


async def test_an_adapter_that_vllm_cannot_carry_is_refused(
    started: tuple[Engine, Engine], folder: Path
) -> None:
    for id, config, reason in (
        ("low", low_rank(), "it has LoRA terms, for which this engine made no room"),
        ("head", adapter_config("v1", HEAD_DIM).model_copy(update={"head": True}), "an output head"),
    ):
        save_adapter(random_adapter(config), folder / "adapters" / id)
        with pytest.raises(InvalidRequest, match=reason):
            await started[0].load_adapter(id, id)
        assert id not in [model.id for model in started[0].models()]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOL = ToolSchema("look_up", {"type": "object", "properties": {"q": {"type": "string", "maxLength": 4}}})


@pytest.mark.parametrize(
    "grammar", [Grammar("json_schema", SCHEMA), Grammar("tool_calls", tools=(TOOL,), parallel_calls=False)]
)
async def test_a_grammar_is_kept_to_beside_requests_without_one(
    started: tuple[Engine, Engine], grammar: Grammar
) -> None:
    kinds = ("v1", "tiny", "sees")
    constrained = [
        ask("An answer in JSON", kind, max_tokens=60, ignore_eos=False, grammar=grammar, logprobs=0)
        for kind in kinds
    ]
    free = [ask("An answer", kind, max_tokens=25) for kind in kinds]
    mixed = await asyncio.gather(*(events_of(started[0], request) for request in (*constrained, *free)))
    for request, events in zip((*constrained, *free), mixed, strict=True):
        native = await events_of(started[1], request)
        assert shown(events) == shown(native)
        assert end_of(events).finish_reason == end_of(native).finish_reason


def shown(events: list[Event]) -> tuple[str, list[object]]:
    calls = [call for event in events if isinstance(event, Delta) for call in event.tool_calls]
    return text_of(events), [(c.index, c.name) for c in calls if c.name] + [
        "".join(c.arguments for c in calls)
    ]


async def test_a_grammar_that_cannot_be_followed_is_refused(started: tuple[Engine, Engine]) -> None:
    request = ask("a", ignore_eos=False, grammar=Grammar("json_schema", {"not": {"type": "string"}}))
    with pytest.raises(InvalidRequest, match="response_format"):
        await events_of(started[0], request)
