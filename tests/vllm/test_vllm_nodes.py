"""A model that two machines share: two processes, each with a /tmp and a shared memory of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import Service, serving, until
from tiny_base import write_adapter, write_tiny_base
from vllm_support import HEAD_DIM

pytestmark = [pytest.mark.vllm, pytest.mark.server, pytest.mark.timeout(900)]

_ROOT = Path(__file__).parents[2]
# But what the code itself lies in.
_OWN = [place for place in ("/tmp", "/dev/shm") if not _ROOT.is_relative_to(place)]
_APART = "; ".join(f"mount -t tmpfs tmpfs {place}" for place in _OWN) + "; exec"
_MODELS = ("tiny", "poet", "tuned")


@pytest.fixture
def files() -> Iterator[Path]:
    """A base and adapters where both machines see them: not in /tmp."""
    folder = _ROOT / "build" / f"two-machines-{os.getpid()}"
    write_tiny_base(folder / "tiny", head_dim=HEAD_DIM)
    for name, kind in (("poet", "v1"), ("tuned", "v2")):
        write_adapter(folder / "adapters" / name, kind, head_dim=HEAD_DIM)
    write_adapter(folder / "root" / "late", "v1", 3, HEAD_DIM)
    yield folder
    shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def follower(options: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Machine 1, as much of one as this machine allows."""
    ours = [sys.executable, "-m", "server.cli", "worker", *options, "--node-rank", "1"]
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0:
        ours = ["unshare", "--mount", "sh", "-c", f'{_APART} "$@"', "sh", *ours]
    with log.open("wb") as file, subprocess.Popen(ours, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


def answers(service: Service, *models: str) -> list[str]:
    said = []
    for model in models:
        body: dict[str, Any] = {
            "model": model, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
            "messages": [{"role": "user", "content": "hello"}],
        }  # fmt: skip
        answer = service.ask(body)
        assert answer.status_code == 200, answer.text
        said.append(answer.json()["choices"][0]["message"]["content"])
    return said


@pytest.mark.usefixtures("environment")
def test_two_machines_answer_as_one_and_end_together(files: Path) -> None:
    served = (
        *("--experts", "", "--admin-key", "admin"),
        *("--adapter-dir", str(files / "adapters"), "--adapter-root", str(files / "root")),
    )
    base = ("--base", str(files / "tiny"), "--dtype", "float32")
    with serving(*base, *served, start_seconds=300) as native:
        right = answers(native, *_MODELS)
    shared = [
        *(*base, "--engine", "vllm", "--vllm-adapters", "all", "--max-hot-adapters", "4"),
        *("--kv-cache-mib", "8", "--tensor-parallel", "2"),
        "--no-vllm-compile",  # which takes minutes where machines have one core
        *("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())),
    ]
    log = files / "follower.log"
    with follower(shared, log) as other:
        with serving(*shared, *served, start_seconds=400) as service:
            assert answers(service, *_MODELS) == right, log.read_text()
            load(service, "late")
            assert answers(service, "late") != answers(service, "tiny")
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(60) == 0
        until(lambda: other.poll() is not None, 60)
        assert other.returncode == 1
    assert "machine 0 cannot be reached any more" in log.read_text()


def load(service: Service, id: str) -> None:
    headers = {"authorization": "Bearer admin"}
    body = {"id": id, "path": id}
    loaded = httpx.post(f"{service.url}/v1/adapters", json=body, headers=headers, timeout=60)
    assert loaded.status_code == 201, loaded.text
