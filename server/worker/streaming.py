"""One request's events as JSON lines, for as long as somebody reads them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, ServerFailure, Unavailable
from server.metrics import GenerationObserver
from server.serving import Drain
from server.worker.messages import EVENT, Event, Failed, PromptScored
from server.worker.tracing import GenerationTrace

log = logging.getLogger(__name__)

_QUIET_SECONDS = 10.0  # without a line; gateways wait 120 s for one (`worker_read_seconds`)


class EventStream(Response):
    """Sends `events` as `application/x-ndjson`.

    An error before the first event is an HTTP status with the OpenAI error body, afterwards a `Failed`
    line. Whatever ends the response, also a closed connection, closes the generator at once. While there is
    no event, empty lines say that the engine works on: a request may wait long for its turn, or for text
    that can be shown.
    """

    media_type = "application/x-ndjson"

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        observer: GenerationObserver,
        trace: GenerationTrace,
        drain: Drain,
        steps: Callable[[], int],
    ) -> None:
        """`steps` the engine has made so far."""
        super().__init__()
        del self.headers["content-length"]
        self._events = events
        self._observer = observer
        self._trace = trace
        self._drain = drain
        self._steps = steps
        self._started = False
        self._num_lines = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        produced = asyncio.create_task(self._produce(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        expired = asyncio.create_task(self._drain.expired.wait())
        works = asyncio.create_task(self._tell_that_it_works(send))
        try:
            await asyncio.wait({produced, gone, expired}, return_when=asyncio.FIRST_COMPLETED)
            if expired.done() and not (produced.done() or gone.done()):
                await _cancelled(produced)
                error = Unavailable("The worker is shutting down.")
                await self._fail(error, scope, receive, send)
        finally:
            await _cancelled(produced, gone, expired, works)
            await self._events.aclose()
            self._trace.close()

    async def _produce(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for event in self._events:
                self._observer.see(event)
                self._trace.see(event)
                await self._write(event, send)
                if isinstance(event, PromptScored):  # pieces take a millisecond each and come many at once
                    await asyncio.sleep(0)
            if not self._started:
                raise RuntimeError("the engine ended a request without an event")
        except ApiError as error:
            await self._fail(error, scope, receive, send)
        except Exception:
            log.exception("a request failed")
            bug = ServerFailure("The worker failed on this request; its log says why.")
            await self._fail(bug, scope, receive, send)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, event: Event, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        line = EVENT.dump_json(event) + b"\n"
        await send({"type": "http.response.body", "body": line, "more_body": True})
        self._num_lines += 1

    async def _tell_that_it_works(self, send: Send) -> None:
        """Only while the engine steps: silence is what tells the gateway of one that hangs."""
        while True:
            lines, steps = self._num_lines, self._steps()
            await asyncio.sleep(_QUIET_SECONDS)
            if lines and lines == self._num_lines and steps != self._steps():
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._started:
            response = JSONResponse(error.body(), error.status, error.headers())
            await response(scope, receive, send)
            return
        await self._write(Failed(error.status, error.message, error.type, error.code, error.param), send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
