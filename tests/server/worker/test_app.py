"""The worker's routes over a scripted engine, through a real socket: what HTTP adds is tested here."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from pydantic import TypeAdapter

from server.errors import ApiError, InvalidRequest, RateLimited, Unavailable, model_not_found
from server.serving import Drain, StartupError, bind, serve_app
from server.settings import WorkerSettings
from server.worker.app import create_app
from server.worker.messages import (
    EVENT,
    MODELS,
    AdapterGates,
    Delta,
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    Started,
    TextPrompt,
    Tokenized,
    TokenizeRequest,
    Usage,
    generate_body,
    read_generate_body,
)

GATES = AdapterGates(2, 3, ((0, 0, 0), (0.5, 0.25, 0)), (1,), "V1 text", 10, 1234, "a poet")


@dataclass
class ScriptedEngine:
    """Yields `script`: events, errors to raise, or an asyncio.Event to wait for."""

    script: list[Event | Exception | asyncio.Event] = field(default_factory=list)
    healthy: bool = True
    called: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerateRequest] = field(default_factory=list)
    stopped: bool = False
    steps: Iterator[int] = field(default_factory=lambda: itertools.repeat(7))

    async def start(self) -> None:
        for step in self.script:
            if isinstance(step, MemoryError):
                raise step

    async def stop(self) -> None:
        self.stopped = True

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.called.set()
        try:
            for step in self.script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.closed.set()

    async def tokenize(self, request: TokenizeRequest) -> Tokenized:
        if not isinstance(request.prompt, TextPrompt):
            raise InvalidRequest("only text", param="prompt")
        return Tokenized(tuple(request.prompt.text.encode()), max_model_len=64)

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        return Detokenized(bytes(request.token_ids).decode())

    def models(self) -> list[ModelInfo]:
        return [ModelInfo("base", "base", "base", None, created=1, max_model_len=64)]

    async def gates(self, id: str) -> AdapterGates:
        if id != "poet":
            raise model_not_found(id)
        return GATES

    async def load_adapter(
        self, id: str, path: str, options: Mapping[str, str] | None = None, version: int = 1
    ) -> ModelInfo:
        return ModelInfo(id, "adapter", path, "base", created=2, max_model_len=64)

    async def unload_adapter(self, id: str) -> asyncio.Task[None]:
        raise model_not_found(id)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=2,
            waiting=3,
            kv_blocks_total=8,
            kv_blocks_used=2,
            prefix_cache_queries=40,
            prefix_cache_hits=16,
            preemptions=1,
            adapters_loaded=4,
            adapters_hot=2,
            prompt_slots_used=5,
            steps=next(self.steps),
        )


@dataclass
class Served:
    client: httpx.AsyncClient
    drain: Drain
    task: asyncio.Task[None]


@asynccontextmanager
async def served(engine: ScriptedEngine, folder: Path, **settings: Any) -> AsyncIterator[Served]:
    """The app on a Unix socket, as the gateway meets it; drained and gone afterwards."""
    drain = Drain()
    path = folder / "w.sock"
    configured = WorkerSettings(drain_seconds=settings.pop("drain_seconds", 5.0), **settings)
    app = create_app(engine, configured, drain)
    task = asyncio.create_task(serve_app(app, bind("", 0, path), drain, configured.drain_seconds))
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=10) as client:
        yield Served(client, drain, task)
        drain.ask()
        drain.ask()
    await asyncio.wait_for(task, 10)
    assert engine.stopped


def body(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"request_id": "r", "model": "base", "prompt": TextPrompt("hi"), **changes}
    return b"".join(generate_body(GenerateRequest(**fields)))


async def lines(response: httpx.Response) -> list[Event]:
    return [EVENT.validate_json(line) async for line in response.aiter_lines()]


FINISHED = Finished("stop", Usage(prompt_tokens=3, completion_tokens=4))
STORY: list[Event | Exception | asyncio.Event] = [Started(3), Delta("a", (1,)), Delta("b", (2, 3)), FINISHED]


async def test_generate_streams_every_event_as_a_line(tmp_path: Path) -> None:
    engine = ScriptedEngine(STORY)
    async with served(engine, tmp_path) as worker:
        sampling = SamplingParams(max_tokens=4, logit_bias={7: -1.0}, stop=("x",))
        response = await worker.client.post("/generate", content=body(sampling=sampling, images=(b"\xff\0",)))
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        assert await lines(response) == STORY
    assert engine.requests[0].sampling == sampling
    assert engine.requests[0].images == (b"\xff\0",)


async def test_events_leave_as_they_come(tmp_path: Path) -> None:
    gate = asyncio.Event()
    engine = ScriptedEngine([Started(3), Delta("a"), gate, FINISHED])
    async with (
        served(engine, tmp_path) as worker,
        worker.client.stream("POST", "/generate", content=body()) as response,
    ):
        received = response.aiter_lines()
        assert EVENT.validate_json(await anext(received)) == Started(3)
        assert EVENT.validate_json(await anext(received)) == Delta("a")
        gate.set()
        assert EVENT.validate_json(await anext(received)) == FINISHED


@pytest.mark.parametrize("moves", [True, False])
async def test_empty_lines_come_while_nothing_else_does_and_the_engine_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    """A request that waits is told from one whose engine hangs, and is given up by nobody."""
    monkeypatch.setattr("server.worker.streaming._QUIET_SECONDS", 0.02)
    prepared, gate = asyncio.Event(), asyncio.Event()
    engine = ScriptedEngine([prepared, Started(3), gate, FINISHED])
    if moves:
        engine.steps = itertools.count()
    asyncio.get_running_loop().call_later(0.1, prepared.set)
    async with (
        served(engine, tmp_path) as worker,
        worker.client.stream("POST", "/generate", content=body()) as response,
    ):
        received = response.aiter_lines()
        assert EVENT.validate_json(await anext(received)) == Started(3)
        if moves:
            assert [await anext(received) for _ in range(2)] == ["", ""]
        else:
            await asyncio.sleep(0.1)
        gate.set()
        rest = [line async for line in received]
        assert EVENT.validate_json(rest.pop()) == FINISHED
        assert set(rest) <= ({""} if moves else set())


async def test_no_empty_line_comes_before_the_first_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a 200, and the request may be refused yet."""
    monkeypatch.setattr("server.worker.streaming._QUIET_SECONDS", 0.01)
    gate = asyncio.Event()
    engine = ScriptedEngine([gate, InvalidRequest("too long")], steps=itertools.count())
    async with served(engine, tmp_path) as worker:
        asked = asyncio.create_task(worker.client.post("/generate", content=body()))
        await engine.called.wait()
        await asyncio.sleep(0.05)
        gate.set()
        assert (await asked).status_code == 400


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (InvalidRequest("too long", param="messages", code="context_length_exceeded"), {}),
        (model_not_found("nobody"), {}),
        (RateLimited("full", retry_after=2), {"retry-after": "2"}),
    ],
)
async def test_error_before_the_first_event_is_a_status(
    tmp_path: Path, error: ApiError, headers: dict[str, str]
) -> None:
    async with served(ScriptedEngine([error]), tmp_path) as worker:
        response = await worker.client.post("/generate", content=body())
        assert response.status_code == error.status
        assert response.json() == error.body()
        assert headers.items() <= dict(response.headers).items()


