"""What the engines have in common: models by id, the life of a request and of an adapter's versions.

What computes is a subclass's: it turns a prepared request into events, takes adapters and forgets them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import TypeVar

import torch

from models.errors import ModelError
from server.errors import InvalidRequest, NotFound, RateLimited, Timeout, Unavailable
from server.worker.adapter_loading import AdapterLoader
from server.worker.frontend import Frontend, ServedModel
from server.worker.gates import gates_of
from server.worker.messages import (
    AdapterGates,
    Detokenized,
    DetokenizeRequest,
    Event,
    GenerateRequest,
    ModelInfo,
    Started,
    Tokenized,
    TokenizeRequest,
)
from server.worker.request import Prepared

T = TypeVar("T")


_PAUSE = 0.01  # seconds; a part of an adapter's reading takes half a millisecond of a core


def _step_back() -> None:
    """Let this thread have a tenth of what others want too: adapters are not awaited as tokens are.

    Not less: an encoder is read here as well, beside whatever else the machine does.
    """
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(10, os.getpriority(os.PRIO_PROCESS, thread)))


class EngineBase(ABC):
    def __init__(
        self, frontend: Frontend, loader: AdapterLoader, models: list[ServedModel], *, max_requests: int
    ) -> None:
        """`models`: the base first. `max_requests` counts those running and waiting together."""
        self._frontend = frontend
        self._loader = loader
        self._models = {model.info.id: model for model in models}
        self._max_requests = max_requests
        self._requests = 0
        self._users: Counter[tuple[str, int]] = Counter()  # requests by adapter version
        self._released = asyncio.Condition()
        self._retiring: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="adapters", initializer=_step_back)

    @property
    @abstractmethod
    def healthy(self) -> bool: ...

    @abstractmethod
    def _events(self, prepared: Prepared, deadline: float | None) -> AsyncGenerator[Event, None]:
        """One request's events after `Started`. Raises TimeoutError at the deadline; closing it aborts."""

    async def _take(self, model: ServedModel) -> None:  # noqa: B027 - nothing to do is an answer
        """A new version of an adapter, before the first request for it. Raises `ModelError`."""

    @abstractmethod
    async def _forget(self, key: tuple[str, int]) -> None:
        """A version that no request will ever use again."""

    def models(self) -> list[ModelInfo]:
        return [model.info for model in self._models.values()]

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
        if not self.healthy:
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
            async with asyncio.timeout_at(deadline):
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
            try:
                model = await self._on(
                    self._reading, lambda: load(id, path, options or {}, version, self._let_others_go_on)
                )
                await self._take(model)
            except ModelError as error:
                raise InvalidRequest(str(error), param="path", code="invalid_adapter") from error
            except torch.OutOfMemoryError as error:
                raise Unavailable(
                    f"The device's memory has no room for adapter {id!r}; unload another one, or start the "
                    "worker with a smaller kv_cache_mib.",
                    retry_after=60,
                ) from error
            replaced = self._models.get(id)
            self._models[id] = model
            if replaced is not None:
                self._retire(replaced)
            return model.info

    def _let_others_go_on(self) -> None:
        """On the reading thread, between two parts of its work: no step is late by more than one of them."""
        if self._requests:
            time.sleep(_PAUSE)

    async def unload_adapter(self, id: str) -> asyncio.Task[None]:
        async with self._loading:
            model = self._models.get(id)
            if model is None or model.adapter is None:
                raise NotFound(f"No adapter {id!r} is loaded.", param="id", code="model_not_found")
            del self._models[id]
        return self._retire(model)

    def _retire(self, model: ServedModel) -> asyncio.Task[None]:
        """Let running requests finish with their version, then forget it."""

        async def retire() -> None:
            async with self._released:
                await self._released.wait_for(lambda: model.key not in self._users)
            with suppress(Unavailable):  # an engine that stops forgets everything
                await self._forget(model.key)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _notify_released(self) -> None:
        async with self._released:
            self._released.notify_all()

    async def _prepare(self, work: Callable[[], T]) -> T:
        return await self._on(self._preparing, work)

    async def _on(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def _close(self) -> None:
        """Once nothing computes any more."""
        for threads in (self._preparing, self._reading):
            threads.shutdown(wait=False)
        for task in self._retiring:
            task.cancel()
