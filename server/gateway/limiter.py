"""What each key may ask for: requests, tokens, and how many at once.

Requests and tokens are counted in sliding-window counters of the `limits` library, two numbers each, where
a moving window would remember every request and token. Gateways may share their store. The number at once
is this gateway's own, so that no crash can leave a place taken.

Tokens are only known afterwards. A generation therefore reserves an estimate here, which others of the
same key cannot have meanwhile, and what it took is charged when it ends, even where that is more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TypeVar
from weakref import WeakValueDictionary

from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.storage.base import SlidingWindowCounterSupport as Counters
from limits.errors import StorageError

from server.errors import RateLimited
from server.gateway.keys import Caller
from server.gateway.rates import Rate, Window
from server.serving import StartupError
from server.worker.messages import Delta, Event, Finished, Started

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

RATE_HEADERS = tuple(
    f"x-ratelimit-{part}-{what}"
    for what in ("requests", "tokens")
    for part in ("limit", "remaining", "reset")
)

_ANY = 2**53  # no limit: what was used is charged, whatever is left
_STORE_SECONDS = 1.0  # for the store to answer
_STORE_AWAY_SECONDS = 5.0  # until one that did not is asked again


_calling: ContextVar[str] = ContextVar("calling", default="")  # the name of whose request this is


class Shares:
    """`total` places, of which the requests of one caller have `each` at most; more wait for theirs."""

    def __init__(self, total: int, each: int) -> None:
        self._all = asyncio.Semaphore(total)
        self._each = each
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # while in use

    async def take(self) -> Callable[[], None]:
        """A place for the current request's caller, and what gives it back, from the same loop."""
        name = _calling.get()
        own = self._own.get(name) or self._own.setdefault(name, asyncio.Semaphore(self._each))
        await own.acquire()  # before those of all: who has enough does not stand in others' way
        try:
            await self._all.acquire()
        except BaseException:
            own.release()
            raise

        def give_back() -> None:
            self._all.release()
            own.release()

        return give_back


class Spending:
    """What one request has taken so far."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self._completions: Counter[int] = Counter()

    def see(self, index: int, event: Event, counts_prompt: bool) -> None:
        """`event` of the choice `index`; a prompt that several choices share is counted for one of them."""
        match event:
            case Started() if counts_prompt:
                self.prompt_tokens += event.prompt_tokens
            case Delta():
                self._completions[index] += len(event.token_ids)
            case Finished():  # knows also of tokens that are in no delta, such as the stop token
                self._completions[index] = max(self._completions[index], event.usage.completion_tokens)

    @property
    def completion_tokens(self) -> int:
        return self._completions.total()

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Limiter:
    """Raises `RateLimited`, with the seconds after which the same request fits, for what is over a quota."""

    def __init__(self, store_url: str) -> None:
        self._store = _Store(store_url)
        self._running: Counter[str] = Counter()  # by the caller's name; no entry where it is 0
        self._reserved: Counter[str] = Counter()

    async def close(self) -> None:
        await self._store.close()

    @asynccontextmanager
    async def admitted(self, caller: Caller, headers: dict[str, str]) -> AsyncIterator[None]:
        """One request of `caller`, counted; puts OpenAI's `x-ratelimit-*` into `headers`."""
        most = caller.quota.concurrency
        if most is not None and self._running[caller.name] >= most:
            raise RateLimited(f"{most} requests of this key run already; try again.")
        with _held(self._running, caller.name, 1), _called(caller.name):
            requests, tokens = caller.quota.requests, caller.quota.tokens
            wait = await self._debt(caller, tokens, headers) if tokens else 0.0
            if requests:
                await self._count_request(caller, requests, headers, counts=wait <= 0)
            if tokens and wait > 0:
                raise _out_of("tokens", tokens, wait)
            yield

    @asynccontextmanager
    async def spending(self, caller: Caller, estimate: int) -> AsyncIterator[Spending]:
        """A generation that is expected to take `estimate` tokens; what it is seen to take is charged."""
        spending = Spending()
        rate = caller.quota.tokens
        if rate is None:
            yield spending
            return
        estimate = min(estimate, rate.amount)  # one that can never fit has to wait for an empty window
        window = await self._tokens(caller, rate)
        needed = self._reserved[caller.name] + estimate
        if needed > rate.amount or (wait := window.wait(rate.amount, needed)) > 0:
            raise _out_of("tokens", rate, 1.0 if needed > rate.amount else wait)
        with _held(self._reserved, caller.name, estimate):
            try:
                yield spending
            finally:
                if spending.tokens:
                    await self._charge(caller, rate, spending.tokens)

    async def _count_request(
        self, caller: Caller, rate: Rate, headers: dict[str, str], *, counts: bool
    ) -> None:
        """One that is refused for another reason does not count, but is told the same."""
        key = _key("requests", caller, rate)
        counted = not counts or await self._store.ask(
            lambda counter: _add(counter, key, rate, 1, rate.amount)
        )
        window = await self._store.ask(lambda counter: _window(counter, key, rate))
        left = rate.amount - int(window.used)
        headers |= _headers("requests", rate, left, window)
        if not counted:
            raise _out_of("requests", rate, window.wait(rate.amount, 1))

    async def _debt(self, caller: Caller, rate: Rate, headers: dict[str, str]) -> float:
        """Seconds until there is a token left; not over 0 where there is one."""
        window = await self._tokens(caller, rate)
        left = rate.amount - int(window.used) - self._reserved[caller.name]
        headers |= _headers("tokens", rate, left, window)
        return window.wait(rate.amount, 1)

    async def _tokens(self, caller: Caller, rate: Rate) -> Window:
        return await self._store.ask(lambda counter: _window(counter, _key("tokens", caller, rate), rate))

    async def _charge(self, caller: Caller, rate: Rate, tokens: int) -> None:
        key = _key("tokens", caller, rate)
        await self._store.ask(lambda counter: _add(counter, key, rate, tokens, _ANY))