async def test_error_after_the_first_event_is_a_failed_line(tmp_path: Path) -> None:
    engine = ScriptedEngine([Started(3), Delta("a"), Unavailable("gone")])
    async with served(engine, tmp_path) as worker:
        response = await worker.client.post("/generate", content=body())
        assert response.status_code == 200
        assert (await lines(response))[-1] == Failed(503, "gone", "server_error", "unavailable")


async def test_a_bug_tells_nothing_of_its_insides(tmp_path: Path) -> None:
    for script in ([ZeroDivisionError("secret")], [Started(1), ZeroDivisionError("secret")], []):
        async with served(ScriptedEngine(list(script)), tmp_path) as worker:
            response = await worker.client.post("/generate", content=body())
            assert "secret" not in response.text
            assert response.status_code == (200 if len(script) == 2 else 500)
            assert "internal_error" in response.text


@pytest.mark.parametrize("events_before", [[], [Started(3)], [Started(3), Delta("a")]])
async def test_closed_connection_closes_the_generator(tmp_path: Path, events_before: list[Event]) -> None:
    engine = ScriptedEngine([*events_before, asyncio.Event()])
    async with served(engine, tmp_path) as worker:

        async def read_for_ever() -> None:
            async with worker.client.stream("POST", "/generate", content=body()) as response:
                await response.aread()

        reader = asyncio.create_task(read_for_ever())
        await asyncio.wait_for(engine.called.wait(), 5)
        assert not engine.closed.is_set()
        reader.cancel()
        await asyncio.wait_for(engine.closed.wait(), 5)


