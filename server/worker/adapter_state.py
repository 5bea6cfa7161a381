"""Adapters that come and go at run time, remembered in a file: it outlives the worker.

The file holds the last word on each id that was loaded or unloaded over HTTP. A worker follows it before
it is ready, and goes on following it: what another worker that shares the file records meanwhile, such as
while this one was starting and nobody could ask it, holds here too a moment later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from server.errors import ApiError, NotFound
from server.serving import StartupError
from server.worker.engine_api import Engine
from server.worker.messages import LoadAdapterRequest, ModelInfo

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_LOCK_SECONDS = 10.0  # others hold it for a moment; a worker that is stopped just then must not stop us


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one id. `path` is None where it was unloaded."""

    version: int
    path: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


Changes = dict[str, Change]
_CHANGES: TypeAdapter[Changes] = TypeAdapter(Changes)


class AdapterState:
    """The file at `path`, which several workers may share. With None nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None

    def read(self) -> Changes:
        """Raises `StartupError` where the file cannot be understood. One that is not there is empty."""
        self._seen = self._stamp()  # before reading: what is written meanwhile is read again
        return self._content()

    def read_if_new(self) -> Changes:
        """As `read`, but empty while the file is the one that was read last."""
        return {} if self._stamp() == self._seen else self.read()

    def record(self, id: str, change: Change) -> None:
        """Raises `OSError`, and `StartupError` as `read` does."""
        if self.path is None:
            return
        with FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS):
            content = _CHANGES.dump_json(self._content() | {id: change}, indent=1)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                try:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut may leave an empty one, with which none starts
                    Path(file.name).replace(self.path)  # who reads sees all of the one or all of the other
                except OSError:  # a full disk is not to be filled further, by a file for each try
                    Path(file.name).unlink(missing_ok=True)
                    raise

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat() if self.path else None
        except OSError:
            return None
        return (stat.st_ino, stat.st_mtime_ns) if stat else None

    def _content(self) -> Changes:
        try:
            return _CHANGES.validate_json(self.path.read_bytes()) if self.path else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            cause = str(error).splitlines()[0]
            raise StartupError(
                f"adapter_state {self.path} cannot be read ({cause}); mend it, or delete it to begin with "
                "the adapters of the settings"
            ) from error


class RunTimeAdapters:
    """Loads and unloads adapters of one engine as it is asked to, and as others record."""

    def __init__(self, engine: Engine, state: AdapterState) -> None:
        self._engine = engine
        self._state = state
        self._applied: Changes = {}
        self._changing = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what is recorded; what cannot be loaded is named in the log. Raises `StartupError`."""
        async with self._changing:
            await self._apply(await asyncio.to_thread(self._state.read))
        if self._state.path is not None:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})

    async def load(self, request: LoadAdapterRequest) -> ModelInfo:
        """Raises `ApiError`."""
        async with self._changing:
            last = self._applied.get(request.id)
            version = last.version + 1 if last else 1
            info = await self._engine.load_adapter(request.id, request.path, request.options, version)
            await self._record(request.id, Change(info.version, request.path, dict(request.options)))
        return info

    async def unload(self, id: str) -> None:
        """Returns when no request uses it any more. Raises `ApiError`."""
        async with self._changing:
            versions = {info.id: info.version for info in self._engine.models()}
            unused = await self._engine.unload_adapter(id)
            # Now, not when requests use it no more: a worker that dies meanwhile is not to load it again.
            await self._record(id, Change(versions[id]))
        await asyncio.shield(unused)

    async def _record(self, id: str, change: Change) -> None:
        self._applied[id] = change
        try:
            await asyncio.to_thread(self._state.record, id, change)
        except (OSError, StartupError) as error:
            log.error("the adapter %r will not be remembered after a restart: %s", id, error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            async with self._changing:
                try:
                    await self._apply(await asyncio.to_thread(self._state.read_if_new))
                except StartupError as error:
                    log.error("%s", error)

    async def _apply(self, changes: Changes) -> None:
        for id, change in changes.items():
            if self._applied.get(id) != change:
                self._applied[id] = change  # also where it fails: once is enough
                await self._follow(id, change)

    async def _follow(self, id: str, change: Change) -> None:
        try:
            if change.path is None:
                with suppress(NotFound):
                    await self._engine.unload_adapter(id)
            else:
                await self._engine.load_adapter(id, change.path, change.options, change.version)
        except ApiError as error:
            log.error("the adapter %r cannot be loaded again and is left out: %s", id, error.message)
        except Exception:
            log.exception("the adapter %r cannot be loaded again and is left out", id)
