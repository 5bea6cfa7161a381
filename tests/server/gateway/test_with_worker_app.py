"""The gateway before the worker's own HTTP routes: both sides of the protocol, with a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

import pytest

from server.errors import InvalidRequest, NotFound
from server.settings import WorkerSettings
from server.worker.app import create_app
from server.worker.messages import (
    AdapterGates,
    Delta,
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    Event,
    GenerateRequest,
    ModelInfo,
    Started,
    Tokenized,
    TokenizeRequest,
)
from tests.server.gateway.scripted import (
    BASE,
    SEEING_ADAPTER,
    STATS,
    TEXT_ADAPTER,
    Launch,
    Stack,
    picture,
    serving,
    story,
)
from tests.server.gateway.test_image_loading import content, data_url


class ScriptedEngine:
    healthy = True
    is_busy = True  # it steps, whoever waits

    def __init__(self) -> None:
        self.held = [BASE, TEXT_ADAPTER, SEEING_ADAPTER]
        self.seen: list[GenerateRequest] = []
        self.aborted = asyncio.Event()
        self.asked = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.seen.append(request)
        if request.sampling.temperature == 2:
            raise InvalidRequest("The prompt is too long.", param="messages", code="context_length_exceeded")
        if request.sampling.min_tokens:
            yield Started(1)
            await asyncio.sleep(1)
        if request.sampling.ignore_eos:
            try:
                yield Started(1)
                while True:
                    yield Delta("x", (1,))
                    await asyncio.sleep(0.01)
            finally:
                self.aborted.set()
        for event in story("one\u2028", "two"):
            yield event

    async def tokenize(self, request: TokenizeRequest) -> Tokenized:
        return Tokenized((1, 2, 3), 2048)

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        return Detokenized("text")

    def models(self) -> list[ModelInfo]:
        return self.held

    async def gates(self, id: str) -> AdapterGates:
        if id == "base":
            raise NotFound("The base has no gates.", param="id")
        return AdapterGates(1, 2, ((0.5, 0.0),), (0,), "V1 text", 10, 1234, f"what {id} is")

    async def load_adapter(
        self, id: str, path: str, options: Mapping[str, str] | None = None, version: int = 1
    ) -> ModelInfo:
        info = replace(TEXT_ADAPTER, id=id, root=path)
        self.options = options
        self.held = [*self.held, info]
        return info

    async def unload_adapter(self, id: str) -> asyncio.Task[None]:
        if id not in [info.id for info in self.held]:
            raise NotFound("no such adapter")
        self.held = [info for info in self.held if info.id != id]
        return asyncio.create_task(asyncio.sleep(0))

    def stats(self) -> EngineStats:
        self.asked += 1
        return replace(STATS, steps=self.asked if self.is_busy else 0)


async def before(launch: Launch, url: str) -> Stack:
    gateway = await launch(worker_urls=(url,), admin_keys=("root",))
    gateway.http.headers["authorization"] = "Bearer root"
    return gateway


async def test_the_two_sides_understand_each_other(launch: Launch) -> None:
    engine = ScriptedEngine()
    async with serving(create_app(engine, WorkerSettings())) as url:
        gateway = await before(launch, url)
        assert (await gateway.http.get("/health/ready")).status_code == 200
        assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == "one\u2028two"
        assert (await gateway.chunks())[-1] == "[DONE]"
        await gateway.chat(model="org/sees", messages=content(data_url(picture())))
        assert engine.seen[-1].images == (picture(),)
        refused = await gateway.chat(temperature=2, stream=True)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        tokens = await gateway.http.post("/tokenize", json={"model": "base", "prompt": "x"})
        assert tokens.json() == {"tokens": [1, 2, 3], "count": 3, "max_model_len": 2048}
        text = await gateway.http.post("/detokenize", json={"model": "base", "tokens": [1]})
        assert text.json() == {"prompt": "text"}
        loaded = await gateway.http.post(
            "/v1/adapters", json={"id": "new", "path": "folder", "options": {"gate": "raw"}}
        )
        assert (loaded.status_code, loaded.json()["root"]) == (201, "folder")
        assert engine.options == {"gate": "raw"}
        assert (await gateway.chat(model="new")).status_code == 200
        assert (await gateway.http.delete("/v1/adapters/new")).status_code == 200
        assert (await gateway.chat(model="new")).status_code == 404
        assert 'llama_adapter:num_requests_running{model="base"' in (await gateway.http.get("/metrics")).text


async def test_a_closed_stream_reaches_the_engine(launch: Launch) -> None:
    engine = ScriptedEngine()
    async with serving(create_app(engine, WorkerSettings())) as url:
        gateway = await before(launch, url)
        body = {
            "model": "base",
            "stream": True,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": "Hi"}],
        }
        async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                break
        await asyncio.wait_for(engine.aborted.wait(), 10)


@pytest.mark.parametrize("is_busy", [True, False])
async def test_who_waits_longer_than_a_worker_may_be_silent(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    """Is answered, if the engine steps meanwhile; one that does not is found out."""
    monkeypatch.setattr("server.worker.streaming._QUIET_SECONDS", 0.05)
    engine = ScriptedEngine()
    engine.is_busy = is_busy
    async with serving(create_app(engine, WorkerSettings())) as url:
        gateway = await launch(worker_urls=(url,), worker_read_seconds=0.5)
        answer = await gateway.chat(min_tokens=1)
        assert answer.status_code == (200 if is_busy else 504)


async def test_gates_are_passed_on(launch: Launch) -> None:
    async with serving(create_app(ScriptedEngine(), WorkerSettings())) as url:
        gateway = await launch(worker_urls=(url,), api_keys=("one",))
        assert (await gateway.http.get("/v1/adapters/alpaca/gates")).status_code == 401
        gateway.http.headers["authorization"] = "Bearer one"  # no admin's
        assert (await gateway.http.get("/v1/adapters/alpaca/gates")).json() == {
            "layers": 1,
            "heads": 2,
            "gates": [[0.5, 0.0]],
            "gated_layers": [0],
            "variant": "V1 text",
            "prompt_len": 10,
            "num_parameters": 1234,
            "description": "what alpaca is",
        }
        for id, code in (("base", "not_found"), ("nobody", "model_not_found")):
            refused = await gateway.http.get(f"/v1/adapters/{id}/gates")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, code)
