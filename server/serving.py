"""Runs an app on a socket, and lets it finish what it has begun when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

log = logging.getLogger(__name__)

_BACKLOG = 2048
_CLOSING_SECONDS = 5  # for the last bytes to reach slow clients, after the drain
_IDLE_SECONDS = 75  # longer than proxies (60) and our own clients (5) keep a connection, else both may end it
_UNREAD_SECONDS = 60  # after which a client that takes nothing of what it is sent has gone


class StartupError(Exception):
    """A process cannot start; the message is one sentence for whoever started it."""


class Drain:
    """A process on its way out: it admits no new work, and from `expired` on it waits for none.

    `failed` tells that nobody asked: what it serves is gone, and it is to end with 1 to be started again.
    """

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self.expired = asyncio.Event()
        self.failed = False

    @property
    def draining(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        """Begin to drain; asked a second time, stop waiting."""
        if self._asked.is_set():
            self.expired.set()
        self._asked.set()

    async def asked(self) -> None:
        await self._asked.wait()


def bind(host: str, port: int, uds: Path | None = None) -> socket.socket:
    """A listening socket. Raises `StartupError` where the address cannot be had."""
    try:
        return _bind_unix(uds) if uds else _bind_tcp(host, port)
    except OSError as error:
        where = str(uds) if uds else f"{host}:{port}"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartupError(f"cannot listen on {where}: {reason}; give another address") from error


def _bind_tcp(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # connections have it from the socket that listens
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
    return _listen(sock, address)


def _bind_unix(path: Path) -> socket.socket:
    if path.is_socket():
        _refuse_if_alive(path)
        path.unlink()
    return _listen(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(path))


def _refuse_if_alive(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise StartupError(f"cannot listen on {path}: another process does; stop it or give another path")


def _listen(sock: socket.socket, address: object) -> socket.socket:
    try:
        sock.bind(address)  # type: ignore[arg-type]  # typeshed wants the family's own address type
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the socket at once and exit by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def serve_app(app: ASGIApp, sock: socket.socket, drain: Drain, drain_seconds: float) -> None:
    """Serve until `drain` is asked and the running requests ended, or `drain_seconds` passed.

    The socket stays open meanwhile, so that readiness can say 503 and new requests get an answer.
    Raises `StartupError` if the app's own start-up fails.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        log_level="warning",  # its news of starting and stopping; ours say the same
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        timeout_keep_alive=_IDLE_SECONDS,
    )
    server = _Server(config)
    asyncio.get_running_loop().set_exception_handler(_tell)
    leaving = asyncio.create_task(_leave(server, drain, drain_seconds))
    try:
        await server.serve(sockets=[sock])
    except SystemExit:  # uvicorn's word for a failed lifespan start; it has logged the cause
        raise StartupError("the application did not start; the lines above say why") from None
    finally:
        leaving.cancel()
        sock.close()


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a callback raised, but for one thing that is nobody's failure.

    anyio's Unix sockets give a wait its result also where it was cancelled a moment before, such as when
    a client leaves just as its worker says something.
    """
    late = isinstance(context.get("exception"), asyncio.InvalidStateError)
    if not (late and "set_result" in context["message"]):
        loop.default_exception_handler(context)


async def _leave(server: uvicorn.Server, drain: Drain, drain_seconds: float) -> None:
    await drain.asked()
    log.info("draining: %d requests run", len(server.server_state.tasks))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(drain_seconds):
            while server.server_state.tasks and not drain.expired.is_set():  # noqa: ASYNC110 - uvicorn has no event
                await asyncio.sleep(0.05)
    drain.expired.set()
    server.should_exit = True


def drain_on_signals(drain: Drain) -> None:
    """SIGTERM and SIGINT ask for the drain; a second one cuts it short. Needs the running loop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain.ask)
