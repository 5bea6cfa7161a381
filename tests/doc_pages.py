"""What the pages of documentation hold, and a reader who does what they say."""

from __future__ import annotations

import functools
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"\b(800[0-9]|9000)\b")  # those of services that pages tell of
_DEFAULT_PORTS = {"serve": "8000", "gateway": "8000", "worker": "8001", "expert": "8002"}
_SERVER = re.compile(
    r"^(?:\w+=\S+ )*(?:llama-adapter (serve|gateway|worker|expert)\b|make (serve)\b|python \w+\.py)"
)
_READY_SECONDS = 180.0
_COMMAND_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `where` tells page and line."""

    where: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}", found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block: lines, with those that quotes, backslashes or a here-document join."""
    pending = ""
    for line in text.splitlines():
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        pending += line + "\n"
        if not _open(pending):
            yield pending.strip()
            pending = ""
    assert not pending, f"a command without an end: {pending}"


def _open(command: str) -> bool:
    if command.endswith("\\\n"):
        return True
    if here := re.search(r"<<-?'?(\w+)'?", command):
        return not re.search(rf"^{here[1]}$", command.partition("\n")[2], re.MULTILINE)
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return False


class Reader:
    """Runs a page's blocks one after another in a folder of its own; services go on in the background.

    Ports are others than the page says, so that whatever runs on this machine is left alone. A page that
    asks a service at port 8000 and starts none means the one that `llama-adapter serve` starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("docs", "models", "deploy", "constraints.txt", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        self._services: dict[str, subprocess.Popen[bytes]] = {}  # by port

    def close(self) -> None:
        for port in list(self._services):
            self._stop(port)

    def run(self, command: str) -> str:
        """What it prints. An exit code other than 0 fails the test."""
        if server := _SERVER.match(command):
            self._serve(command, server[1] or server[2])
            return ""
        self._see_to_a_service(command)
        return self._finish(["bash", "-euo", "pipefail", "-c", f"{_CURL}\n{self._told(command)}"], command)

    def run_python(self, text: str) -> str:
        """Runs it; one that begins with a file's name as a comment becomes that file."""
        if name := re.match(r"# (\w+\.py)\n", text):
            (self._folder / name[1]).write_text(self._told(text))
            return ""
        self._see_to_a_service(text)
        return self._finish([sys.executable, "-W", "error", "-c", self._told(text)], text)

    def _finish(self, words: list[str], shown: str) -> str:
        done = subprocess.run(
            words,
            cwd=self._folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
        )
        assert done.returncode == 0, f"{shown}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _told(self, text: str) -> str:
        text = re.sub(r"^make ", f"make --directory={shlex.quote(str(ROOT))} ", text)
        return _PORT.sub(lambda found: str(free_port(found[1])), text)

    def _environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ADAPTER_", "OTEL_", "MAKE"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return clean | {"PATH": path, "LLAMA_ADAPTER_KV_CACHE_MIB": "64"}

    def _see_to_a_service(self, text: str) -> None:
        if re.search(r"127\.0\.0\.1:8000\b", text) and "8000" not in self._services:
            self._serve("llama-adapter serve", "serve")

    def _serve(self, command: str, kind: str | None) -> None:
        given = re.search(r"(?:--port |PORT=)(\d+)", command)
        port = given[1] if given else _DEFAULT_PORTS.get(kind or "", "8003")
        self._stop(port)
        told = self._told(command)
        if told.startswith("make") and not given:
            told += f" PORT={free_port(port)}"
        env = self._environment() | {"LLAMA_ADAPTER_PORT": str(free_port(port))}
        log = self._folder / f"{port}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {told}" if not re.match(r"\w+=", told) else told],
                cwd=self._folder, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        self._services[port] = process
        deadline = time.monotonic() + _READY_SECONDS
        while not _ready(free_port(port)):
            assert process.poll() is None, f"{command} ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"{command} is not ready: {log.read_text()}"
            time.sleep(0.1)

    def _stop(self, port: str) -> None:
        if process := self._services.pop(port, None):
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            for child in family:  # make does not hand a signal on
                with suppress(psutil.NoSuchProcess):
                    child.terminate()
            process.wait(60)
            psutil.wait_procs(family, timeout=60)


_CURL = 'curl() { command curl --fail-with-body --silent --show-error "$@"; }'


@functools.cache
def free_port(told: str) -> int:
    """The port in the place of the one that pages tell."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return (
            httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=5, trust_env=False).status_code == 200
        )
    return False
