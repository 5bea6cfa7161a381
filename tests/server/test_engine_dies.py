"""A worker whose engine has died ends, so that whatever keeps it running starts another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from service import until
from tiny_base import write_tiny_base

from server.worker.messages import GenerateRequest, TextPrompt, generate_body

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

# The first step after the warm-up dies as no step may.
DOOMED = """
from server.worker.step_loop import StepLoop

warm_up = StepLoop.step

def step(self, *deliver):
    if deliver:
        raise RuntimeError("the device is lost")
    warm_up(self)

StepLoop.step = step

from server.cli import main

main()
"""


def test_the_process_ends_with_1(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "tiny")
    uds = tmp_path / "w.sock"
    command = [sys.executable, "-c", DOOMED, "worker", "--base", str(tmp_path / "tiny"), "--uds", str(uds)]
    transport = httpx.HTTPTransport(uds=str(uds))
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        httpx.Client(transport=transport, base_url="http://worker", timeout=60) as client,
    ):
        try:
            until(uds.exists, 150)
            until(lambda: client.get("/health/ready").status_code == 200, 90)
            request = GenerateRequest("r", "tiny", TextPrompt("x"))
            answer = client.post("/generate", content=b"".join(generate_body(request)))
            assert '"status":503' in answer.text
            assert process.wait(60) == 1
        finally:
            process.kill()
        assert process.stderr is not None
        assert "the engine has stopped, and so the worker ends" in process.stderr.read()
