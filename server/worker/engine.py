"""The native engine behind the `Engine` contract: an event loop in front, a step thread behind.

Commands go to the step thread through one queue and take effect between steps; a step's events come
back in one call. All that computes runs on the step thread, so that torch keeps one thread pool;
what a request needs beforehand (template, tokens, image decoding) is done on threads of its own.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from server.errors import InvalidRequest, Unavailable
from server.worker.adapter_loading import AdapterLoader
from server.worker.device import use_device
from server.worker.engine_base import EngineBase
from server.worker.frontend import Frontend, ServedModel
from server.worker.messages import EngineStats, Event, Failed, Finished
from server.worker.request import Prepared
from server.worker.scheduler import SequenceRejected
from server.worker.step_loop import StepLoop

log = logging.getLogger(__name__)

T = TypeVar("T")

_END = object()
_IDLE_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class NativeEngine(EngineBase):
    def __init__(
        self,
        step_loop: StepLoop,
        frontend: Frontend,
        loader: AdapterLoader,
        models: list[ServedModel],
        *,
        max_requests: int,
    ) -> None:
        super().__init__(frontend, loader, models, max_requests=max_requests)
        self._step_loop = step_loop
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[tuple[asyncio.Queue[Event], Event]] = []
        self._asked: set[Future[Any]] = set()  # commands that somebody waits for
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stats = _IDLE_STATS
        self._healthy = True

    @property
    def healthy(self) -> bool:
        return self._healthy

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._healthy = False
        self._close()

    def stats(self) -> EngineStats:
        return replace(self._stats, adapters_loaded=len(self._models) - 1, max_requests=self._max_requests)

    async def _take(self, model: ServedModel) -> None:
        """Fill its slots before its first request can come, a part of the work between two steps."""
        if model.adapter is None:
            return
        runner, loaded = self._step_loop.runner, model.adapter
        use_room = await self._on(self._reading, lambda: runner.room_for(loaded, self._let_others_go_on))
        filling = runner.filling(loaded, use_room)
        try:
            while await self._ask(lambda: next(filling, _END)) is not _END:
                pass
        except BaseException:  # whoever loads it has left: nobody will use what is filled
            self._inbox.put(lambda: self._step_loop.forget(model.key))
            raise

    async def _forget(self, key: tuple[str, int]) -> None:
        await self._ask(lambda: self._step_loop.forget(key))

    async def _events(self, prepared: Prepared, deadline: float | None) -> AsyncGenerator[Event, None]:
        """The step loop's events for one request. Raises TimeoutError at the deadline."""
        events: asyncio.Queue[Event] = asyncio.Queue()

        def add() -> None:
            self._step_loop.add(prepared, lambda event: self._outbox.append((events, event)))

        ended = False
        try:
            async with asyncio.timeout_at(deadline):
                await self._ask(add)
            while not ended:
                async with asyncio.timeout_at(deadline):
                    event = await events.get()
                ended = isinstance(event, Finished | Failed)
                yield event
        except SequenceRejected as error:
            ended = True
            raise InvalidRequest(str(error)) from error
        finally:
            if not ended:
                self._inbox.put(lambda: self._step_loop.abort(prepared.request_id))

    async def _ask(self, command: Callable[[], T]) -> T:
        """Run a command on the step thread, between two steps, and wait for what it gives."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has left meanwhile
            try:
                result = command()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        if not self._healthy:
            raise _stopped()
        self._asked.add(future)
        self._inbox.put(run)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._asked.discard(future)

    def _run(self) -> None:
        """The step thread."""
        try:
            use_device(self._step_loop.runner.base.device)
            while self._take_commands():
                if self._step_loop.has_work:
                    self._stats = self._step_loop.stats()  # what came and went is seen before the step's end
                    self._step_loop.step(self._deliver)
                self._stats = self._step_loop.stats()
                self._deliver()
        except Exception:
            log.exception("the step thread died")
        finally:
            self._healthy = False
            self._step_loop.fail_all(503, "The engine stopped before this request was finished.")
            self._deliver()
            self._call(self._refuse_asked)

    def _refuse_asked(self) -> None:
        """What still lies in the inbox, nobody will run. On the event loop, where `_ask` looks first."""
        for future in self._asked:
            if not future.done():
                future.set_exception(_stopped())

    def _take_commands(self) -> bool:
        """Run what waits in the inbox, waiting for something while there is no work; False to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self._step_loop.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            if self._inbox.empty():
                return True

    def _deliver(self) -> None:
        """Hand the step's events to the event loop, all in one call."""
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, []

        def put() -> None:
            for events, event in outbox:
                events.put_nowait(event)

        self._call(put)

    def _call(self, function: Callable[[], None]) -> None:
        """Let the event loop call it."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the event loop is closed: nobody listens any more
            log.debug("events came after the end")


def _stopped() -> Unavailable:
    return Unavailable("The engine stopped; the worker is restarting.", retry_after=5)
