"""What a plain `llama-adapter serve` makes of the adapters that come with the project.

The default base and the project's adapters are stood in for by a tiny base in the cache folder and by a
folder of random adapters.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image
from service import COMMAND, Service, serving
from tiny_base import write_adapter, write_tiny_base

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

BASE = "smollm2-135m"
MAIN = "import server.shipped, pathlib; server.shipped.SHIPPED_DIR = pathlib.Path({!r}); "


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("shipped")
    write_tiny_base(folder / "cache" / BASE)
    write_adapter(folder / "adapters" / "caption", "sight")
    write_adapter(folder / "adapters" / "math", "v2")
    code = MAIN.format(str(folder / "adapters")) + "from server.cli import main; main()"
    command = (sys.executable, "-c", code, *COMMAND[3:])
    given = ("--cache-dir", str(folder / "cache"), "--experts", "", "--caption-min-confidence", "0")
    with serving(*given, command=command) as service:
        yield service


def ask(service: Service, model: str, **changes: Any) -> dict[str, Any]:
    encoded = BytesIO()
    Image.new("RGB", (40, 30), "green").save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4} | changes
    response = service.ask(body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_they_are_listed_below_the_base(service: Service) -> None:
    models = httpx.get(f"{service.url}/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [
        (BASE, None),
        ("caption", BASE),
        ("math", BASE),
    ]
    assert [model["reads_images"] for model in models] == [False, True, False]
    assert f'"model": "{BASE}"' in service.text  # of the request that it prints


def test_a_picture_is_answered_with_a_caption_before_the_question(service: Service) -> None:
    blind = ask(service, BASE, experts=[])
    [caption] = (answer := ask(service, BASE))["experts"]
    assert (caption["name"], caption["outcome"], caption["image"]) == ("caption", "ok", 0)
    said = f"[Caption expert: {caption['text']}]\n"
    told = {"model": BASE, "messages": [{"role": "user", "content": said + "What?"}]}
    counted = httpx.post(f"{service.url}/tokenize", json=told).json()["count"]
    assert answer["usage"]["prompt_tokens"] == counted > blind["usage"]["prompt_tokens"]


def test_the_captioner_itself_hears_no_caption(service: Service) -> None:
    assert ask(service, "caption")["experts"] == []
    asked = ask(service, "caption", experts=["caption"])
    assert [report["name"] for report in asked["experts"]] == ["caption"]
