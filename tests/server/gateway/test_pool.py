"""Which worker gets a request, and what happens when it fails."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from dataclasses import replace

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import InvalidRequest, NotFound, RateLimited, ServerFailure, Unavailable, model_not_found
from server.gateway.clients.pool import Worker
from server.gateway.clients.workers import _lines
from server.worker.messages import Delta, EngineStats, Event, ModelInfo, Scheduled, Started
from tests.server.gateway.scripted import (
    BASE,
    STATS,
    TEXT_ADAPTER,
    Died,
    Launch,
    ScriptedWorker,
    serving,
    story,
    until,
    with_load,
)


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_the_least_loaded_worker_is_chosen(launch: Launch) -> None:
    busy = ScriptedWorker(stats=with_load(STATS, 9))
    idle = ScriptedWorker(stats=with_load(STATS, 0))
    gateway = await launch(busy, idle)
    for _ in range(3):
        await gateway.chat()
    assert (len(busy.requests), len(idle.requests)) == (0, 3)


async def test_requests_under_way_count_at_once(launch: Launch) -> None:
    go_on = asyncio.Event()

    async def script(_: object):
        yield Started(1)
        await go_on.wait()
        raise Died

    workers = [ScriptedWorker(stats=with_load(STATS, 0), script=script) for _ in range(2)]
    gateway = await launch(*workers, worker_poll_seconds=60)
    running = [asyncio.create_task(gateway.chat()) for _ in range(6)]
    await until(lambda: sum(len(worker.requests) for worker in workers) == 6)
    go_on.set()
    await asyncio.gather(*running)
    assert max(len(worker.requests) for worker in workers) <= 4  # 1.25 times the mean, in whole requests


async def test_a_poll_counts_our_own_requests_once() -> None:
    """The worker reports them too, beside those that others have sent it."""

    class Client:
        url = "http://worker"

        async def ready(self, _: float) -> bool:
            return True

        async def models(self, _: float) -> list[ModelInfo]:
            return [BASE]

        async def stats(self, _: float) -> EngineStats:
            return replace(STATS, running=4, waiting=1)

    worker = Worker(Client(), "worker")  # type: ignore[arg-type]
    with worker.counted(), worker.counted():
        await worker.poll(1.0)
        assert worker.load == 5
    assert worker.load == 3


async def test_requests_that_begin_alike_meet(launch: Launch) -> None:
    workers = [ScriptedWorker(stats=with_load(STATS, 0)) for _ in range(3)]
    gateway = await launch(*workers, worker_poll_seconds=60)
    for topic in range(6):
        begun = [{"role": "user", "content": f"topic {topic}"}]
        longer = [*begun, {"role": "assistant", "content": "so"}, {"role": "user", "content": "and?"}]
        before = [len(worker.requests) for worker in workers]
        for messages in (begun, longer, begun):
            assert (await gateway.chat(messages=messages)).status_code == 200
        grown = [len(worker.requests) - count for worker, count in zip(workers, before, strict=True)]
        assert sorted(grown) == [0, 0, 3]


async def test_only_a_holder_of_the_model_is_asked(launch: Launch) -> None:
    without = ScriptedWorker(models=[BASE], stats=with_load(STATS, 0))
    holder = ScriptedWorker(models=[BASE, TEXT_ADAPTER], stats=with_load(STATS, 50))
    gateway = await launch(without, holder)
    assert (await gateway.chat(model="alpaca")).status_code == 200
    assert (len(without.requests), len(holder.requests)) == (0, 1)


async def test_a_worker_that_fails_before_its_first_event_is_replaced(launch: Launch) -> None:
    for refusal in (
        Unavailable("draining"),
        RateLimited("full"),
        ServerFailure("broken"),
        model_not_found("base"),
    ):
        failing = ScriptedWorker(stats=with_load(STATS, 0), refusal=refusal)
        healthy = ScriptedWorker(stats=with_load(STATS, 50))
        gateway = await launch(failing, healthy)
        assert (await gateway.chat()).status_code == 200
        assert (await gateway.chunks())[-1] == "[DONE]"
        assert failing.requests
        assert healthy.requests


async def test_a_callers_mistake_is_not_tried_elsewhere(launch: Launch) -> None:
    first = ScriptedWorker(stats=with_load(STATS, 0), refusal=InvalidRequest("too long", param="messages"))
    second = ScriptedWorker(stats=with_load(STATS, 50))
    gateway = await launch(first, second)
    response = await gateway.chat()
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert second.requests == []


async def test_a_worker_that_dies_before_its_first_event_is_replaced(launch: Launch) -> None:
    async def script(_: object):
        raise Died
        yield Started(1)

    dying = ScriptedWorker(stats=with_load(STATS, 0), script=script)
    healthy = ScriptedWorker(stats=with_load(STATS, 50))
    gateway = await launch(dying, healthy)
    assert (await gateway.chat()).status_code == 200
    assert len(dying.requests) == 1


async def test_a_worker_that_dies_before_its_first_token_is_replaced(launch: Launch) -> None:
    async def script(_: object):
        yield Started(5)
        yield Scheduled(0.1)
        raise Died

    dying = ScriptedWorker(stats=with_load(STATS, 0), script=script)
    healthy = ScriptedWorker(stats=with_load(STATS, 50))
    gateway = await launch(dying, healthy)
    answer = (await gateway.chat()).json()
    assert answer["choices"][0]["message"]["content"] == "Hello world"
    assert answer["usage"]["prompt_tokens"] == 5
    assert len(dying.requests) == 1


async def test_a_stream_that_moves_before_its_first_token_begins_once(launch: Launch) -> None:
    async def script(_: object):
        yield Started(5)
        raise Died

    dying = ScriptedWorker(stats=with_load(STATS, 0), script=script)
    gateway = await launch(dying, ScriptedWorker(stats=with_load(STATS, 50)))
    *chunks, done = await gateway.chunks()
    assert done == "[DONE]"
    assert len(dying.requests) == 1
    assert [c["choices"][0]["delta"].get("role") for c in chunks].count("assistant") == 1


async def die(_: object) -> AsyncGenerator[Event, None]:
    yield Started(5)
    raise Died


async def test_what_workers_die_of_is_not_sent_to_all_of_them(launch: Launch) -> None:
    refusing = ScriptedWorker(stats=with_load(STATS, 0), refusal=Unavailable("draining"))
    dying = [ScriptedWorker(stats=with_load(STATS, 50 * i), script=die) for i in range(1, 4)]
    gateway = await launch(refusing, *dying, worker_poll_seconds=60)
    response = await gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "given_up")
    assert "retry-after" not in response.headers
    assert sum(len(worker.requests) for worker in dying) == 2


async def test_a_client_does_not_repeat_what_workers_die_of(launch: Launch) -> None:
    dying = [ScriptedWorker(script=die) for _ in range(4)]
    gateway = await launch(*dying, worker_poll_seconds=60)
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=2) as api:
        with pytest.raises(openai.InternalServerError, match="do not repeat it"):
            await api.completions.create(model="base", prompt="Hi")
    assert sum(len(worker.requests) for worker in dying) == 2


async def test_who_cannot_be_connected_to_did_not_fail_on_a_request(launch: Launch) -> None:
    gone = [ScriptedWorker(stats=with_load(STATS, 0)) for _ in range(2)]
    last = ScriptedWorker(stats=with_load(STATS, 500))
    async with serving(last.app) as there:
        async with serving(gone[0].app) as one, serving(gone[1].app) as other:
            gateway = await launch(worker_urls=(one, other, there), worker_poll_seconds=60)
        assert (await gateway.chat()).status_code == 200
    assert [len(worker.requests) for worker in (*gone, last)] == [0, 0, 1]


async def test_what_waits_for_a_worker_that_went_silent_moves(launch: Launch) -> None:
    async def script(_: object):
        yield Started(5)
        await asyncio.Event().wait()

    silent = ScriptedWorker(stats=with_load(STATS, 0), script=script)
    healthy = ScriptedWorker(stats=with_load(STATS, 50))
    gateway = await launch(silent, healthy)
    asked = asyncio.create_task(gateway.chat())
    await until(lambda: bool(silent.requests))
    silent.is_silent = True
    assert (await asked).status_code == 200
    assert len(healthy.requests) == 1
    assert silent.polls >= 4  # one answered, three not


async def test_a_poll_that_is_not_answered_refuses_nobody(launch: Launch) -> None:
    busy = ScriptedWorker(stats=with_load(STATS, 0))
    gateway = await launch(busy)
    busy.is_silent = True
    polls = busy.polls
    await until(lambda: busy.polls >= polls + 2, seconds=5)  # so the first is over
    assert (await gateway.chat()).status_code == 200
    await until(lambda: busy.polls >= polls + 4, seconds=5)
    assert (await gateway.chat()).status_code == 503
    busy.is_silent = False
    await until(lambda: busy.polls >= polls + 6, seconds=5)
    assert (await gateway.chat()).status_code == 200


async def test_who_answers_polls_is_asked_first(launch: Launch) -> None:
    silent, busy = (ScriptedWorker(stats=with_load(STATS, load)) for load in (0, 9))
    gateway = await launch(silent, busy)
    silent.is_silent = True
    polls = silent.polls
    await until(lambda: silent.polls >= polls + 2, seconds=5)
    assert (await gateway.chat()).status_code == 200
    assert (len(silent.requests), len(busy.requests)) == (0, 1)


@pytest.mark.parametrize("others", [[], [BASE]], ids=["alone", "beside one without the model"])
async def test_nobody_is_given_up_where_nobody_does_better(launch: Launch, others: list[ModelInfo]) -> None:
    go_on = asyncio.Event()

    async def script(_: object):
        yield Started(5)
        await go_on.wait()
        for event in story("late")[1:]:
            yield event

    holder = ScriptedWorker(script=script)
    gateway = await launch(holder, *([ScriptedWorker(models=others)] if others else []))
    asked = asyncio.create_task(gateway.chat(model="alpaca"))
    await until(lambda: bool(holder.requests))
    holder.is_silent = True
    polls = holder.polls
    await until(lambda: holder.polls >= polls + 4, seconds=10)
    go_on.set()
    assert (await asked).json()["choices"][0]["message"]["content"] == "late"


async def test_nothing_is_retried_after_the_first_token(launch: Launch) -> None:
    async def script(_: object):
        yield Started(1)
        yield Delta("x", (1,))
        raise Died

    dying = ScriptedWorker(stats=with_load(STATS, 0), script=script)
    healthy = ScriptedWorker(stats=with_load(STATS, 50))
    gateway = await launch(dying, healthy)
    response = await gateway.chat()
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert healthy.requests == []


class Link:
    """Carries connections to `port` of this machine, until it is cut: then all that is sent is lost."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._up = asyncio.Event()
        self._up.set()
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Link:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._up.clear()
        self._server.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, there[1]), (there[0], writer)):
            self._carrying.add(asyncio.create_task(self._carry(source, target)))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while piece := await source.read(65536):
            if self._up.is_set():
                target.write(piece)
        target.close()


