"""The Dockerfile: what it copies and installs is there, its images are confined, and it lints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from server.settings import ExpertSettings, GatewaySettings, WorkerSettings
from tests.deploy.deployment import ROOT, run

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TARGETS = ("gateway", "worker", "worker-cuda", "worker-vllm", "expert", "train")

Stage = list[tuple[str, str]]  # instruction, arguments


def stages() -> dict[str, Stage]:
    """The instructions of each stage by its name, those of what it is built from first."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    current: Stage = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = arguments.partition(" AS ")
            current = found[name] = list(found.get(parent.replace("${VLLM}", "cuda"), ()))
        if instruction:
            current.append((instruction, arguments))
    return found


def last(stage: Stage, instruction: str) -> str:
    return [arguments for name, arguments in stage if name == instruction][-1]


def environment(stage: Stage) -> dict[str, str]:
    pairs = " ".join(arguments for name, arguments in stage if name == "ENV")
    return dict(pair.split("=", 1) for pair in pairs.split())


def test_targets() -> None:
    assert set(TARGETS) <= set(stages())
    told = re.findall(r"^# ([a-z-]+)  +\S", DOCKERFILE.read_text(), re.MULTILINE)
    assert tuple(told) == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_confined_and_gets_its_signals(target: str) -> None:
    stage = stages()[target]
    assert last(stage, "USER") == "10001:10001"
    assert json.loads(last(stage, "ENTRYPOINT")) == ["tini", "--", "llama-adapter"]
    command = json.loads(last(stage, "CMD"))
    assert command[0] == target.partition("-")[0]
    assert "org.opencontainers.image.licenses" in last(stage, "LABEL")
    assert "VOLUME" not in dict(stage), "an anonymous volume is written to where nobody looks"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_writes_to_its_volumes_and_tmp_alone(target: str) -> None:
    env = environment(stages()[target])
    places = [env[name] for name in ("HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR")]
    assert {Path("/", *Path(place).parts[1:2]) for place in places} == {Path("/tmp")}
    assert env["LLAMA_ADAPTER_CACHE_DIR"] == "/cache"


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("gateway", GatewaySettings),
        ("worker", WorkerSettings),
        ("worker-cuda", WorkerSettings),
        ("worker-vllm", WorkerSettings),
        ("expert", ExpertSettings),
    ],
)
def test_an_image_has_a_health_check_and_settings_that_load(
    target: str, settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stages()[target]
    assert last(stage, "HEALTHCHECK").endswith('CMD ["python", "/usr/local/bin/healthcheck"]')
    for name, value in environment(stage).items():
        if name.startswith("LLAMA_ADAPTER_"):
            monkeypatch.setenv(name, value)
    loaded = settings()
    assert loaded.port == settings.model_fields["port"].default  # type: ignore[attr-defined]
    assert last(stage, "EXPOSE") == str(loaded.port)  # type: ignore[attr-defined]
    assert loaded.host == "0.0.0.0"  # type: ignore[attr-defined]


def test_extras_are_there() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [
        extra
        for group in re.findall(r"'\.\[([a-z,]+)\]'", DOCKERFILE.read_text())
        for extra in group.split(",")
    ]
    assert {"worker", "experts", "train", "otel", "redis"} <= set(asked) <= set(known)


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [
        source
        for stage in stages().values()
        for instruction, arguments in stage
        if instruction == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    ]
    assert {source for source in copied if not (ROOT / source).exists()} == set()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    assert {source for source in copied if f"!{source}" not in ignored} == set()


def test_every_base_image_is_pinned() -> None:
    froms = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert {image for image in froms if image not in stages()} == {"${PYTHON_IMAGE}", "build-vllm-${VLLM}"}
    assert {"build-vllm-cuda", "build-vllm-cpu"} <= set(stages())
    assert re.search(r"^ARG PYTHON_IMAGE=\S+:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE.read_text(), re.MULTILINE)


def test_no_package_is_whatever_version_is_the_latest() -> None:
    runs = [arguments for stage in stages().values() for name, arguments in stage if name == "RUN"]
    installs = [part for run in runs for part in run.split("&&") if re.search(r"\bpip install\b", part)]
    assert len(installs) > 10
    assert [part for part in installs if not re.search(r"--(no-deps|constraint)\b", part)] == []


def test_every_environment_comes_with_a_list_of_licences() -> None:
    built = re.findall(r"^COPY --from=(\S+) /opt/venv /opt/venv\n", DOCKERFILE.read_text(), re.MULTILINE)
    assert len(built) == 6
    for stage in built:
        assert "--output-file /opt/venv/LICENCES.md" in stages()[stage][-1][1], stage


@pytest.mark.parametrize("target", ["worker-cuda", "worker-vllm", "train"])
def test_what_may_run_on_a_gpu_has_a_compiler(target: str) -> None:
    """Triton builds with it what launches a kernel."""
    assert any("g++" in arguments for name, arguments in stages()[target] if name == "RUN")


@contextmanager
def answering(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()
            self.wfile.write(b"said")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def healthcheck(port: int) -> tuple[int, str]:
    environ = os.environ | {"LLAMA_ADAPTER_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    command = (sys.executable, ROOT / "deploy" / "healthcheck.py")
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout


def test_health_check() -> None:
    with answering(200) as port:
        assert healthcheck(port) == (0, "200 said\n")
    with answering(503) as port:
        assert healthcheck(port) == (1, "503 said\n")
    status, told = healthcheck(port)
    assert status == 1
    assert told.startswith("no answer: ")


@pytest.mark.deploy
def test_hadolint(tools: Path) -> None:
    run(tools / "hadolint", DOCKERFILE)
