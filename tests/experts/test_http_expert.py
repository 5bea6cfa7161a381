"""The client of an expert service, against services that answer amiss."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from experts.contract import Busy, ExpertError, Reading
from experts.http import HttpExpert

Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
RESULT = {"name": "size", "version": "1", "text": "7×5", "confidence": 1.0, "seconds": 0.1}
LIST = [{"name": "size", "version": "1"}]


@contextlib.asynccontextmanager
async def service(folder: Path, answer: Answer) -> AsyncIterator[HttpExpert]:
    """A client, not yet loaded, of a service that writes `answer(head of the request, writer)`."""
    serving = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await answer((await reader.readuntil(b"\r\n\r\n")).decode(), writer)
            await writer.drain()
        writer.close()

    path = str(folder / "expert.sock")
    expert = HttpExpert("size", f"unix:{path}")
    async with await asyncio.start_unix_server(serve, path):
        try:
            yield expert
        finally:
            await expert.close()
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving)


def whole(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def always(listed: bytes, read: bytes) -> Answer:
    async def answer(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(listed if head.startswith("GET") else read)

    return answer


def padded(value: object) -> bytes:
    """JSON of 2 MiB."""
    return json.dumps(value).encode() + b" " * 2**21


async def test_no_answer_is_longer_than_a_reading_can_be(tmp_path: Path) -> None:
    async with service(tmp_path, always(whole(padded(LIST)), whole(padded(RESULT)))) as expert:
        await expert.load()
        assert expert.version == "unknown"
        with pytest.raises(ExpertError, match=r"'size' at unix:.* answers more than 1048576 bytes"):
            await expert.read(b"x")


async def test_an_answer_without_end_is_given_up(tmp_path: Path) -> None:
    async def endless(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(bytes(2**16))
            await writer.drain()

    async with service(tmp_path, endless) as expert:
        async with asyncio.timeout(60):
            await expert.load()
            with pytest.raises(ExpertError, match="answers more than 1048576 bytes"):
                await expert.read(b"x")


async def test_a_long_reading_is_read_all_the_same(tmp_path: Path) -> None:
    text = "x" * 900_000
    answer = always(whole(json.dumps(LIST).encode()), whole(json.dumps({**RESULT, "text": text}).encode()))
    async with service(tmp_path, answer) as expert:
        await expert.load()
        assert await expert.read(b"x") == Reading(text, 1.0)


async def test_packed_answers_are_neither_asked_for_nor_unpacked(tmp_path: Path) -> None:
    heads = []

    async def packed(head: str, writer: asyncio.StreamWriter) -> None:
        heads.append(head.lower())
        body = gzip.compress(json.dumps(LIST if head.startswith("GET") else RESULT).encode())
        writer.write(whole(body, headers="content-encoding: gzip\r\n"))

    async with service(tmp_path, packed) as expert:
        await expert.load()
        assert expert.version == "unknown"
        with pytest.raises(ExpertError, match="answers in 'gzip', which it was not asked for"):
            await expert.read(b"x")
    assert len(heads) == 2
    assert all("\r\naccept-encoding: identity\r\n" in head for head in heads)


async def test_a_refusal_may_be_deep_and_long(tmp_path: Path) -> None:
    for body in (b"[" * 200_000, json.dumps({"error": {"message": "no " * 100_000}}).encode()):
        answer = always(whole(json.dumps(LIST).encode()), whole(body, "500 Internal Server Error"))
        async with service(tmp_path, answer) as expert:
            await expert.load()
            with pytest.raises(ExpertError, match=r": 500 (\[\[|no )") as refused:
                await expert.read(b"x")
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable", "502 Bad Gateway"])
async def test_a_busy_service_is_told_from_one_that_failed(tmp_path: Path, status: str) -> None:
    refusal = whole(json.dumps({"error": {"message": "later"}}).encode(), status)
    async with service(tmp_path, always(refusal, refusal)) as expert:
        await expert.load()
        assert expert.version == "unknown"
        with pytest.raises(ExpertError, match=r": \d\d\d later") as refused:
            await expert.read(b"x")
        assert isinstance(refused.value, Busy) == (status[:3] != "502")


async def test_another_version_is_asked_for_and_kept_where_it_is_not_told(tmp_path: Path) -> None:
    listed = [json.dumps([{"name": "size", "version": str(i)}]).encode() for i in (1, 2)] + [b"[]", b"<html>"]

    async def changing(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(listed.pop(0)))

    async with service(tmp_path, changing) as expert:
        await expert.load()
        assert expert.version == "1"
        await expert.refresh()
        assert expert.version == "2"
        for _ in range(2):
            with pytest.raises(ExpertError, match="does not tell its version"):
                await expert.refresh()
            assert expert.version == "2"


@pytest.mark.parametrize("listed", [b"[" * 200_000, b'[{"name": "size", "version": %s}]' % (b"1" * 5000)])
async def test_a_list_that_is_nonsense_is_made_up_for_by_a_reading(tmp_path: Path, listed: bytes) -> None:
    async with service(tmp_path, always(whole(listed), whole(json.dumps(RESULT).encode()))) as expert:
        await expert.load()
        assert expert.version == "unknown"
        assert await expert.read(b"x") == Reading("7×5", 1.0)
        assert expert.version == "1"


@pytest.mark.parametrize("trickle", [b"", b" "])
async def test_a_list_that_does_not_come_holds_nobody_up(
    tmp_path: Path, trickle: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.http._LIST_SECONDS", 0.3)

    async def slow_to_list(head: str, writer: asyncio.StreamWriter) -> None:
        if head.startswith("POST"):
            writer.write(whole(json.dumps(RESULT).encode()))
            return
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(trickle)
            await writer.drain()
            await asyncio.sleep(0.01)

    async with service(tmp_path, slow_to_list) as expert:
        async with asyncio.timeout(60):
            await expert.load()
            assert await expert.read(b"x") == Reading("7×5", 1.0)
        assert expert.version == "1"
