"""`kubectl apply --dry-run=client`, which asks a cluster for its kinds: here a scripted one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.deploy.deployment import ROOT, VALUES, Object, Render, run
from tests.deploy.test_chart import WITHOUT_SCHEMA

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

KINDS = {
    "v1": ["Namespace", "Service", "ServiceAccount", "ConfigMap"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "batch/v1": ["Job"],
    "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
}


def plural(kind: str) -> str:
    name = kind.lower()
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}es" if name.endswith("s") else f"{name}s"


def known(path: str) -> Object | None:
    """What an API server says of itself at `path`; None for whatever else, of which it has nothing."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = {g: {"groupVersion": g, "version": g.partition("/")[2]} for g in KINDS if "/" in g}
        groups = [
            {"name": group.partition("/")[0], "versions": [version], "preferredVersion": version}
            for group, version in versions.items()
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    group = path.removeprefix("/apis/").removeprefix("/api/")
    if group not in KINDS:
        return None
    resources = [
        {
            "name": plural(kind),
            "singularName": "",
            "namespaced": kind != "Namespace",
            "kind": kind,
            "verbs": [],
        }
        for kind in KINDS[group]
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = known(self.path.partition("?")[0])
        body = json.dumps(
            answer or {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
        )
        self.send_response(200 if answer else 404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def apply(tmp_path: Path) -> Iterator[tuple[str | Path, ...]]:
    """`kubectl apply --dry-run=client` against that cluster; schemas are looked at elsewhere."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        options = ("--server", address, "--cache-dir", tmp_path / "cache", "--kubeconfig", "/dev/null")
        yield ("kubectl", *options, "apply", "--dry-run=client", "--validate=false")
        server.shutdown()


def test_the_manifests_apply(apply: tuple[str, ...]) -> None:
    told = run(*apply, "-k", ROOT / "deploy" / "kubernetes").splitlines()
    assert len(told) > 10
    assert all(line.endswith(" created (dry run)") for line in told)


@pytest.mark.deploy
@pytest.mark.parametrize("values", VALUES)
def test_rendered_objects_apply(apply: tuple[str, ...], render: Render, values: str, tmp_path: Path) -> None:
    objects = [thing for thing in render(VALUES[values]) if thing["kind"] not in WITHOUT_SCHEMA]
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    told = run(*apply, "--namespace", "llama-adapter", "-f", file).splitlines()
    assert len(told) == len(objects)