async def test_a_client_may_leave_in_the_middle_of_its_body(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(ScriptedEngine(STORY), tmp_path) as worker:
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "w.sock"))
        writer.write(b"POST /generate HTTP/1.1\r\nHost: w\r\nContent-Length: 1000\r\n\r\n" + body()[:50])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await worker.client.post("/generate", content=body())).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"request_id": "r", "model": "m"}', "prompt"),
        (b'{"request_id": "r", "model": 1, "prompt": {"type": "text", "text": "x"}}', "model"),
        (b'{"request_id": "r", "model": "m", "prompt": {"type": "song"}}', "prompt"),
        (b'{"request_id": "r", "model": "m", "prompt": {"type": "text", "text": "x"}, "more": 1}', "more"),
        (b'{"request_id": "\\ud800", "model": "m", "prompt": {"type": "text", "text": "x"}}', None),
        (b"\xff\xfe", None),
        (body() + b"5\nhell", None),
        (body() + b"5\nhello!", None),
        (body() + b"-1\nhello", None),
        (body() + b"hello", None),
        (body() + b"\n", None),
        (body() + b"9" * 5000 + b"\nhello", None),
    ],
)
async def test_bad_bodies_are_400(tmp_path: Path, content: bytes, param: str | None) -> None:
    async with served(ScriptedEngine(STORY), tmp_path) as worker:
        response = await worker.client.post("/generate", content=content)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


@hypothesis(deadline=None, max_examples=50)
@given(
    st.text(), st.lists(st.binary(max_size=40) | st.binary(min_size=1).map(lambda b: b * 9001), max_size=3)
)
def test_bodies_are_read_as_they_were_written(text: str, images: list[bytes]) -> None:
    request = GenerateRequest("r", "m", TextPrompt(text), images=tuple(images), timeout_seconds=1.5)
    assert read_generate_body(b"".join(generate_body(request))) == request


