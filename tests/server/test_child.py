"""Children as real processes that a short script plays, so that they can die as a test wants."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.child import Child, ChildSpec, restart_pause
from server.serving import StartupError

pytestmark = [pytest.mark.server, pytest.mark.timeout(60)]

# Serves 200 on every path; /health/live answers what the file `live` says, if it is there.
SERVER = """
import http.server, os, pathlib, signal, socketserver, sys
folder = pathlib.Path(sys.argv[1])
with (folder / "pids").open("a") as pids:
    pids.write(f"{os.getpid()}\\n")

class Handler(http.server.BaseHTTPRequestHandler):
    def address_string(self):
        return ""
    def log_message(self, *args):
        pass
    def do_GET(self):
        live = folder / "live"
        status = int(live.read_text()) if "live" in self.path and live.exists() else 200
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128  # a probe of a stopped process waits in there

path = folder / "c.sock"
path.unlink(missing_ok=True)
"""
SERVE = "print('hello from the child', flush=True)\nServer(str(path), Handler).serve_forever()\n"


def script(folder: Path, body: str) -> ChildSpec:
    path = folder / "child.py"
    path.write_text(SERVER + textwrap.dedent(body))
    command = (sys.executable, str(path), str(folder))
    return ChildSpec("toy", command, folder / "c.sock", dict(os.environ), stop_seconds=0.5)


@asynccontextmanager
async def kept(spec: ChildSpec) -> AsyncIterator[tuple[Child, asyncio.Task[None]]]:
    child = Child(spec)
    keeping = asyncio.create_task(child.keep())
    try:
        yield child, keeping
    finally:
        child.stop()
        await asyncio.wait_for(keeping, 15)


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def test_lines_are_passed_on_with_the_childs_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "print('x' * 200_000); print(b'\\xff'.decode('latin-1'))\n" + SERVE
    async with kept(script(tmp_path, body)) as (child, _):
        await asyncio.wait_for(child.ready.wait(), 20)
        shown = capfd.readouterr().err
    assert "toy    | hello from the child\n" in shown
    assert shown.count("x") >= 200_000


async def test_a_crashed_child_is_started_again(tmp_path: Path) -> None:
    async with kept(script(tmp_path, SERVE)) as (child, keeping):
        await asyncio.wait_for(child.ready.wait(), 20)
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        await until(lambda: len(pids(tmp_path)) == 2)
        assert not keeping.done()
        second = pids(tmp_path)[1]
        assert alive(second)
    assert not alive(second)


async def test_a_child_that_cannot_be_started_for_a_while_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where clients have taken all file descriptors: the gateway still serves what it can."""
    start, failures = asyncio.create_subprocess_exec, iter([OSError(errno.EMFILE, "Too many open files")])
    async with kept(script(tmp_path, SERVE)) as (child, _):
        await asyncio.wait_for(child.ready.wait(), 20)

        async def start_later(*command: str, **options: Any) -> asyncio.subprocess.Process:
            for error in failures:
                raise error
            return await start(*command, **options)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", start_later)
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        await until(lambda: len(pids(tmp_path)) == 2)
    assert "the toy cannot be started: Too many open files; starting it again in 1.0 s" in caplog.text


async def test_a_child_whose_socket_is_gone_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the folder that it lies in, as by who tidies /tmp."""
    monkeypatch.setattr("server.child._LIVENESS_SECONDS", 0.1)
    socket = tmp_path / "sockets" / "c.sock"
    spec = replace(script(tmp_path, f"path = pathlib.Path({str(socket)!r})\n" + SERVE), uds=socket)
    async with kept(spec) as (child, _):
        await asyncio.wait_for(child.ready.wait(), 20)
        shutil.rmtree(socket.parent)
        await until(lambda: len(pids(tmp_path)) == 2 and socket.exists())
        assert not alive(pids(tmp_path)[0])
        assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert "the toy has lost its socket; killing it" in caplog.text


async def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    spec = replace(script(tmp_path, SERVE), command=(str(tmp_path / "nowhere"),))
    with pytest.raises(StartupError, match=r"^the toy cannot be started: No such file or directory$"):
        await Child(spec).keep()


async def test_a_child_that_says_it_cannot_go_on_is_replaced(tmp_path: Path) -> None:
    async with kept(script(tmp_path, SERVE)) as (child, _):
        await asyncio.wait_for(child.ready.wait(), 20)
        (tmp_path / "live").write_text("503")
        await until(lambda: not alive(pids(tmp_path)[0]))
        (tmp_path / "live").unlink()
        await until(lambda: len(pids(tmp_path)) == 2)


async def test_a_child_that_answers_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.child._ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("server.child._LIVENESS_SECONDS", 0.1)
    spec = replace(script(tmp_path, SERVE), silent_seconds=4.0)
    async with kept(spec) as (child, _):
        await asyncio.wait_for(child.ready.wait(), 20)
        first = pids(tmp_path)[0]
        for _ in range(2):  # once it answers again, what was counted is forgotten
            os.kill(first, signal.SIGSTOP)
            await asyncio.sleep(2.4)
            os.kill(first, signal.SIGCONT)
            async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(spec.uds))) as client:
                await client.get("http://child/")
            await asyncio.sleep(0.5)
        assert len(pids(tmp_path)) == 1
        os.kill(first, signal.SIGSTOP)
        await until(lambda: len(pids(tmp_path)) == 2)
        assert not alive(first)
    assert "the toy has not answered for 4 s; killing it" in caplog.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('loading'); sys.exit('error: no such folder: /nowhere')", "^no such folder: /nowhere$"),
        ("sys.exit(3)", "the toy ended with exit code 3 before it was ready"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL .out of memory"),
    ],
)
async def test_a_child_that_cannot_start_says_why(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        await asyncio.wait_for(Child(script(tmp_path, body)).keep(), 20)


async def test_a_child_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.child._KILL_SECONDS", 0.2)
    async with kept(script(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVE)) as (
        child,
        _,
    ):
        await asyncio.wait_for(child.ready.wait(), 20)
    assert not alive(pids(tmp_path)[0])


async def test_stop_reaches_a_child_that_is_not_ready_yet(tmp_path: Path) -> None:
    async with kept(script(tmp_path, "import time; time.sleep(600)")) as (child, _):
        await until((tmp_path / "pids").exists)
        assert not child.ready.is_set()
    assert not alive(pids(tmp_path)[0])


async def test_stop_cuts_the_pause_before_a_restart_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.child._FIRST_PAUSE", 600.0)
    async with kept(script(tmp_path, SERVE)) as (child, _):
        await asyncio.wait_for(child.ready.wait(), 20)
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        await until(lambda: not alive(pids(tmp_path)[0]))


def test_pauses_double_up_to_a_limit() -> None:
    pauses = [restart_pause(failures) for failures in range(1, 9)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert restart_pause(10_000) == 30


def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    """The parent is killed without a chance to tell anybody."""
    watched = "from server.child import exit_with_parent; exit_with_parent()\n" + SERVE
    spec = script(tmp_path, watched)
    parent_code = (
        "import asyncio, pathlib; from server.child import Child, ChildSpec\n"
        f"spec = ChildSpec('toy', {spec.command!r}, pathlib.Path({str(spec.uds)!r}), {{}})\n"
        "asyncio.run(Child(spec).keep())\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code]) as parent:
        asyncio.run(until(lambda: (tmp_path / "c.sock").exists()))
        child = pids(tmp_path)[0]
        assert alive(child)
        parent.kill()
    asyncio.run(until(lambda: not alive(child)))