async def test_what_a_lost_worker_has_begun_ends_with_an_error(launch: Launch) -> None:
    async def script(_: object):
        yield Started(1)
        yield Delta("x", (1,))
        await asyncio.Event().wait()

    worker = ScriptedWorker(script=script)
    async with serving(worker.app) as url, Link(int(url.rpartition(":")[2])) as link:
        gateway = await launch(worker_urls=(link.url,), worker_lost_seconds=1)
        asked = asyncio.create_task(gateway.chunks())
        await until(lambda: bool(worker.requests))
        polls = worker.polls
        await until(lambda: worker.polls >= polls + 2)  # the text is on its way, too
        link.cut()
        chunks = await asyncio.wait_for(asked, 15)
    assert [c["choices"][0]["delta"].get("content") for c in chunks[:-1] if c["choices"]][-1] == "x"
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "cannot be reached" in chunks[-1]["error"]["message"]


async def test_a_worker_that_is_only_slow_keeps_what_it_has_begun(launch: Launch) -> None:
    go_on = asyncio.Event()

    async def script(_: object):
        begun, *rest = story("slow", "ly")
        yield begun
        yield rest[0]
        await go_on.wait()
        for event in rest[1:]:
            yield event

    slow = ScriptedWorker(stats=with_load(STATS, 0), script=script)
    gateway = await launch(slow, ScriptedWorker(stats=with_load(STATS, 50)), worker_lost_seconds=0.2)
    asked = asyncio.create_task(gateway.chat())
    await until(lambda: bool(slow.requests))
    slow.is_silent = True
    polls = slow.polls
    await until(lambda: slow.polls >= polls + 5, seconds=10)
    go_on.set()
    assert (await asked).json()["choices"][0]["message"]["content"] == "slowly"


