"""The rehearsal of a cluster: it calls by its name what becomes of a request, and runs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tiny_base import write_tiny_base

from deploy.rehearsal.balancer import Balancer
from deploy.rehearsal.cluster import SCENARIOS, Finding
from deploy.rehearsal.traffic import Answer, Outcome, Question, ask, judged, questions
from tests.deploy.deployment import ROOT

Handler = Callable[[httpx.Request], httpx.Response]

PLAIN, STREAMED = questions(["m"], ())[:2]
ERROR = {"error": {"message": "No worker is ready.", "type": "server_error"}}
WHOLE = {"choices": [{"message": {"content": "Yes."}}], "experts": [{"name": "ocr", "outcome": "ok"}]}


async def answer_of(question: Question, handler: Handler) -> Answer:
    transport = httpx.MockTransport(handler)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        return await ask(http, question)


def stream(*events: object) -> httpx.Response:
    lines = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in lines))


def piece(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}}]}


def broken(_: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset")


@pytest.mark.parametrize(
    ("question", "handler", "outcome"),
    [
        (PLAIN, lambda _: httpx.Response(200, json=WHOLE), Outcome.OK),
        (PLAIN, lambda _: httpx.Response(503, json=ERROR), Outcome.REFUSED),
        (PLAIN, lambda _: httpx.Response(503, json={"error": {"message": "", "type": ""}}), Outcome.LOST),
        (PLAIN, lambda _: httpx.Response(502, text="Bad gateway"), Outcome.LOST),
        (PLAIN, lambda _: httpx.Response(200, json={}), Outcome.LOST),
        (PLAIN, broken, Outcome.LOST),
        (STREAMED, lambda _: stream(piece("Yes."), "[DONE]"), Outcome.OK),
        (STREAMED, lambda _: httpx.Response(503, json=ERROR), Outcome.REFUSED),
        (STREAMED, lambda _: stream(piece("Ye"), ERROR), Outcome.CUT),
        (STREAMED, lambda _: stream(piece("Ye")), Outcome.LOST),
    ],
)
async def test_outcomes(question: Question, handler: Handler, outcome: Outcome) -> None:
    assert (await answer_of(question, handler)).outcome is outcome


async def test_another_answer_is_wrong() -> None:
    answer = await answer_of(PLAIN, lambda _: httpx.Response(200, json=WHOLE))
    assert judged(answer, "q", {("q", ("ocr",)): "Yes.", ("q", ()): "No."}) is Outcome.OK
    assert judged(answer, "q", {("q", ("ocr",)): "No.", ("q", ()): "Yes."}) is Outcome.WRONG
    cut = replace(answer, outcome=Outcome.CUT)
    assert judged(cut, "q", {("q", ("ocr",)): "Yes, it is."}) is Outcome.CUT


def test_a_finding_names_what_may_not_be() -> None:
    calm = SCENARIOS[0]
    answers = [
        Answer(Outcome.OK, ended=9.0),
        Answer(Outcome.CUT, told="broke off", ended=3.0),
        Answer(Outcome.LOST, ended=2.0),
    ]
    finding = Finding(calm, answers, broken=1.0, mended=4.0, whole=5.0)
    assert finding.trouble_seconds == 2.0
    assert len(finding.faults()) == 2
    forgiving = replace(finding, scenario=replace(calm, spared=frozenset()))
    assert [fault.split(": ")[1] for fault in forgiving.faults()] == ["lost"]


@asynccontextmanager
async def listening(answer: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
    """Serves connections at the yielded address; at the end all of them must have ended."""
    tasks: set[asyncio.Task[None]] = set()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(answer(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


def gateway(name: bytes, ready: bool = True) -> AbstractAsyncContextManager[str]:
    """Says its name to every line but a probe's, whose status it answers."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            probed = line.startswith(b"GET /health/ready")
            writer.write(b"HTTP/1.1 %d\r\n" % (200 if ready else 503) if probed else name)
        writer.close()
        with suppress(OSError):  # a probe that has seen enough
            await writer.wait_closed()

    return listening(answer)


async def said(balanced: str) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
    """Who answers on a new connection, and that connection."""
    address, _, port = balanced.rpartition(":")
    reader, writer = await asyncio.open_connection(address, int(port))
    writer.write(b"who?\n")
    return await asyncio.wait_for(reader.read(1), 5), reader, writer


async def test_the_balancer_sends_new_connections_to_whom_it_shall(tmp_path: Path) -> None:
    async with gateway(b"a") as a, gateway(b"b") as b, gateway(b"c", ready=False) as c:
        endpoints = tmp_path / "endpoints"
        endpoints.write_text(f"{a}\n{b}\n{c}\n127.0.0.1:1")
        balancer = Balancer(endpoints)
        async with asyncio.TaskGroup() as group, listening(balancer.carry) as balanced:
            probing = group.create_task(balancer.probe_forever())
            async with asyncio.timeout(10):
                while balancer.ready != {a, b}:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            connections = [await said(balanced) for _ in range(4)]
            assert sorted(name for name, *_ in connections) == [b"a", b"a", b"b", b"b"]
            endpoints.write_text(b)
            connections += [await said(balanced) for _ in range(2)]
            assert [name for name, *_ in connections[4:]] == [b"b", b"b"]
            for name, reader, writer in connections:  # those that stand stay
                writer.write(b"who?\n")
                assert await asyncio.wait_for(reader.read(1), 5) == name
                writer.close()
                await writer.wait_closed()
            probing.cancel()


@pytest.mark.server
def test_a_worker_is_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "tiny")
    command = (sys.executable, "-m", "deploy.rehearsal.cluster")
    options = ("--only", "a worker is killed", "--base", str(tmp_path / "tiny"), "--clients", "3")
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=240)
    if "unshare" in done.stderr and done.returncode:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No request was lost without a word, no answer was wrong." in done.stdout
