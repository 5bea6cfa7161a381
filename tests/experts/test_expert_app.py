"""The experts' service over ASGI, and over a real socket with its client."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
import uvicorn
from PIL import Image

from experts.app import create_app
from experts.contract import BadImage, Expert, ExpertError, Reading
from experts.http import HttpExpert

Encode = Callable[..., bytes]
LIMIT = 100_000


@contextlib.asynccontextmanager
async def asgi(app) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the started app."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t") as client,
    ):
        yield client


@contextlib.asynccontextmanager
async def listening(app, **where: object) -> AsyncIterator[uvicorn.Server]:
    """The app behind uvicorn on a real socket."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", **where))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not serving.done()
    try:
        yield server
    finally:
        server.should_exit = True
        await serving


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.fixture
async def client(size_expert) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi(create_app([size_expert], max_image_bytes=LIMIT)) as client:
        yield client


async def test_a_reading(client: httpx.AsyncClient, encode: Encode) -> None:
    answer = await client.post("/experts/size/read", content=encode(Image.new("RGB", (7, 5), "red")))
    assert answer.status_code == 200
    result = answer.json()
    assert 0 < result.pop("seconds") < 60
    assert result == {"name": "size", "version": "1", "text": "7×5", "confidence": 1.0}


async def test_the_list(client: httpx.AsyncClient) -> None:
    assert (await client.get("/experts")).json() == [{"name": "size", "version": "1"}]


