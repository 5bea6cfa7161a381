"""Images in requests: data URLs, limits, who gets them, and what they do to the event loop."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.gateway import fetching
from server.gateway.fetching import ImageFetcher
from server.gateway.images import Image, ImageLoader
from server.settings import GatewaySettings
from tests.server.gateway.scripted import Launch, ScriptedExpert, ScriptedWorker, Stack, picture, serving


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def loader(**limits: Any) -> ImageLoader:
    allowed = GatewaySettings(**limits)
    return ImageLoader(allowed, ImageFetcher(allowed))


async def load(url: str, **limits: Any) -> Image:
    [image] = await loader(**limits).load([("p", url)])
    return image


async def refused(url: str, **limits: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await load(url, **limits)
    assert caught.value.param == "p"
    return caught.value


def huge_png(width: int, height: int) -> bytes:
    """A small file that declares `width` x `height` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT\x35\xaf\x06\x1e"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_every_format(kind: str) -> None:
    data = picture(kind)
    image = await load(data_url(data, f"image/{kind.lower()}"))
    assert image.data == data
    assert len(image.sha256) == 64
    assert (
        await load("DATA:IMAGE/X;charset=x;BASE64" + data_url(data)[len("data:image/png;base64") :])
    ).data == data


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:", "invalid_image_url"),
        ("data:,", "invalid_image_url"),
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png,AAAA", "invalid_image_url"),
        ("data:text/html;base64,AAAA", "invalid_image_url"),
        ("data:image/png;base64,AAA", "invalid_image_url"),
        ("data:image/png;base64,A*AA", "invalid_image_url"),
        ("data:image/png;base64,ÄÄÄÄ", "invalid_image_url"),
        ("data:image/png" + ";" * 1000 + ";base64," + "A" * 8, "invalid_image_url"),
        ("data:" + ";" * 2**20, "invalid_image_url"),
        ("data:image/png;base64,", "invalid_image"),
        (data_url(b"not an image"), "invalid_image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "invalid_image"),
        (data_url(picture("BMP")), "invalid_image"),
        (data_url(picture("TIFF")), "invalid_image"),
        (data_url(picture()[:20]), "invalid_image"),
    ],
)
async def test_what_is_no_image_is_refused(url: str, code: str) -> None:
    assert (await refused(url)).code == code


async def test_limits_on_bytes_and_pixels() -> None:
    data = picture(size=(50, 40))
    assert (await load(data_url(data), max_image_bytes=len(data), max_image_pixels=2000)).data == data
    error = await refused(data_url(data), max_image_bytes=len(data) - 1)
    assert (error.code, "max_image_bytes" in error.message) == ("image_too_large", True)
    error = await refused(data_url(data), max_image_pixels=1999)
    assert (error.code, "max_image_pixels" in error.message) == ("image_too_large", True)


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1), (1, 39_000_000)])
async def test_a_side_that_has_no_end_is_refused(size: tuple[int, int]) -> None:
    """A hundred bytes for as many memory blocks as there are rows, on each service that decodes it."""
    error = await refused(data_url(huge_png(*size)))
    assert (error.code, "a side may have 65535" in error.message) == ("image_too_large", True)
    assert (await load(data_url(huge_png(1, 65_535)))).sha256


@pytest.mark.parametrize("side", [7_000, 10_000, 20_000, 2**31 - 1])
async def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    assert (await refused(data_url(huge_png(side, side)))).code in ("image_too_large", "invalid_image")


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=80), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]), st.data())
async def test_mutated_images_are_read_or_refused(noise: bytes, kind: str, data: st.DataObject) -> None:
    whole = bytearray(picture(kind))
    at = data.draw(st.integers(0, len(whole)))
    whole[at : at + len(noise)] = noise
    cut = data.draw(st.integers(0, len(whole)))
    for candidate in (bytes(whole), bytes(whole[:cut])):
        try:
            image = await load(data_url(candidate))
        except InvalidRequest as error:
            assert error.status == 400  # noqa: PT017
        else:
            assert image.data == candidate


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60))
async def test_any_data_url_is_read_or_refused(rest: str) -> None:
    with pytest.raises(InvalidRequest):
        await load("data:" + rest)


async def test_a_large_file_is_decoded_piecewise_to_the_same_bytes() -> None:
    data = picture() + random.Random(0).randbytes(3_000_001)  # Pillow reads the header alone
    assert (await load(data_url(data))).data == data


