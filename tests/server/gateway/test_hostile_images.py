"""Images made to hurt: bombs of 30,000 x 30,000 pixels, and hosts that never come to an end."""

from __future__ import annotations

import asyncio
import struct
import time
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO

import pytest
from PIL import Image

from server.errors import InvalidRequest
from server.gateway.fetching import ImageFetcher
from server.gateway.images import ImageLoader
from server.settings import GatewaySettings
from tests.server.gateway.scripted import picture
from tests.server.gateway.test_image_loading import data_url

SIDE = 30_000
MIB = 1024 * 1024

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *extra: bytes, pixels: bool = True) -> bytes:
    """A whole, valid PNG of one bit a pixel: at 30,000 a side a hundred kilobytes for 900 million pixels."""
    row = bytes(1 + (side + 7) // 8)
    body = zlib.compressobj(9)
    rows = [body.compress(row * 100) for _ in range(side // 100)] if pixels else []
    data = b"".join([*rows, body.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(side: int) -> bytes:
    data = bytearray(picture("JPEG"))
    frame = data.index(b"\xff\xc0") + 5  # the start of frame: length, precision, then height and width
    data[frame : frame + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def gif(side: int) -> bytes:
    data = bytearray(picture("GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def loader(**limits: float | bool) -> ImageLoader:
    allowed = GatewaySettings(image_allow_private=True, **limits)  # type: ignore[arg-type]
    return ImageLoader(allowed, ImageFetcher(allowed))


async def refusal(url: str, **limits: float | bool) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await loader(**limits).load([("p", url)])
    return caught.value


BOMBS = {"png": png(SIDE), "jpeg": jpeg(SIDE), "gif": gif(SIDE)}


def test_the_bombs_are_what_they_say() -> None:
    assert len(BOMBS["png"]) < MIB
    with Image.open(BytesIO(png(1000))) as small:
        small.load()
        assert small.size == (1000, 1000)
    with Image.open(BytesIO(jpeg(1000))) as small:
        assert small.size == (1000, 1000)


@pytest.mark.parametrize("kind", BOMBS)
async def test_a_bomb_is_refused_before_it_unpacks(kind: str) -> None:
    tracemalloc.start()
    begun = time.process_time()
    error = await refusal(data_url(BOMBS[kind], f"image/{kind}"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code == "image_too_large"
    assert "max_image_pixels" in error.message
    assert peak < 20 * MIB
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("text", [b"zTXt", b"iCCP"])
async def test_bombs_in_a_pngs_texts(text: bytes) -> None:
    """What a header carries packed is read before the pixels, and may unpack to more than they do."""
    inner = zlib.compress(bytes(200 * MIB), 9)
    data = png(8, chunk(text, b"name\x00\x00" + inner), pixels=False)
    tracemalloc.start()
    try:
        await loader().load([("p", data_url(data))])
    except InvalidRequest as error:
        code = error.code
    else:
        code = None  # read, and the text with it left out
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code in (None, "invalid_image", "image_too_large")
    assert peak < 30 * MIB


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def with_segments(segments: bytes) -> bytes:
    data = picture("JPEG")
    return data[:2] + segments + data[2:]


def with_comment(blocks: bytes) -> bytes:
    data = picture("GIF")
    at = 13 + ((3 << ((data[10] & 7) + 1)) if data[10] & 0x80 else 0)  # behind the palette
    return data[:at] + b"\x21\xfe" + blocks + b"\0" + data[at:]


def numbers(count: int) -> bytes:
    """EXIF, in which the orientation and what tells the resolution are lists of so many fractions."""
    tags = (0x0112, 0x011A, 0x0128)
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHLL", tag, 5, count // 3, start) for tag in tags)
    head = b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4)
    return head + b"\1\0\0\0\3\0\0\0" * count


def exif_segments(data: bytes) -> bytes:
    pieces = [data[i : i + 65_000] for i in range(0, len(data), 65_000)]
    return b"".join(segment(0xE1, b"Exif\0\0" + piece) for piece in pieces)


PROFILE = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(MIB - 8), 9))
ENDLESS = {  # each up to 20 MiB, which Pillow by itself works on for seconds or minutes
    "exif": lambda: with_segments(segment(0xE1, b"Exif\0\0xx") * 1_500_000),
    "exif of some size": lambda: with_segments(segment(0xE1, b"Exif\0\0" + bytes(390)) * 50_000),
    "comments": lambda: with_segments(segment(0xFE, b"") * 5_000_000),
    "fill": lambda: with_segments(b"\xff" * 20_000_000),
    "chunks": lambda: png(8, chunk(b"teSt", b"") * 1_600_000),
    "profiles": lambda: png(8, PROFILE * 18_000),
    "fractions": lambda: with_segments(exif_segments(numbers(2_500_000))),
    "few fractions": lambda: with_segments(exif_segments(numbers(400_000))),
    "gif": lambda: with_comment((b"\xff" + bytes(255)) * 80_000),
}


@pytest.mark.parametrize("kind", ENDLESS)
async def test_metadata_without_an_end(kind: str) -> None:
    data = ENDLESS[kind]()
    assert len(data) <= 20 * MIB
    begun = time.thread_time()
    with pytest.raises(InvalidRequest, match="more metadata than is read") as caught:
        loader()._checked(data)
    assert time.thread_time() - begun < 0.5
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")


async def test_metadata_as_editors_write_it_is_read() -> None:
    picture = BytesIO()
    exif = Image.Exif()
    exif[0x010F] = "x" * 60_000
    Image.new("RGB", (8, 8)).save(
        picture, "JPEG", exif=exif, icc_profile=bytes(2 * MIB), comment=b"c" * 60_000
    )
    data = picture.getvalue()
    [image] = await loader().load([("p", data_url(data))])
    assert image.data == data


@asynccontextmanager
async def host(answer: Answer):
    """The URL of a host that answers any request by `answer`, over a bare connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


async def test_a_bomb_from_a_host() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BOMBS["png"])
        await writer.drain()

    async with host(answer) as url:
        assert (await refusal(url)).code == "image_too_large"


async def test_a_fast_body_without_an_end() -> None:
    sent = 0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()
            sent += 0x10000

    async with host(answer) as url:
        error = await refusal(url, max_image_bytes=MIB)
    assert (error.code, "max_image_bytes" in error.message) == ("image_too_large", True)
    assert sent < 16 * MIB  # what the sockets hold, and not what it would have sent


async def test_headers_that_drip_without_an_end() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx-")
        while True:
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with host(answer) as url:
        begun = time.monotonic()
        assert (await refusal(url, image_total_seconds=0.5)).code == "image_fetch_timeout"
        assert time.monotonic() - begun < 10  # they never end


async def test_headers_that_rush_without_an_end() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x-more: " + b"a" * 1000 + b"\r\n")
            await writer.drain()

    async with host(answer) as url:
        tracemalloc.start()
        assert (await refusal(url, image_total_seconds=5)).code == "image_fetch_failed"
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
        tracemalloc.stop()


async def test_a_host_that_says_nothing() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with host(answer) as url:
        error = await refusal(url, image_read_seconds=0.2)
    assert (error.code, "0.2 s" in error.message) == ("image_fetch_timeout", True)


async def test_a_body_shorter_than_it_says() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort")
        await writer.drain()

    async with host(answer) as url:
        assert (await refusal(url)).code == "image_fetch_failed"
