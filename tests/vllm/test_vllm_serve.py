"""`llama-adapter serve --engine vllm` as its user meets it: real processes, over HTTP."""

from __future__ import annotations

import base64
import json
import signal
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from service import Service, serving, until
from tiny_base import write_adapter, write_tiny_base
from vllm_support import HEAD_DIM

pytestmark = [pytest.mark.vllm, pytest.mark.server, pytest.mark.timeout(600)]


def request(content: Any = "hello", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "ignore_eos": True} | changes


def descendants(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children(recursive=True)


def test_the_api_is_the_same_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # as it comes
    write_tiny_base(tmp_path / "tiny", head_dim=HEAD_DIM)
    for name, kind in (("poet", "v1"), ("sees", "sight")):
        write_adapter(tmp_path / "adapters" / name, kind, head_dim=HEAD_DIM)
    write_adapter(tmp_path / "root" / "late", "v1", 3, HEAD_DIM)
    arguments = (
        *("--engine", "vllm", "--base", str(tmp_path / "tiny"), "--adapter-dir", str(tmp_path / "adapters")),
        *("--adapter-root", str(tmp_path / "root"), "--admin-key", "admin", "--api-key", "key"),
        *("--max-hot-adapters", "4", "--dtype", "float32", "--experts", "", "--no-vllm-compile"),
    )
    with serving(*arguments, start_seconds=300) as service:
        client = httpx.Client(base_url=service.url, headers={"authorization": "Bearer key"}, timeout=120)
        admin = {"authorization": "Bearer admin"}
        with client:
            check_answers(client)
            loaded = client.post("/v1/adapters", json={"id": "late", "path": "late"}, headers=admin)
            assert loaded.status_code == 201, loaded.text
            assert client.post("/v1/chat/completions", json=request(model="late")).status_code == 200
            assert client.delete("/v1/adapters/late", headers=admin).status_code in (200, 204)
            assert client.post("/v1/chat/completions", json=request(model="late")).status_code == 404
            check_another_starts_for_one_that_dies(service, client)
        left = descendants(service)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        until(lambda: not any(process.is_running() for process in left), 20)


def check_answers(client: httpx.Client) -> None:
    for name in ("tiny", "poet", "sees"):
        answer = client.post("/v1/chat/completions", json=request(model=name)).json()
        assert answer["usage"]["completion_tokens"] == 8
    encoded = BytesIO()
    Image.new("RGB", (32, 32), "red").save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    content = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": url}}]
    blind, seeing = (
        client.post("/v1/chat/completions", json=request(said, model="sees", temperature=0)).json()
        for said in ("hello", content)
    )
    assert blind["choices"][0]["message"]["content"] != seeing["choices"][0]["message"]["content"]
    assert blind["usage"]["prompt_tokens"] == seeing["usage"]["prompt_tokens"] < 32
    with client.stream("POST", "/v1/chat/completions", json=request(model="poet", stream=True)) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def check_another_starts_for_one_that_dies(service: Service, client: httpx.Client) -> None:
    """The worker is killed; its vLLM must not outlive it."""
    before = [process.pid for process in descendants(service)]
    service.child("worker").kill()
    until(lambda: not client.get("/health/ready").is_success, 60)
    until(lambda: not any(map(psutil.pid_exists, before)), 60)
    until(lambda: client.get("/health/ready").is_success, 300)
    assert client.post("/v1/chat/completions", json=request()).status_code == 200
