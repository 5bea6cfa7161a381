"""What the clients are told of the service: its address, a picture, and how plain HTTP is answered."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["SERVICE_URL"] + "/v1"


@pytest.fixture(scope="session")
def image() -> str:
    """The picture's bytes as base64."""
    return base64.b64encode(Path(os.environ["PICTURE"]).read_bytes()).decode()


@pytest.fixture(params=["text", "image"])
def question(request: pytest.FixtureRequest, image: str) -> dict[str, Any]:
    """Model and messages, with and without an image."""
    if request.param == "text":
        return {"model": "poet", "messages": [{"role": "user", "content": "hello"}]}
    parts = [
        {"type": "text", "text": "hello"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
    ]
    return {"model": "sight", "messages": [{"role": "user", "content": parts}]}


@pytest.fixture
def by_hand(url: str, question: dict[str, Any]) -> str:
    """The answer to `question` that plain HTTP gets."""
    body = {**question, "temperature": 0, "max_tokens": 12}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.fixture
def closing_bias(url: str, question: dict[str, Any]) -> dict[str, int]:
    """A `logit_bias` under which any JSON object ends as soon as it may."""
    body = {"model": question["model"], "prompt": "}", "add_special_tokens": False}
    [brace] = httpx.post(f"{url}/../tokenize", json=body).json()["tokens"]
    return {str(brace): 100}
