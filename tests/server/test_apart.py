"""Gateway, worker and expert as three commands that know each other by address only."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO

import httpx
import pytest
from openai import OpenAI
from PIL import Image, ImageDraw, ImageFont
from service import until
from tiny_base import write_adapter, write_tiny_base

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("apart")
    write_tiny_base(folder / "tiny")
    write_adapter(folder / "sight", "sight")
    with ExitStack() as stack:

        def start(*arguments: str) -> str:
            port = free_port()
            command = [sys.executable, "-m", "server.cli", *arguments, "--port", str(port)]
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            return f"http://127.0.0.1:{port}"

        adapters = [f"--adapter={id}={folder / 'sight'}" for id in ("sight", "caption")]
        worker = start("worker", "--base", str(folder / "tiny"), *adapters)
        expert = start("expert", "ocr")
        captions = ("--captions", "--caption-min-confidence", "0")
        gateway = start("gateway", "--worker", worker, "--expert", f"ocr={expert}", *captions)
        until(lambda: ready(gateway) and ready(expert), 150)
        yield gateway


def picture(text: str) -> str:
    image = Image.new("RGB", (420, 90), "white")
    ImageDraw.Draw(image).text((20, 25), text, fill="black", font=ImageFont.load_default(size=32))
    data = BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


@pytest.mark.parametrize("model", ["tiny", "sight"])
def test_a_picture_goes_through_all_three(gateway: str, model: str):
    parts = [
        {"type": "text", "text": "What does it say?"},
        {"type": "image_url", "image_url": {"url": picture("HELLO 4711")}},
    ]
    with OpenAI(base_url=f"{gateway}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": parts}], max_tokens=8, temperature=0
        )
    ocr, caption = answer.experts
    assert caption["name"] == "caption"
    assert caption["outcome"] in ("ok", "empty")  # whatever random weights say
    assert ocr["outcome"] == "ok"
    assert ocr["text"] == "HELLO 4711"
    assert answer.usage.completion_tokens >= 1
    prompt = httpx.post(f"{gateway}/tokenize", json={"model": model, "prompt": "HELLO 4711"}).json()
    assert answer.usage.prompt_tokens > prompt["count"]


def test_an_adapter_that_sees_needs_no_expert(gateway: str):
    parts = [{"type": "image_url", "image_url": {"url": picture("HELLO")}}]
    messages = [{"role": "user", "content": parts}]
    body = {"model": "sight", "messages": messages, "max_tokens": 4, "experts": []}
    answer = httpx.post(f"{gateway}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert not answer.get("experts")
