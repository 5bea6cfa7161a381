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
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from server.errors import InvalidRequest, NotFound, RateLimited, Timeout, Unavailable
from server.worker.adapter_loading import AdapterLoader
from server.worker.frontend import Frontend, ServedModel
from server.worker.gates import gates_of
from server.worker.messages import (
    AdapterGates,
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ModelInfo,
    Started,
    Tokenized,
    TokenizeRequest,
)
from server.worker.scheduler import SequenceRejected
from server.worker.step_loop import Prepared, StepLoop

log = logging.getLogger(__name__)
T = TypeVar("T")

_IDLE_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class NativeEngine:
    def __init__(
        self,
        step_loop: StepLoop,
        frontend: Frontend,
        loader: AdapterLoader,
        models: list[ServedModel],
        *,
        max_requests: int,
    ) -> None:
        """`models`: the base first. `max_requests` counts those running and waiting together."""
        self._step_loop = step_loop
        self._frontend = frontend
        self._loader = loader
        self._models = {model.info.id: model for model in models}
        self._max_requests = max_requests
        self._requests = 0
        self._users: Counter[tuple[str, int]] = Counter()  # requests by adapter version
        self._released = asyncio.Condition()
        self._retiring: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[tuple[asyncio.Queue[Event], Event]] = []
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")
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
        self._preparing.shutdown(wait=False)
        for task in self._retiring:
            task.cancel()

    def models(self) -> list[ModelInfo]:
        return [model.info for model in self._models.values()]

    def stats(self) -> EngineStats:
        return replace(self._stats, adapters_loaded=len(self._models) - 1)

    async def tokenize(self, request: TokenizeRequest) -> Tokenized:
        model = self._frontend.find(self._models, request.model)
        ids = await self._prepare(lambda: self._frontend.tokenize(model, request.prompt))
        return Tokenized(tuple(ids), model.info.max_model_len)

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        self._frontend.find(self._models, request.model)
        return Detokenized(await self._prepare(lambda: self._frontend.detokenize(request.token_ids)))

    async def gates(self, id: str) -> AdapterGates:
        loaded = self._frontend.find(self._models, id).adapter
        if loaded is None:
            raise NotFound(f"{id!r} is the base model, which has no gates.", param="id")
        return await self._prepare(lambda: gates_of(loaded.adapter))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if not self._healthy:
            raise Unavailable("The engine stopped; the worker is restarting.", retry_after=5)
        if self._requests >= self._max_requests:
            raise RateLimited(
                f"{self._requests} requests are running or waiting, as many as this worker takes."
            )
        model = self._frontend.find(self._models, request.model)
        timeout = request.timeout_seconds
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._requests += 1
        self._users[model.key] += 1
        try:
            prepared = await self._prepare(lambda: self._frontend.prepare(model, request))
            yield Started(len(prepared.token_ids))
            async with aclosing(self._events(prepared, deadline)) as events:
                async for event in events:
                    yield event
        except TimeoutError:
            raise Timeout(f"The request took longer than its {timeout:g} seconds.") from None
        finally:
            self._requests -= 1
            self._users[model.key] -= 1
            if not self._users[model.key]:
                del self._users[model.key]
                await asyncio.shield(self._notify_released())

    async def load_adapter(
        self, id: str, path: str, options: Mapping[str, str] | None = None, version: int = 1
    ) -> ModelInfo:
        async with self._loading:
            load = self._loader.load_at_run_time
            model = await asyncio.to_thread(load, id, path, options or {}, version)
            replaced = self._models.get(id)
            self._models[id] = model
            if replaced is not None:
                self._retire(replaced)
            return model.info

    async def unload_adapter(self, id: str) -> asyncio.Task[None]:
        async with self._loading:
            model = self._models.get(id)
            if model is None or model.adapter is None:
                raise NotFound(f"No adapter {id!r} is loaded.", param="id", code="model_not_found")
            del self._models[id]
        return self._retire(model)

    def _retire(self, model: ServedModel) -> asyncio.Task[None]:
        """Let running requests finish with their version, then drop what was cached for it."""

        async def retire() -> None:
            async with self._released:
                await self._released.wait_for(lambda: model.key not in self._users)
            await self._ask(lambda: self._step_loop.forget(model.key))

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _notify_released(self) -> None:
        async with self._released:
            self._released.notify_all()

    async def _prepare(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    async def _events(self, prepared: Prepared, deadline: float | None) -> AsyncGenerator[Event, None]:
        """The step loop's events for one request. Raises TimeoutError at the deadline."""
        events: asyncio.Queue[Event] = asyncio.Queue()

        def add() -> None:
            self._step_loop.add(prepared, lambda event: self._outbox.append((events, event)))

        ended = False
        try:
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

    async def _ask(self, command: Callable[[], None]) -> None:
        """Run a command on the step thread, between two steps, and wait for it."""
        future: Future[None] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has left meanwhile
            try:
                command()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        if not self._healthy:
            raise Unavailable("The engine stopped; the worker is restarting.", retry_after=5)
        self._inbox.put(run)
        await asyncio.wrap_future(future)

    def _run(self) -> None:
        """The step thread."""
        try:
            while self._take_commands():
                if self._step_loop.has_work:
                    self._stats = self._step_loop.stats()  # what came and went is seen before the step's end
                    self._step_loop.step()
                self._stats = self._step_loop.stats()
                self._deliver()
        except Exception:
            log.exception("the step thread died")
        finally:
            self._healthy = False
            self._step_loop.fail_all(503, "The engine stopped before this request was finished.")
            self._deliver()

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

        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # the event loop is closed: nobody listens any more
            log.debug("%d events came after the end", len(outbox))
