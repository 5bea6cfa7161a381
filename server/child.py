"""Keeps one child process running: starts it, passes its lines on, watches its health, starts it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from server.serving import StartupError

log = logging.getLogger(__name__)

ERROR_PREFIX = "error: "  # what a command says last when it cannot start

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_STABLE_SECONDS = 60.0  # a child that lived this long is not in a crash loop
_PROBE_SECONDS = 0.1
_LIVENESS_SECONDS = 2.0
_ANSWER_SECONDS = 5.0  # for one probe
_KILL_SECONDS = 5.0  # after a child's own drain
_OUTPUT_SECONDS = 1.0  # for the last lines of one that has ended


def restart_pause(failures: int) -> float:
    """Seconds before the next start, after `failures` quick deaths in a row."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(max(0, failures - 1), 16))


def exit_with_parent() -> None:
    """End this process when its parent does, however the parent ends.

    The parent holds the other end of our standard input and never writes to it, so that reading it
    returns only when the parent is gone. Unlike Linux's parent-death signal this works on every Unix.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """`command` serves HTTP on the Unix socket `uds` and reads nothing from its standard input.

    Once ready it is started again if it answers nothing for `silent_seconds`.
    """

    name: str
    command: tuple[str, ...]
    uds: Path
    env: dict[str, str] = field(default_factory=dict)
    stop_seconds: float = 30.0
    silent_seconds: float = 60.0


class Child:
    """One child. `ready` is set once it has answered its readiness route for the first time."""

    def __init__(self, spec: ChildSpec) -> None:
        self._spec = spec
        self._stopping = asyncio.Event()
        self._errors: list[str] = []
        self.ready = asyncio.Event()

    def stop(self) -> None:
        """Let it drain and end; `keep` returns when it has."""
        self._stopping.set()

    async def keep(self) -> None:
        """Keep it running until `stop`. Raises `StartupError` if it ends before it was ever ready."""
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            ending = await self._run_once()
            if self._stopping.is_set():
                return
            if not self.ready.is_set():
                raise StartupError(self._why(ending))
            failures = 0 if time.monotonic() - started > _STABLE_SECONDS else failures + 1
            pause = restart_pause(failures)
            log.error("the %s %s; starting it again in %.1f s", self._spec.name, ending, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _run_once(self) -> str:
        """From start to end, which is told; an end that `stop` asked for is a drain first."""
        self._errors.clear()
        try:
            process = await self._spawn()
        except OSError as error:  # such as for want of a file descriptor, which may pass
            ending = f"cannot be started: {error.strerror}"
            self._errors.append(f"the {self._spec.name} {ending}")
            return ending
        assert process.stdout is not None
        output = asyncio.create_task(self._pass_on(process.stdout))
        health = asyncio.create_task(self._watch_health(process))
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                health.cancel()  # its socket may go before the requests that it still has
                await self._drain(process)
            code = await ended
            await asyncio.wait({output}, timeout=_OUTPUT_SECONDS)
            return _ending(code)
        finally:
            for task in (output, health, ended, stopping):
                task.cancel()
            _kill(process)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._spec.uds.parent.mkdir(mode=0o700, exist_ok=True)  # who tidies /tmp may have taken it away
        return await asyncio.create_subprocess_exec(
            *self._spec.command,
            stdin=asyncio.subprocess.PIPE,  # held open and never written to: see `exit_with_parent`
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._spec.env,
            start_new_session=True,  # a Ctrl-C at the terminal is the supervisor's to handle
        )

    async def _drain(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._spec.stop_seconds + _KILL_SECONDS)
        except TimeoutError:
            log.error("the %s did not stop in time; killing it", self._spec.name)
            _kill(process)

    async def _pass_on(self, lines: asyncio.StreamReader) -> None:
        while line := await _read_line(lines):
            text = line.decode(errors="replace").rstrip("\r\n")
            if text.startswith(ERROR_PREFIX) and not self.ready.is_set():
                self._errors.append(text.removeprefix(ERROR_PREFIX))
            else:
                print(f"{self._spec.name:<7}| {text}", file=sys.stderr, flush=True)

    async def _watch_health(self, process: asyncio.subprocess.Process) -> None:
        """Wait until it is ready, then kill it if it can never answer again."""
        transport = httpx.AsyncHTTPTransport(uds=str(self._spec.uds))
        patience = min(_ANSWER_SECONDS, self._spec.silent_seconds)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://child", timeout=patience
        ) as client:
            await _until_ready(client)
            self.ready.set()
            why = await _until_lost(client, self._spec)
        log.error("the %s %s; killing it", self._spec.name, why)
        _kill(process)

    def _why(self, ending: str) -> str:
        if self._errors:
            return " ".join(self._errors)
        return f"the {self._spec.name} {ending} before it was ready; the lines above say why"


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def _until_ready(client: httpx.AsyncClient) -> None:
    while True:
        # Not listening yet, or too busy to answer: neither is an answer.
        with contextlib.suppress(httpx.HTTPError):
            if (await client.get("/health/ready")).status_code == httpx.codes.OK:
                return
        await asyncio.sleep(_PROBE_SECONDS)


async def _until_lost(client: httpx.AsyncClient, spec: ChildSpec) -> str:
    """What it did that no patience mends: it says so itself, or it says nothing, or nobody can ask it."""
    silent = 0.0
    while _is_there(spec.uds):  # our own connection would outlive it
        began = time.monotonic()
        try:
            response = await client.get("/health/live")
            if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                return "says that it cannot go on"
            silent = 0.0
        except httpx.HTTPError:
            # Never more than a probe may take: if we ourselves were stopped, the child was not silent.
            silent += min(time.monotonic() - began, _ANSWER_SECONDS) + _LIVENESS_SECONDS
            if silent >= spec.silent_seconds:
                return f"has not answered for {silent:.0f} s"
        await asyncio.sleep(_LIVENESS_SECONDS)
    return "has lost its socket"


def _is_there(socket: Path) -> bool:
    return socket.exists()


async def _read_line(lines: asyncio.StreamReader) -> bytes:
    """The next line, or the next piece of one that is longer than the reader's buffer; empty at the end."""
    try:
        return await lines.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await lines.read(error.consumed)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