@hypothesis(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_any_body_is_read_or_refused(rest: bytes) -> None:
    for raw in (rest, body() + rest):
        with suppress(ValueError):
            assert b"".join(read_generate_body(raw).images) in raw


async def test_body_over_the_limit_is_413(tmp_path: Path) -> None:
    async with served(ScriptedEngine(STORY), tmp_path, max_message_bytes=500) as worker:
        assert (await worker.client.post("/generate", content=body())).status_code == 200
        response = await worker.client.post("/generate", content=body(images=(bytes(1000),)))
        assert response.status_code == 413
        assert "max_message_bytes" in response.json()["error"]["message"]


async def test_unknown_routes_and_methods_have_openai_errors(tmp_path: Path) -> None:
    async with served(ScriptedEngine(), tmp_path) as worker:
        for method, path, status in (("GET", "/nowhere", 404), ("GET", "/generate", 405)):
            response = await worker.client.request(method, path)
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_tokenize_adapters_and_models(tmp_path: Path) -> None:
    async with served(ScriptedEngine(), tmp_path) as worker:
        post = worker.client.post
        prompt = {"type": "text", "text": "hi"}
        tokenized = await post("/tokenize", json={"model": "base", "prompt": prompt})
        assert tokenized.json() == {"token_ids": [104, 105], "max_model_len": 64}
        assert (
            await post("/tokenize", json={"model": "base", "prompt": {**prompt, "text": 3}})
        ).status_code == 400
        detokenized = await post("/detokenize", json={"model": "base", "token_ids": [104, 105]})
        assert detokenized.json() == {"text": "hi"}
        assert MODELS.validate_json((await worker.client.get("/models")).content) == ScriptedEngine().models()
        gates = await worker.client.get("/models/poet/gates")
        assert TypeAdapter(AdapterGates).validate_json(gates.content) == GATES
        assert (await worker.client.get("/models/base/gates")).json() == model_not_found("base").body()
        assert (await post("/adapters", json={"id": "a", "path": "p"})).json()["parent"] == "base"
        assert (await worker.client.delete("/adapters/a")).json() == model_not_found("a").body()


async def test_metrics_tell_what_the_engine_and_the_requests_did(tmp_path: Path) -> None:
    async with served(ScriptedEngine(STORY), tmp_path) as worker:
        await worker.client.post("/generate", content=body(model="poet"))
        scraped = (await worker.client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in scraped.splitlines() if not line.startswith("#"))
    expected = {
        'num_requests_running{model="base"}': 2,
        'num_requests_waiting{model="base"}': 3,
        'kv_cache_usage_perc{model="base"}': 0.25,
        'prefix_cache_queries_total{model="base"}': 40,
        'prefix_cache_hits_total{model="base"}': 16,
        'num_preemptions_total{model="base"}': 1,
        'prompt_tokens_total{model="poet"}': 3,
        'generation_tokens_total{model="poet"}': 4,
        'request_success_total{finished_reason="stop",model="poet"}': 1,
        'time_to_first_token_seconds_count{model="poet"}': 1,
        'inter_token_latency_seconds_count{model="poet"}': 1,
        'e2e_request_latency_seconds_count{model="poet"}': 1,
    }
    assert {name: float(values["llama_adapter:" + name]) for name in expected} == expected


async def test_refused_models_become_no_label(tmp_path: Path) -> None:
    async with served(ScriptedEngine([model_not_found("evil")]), tmp_path) as worker:
        await worker.client.post("/generate", content=body(model="evil"))
        assert "evil" not in (await worker.client.get("/metrics")).text


async def test_dead_engine_fails_liveness_and_readiness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.app._LIFE_SECONDS", 60)
    engine = ScriptedEngine(STORY)
    async with served(engine, tmp_path) as worker:
        assert (await worker.client.get("/health/live")).status_code == 200
        assert (await worker.client.get("/health/ready")).status_code == 200
        engine.healthy = False
        assert (await worker.client.get("/health/live")).status_code == 503
        assert (await worker.client.get("/health/ready")).status_code == 503
        assert (await worker.client.post("/generate", content=body())).status_code == 503
        assert (await worker.client.get("/stats")).json()["ready"] is False


async def test_a_worker_ends_with_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine said last still arrives."""
    monkeypatch.setattr("server.worker.app._LIFE_SECONDS", 0.05)
    last_words = asyncio.Event()
    engine = ScriptedEngine([Started(3), last_words, FINISHED])
    async with served(engine, tmp_path) as worker:
        running = asyncio.create_task(worker.client.post("/generate", content=body()))
        await asyncio.wait_for(engine.called.wait(), 5)
        assert not worker.drain.failed
        engine.healthy = False
        await asyncio.wait_for(worker.drain.asked(), 10)
        assert worker.drain.failed
        last_words.set()
        assert await lines(await running) == [Started(3), FINISHED]
        await asyncio.wait_for(worker.task, 10)
    assert engine.stopped


async def test_drain_finishes_what_runs_and_admits_nothing_new(tmp_path: Path) -> None:
    gate = asyncio.Event()
    engine = ScriptedEngine([Started(3), gate, FINISHED])
    async with served(engine, tmp_path) as worker:
        running = asyncio.create_task(worker.client.post("/generate", content=body()))
        await asyncio.wait_for(engine.called.wait(), 5)
        worker.drain.ask()
        refused = await worker.client.post("/generate", content=body())
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert (await worker.client.get("/health/ready")).status_code == 503
        assert (await worker.client.get("/health/live")).status_code == 200
        assert (await worker.client.get("/stats")).json()["draining"] is True
        gate.set()
        assert await lines(await running) == [Started(3), FINISHED]
        await asyncio.wait_for(worker.task, 5)


async def test_drain_past_its_deadline_ends_in_a_failed_line(tmp_path: Path) -> None:
    engine = ScriptedEngine([Started(3), asyncio.Event()])
    async with served(engine, tmp_path, drain_seconds=0.2) as worker:
        async with worker.client.stream("POST", "/generate", content=body()) as response:
            received = response.aiter_lines()
            assert EVENT.validate_json(await anext(received)) == Started(3)
            worker.drain.ask()
            [last] = [EVENT.validate_json(line) async for line in received]
        assert isinstance(last, Failed)
        assert last.status == 503
        assert engine.closed.is_set()
        await asyncio.wait_for(worker.task, 5)


async def test_failed_start_is_a_startup_error(tmp_path: Path) -> None:
    drain = Drain()
    app = create_app(ScriptedEngine([MemoryError("no room")]), WorkerSettings(), drain)
    with pytest.raises(StartupError):
        await serve_app(app, bind("", 0, tmp_path / "w.sock"), drain, 1)


def test_bind_says_why_it_cannot(tmp_path: Path) -> None:
    path = tmp_path / "taken.sock"
    with bind("", 0, path), pytest.raises(StartupError, match="another process"):
        bind("", 0, path)
    bind("", 0, path).close()  # left behind by a dead process: taken over
    with pytest.raises(StartupError, match="No such file"):
        bind("", 0, tmp_path / "missing" / "w.sock")
    with bind("127.0.0.1", 0) as sock, pytest.raises(StartupError, match="in use"):
        bind("127.0.0.1", sock.getsockname()[1])


def test_event_lines_are_json() -> None:
    assert json.loads(EVENT.dump_json(Failed(400, "m", "t"))) == {
        "status": 400,
        "message": "m",
        "error_type": "t",
        "code": None,
        "param": None,
        "type": "failed",
    }