async def test_threads_are_few_though_what_they_work_for_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = 0
    peak = 0
    go_on = threading.Event()

    def slow(self: ImageLoader, data: bytes) -> tuple[int, int]:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        go_on.wait(10)
        running -= 1
        return 1, 1

    monkeypatch.setattr(ImageLoader, "_size", slow)
    fetcher = ImageFetcher(GatewaySettings())
    busy = ImageLoader(GatewaySettings(), fetcher)
    for _ in range(3):
        tasks = [asyncio.create_task(busy.load([("p", data_url(picture()))])) for _ in range(4)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert peak == 4
    begun = time.monotonic()
    await fetcher.close()  # waits for no thread
    assert time.monotonic() - begun < 5
    go_on.set()


def content(*urls: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


async def test_images_reach_a_model_that_reads_them_in_order(gateway: Stack, worker: ScriptedWorker) -> None:
    first, second = picture(color="red"), picture("JPEG", color="blue")
    response = await gateway.chat(model="org/sees", messages=content(data_url(first), data_url(second)))
    assert response.status_code == 200, response.text
    assert worker.requests[0].images == (first, second)
    assert worker.requests[0].prompt.messages[0].content == "What is it?"


async def test_a_model_that_reads_no_images_gets_none(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr", "Total 5")})
    await gateway.chat(model="base", messages=content(data_url(picture())))
    assert worker.requests[0].images == ()
    assert worker.requests[0].prompt.context[0].text == "Total 5"


async def test_images_that_nobody_would_look_at_are_refused(gateway: Stack, worker: ScriptedWorker) -> None:
    response = await gateway.chat(messages=content(data_url(picture())))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "images_not_supported")
    assert (await gateway.chat(messages=content(data_url(picture())), experts=[])).status_code == 200
    assert len(worker.requests) == 1


async def test_refusals_name_the_image(gateway: Stack) -> None:
    good = data_url(picture())
    for stream in (False, True):
        response = await gateway.chat(messages=content(good, "data:image/png;base64,AAAA"), stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "invalid_image")
        assert error["param"] == "messages[0].content[1].image_url.url"
    response = await gateway.chat(messages=content(*[good] * 9))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "too_many_images")
    response = await gateway.chat(messages=content("http://127.0.0.1:1/x"))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "image_host_refused")


async def test_an_image_from_another_host(launch: Launch, worker: ScriptedWorker) -> None:
    async def image_host(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": picture("WEBP")})

    async with serving(image_host, lifespan="off") as url:
        gateway = await launch(worker, image_allow_private=True)
        response = await gateway.chat(model="org/sees", messages=content(f"{url}/x.webp"))
        assert response.status_code == 200, response.text
    assert worker.requests[0].images == (picture("WEBP"),)


@asynccontextmanager
async def counting_host(size: int, seconds: float = 0) -> AsyncIterator[tuple[str, list[str], list[int]]]:
    """Pictures of `size` bytes: the host's URL, the paths asked for, and how many at once each time."""
    paths: list[str] = []
    running: list[int] = []
    now = 0

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        nonlocal now
        now += 1
        paths.append(scope["path"])
        running.append(now)
        await asyncio.sleep(seconds)
        now -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": picture().ljust(size, b"x")})

    async with serving(answer, lifespan="off") as url:
        yield url, paths, running


async def test_an_image_that_is_named_twice_is_fetched_once() -> None:
    async with counting_host(500) as (url, paths, _):
        named = [("a", f"{url}/1"), ("b", data_url(picture())), ("c", f"{url}/2"), ("d", f"{url}/1")]
        first, second, third, again = await loader(image_allow_private=True).load(named)
        assert sorted(paths) == ["/1", "/2"]
        assert (first, second.data, third) == (again, picture(), first)


async def test_the_images_of_one_request_have_a_limit_together() -> None:
    async with counting_host(500) as (url, _, _):
        limited = loader(image_allow_private=True, max_body_bytes=1499)
        two = [("p", f"{url}/{number}") for number in range(2)]
        for _ in range(2):  # each request has its own
            assert len(await limited.load(two)) == 2
        with pytest.raises(InvalidRequest, match=r"1499 bytes together \(max_body_bytes\)") as caught:
            await limited.load([*two, ("p", f"{url}/2")])
        assert (caught.value.status, caught.value.code) == (400, "image_too_large")


async def test_fetches_at_once_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_FETCHES", (3, 3))
    async with counting_host(500, seconds=0.05) as (url, _, running):
        few = loader(image_allow_private=True)
        requests = [[("p", f"{url}/{n}") for n in range(4)] for _ in range(2)]
        await asyncio.gather(*[few.load(named) for named in requests])
        assert (len(running), max(running)) == (8, 3)


async def test_large_images_are_not_worked_on_by_the_event_loop(launch: Launch) -> None:
    """Images of 16 MB on their way to an expert, one after another.

    What the loop does at a stretch is counted in its thread's own seconds, which a busy machine hardly
    changes, and compared with what decoding and hashing such an image take.
    """
    worker = ScriptedWorker()
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr", "x")})
    blob = picture() + random.Random(0).randbytes(16_000_000)
    encoded = base64.b64encode(blob)
    body = json.dumps({"model": "base", "messages": content(data_url(blob))}).encode()
    headers = {"content-type": "application/json"}

    def send() -> int:
        with httpx.Client(timeout=60, trust_env=False) as client:
            url = f"{gateway.url}/v1/chat/completions"
            return client.post(url, content=body, headers=headers).status_code

    async def longest_stretch() -> float:
        request = asyncio.create_task(anyio.to_thread.run_sync(send))
        longest = 0.0
        while not request.done():
            begun = time.thread_time()
            await asyncio.sleep(0.002)
            longest = max(longest, time.thread_time() - begun)
        assert request.result() == 200
        return longest

    stretches = [await longest_stretch() for _ in range(4)]
    print("longest stretches:", ", ".join(f"{seconds * 1e3:.1f} ms" for seconds in stretches))
    begun = time.thread_time()
    hashlib.sha256(base64.b64decode(encoded, validate=True)).digest()
    cost = time.thread_time() - begun
    print(f"the work itself: {cost * 1e3:.1f} ms")
    assert min(stretches) < cost  # what the loop did itself, it would do every time
