"""All workers: who is ready, who holds which model, who has how much to do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TypeVar

from server.errors import (
    ApiError,
    Conflict,
    GivenUp,
    NotFound,
    ServerFailure,
    Timeout,
    Unavailable,
    model_not_found,
)
from server.gateway.clients.routing import choose, prefix_key
from server.gateway.clients.workers import BrokeOff, Unreachable, WorkerClient
from server.gateway.tasks import cancelled
from server.settings import GatewaySettings
from server.worker.messages import (
    AdapterGates,
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    Event,
    GenerateRequest,
    LoadAdapterRequest,
    ModelInfo,
    Scheduled,
    Started,
    Tokenized,
    TokenizeRequest,
)

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# In a row, until a worker is not ready, and what waits for its first token goes to another one that has the
# model. One alone may only be busy; without a second worker everybody would be refused.
_SILENT_POLLS = 3
_LOST_POLLS = 3  # in a row that could not even connect, which a worker that is only slow lets us do

# Workers that may fail on one request: it may be what they die of, and would take all of them with it. Who
# only refuses it, or cannot be connected to, does not count.
_MOST_FAILURES = 2
_FAILURES = (BrokeOff, Timeout, ServerFailure)


@dataclass(eq=False, slots=True)
class Worker:
    """What is known of one worker, as of the last poll."""

    client: WorkerClient
    name: str  # in metrics
    ready: bool = False
    models: dict[str, ModelInfo] = field(default_factory=dict)
    stats: EngineStats | None = None
    in_flight: int = 0  # this gateway's own requests
    others: int = 0  # requests of anybody else, at the last poll
    polled: bool = False
    silent_polls: int = 0  # in a row that got no answer
    lost_polls: int = 0  # in a row that found nobody
    _heard: float = field(default_factory=time.monotonic)  # when anything came from it
    # Of each `next` that waits, for what model; None where its answer has begun.
    _patience: dict[asyncio.Timeout, str | None] = field(default_factory=dict)

    @property
    def load(self) -> int:
        return self.in_flight + self.others

    @property
    def base(self) -> str:
        return next((info.id for info in self.models.values() if info.kind == "base"), "")

    async def poll(self, seconds: float) -> None:
        """Look again; a failure makes it unready, keeping what is known.

        So do `_SILENT_POLLS` in a row without an answer within `seconds`; fewer change nothing.
        """
        was_ready = self.ready if self.polled else None
        self.polled, cause = True, ""
        try:
            ready = await self.client.ready(seconds)
            if ready:
                models = await self.client.models(seconds)
                self.models = {info.id: info for info in models}
                self.stats = await self.client.stats(seconds)
                self.others = max(0, self.stats.running + self.stats.waiting - self.in_flight)
            self.ready = ready
            self.silent_polls = self.lost_polls = 0
            self._heard = time.monotonic()
        except ApiError as error:
            self.silent_polls += isinstance(error, (Unreachable, Timeout))
            if not isinstance(error, Timeout) or self.silent_polls >= _SILENT_POLLS:
                self.ready = False
            self.lost_polls = self.lost_polls + 1 if isinstance(error, Unreachable) else 0
            reason = str(error.__cause__) if isinstance(error, Unreachable) else ""
            cause = reason or error.message
        if self.ready != was_ready:
            self._tell_readiness(was_ready, cause)

    def _tell_readiness(self, was_ready: bool | None, cause: str) -> None:
        word = "ready" if self.ready else "not ready" if was_ready else "not ready yet"
        level = logging.WARNING if was_ready and cause else logging.INFO
        why = {"cause": cause} if cause else {}
        log.log(level, "a worker is %s", word, extra={"worker": self.client.url, **why})

    @property
    def silent_seconds(self) -> float:
        """Since anything came from it: an answer to a poll, or an event of any request."""
        return time.monotonic() - self._heard

    async def next(self, events: AsyncGenerator[Event, None], model: str | None) -> Event | None:
        """The next event, None at the end. Raises `BrokeOff` if the worker is given up meanwhile.

        `model` is what the answer is of, None where it has begun.
        """
        try:
            async with asyncio.timeout(None) as patience:
                self._patience[patience] = model
                try:
                    event = await anext(events, None)
                finally:
                    del self._patience[patience]
        except TimeoutError as error:
            raise BrokeOff("The worker cannot be reached; try again.") from error
        self._heard = time.monotonic()
        return event

    def give_up(self, models: Collection[str] | None = None) -> None:
        """End every `next` that waits, or only those of answers of `models` that have not begun."""
        now = asyncio.get_running_loop().time()
        for patience, model in self._patience.items():
            if models is None or model in models:
                patience.reschedule(now)

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class WorkerPool:
    """Polls the workers every `poll_seconds` between `start` and `close`.

    One that cannot be connected to, and has said nothing for `lost_seconds`, is lost with what it has begun.
    """

    def __init__(self, workers: list[WorkerClient], poll_seconds: float, lost_seconds: float) -> None:
        names = _names([client.url for client in workers])
        self.workers = [Worker(client, name) for client, name in zip(workers, names, strict=True)]
        self._poll_seconds = poll_seconds
        self._poll_timeout = max(1.0, poll_seconds)  # for a poll's answer
        self._lost_seconds = lost_seconds
        self._polls: list[asyncio.Task[None]] = []
        self._loading: set[asyncio.Task[ModelInfo]] = set()

    @classmethod
    def of(cls, settings: GatewaySettings) -> WorkerPool:
        """Over the workers at `worker_urls`."""
        connect, read = settings.worker_connect_seconds, settings.worker_read_seconds
        clients = [WorkerClient(url, connect, read) for url in settings.worker_urls]
        return cls(clients, settings.worker_poll_seconds, settings.worker_lost_seconds)

    async def start(self) -> None:
        await asyncio.gather(*(worker.poll(self._poll_timeout) for worker in self.workers))
        self._polls = [asyncio.create_task(self._poll_forever(worker)) for worker in self.workers]

    async def close(self) -> None:
        await cancelled([*self._polls, *self._loading])
        await asyncio.gather(*(worker.client.close() for worker in self.workers))

    async def _poll_forever(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await worker.poll(self._poll_timeout)
                if worker.lost_polls >= _LOST_POLLS and worker.silent_seconds >= self._lost_seconds:
                    worker.give_up()
                elif worker.silent_polls >= _SILENT_POLLS:
                    worker.give_up({id for other in self.workers if other.ready for id in other.models})
            except Exception:
                log.exception("polling a worker failed")
                worker.ready = False

    @property
    def ready(self) -> bool:
        return any(worker.ready for worker in self.workers)

    @property
    def all_ready(self) -> bool:
        return all(worker.ready for worker in self.workers)

    def stats(self) -> list[tuple[str, str, EngineStats | None]]:
        """(name, base's id, last snapshot) of each worker; the snapshot of one that is not ready is None."""
        return [(w.name, w.base, w.stats if w.ready else None) for w in self.workers]

    def models(self) -> list[ModelInfo]:
        """Each model that a ready worker holds, bases first, once."""
        held = {
            info.id: info
            for worker in reversed(self.workers)
            if worker.ready
            for info in worker.models.values()
        }
        return sorted(held.values(), key=lambda info: (info.kind != "base", info.id))

    def holdings(self, id: str) -> list[ModelInfo]:
        """What each ready worker that holds this id says of it."""
        return [worker.models[id] for worker in self.workers if worker.ready and id in worker.models]

    def capacity(self, model: str) -> int | None:
        """How many requests all its workers, ready or not, take at once. None if one has never told."""
        may_hold = [worker for worker in self.workers if model in worker.models or not worker.models]
        each = [worker.stats.max_requests if worker.stats else 0 for worker in may_hold]
        return sum(each) if all(each) else None

    def model(self, id: str) -> ModelInfo:
        """Raises `NotFound` for an unknown id, `Unavailable` where nobody can say now."""
        return self._usable(id, ())[0].models[id]

    def _choose(self, request: GenerateRequest, tried: Collection[Worker]) -> Worker:
        """See `routing`. Raises as `model` does."""
        usable = {worker.client.url: worker for worker in self._usable(request.model, tried)}
        loads = {url: worker.load for url, worker in usable.items()}
        return usable[choose(prefix_key(request), loads)]

    def _usable(self, model: str, tried: Collection[Worker]) -> list[Worker]:
        """Who is ready, holds the model and was not tried; of these who answered the last poll, if any did.

        Never empty: raises as `model` does.
        """
        holders = [worker for worker in self.workers if model in worker.models]
        usable = [worker for worker in holders if worker.ready and worker not in tried]
        if usable:
            return [worker for worker in usable if not worker.silent_polls] or usable
        if holders or not self.ready:
            raise Unavailable("No worker is ready to serve this model; try again.")
        raise model_not_found(model)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of the best worker; one that fails before its first token is replaced by the next.

        So is one that says nothing any more, while another may do better. Raises `BrokeOff` where a worker
        is lost in the middle of its answer, and `GivenUp` where `_MOST_FAILURES` have failed.
        """
        tried: dict[Worker, ApiError] = {}
        told: set[type[Event]] = set()  # what precedes the first token is told once, whoever says it
        while True:
            worker = self._choose(request, tried)
            begun = False
            try:
                with worker.counted():
                    async with aclosing(worker.client.generate(request)) as events:
                        while event := await worker.next(events, None if begun else request.model):
                            begun = begun or not isinstance(event, (Started, Scheduled))
                            if begun or type(event) not in told:
                                told.add(type(event))
                                yield event
                return
            except ApiError as error:
                tried[worker] = error
                if not self._elsewhere(worker, request.model, tried) or begun:
                    raise

    def _elsewhere(self, worker: Worker, model: str, tried: dict[Worker, ApiError]) -> bool:
        """Whether another worker may do better than `worker`, the last one of `tried`.

        Raises `GivenUp` where `_MOST_FAILURES` have failed.
        """
        error = tried[worker]
        if isinstance(error, Unreachable):
            worker.ready = False  # until the next poll says otherwise
        if error.status < 500 and error.status not in (404, 429):
            return False
        log.warning(
            "a worker failed on a request", extra={"worker": worker.client.url, "cause": error.message}
        )
        if sum(isinstance(failure, _FAILURES) for failure in tried.values()) >= _MOST_FAILURES:
            raise GivenUp(
                f"{_MOST_FAILURES} workers have failed on this request, which may be what they fail on; "
                "do not repeat it as it is."
            ) from error
        return any(w.ready and model in w.models and w not in tried for w in self.workers)

    async def gates(self, id: str) -> AdapterGates:
        """Raises `NotFound` for the base and for an unknown id."""
        return await self._ask(id, lambda client: client.gates(id))

    async def tokenize(self, request: TokenizeRequest) -> Tokenized:
        return await self._ask(request.model, lambda client: client.tokenize(request))

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        return await self._ask(request.model, lambda client: client.detokenize(request))

    async def _ask(self, model: str, question: Callable[[WorkerClient], Awaitable[Answer]]) -> Answer:
        tried: dict[Worker, ApiError] = {}
        while True:
            worker = min(self._usable(model, tried), key=lambda worker: worker.load)
            try:
                return await question(worker.client)
            except ApiError as error:
                tried[worker] = error
                if not self._elsewhere(worker, model, tried):
                    raise

    async def load_adapter(self, request: LoadAdapterRequest) -> ModelInfo:
        """Load it on every ready worker, or on none: where one refuses, the others give it back.

        So it is also where whoever asked does not wait for it.
        """
        loading = asyncio.create_task(self._load_on_each(request))
        self._loading.add(loading)
        loading.add_done_callback(self._loaded)
        return await asyncio.shield(loading)

    def _loaded(self, loading: asyncio.Task[ModelInfo]) -> None:
        self._loading.discard(loading)
        if not loading.cancelled() and (error := loading.exception()):
            log.info("an adapter was not loaded", extra={"cause": str(error)})

    async def _load_on_each(self, request: LoadAdapterRequest) -> ModelInfo:
        workers = self._ready_workers()
        had = {worker for worker in workers if request.id in worker.models}
        results = await self._on_each(workers, lambda client: client.load_adapter(request))
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            loaded = [
                w for w, r in zip(workers, results, strict=True) if isinstance(r, ModelInfo) and w not in had
            ]
            await self._on_each(loaded, lambda client: client.unload_adapter(request.id, 0))
            raise errors[0]
        return next(result for result in results if isinstance(result, ModelInfo))

    async def unload_adapter(self, id: str, seconds: float) -> None:
        """Unload it wherever it is, and wait for its requests, which take `seconds` at most.

        Raises `NotFound` where no worker has it.
        """
        holders = [worker for worker in self._ready_workers() if id in worker.models]
        if not holders:
            raise NotFound(f"No adapter {id!r} is loaded; GET /v1/adapters lists them.", param="id")
        if any(worker.models[id].kind == "base" for worker in holders):
            raise Conflict(f"{id!r} is the base model; it cannot be unloaded.")
        for result in await self._on_each(holders, lambda client: client.unload_adapter(id, seconds)):
            if isinstance(result, BaseException):
                raise result

    def _ready_workers(self) -> list[Worker]:
        workers = [worker for worker in self.workers if worker.ready]
        if not workers:
            raise Unavailable("No worker is ready; try again.")
        return workers

    async def _on_each(
        self, workers: list[Worker], change: Callable[[WorkerClient], Awaitable[Answer]]
    ) -> list[Answer | BaseException]:
        results = await asyncio.gather(*(change(worker.client) for worker in workers), return_exceptions=True)
        await asyncio.gather(*(worker.poll(self._poll_timeout) for worker in workers))
        return results


def _names(urls: Sequence[str]) -> list[str]:
    """A socket's name without its folder, which `serve` makes anew each time, if that tells them apart."""
    names = [PurePath(url).stem if url.startswith("unix:") else url for url in urls]
    return names if len(set(names)) == len(names) else list(urls)
