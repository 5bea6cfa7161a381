"""The gateway before a worker that says what a test has it say, at the moment the test does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from anyio.from_thread import BlockingPortal, start_blocking_portal

from server.gateway.app import create_app
from server.settings import GatewaySettings
from server.worker.messages import Delta, Event, Finished, GenerateRequest, Started, Usage
from tests.server.gateway.scripted import ScriptedExpert, ScriptedWorker, serving

READING = "\n".join(f"Line {number} of a long sign." for number in range(40))


@dataclass
class Speaker:
    """`worker` refuses and is ready as it is told; the requests' events come from the test."""

    portal: BlockingPortal
    url: str = ""
    worker: ScriptedWorker = field(default_factory=ScriptedWorker)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    def say(self, text: str) -> None:
        self._tell(Delta(text, (1,)))

    def finish(self) -> None:
        self._tell(Finished("stop", Usage(5, 3, 0)))

    def answer(self, text: str) -> None:
        """All of an answer, also of a request that is still to come."""
        self.say(text)
        self.finish()

    def _tell(self, event: Event) -> None:
        self.portal.call(self.events.put_nowait, event)

    async def script(self, _: GenerateRequest) -> AsyncGenerator[Event, None]:
        yield Started(5)
        while not isinstance(event := await self.events.get(), Finished):
            yield event
        yield event


@contextmanager
def speaking() -> Iterator[Speaker]:
    """On a thread of its own, for Playwright's is taken. Pictures are read by one expert, `ocr`."""
    with start_blocking_portal() as portal:
        speaker = Speaker(portal)
        speaker.worker.script = speaker.script
        with portal.wrap_async_context_manager(serving(speaker.worker.app)) as worker_url:
            settings = GatewaySettings(worker_urls=(worker_url,), worker_poll_seconds=0.1)
            app = portal.call(create_app, settings, {"ocr": ScriptedExpert("ocr", READING)})
            with portal.wrap_async_context_manager(serving(app)) as speaker.url:
                yield speaker
