"""`llama-adapter serve` in a process of its own, for as long as a test needs it.

The service's own variable names its engine: `LLAMA_ADAPTER_ENGINE=vllm pytest tests/clients` holds vLLM, in
the environment of `make vllm`, to what the native engine is held to.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ON_VLLM = os.environ.get("LLAMA_ADAPTER_ENGINE") == "vllm"
PYTHON = str(Path(__file__).parents[1] / ".venv-vllm/bin/python") if ON_VLLM else sys.executable
COMMAND = (PYTHON, "-m", "server.cli", "serve", "--port", "0", "--kv-cache-mib", "8")


@dataclass
class Service:
    process: subprocess.Popen[str]
    printed: list[str] = field(default_factory=list)
    url: str = ""

    def read(self) -> None:
        for line in self.process.stdout or ():
            self.printed.append(line)

    @property
    def text(self) -> str:
        return "".join(self.printed)

    def child(self, name: str) -> psutil.Process:
        """The child that runs the command `name`."""
        return next(c for c in psutil.Process(self.process.pid).children() if name in c.cmdline())

    def ask(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)


@contextmanager
def serving(
    *arguments: str, command: Sequence[str] = COMMAND, start_seconds: float = 300 if ON_VLLM else 150
) -> Iterator[Service]:
    """A service that has said that it is ready; killed afterwards if it still runs."""
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        service = Service(process)
        reader = threading.Thread(target=service.read)
        reader.start()
        try:
            until(lambda: "Say hello" in service.text or process.poll() is not None, start_seconds)
            ready = re.search(r"serves (http://\S+)", service.text)
            assert ready, service.text
            service.url = ready[1]
            yield service
        finally:
            children = psutil.Process(process.pid).children() if process.poll() is None else []
            process.kill()
            for child in children:  # also one that a test has stopped, which cannot see its parent's end
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            reader.join()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