async def _add(counter: Counters, key: str, rate: Rate, amount: int, limit: int) -> bool:
    """Count `amount`, unless that makes it more than `limit`."""
    return await counter.acquire_sliding_window_entry(key, limit, rate.seconds, amount)


async def _window(counter: Counters, key: str, rate: Rate) -> Window:
    previous, previous_left, current, current_left = await counter.get_sliding_window(key, rate.seconds)
    left = max(0.0, current_left - rate.seconds)  # its entry outlives its window by another one
    return Window(previous, previous_left, current, left, rate.seconds)


@contextmanager
def _held(counter: Counter[str], name: str, amount: int) -> Iterator[None]:
    """`amount` more of `name` in `counter`, for as long as the block runs."""
    counter[name] += amount
    try:
        yield
    finally:
        counter[name] -= amount
        if not counter[name]:
            del counter[name]


@contextmanager
def _called(name: str) -> Iterator[None]:
    token = _calling.set(name)
    try:
        yield
    finally:
        _calling.reset(token)


class _Store:
    """The configured store; this process's memory while that one does not answer."""

    def __init__(self, url: str) -> None:
        self._memory = MemoryStorage()
        self._shared: RedisStorage | None = None
        self._away_until = 0.0
        if url != "memory://":
            self._shared, self._close_shared = _redis(url)

    async def close(self) -> None:
        if self._shared:
            await self._close_shared()

    async def ask(self, question: Callable[[Counters], Awaitable[Answer]]) -> Answer:
        if self._shared and time.monotonic() >= self._away_until:
            try:
                return await question(self._shared)
            except StorageError as error:
                self._away_until = time.monotonic() + _STORE_AWAY_SECONDS
                cause = type(error.storage_error).__name__  # its text may have the store's address
                log.warning("the limits' store does not answer: counting here", extra={"cause": cause})
        return await question(self._memory)


def _redis(url: str) -> tuple[RedisStorage, Callable[[], Awaitable[None]]]:
    """The store at `url`, and what closes its connections. Raises `StartupError`."""
    try:
        from redis.asyncio import BlockingConnectionPool
        from redis.exceptions import RedisError
    except ModuleNotFoundError:
        raise StartupError(
            "limits_store names a Redis, and redis is not installed; install llama-adapter-server[redis]."
        ) from None
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=64,
            timeout=_STORE_SECONDS,
            socket_timeout=_STORE_SECONDS,
            socket_connect_timeout=_STORE_SECONDS,
        )
        pool.connection_class(**pool.connection_kwargs)  # not connected; an unknown option is refused here
    except (ValueError, TypeError, RedisError):
        raise StartupError(
            "limits_store must be memory:// or the URL of a Redis, such as redis://host:6379/0, with options "
            "that its client knows."
        ) from None
    storage = RedisStorage(
        "async+redis://",
        wrap_exceptions=True,
        implementation="redispy",
        key_prefix="llama-adapter",
        connection_pool=pool,  # type: ignore[arg-type]  # `limits` documents it and types it away
    )
    return storage, pool.disconnect


def _key(what: str, caller: Caller, rate: Rate) -> str:
    """Not of the amount: what was used counts against a limit that is changed meanwhile, too."""
    return f"{what}/{caller.name}/{rate.seconds}"


def _out_of(what: str, rate: Rate, wait: float) -> RateLimited:
    return RateLimited(
        f"This key may use {rate.amount} {what} in {rate.seconds} s; try again in {wait:.1f} s.",
        retry_after=wait,
    )


def _headers(what: str, rate: Rate, left: int, window: Window) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(rate.amount),
        f"x-ratelimit-remaining-{what}": str(max(0, left)),
        f"x-ratelimit-reset-{what}": f"{window.wait(rate.amount, rate.amount):.3f}s",
    }
