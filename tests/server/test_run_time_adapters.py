"""Adapters that were loaded and unloaded at run time, over workers that are killed."""

from __future__ import annotations

import asyncio
import base64
import shutil
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from service import Service, serving, until
from tiny_base import write_adapter, write_tiny_base

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

KEY = {"authorization": "Bearer root"}


def change(service: Service, method: str, path: str, body: Any = None) -> None:
    response = httpx.request(method, f"{service.url}/v1/adapters{path}", json=body, headers=KEY, timeout=60)
    assert response.is_success, response.text


def load(service: Service, id: str, path: str | None = None) -> None:
    change(service, "POST", "", {"id": id, "path": path or id})


def answer(service: Service, model: str) -> str:
    messages = [{"role": "user", "content": "hello"}]
    response = service.ask({"model": model, "messages": messages, "temperature": 0, "max_tokens": 8})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def workers(service: Service) -> dict[str, psutil.Process]:
    """By the socket that each listens on."""
    children = psutil.Process(service.process.pid).children()
    return {c.environ()["LLAMA_ADAPTER_UDS"]: c for c in children if "worker" in c.cmdline()}


def ask_worker(socket: str, path: str) -> httpx.Response | None:
    """Without the gateway between; None where it cannot be reached."""

    async def ask() -> httpx.Response | None:
        transport = httpx.AsyncHTTPTransport(uds=socket)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as worker:
            with suppress(httpx.TransportError):
                return await worker.get(path)
        return None

    return asyncio.run(ask())


def held(socket: str) -> dict[str, int] | None:
    """Id → version of one worker's adapters; None while it is not ready."""
    ready = ask_worker(socket, "/health/ready")
    models = ask_worker(socket, "/models") if ready and ready.status_code == 200 else None
    return {model["id"]: model["version"] for model in models.json()[1:]} if models else None


def test_a_killed_worker_comes_back_with_what_holds_now(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "tiny")
    root = tmp_path / "adapters"
    for i, id in enumerate(("first", "other", "late", "passing", "vanishing")):
        write_adapter(root / id, "v1", seed=i)
    given = [f"--adapter={id}={root / id}" for id in ("first", "other")]
    arguments = ("--base", str(tmp_path / "tiny"), "--dtype", "float32", "--experts", "", "--workers", "2")
    with serving(*arguments, *given, "--adapter-root", str(root), "--admin-key", "root") as service:
        for id in ("late", "passing", "vanishing"):
            load(service, id)
        load(service, "late", "passing")
        change(service, "DELETE", "/other")  # of the settings
        said = {id: answer(service, id) for id in ("first", "late")}

        socket, doomed = sorted(workers(service).items())[0]
        doomed.suspend()  # the gateway takes it for ready no longer, and nobody starts another yet
        until(
            lambda: (
                f'worker_ready{{worker="{Path(socket).stem}"}} 0.0'
                in httpx.get(f"{service.url}/metrics").text
            )
        )
        change(service, "DELETE", "/passing")
        shutil.rmtree(root / "other")
        shutil.rmtree(root / "vanishing")
        doomed.kill()
        until(lambda: held(socket) is not None, 90)
        assert held(socket) == {"first": 1, "late": 2}
        assert "'vanishing' is not in the adapter root" in service.text

        for worker in (now := workers(service)).values():
            worker.kill()
        until(lambda: all(held(socket) == {"first": 1, "late": 2} for socket in now), 90)
        until(lambda: httpx.get(f"{service.url}/health/ready").status_code == 200)
        assert {id: answer(service, id) for id in said} == said
        models = httpx.get(f"{service.url}/v1/models").json()["data"]
        assert {model["id"] for model in models} == {"tiny", "first", "late"}


def test_captions_by_an_adapter_that_was_replaced_are_not_remembered(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "tiny")
    caption = tmp_path / "caption"
    write_adapter(caption, "sight")
    data = BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    arguments = ("--base", str(tmp_path / "tiny"), "--dtype", "float32", "--experts", "")
    given = ("--adapter", f"caption={caption}", "--adapter-root", str(tmp_path), "--admin-key", "root")
    with serving(*arguments, *given, "--caption-min-confidence", "0") as service:
        [socket] = workers(service)

        def captions() -> float:
            """How many were generated."""
            lines = ask_worker(socket, "/metrics").text.splitlines()
            name = "llama_adapter:request_success_total{"
            return sum(
                float(line.split()[-1]) for line in lines if line.startswith(name) and '"caption"' in line
            )

        def read() -> str:
            [report] = service.ask(body).json()["experts"]
            assert report["outcome"] in ("ok", "empty")  # what a random adapter says is anything
            return report["text"]

        before = {read() for _ in range(2)}
        assert (len(before), captions()) == (1, 1)
        write_adapter(caption, "sight", seed=1)
        load(service, "caption")
        after = {read() for _ in range(2)}
        assert (len(after), captions()) == (1, 2)
        assert before != after