async def test_a_worker_that_is_not_there(launch: Launch) -> None:
    healthy = ScriptedWorker()
    nowhere = f"http://127.0.0.1:{closed_port()}"
    alone = await launch(worker_urls=(nowhere, "unix:/nowhere.sock"))
    response = await alone.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert (await alone.http.get("/health/ready")).status_code == 503
    assert healthy.requests == []


async def test_the_log_says_why_a_worker_was_never_ready(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.gateway.clients.pool")
    await launch(worker_urls=("unix:/nowhere.sock",), worker_poll_seconds=0.05)
    await asyncio.sleep(0.3)
    [line] = [record for record in caplog.records if record.message == "a worker is not ready yet"]
    assert (line.levelname, line.worker, line.cause) == (  # type: ignore[attr-defined]
        "INFO",
        "unix:/nowhere.sock",
        "[Errno 2] No such file or directory",
    )


async def test_all_refuse(launch: Launch) -> None:
    workers = [ScriptedWorker(refusal=RateLimited("full", retry_after=7)) for _ in range(2)]
    gateway = await launch(*workers)
    response = await gateway.chat()
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert [len(worker.requests) for worker in workers] == [1, 1]


async def test_a_model_whose_only_holder_is_down_is_unavailable_not_unknown(launch: Launch) -> None:
    holder = ScriptedWorker(models=[BASE, TEXT_ADAPTER])
    other = ScriptedWorker(models=[BASE])
    gateway = await launch(holder, other)
    holder.is_ready = False
    polls = holder.polls
    await until(lambda: holder.polls >= polls + 2)
    assert (await gateway.chat(model="alpaca")).status_code == 503
    assert (await gateway.chat(model="base")).status_code == 200


async def test_a_worker_error_without_our_shape(launch: Launch, worker: ScriptedWorker) -> None:
    class Odd(NotFound):
        def body(self):
            return {"detail": "odd"}

    worker.refusal = Odd("odd")
    gateway = await launch(worker)
    response = await gateway.chat()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"


class Response:
    """A body in pieces; between two of them others have their turn."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def aiter_bytes(self):
        for piece in self._pieces:
            await asyncio.sleep(0)
            yield piece


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\n"), min_size=1)),
    st.integers(1, 7),
)
async def test_lines_are_split_at_newlines_alone(lines: list[str], size: int) -> None:
    raw = "".join(line + "\n" for line in lines).encode()
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert [line.decode() async for line in _lines(Response(pieces))] == lines  # type: ignore[arg-type]


async def test_empty_lines_say_nothing() -> None:
    response = Response([b"\n", b"a", b"\n\n", b"\nb\n", b"\n"])
    assert [line async for line in _lines(response)] == [b"a", b"b"]  # type: ignore[arg-type]


async def test_a_long_line_costs_no_more_than_its_length() -> None:
    """Joined with each piece that comes, these 16 MB would be copied for half a minute."""
    response = Response([b"x" * 2**12] * 2**12 + [b"\n"])
    async with asyncio.timeout(5):
        assert [len(line) async for line in _lines(response)] == [2**24]  # type: ignore[arg-type]
