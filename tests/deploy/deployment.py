"""The values that the chart is rendered with, and how tools are run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "llama-adapter"

Object = dict[str, Any]
Render = Callable[..., list[Object]]


def run(*command: str | Path, **options: Any) -> str:
    """What the command prints; a failure shows all that it said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def memory_held(settings: GatewaySettings) -> int:
    """Bytes of a gateway that has admitted all it may, by docs/size.md.

    That is of each request its body, the pictures decoded from it and those it names by URL, and what a
    gateway at work takes.
    """
    return settings.max_concurrent_requests * settings.max_body_bytes * 11 // 4 + 100 * 2**20


VALUES: dict[str, Object | Path] = {
    "default": {},
    "laptop": CHART / "values-laptop.yaml",
    "a100": CHART / "values-a100.yaml",
    "multinode": CHART / "values-multinode.yaml",
    "everything": Path(__file__).with_name("everything.yaml"),
    "one node of vLLM": {"worker": {"vllm": {"enabled": True, "gpus": 4}, "state": {"size": "64Mi"}}},
    "groups that scale": {
        "worker": {"vllm": {"enabled": True, "nodes": 2}, "autoscaling": {"kind": "hpa"}},
        "adapters": {"objectStorage": {"source": "store:bucket"}},
    },
    "keda": {"worker": {"autoscaling": {"kind": "keda"}}, "expert": {"enabled": False}},
}