@pytest.mark.parametrize("body", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
async def test_no_image(client: httpx.AsyncClient, body: bytes) -> None:
    answer = await client.post("/experts/size/read", content=body)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_image"


async def test_a_body_over_the_limit_is_refused_while_it_is_read(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 * LIMIT:
            sent += 1000
            yield bytes(1000)

    answer = await client.post("/experts/size/read", content=endless())
    assert answer.status_code == 413
    assert error_of(answer)["message"] == "The image is larger than 100000 bytes, which is the limit here."
    assert sent <= LIMIT + 2000
    assert (await client.post("/experts/size/read", content=bytes(LIMIT))).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/experts/nobody/read", 404, "expert_not_found"),
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/experts/size/read", 405, "method_not_allowed"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


async def test_ready_only_between_load_and_close(size_expert, encode: Encode) -> None:
    app = create_app([size_expert])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for asked in (client.get("/health/ready"), client.post("/experts/size/read", content=b"x")):
            answer = await asked
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert error_of(answer)["type"] == "server_error"
        assert (await client.get("/health/live")).status_code == 200
        async with app.router.lifespan_context(app):
            assert size_expert.loaded
            assert not size_expert.closed
            assert (await client.get("/health/ready")).status_code == 200
        assert size_expert.closed
        assert (await client.get("/health/ready")).status_code == 503


async def test_the_metrics_count_each_outcome(client: httpx.AsyncClient, encode: Encode) -> None:
    for image in (encode(Image.new("RGB", (7, 5), "red")), encode(Image.new("RGB", (7, 5))), b"no image"):
        await client.post("/experts/size/read", content=image)
    lines = (await client.get("/metrics")).text.splitlines()
    for outcome in ("ok", "empty", "bad_image"):
        labels = f'{{expert="size",outcome="{outcome}"}}'
        assert f"llama_adapter:expert_latency_seconds_count{labels} 1.0" in lines


class Scripted:
    """An expert that fails, or waits, as it is told."""

    name, version = "scripted", "1"

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.go = asyncio.Event()
        self.reading = 0
        self.cancelled = False

    async def load(self) -> None:
        pass

    async def refresh(self) -> None:
        pass

    async def read(self, image: bytes) -> Reading:
        if self.failure:
            raise self.failure
        self.reading += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return Reading("done")

    async def close(self) -> None:
        pass


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it waits for what others do
            await asyncio.sleep(0.01)


async def test_an_experts_failure_is_a_502_that_says_why() -> None:
    async with asgi(create_app([Scripted(ExpertError("the camera is on fire"))])) as client:
        answer = await client.post("/experts/scripted/read", content=b"x")
    assert answer.status_code == 502
    assert error_of(answer)["message"] == "the camera is on fire"


async def test_a_bug_is_a_500_that_tells_nothing() -> None:
    async with asgi(create_app([Scripted(KeyError("secret"))])) as client:
        answer = await client.post("/experts/scripted/read", content=b"x")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert error_of(answer)["code"] == "internal_error"


async def test_the_queue_is_bounded() -> None:
    expert = Scripted()
    async with asgi(create_app([expert], max_waiting=2)) as client:
        waiting = [asyncio.create_task(client.post("/experts/scripted/read", content=b"x")) for _ in range(2)]
        await until(lambda: expert.reading == 2)
        refused = await client.post("/experts/scripted/read", content=b"x")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["type"] == "rate_limit_error"
        expert.go.set()
        assert [(await answer).status_code for answer in waiting] == [200, 200]
        assert (await client.post("/experts/scripted/read", content=b"x")).status_code == 200


async def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    expert = Scripted()
    path = str(tmp_path / "experts.sock")
    async with listening(create_app([expert], max_waiting=1), uds=path):
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/experts/scripted/read", content=b"x", timeout=0.3)
            await until(lambda: expert.cancelled)
            expert.go.set()
            assert (await client.post("/experts/scripted/read", content=b"x")).status_code == 200


async def test_a_failed_load_stops_the_start_and_closes_what_was_loaded(size_expert) -> None:
    class Broken(Scripted):
        async def load(self) -> None:
            raise ExpertError("no weights")

    app = create_app([size_expert, Broken()])
    with pytest.raises(ExpertError, match="no weights"):
        async with app.router.lifespan_context(app):
            pass
    assert size_expert.closed


async def test_a_reading_that_nobody_waits_for_is_dropped_before_it_begins(
    size_expert, encode: Encode
) -> None:
    """The one thread is busy; the cancelled image behind it is never decoded."""
    gate, seen = threading.Event(), []
    describe = size_expert._describe

    def slow(image: Image.Image) -> Reading:
        seen.append(image.width)
        gate.wait(10)
        return describe(image)

    size_expert._describe = slow
    reads = [
        asyncio.create_task(size_expert.read(encode(Image.new("RGB", (width, 1), "red"))))
        for width in (1, 2, 3)
    ]
    await until(lambda: seen == [1])
    reads[1].cancel()
    await asyncio.sleep(0)
    gate.set()
    assert [(await reads[0]).text, (await reads[2]).text] == ["1×1", "3×1"]
    assert seen == [1, 3]
    await size_expert.close()


@pytest.fixture(params=["unix", "http"])
async def url(request: pytest.FixtureRequest, size_expert, tmp_path: Path) -> AsyncIterator[str]:
    app = create_app([size_expert, Scripted(ExpertError("on fire"))], max_image_bytes=LIMIT)
    if request.param == "unix":
        path = str(tmp_path / "experts.sock")
        async with listening(app, uds=path):
            yield f"unix:{path}"
    else:
        async with listening(app, host="127.0.0.1", port=0) as server:
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def loaded(expert: HttpExpert) -> AsyncIterator[HttpExpert]:
    await expert.load()
    try:
        yield expert
    finally:
        await expert.close()


async def test_the_client_is_the_expert(url: str, encode: Encode) -> None:
    async with loaded(HttpExpert("size", url)) as expert:
        assert isinstance(expert, Expert)
        assert expert.version == "1"
        assert await expert.read(encode(Image.new("RGB", (7, 5), "red"))) == Reading("7×5", 1.0)
        assert await expert.read(encode(Image.new("RGB", (7, 5)))) == Reading("", 1.0)
        with pytest.raises(BadImage, match="not a PNG"):
            await expert.read(b"hello")
        with pytest.raises(BadImage, match="larger than 100000 bytes"):
            await expert.read(bytes(LIMIT + 1))


async def test_the_client_passes_failures_on(url: str) -> None:
    async with loaded(HttpExpert("scripted", url)) as expert:
        with pytest.raises(ExpertError, match="502 on fire"):
            await expert.read(b"x")
    async with loaded(HttpExpert("no/body", url)) as expert:
        assert expert.version == "unknown"
        with pytest.raises(ExpertError, match="404"):
            await expert.read(b"x")


async def test_a_service_that_comes_later_is_found(size_expert, tmp_path: Path, encode: Encode) -> None:
    image = encode(Image.new("RGB", (7, 5), "red"))
    path = tmp_path / "experts.sock"
    async with loaded(HttpExpert("size", f"unix:{path}")) as expert:
        assert expert.version == "unknown"
        with pytest.raises(ExpertError, match="does not answer: ConnectError"):
            await expert.read(image)
        async with listening(create_app([size_expert]), uds=str(path)):
            assert (await expert.read(image)).text == "7×5"
        assert expert.version == "1"


async def test_a_service_that_hangs_is_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "deaf.sock")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(path)
        deaf.listen()
        timeout = httpx.Timeout(0.2)
        async with loaded(HttpExpert("size", f"unix:{path}", timeout)) as expert:
            with pytest.raises(ExpertError, match="ReadTimeout"):
                await expert.read(b"x")


@pytest.mark.parametrize("body", [b"", b"[]", b'{"text": 5}', b"<html>"])
async def test_nonsense_from_the_service_is_an_experts_error(tmp_path: Path, body: bytes) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    path = str(tmp_path / "nonsense.sock")
    expert = HttpExpert("size", f"unix:{path}")
    async with await asyncio.start_unix_server(nonsense, path), loaded(expert):
        assert expert.version == "unknown"
        with pytest.raises(ExpertError, match="nonsense"):
            await expert.read(b"x")


async def test_it_must_be_loaded_first() -> None:
    with pytest.raises(ExpertError, match="before it was loaded"):
        await HttpExpert("size", "http://127.0.0.1:1").read(b"")
