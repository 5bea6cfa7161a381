"""An expert with what guards the gateway from it: a deadline, a bound on calls at once, a circuit breaker."""

from __future__ import annotations

import asyncio
import logging
import time

from experts.contract import BadImage, Busy, Expert, Reading
from server.gateway.clients.breaker import CircuitBreaker, Permit
from server.gateway.tasks import cancelled

log = logging.getLogger(__name__)

CONFIRM_SECONDS = 60.0  # an expert in use is asked so often, by a reading or else, whether its version holds


class Skipped(Exception):
    """The expert was not asked: it failed too often of late."""


class GuardedExpert:
    """`seconds` bound a reading, its turn included; `concurrency` readings are under way at once."""

    def __init__(self, expert: Expert, seconds: float, concurrency: int, breaker: CircuitBreaker) -> None:
        self._expert = expert
        self._seconds = seconds
        self._turns = asyncio.Semaphore(concurrency)
        self._breaker = breaker
        self._answered = 0  # calls, with a reading or with what is wrong with the image
        self._loading: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._confirmed = 0.0  # when the version was last told, or asked for

    @property
    def version(self) -> str:
        return self._expert.version

    @property
    def circuit_open(self) -> bool:
        return self._breaker.open

    def start(self) -> None:
        """Begin to load. Readings wait for it; nobody else does."""
        self._confirmed = time.monotonic()
        self._loading = asyncio.create_task(self._expert.load())

    def keep_current(self) -> None:
        """Have the version asked for if it is an old one; nobody waits for it.

        Whoever finds readings by `version` calls it: these alone would hide for ever that the expert changed.
        """
        idle = self._refreshing is None or self._refreshing.done()
        if idle and time.monotonic() - self._confirmed >= CONFIRM_SECONDS:
            self._refreshing = asyncio.create_task(self._refresh())

    async def close(self) -> None:
        await cancelled([task for task in (self._loading, self._refreshing) if task is not None])
        await self._expert.close()

    async def read(self, image: bytes) -> Reading:
        """Raises `Skipped`, `TimeoutError`, or what the expert raises."""
        permit = self._breaker.enter(time.monotonic())
        if permit is None:
            raise Skipped
        asked, answered = False, self._answered
        try:
            async with asyncio.timeout(self._seconds):
                assert self._loading is not None, "read before start"
                await asyncio.shield(self._loading)
                async with self._turns:
                    asked = True
                    reading = await self._expert.read(image)
        except (asyncio.CancelledError, Busy):
            self._leave(permit, None)
            raise
        except BadImage:
            self._leave(permit, True)  # it did answer
            raise
        except TimeoutError:
            # An expert that was not asked yet loads, or has much to do. One that answered others meanwhile
            # reads one after another, and this picture was at the back.
            silent = asked and self._answered == answered
            self._leave(permit, False if silent else None)
            raise
        except Exception:
            self._leave(permit, False)
            raise
        self._leave(permit, True)
        self._confirmed = time.monotonic()
        return reading

    async def _refresh(self) -> None:
        try:
            await self._expert.refresh()
        except Exception as error:
            extra = {"expert": self._expert.name, "cause": str(error)}
            log.warning("an expert did not tell its version", extra=extra)
        finally:
            self._confirmed = time.monotonic()

    def _leave(self, permit: Permit, succeeded: bool | None) -> None:
        self._answered += bool(succeeded)
        self._breaker.leave(permit, succeeded, time.monotonic())
