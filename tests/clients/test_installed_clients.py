"""Clients whose dependencies exclude ours, in an environment of their own (`make clients`), as programs.

Each file of cases is one run of its own test runner against the same service.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from service import Service

HERE = Path(__file__).resolve().parent

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]


def run(folder: str, *command: str | Path, service: Service, picture: Path) -> None:
    environment = {
        **os.environ,
        "SERVICE_URL": service.url,
        "PICTURE": str(picture),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would fetch one
    }
    done = subprocess.run(
        command, cwd=HERE / folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.clients
@pytest.mark.parametrize("cases", ["agents_cases.py", "langchain_cases.py", "litellm_cases.py"])
def test_python_clients(clients: Path, service: Service, picture: Path, cases: str) -> None:
    pytest_of_clients = (clients / "python", "-m", "pytest", "-c", "cases.ini", cases)
    run("python", *pytest_of_clients, service=service, picture=picture)


@pytest.mark.node
@pytest.mark.parametrize("cases", ["openai.test.js", "ai-sdk.test.js"])
def test_node_clients(clients: Path, service: Service, picture: Path, cases: str) -> None:
    run("node", clients / "node", "--test", cases, service=service, picture=picture)
