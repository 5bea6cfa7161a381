"""What a soak sends: valid, invalid and aborted requests, each kind with the statuses that it may get."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

_WORDS = ("river", "stone", "lantern", "copper", "winter", "market", "engine", "garden", "letter", "island")
LEFT = "left"  # the outcome of a request whose client did not wait for one


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask: the gateway's client, and its models. `adapters` may be empty."""

    http: httpx.AsyncClient
    base: str
    adapters: tuple[str, ...]
    with_images: bool

    def any_model(self, rng: random.Random) -> str:
        return rng.choice((self.base, *self.adapters))


@dataclass(frozen=True, slots=True)
class Kind:
    """`send` returns an HTTP status, `LEFT`, or `stream error`. 429 is always allowed: the server is full."""

    name: str
    weight: int
    send: Callable[[Target, random.Random], Awaitable[str]]
    expected: frozenset[str]


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(low, high)))


def chat(target: Target, rng: random.Random, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": words(rng, 3, 12)}]
    if rng.random() < 0.3:  # a prefix that many share
        messages.insert(0, {"role": "system", "content": "You are kind. " * 8})
    body = {"model": target.any_model(rng), "messages": messages, "max_tokens": rng.randint(1, 48)}
    return body | {"experts": [], "seed": rng.randint(0, 9), "temperature": rng.choice((0, 0.8))} | fields


def _picture(rng: random.Random) -> str:
    size = rng.choice((32, 200, 640))
    data = BytesIO()
    Image.effect_noise((size, size), rng.uniform(10, 80)).convert("RGB").save(
        data, rng.choice(("PNG", "JPEG"))
    )
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def seeing(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


async def _post(target: Target, path: str, body: Any) -> str:
    return str((await target.http.post(path, json=body)).status_code)


async def answer(target: Target, rng: random.Random) -> str:
    return await _post(target, "/v1/chat/completions", chat(target, rng, n=rng.choice((1, 1, 1, 3))))


async def stream(target: Target, rng: random.Random) -> str:
    body = chat(target, rng, stream=True, logprobs=rng.random() < 0.3)
    return await _streamed(target, "/v1/chat/completions", body, "data: [DONE]")


async def _streamed(
    target: Target, path: str, body: dict[str, Any], last_begins: str | tuple[str, ...]
) -> str:
    async with target.http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            return str(response.status_code)
        last = ""
        async for line in response.aiter_lines():
            last = line or last
    return "200" if last.startswith(last_begins) else "stream error"


def response_body(target: Target, rng: random.Random, **fields: Any) -> dict[str, Any]:
    body = chat(target, rng, top_logprobs=rng.choice((0, 0, 2)), **fields)
    return body | {"input": body.pop("messages"), "max_output_tokens": body.pop("max_tokens")}


async def responses(target: Target, rng: random.Random) -> str:
    return await _post(target, "/v1/responses", response_body(target, rng))


async def responses_stream(target: Target, rng: random.Random) -> str:
    ends = tuple(f'data: {{"type":"response.{status}"' for status in ("completed", "incomplete"))
    return await _streamed(target, "/v1/responses", response_body(target, rng, stream=True), ends)


async def image(target: Target, rng: random.Random) -> str:
    body = chat(target, rng, messages=seeing(_picture(rng)), experts="auto" if target.with_images else [])
    return await _post(target, "/v1/chat/completions", body)


async def scored(target: Target, rng: random.Random) -> str:
    body = {"model": target.base, "prompt": words(rng, 3, 30), "max_tokens": 0, "echo": True, "logprobs": 1}
    return await _post(target, "/v1/completions", body)


async def tokens(target: Target, rng: random.Random) -> str:
    return await _post(target, "/tokenize", {"model": target.base, "prompt": words(rng, 3, 30)})


async def reads(target: Target, rng: random.Random) -> str:
    path = rng.choice(("/v1/models", "/metrics", "/health/ready"))
    return str((await target.http.get(path)).status_code)


async def invalid(target: Target, rng: random.Random) -> str:
    """A 400 of many causes."""
    body = rng.choice(
        (
            chat(target, rng, temperature=9),
            chat(target, rng, messages=[]),
            chat(target, rng, max_tokens=10**9),
            chat(target, rng, messages=[{"role": "user", "content": "x " * 20_000}]),
            chat(target, rng, messages=seeing("data:image/png;base64,bm90IGFuIGltYWdl"), experts=[]),
            chat(target, rng, messages=seeing("http://127.0.0.1:1/x.png"), experts=[]),
            chat(target, rng, experts=["nobody"]),
            ["no object"],
        )
    )
    return await _post(target, "/v1/chat/completions", body)


async def broken(target: Target, rng: random.Random) -> str:
    content = rng.choice((b"{", b"\xff\xfe", b'{"model": ' + b"[" * 5000, b""))
    headers = {"content-type": "application/json"}
    response = await target.http.post("/v1/chat/completions", content=content, headers=headers)
    return str(response.status_code)


async def unknown(target: Target, rng: random.Random) -> str:
    path, model = rng.choice((("/v1/chat/completions", "nobody"), ("/v1/nothing", target.base)))
    return await _post(target, path, chat(target, rng, model=model))


async def left_stream(target: Target, rng: random.Random) -> str:
    """Leaves after some pieces, before the end."""
    body = chat(target, rng, stream=True, max_tokens=120, ignore_eos=True, n=rng.choice((1, 2)))
    async with target.http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return str(response.status_code)
        pieces = rng.randint(1, 30)
        async for _ in response.aiter_lines():
            pieces -= 1
            if not pieces:
                break
    return LEFT


async def left_waiting(target: Target, rng: random.Random) -> str:
    """Leaves while it waits for an answer in one piece."""
    body = chat(target, rng, max_tokens=120, ignore_eos=True)
    try:
        async with asyncio.timeout(rng.uniform(0.005, 0.5)):
            return await _post(target, "/v1/chat/completions", body)
    except TimeoutError:
        return LEFT


async def left_sending(target: Target, rng: random.Random) -> str:
    """Leaves in the middle of its own body."""
    url = urlsplit(str(target.http.base_url))
    _, writer = await asyncio.open_connection(url.hostname, url.port)
    body = json.dumps(chat(target, rng)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
    writer.write(
        head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body[: rng.randint(0, len(body) - 1)]
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    return LEFT


OK, REFUSED, MISSING = frozenset({"200"}), frozenset({"400"}), frozenset({"404"})
GONE = frozenset({LEFT, "200"})  # some are answered before they leave
KINDS = (
    Kind("chat", 20, answer, OK),
    Kind("chat, streamed", 25, stream, OK),
    Kind("chat with an image", 5, image, OK),
    Kind("responses", 4, responses, OK),
    Kind("responses, streamed", 6, responses_stream, OK),
    Kind("prompt scored", 8, scored, OK),
    Kind("tokenize", 4, tokens, OK),
    Kind("models, metrics, health", 4, reads, OK),
    Kind("invalid", 10, invalid, REFUSED),
    Kind("not JSON", 4, broken, REFUSED),
    Kind("unknown model or route", 4, unknown, MISSING),
    Kind("left mid-stream", 8, left_stream, GONE),
    Kind("left while waiting", 5, left_waiting, GONE),
    Kind("left while sending", 3, left_sending, GONE),
)
