"""The values that the chart is rendered with, and how tools are run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "llama-adapter"

Object = dict[str, Any]
Render = Callable[..., list[Object]]


def run(*command: str | Path, **options: Any) -> str:
    """What the command prints; a failure shows all that it said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Every branch of every template.
EVERYTHING: Object = {
    "image": {"registry": "registry.example.org/team", "pullSecrets": ["pull"], "digests": {"gateway": "sha256:" + "0" * 64}},
    "tracing": {"endpoint": "http://jaeger:4318"},
    "gateway": {
        "settings": {"max_images": 4, "image_allowed_hosts": ["example.org"], "max_body_bytes": 67108864},
        "keysSecret": "keys",
        "limitsStoreSecret": "redis",
        "service": {"annotations": {"a": "b"}},
        "ingress": {"enabled": True, "className": "nginx", "host": "llama.example.org", "tlsSecret": "tls", "annotations": {"a": "b"}},
        "autoscaling": {"enabled": True},
    },
    "worker": {
        "base": "/models/llama-2-7b",
        "modelsClaim": "models",
        "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
        "autoscaling": {"kind": "hpa"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "nodeSelector": {"gpu": "a100"},
    },
    "adapters": {"objectStorage": {"source": "store:bucket/adapters", "secret": "storage"}},
    "train": {
        "enabled": True,
        "overrides": ["data.instruct.path=/data/instruct.jsonl"],
        "dataClaim": "data",
        "modelsClaim": "models",
        "runsClaim": "runs",
        "gpu": {"enabled": True, "count": 8, "runtimeClassName": "nvidia"},
    },
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
        "monitoringFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "extraEgress": [{"ports": [{"protocol": "TCP", "port": 6379}]}],
    },
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}, "keySecret": "scrape", "dashboard": True},
}  # fmt: skip
VALUES: dict[str, Object | Path] = {
    "default": {},
    "laptop": CHART / "values-laptop.yaml",
    "a100": CHART / "values-a100.yaml",
    "everything": EVERYTHING,
    "keda": {"worker": {"autoscaling": {"kind": "keda"}}, "expert": {"enabled": False}},
}
