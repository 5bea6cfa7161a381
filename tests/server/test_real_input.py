"""The default service as its users meet it: real weights, real pictures, the stock OpenAI client."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import openai
import pytest
import skimage
from openai import OpenAI
from PIL import Image, ImageDraw, ImageFont
from service import Service, serving

pytestmark = [pytest.mark.server, pytest.mark.weights, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    # In bfloat16 the first words of an answer depend on the processor's order of summing.
    with serving("--kv-cache-mib", "256", "--dtype", "float32") as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def invoice(total: str) -> str:
    """A data URL of a drawn invoice."""
    image = Image.new("RGB", (560, 330), "white")
    draw = ImageDraw.Draw(image)
    rows = [
        "ACME Store INVOICE",
        "Date 2026-01-05",
        "Widget A   $12.50",
        "Widget B   $35.70",
        f"Total   {total}",
    ]
    for number, row in enumerate(rows):
        draw.text((30, 20 + number * 58), row, fill="black", font=ImageFont.load_default(size=26))
    data = BytesIO()
    image.save(data, "PNG")
    return data_url(data.getvalue())


def photo(name: str) -> str:
    return data_url((Path(skimage.__file__).parent / "data" / name).read_bytes())


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def about(text: str, url: str) -> list[dict]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("total", ["$48.20", "$93.75"])
def test_the_total_of_an_invoice_is_read_through_ocr(client: OpenAI, total: str):
    answer = client.chat.completions.create(
        model=MODEL, messages=about("What is the total?", invoice(total)), temperature=0, max_tokens=40
    )
    assert total in answer.choices[0].message.content
    ocr = next(expert for expert in answer.experts if expert["name"] == "ocr")
    assert ocr["outcome"] == "ok"
    assert f"Total {total}" in ocr["text"]
    assert ocr["seconds"] > 0


def test_without_the_expert_the_total_is_not_known(client: OpenAI):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=about("What is the total?", invoice("$48.20")),
        temperature=0,
        max_tokens=40,
        extra_body={"experts": []},
    )
    assert "$48.20" not in answer.choices[0].message.content


@pytest.mark.parametrize(("name", "thing"), [("coffee.png", "espresso"), ("chelsea.png", "cat")])
def test_the_main_object_of_a_photo_is_named_through_the_classifier(client: OpenAI, name: str, thing: str):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=about("What is in this picture?", photo(name)),
        temperature=0,
        max_tokens=40,
        extra_body={"experts": ["classifier"]},
    )
    assert thing in answer.choices[0].message.content.lower()
    assert [expert["name"] for expert in answer.experts] == ["classifier"]


def test_text_chat_streams(client: OpenAI):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "Paris" in "".join(filter(None, pieces))
    assert sum(bool(piece) for piece in pieces) > 3
    assert chunks[-1].usage.completion_tokens > 3


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
        ({"messages": about("?", data_url(b"\x89PNG\r\n\x1a\nbroken"))}, 400, None, None),
        ({"messages": about("?", "http://127.0.0.1:1/x.png")}, 400, None, None),
        ({"temperature": 9}, 400, None, "temperature"),
        ({"experts": ["nobody"]}, 400, None, "experts[0]"),
    ],
)
def test_bad_input_is_named_and_the_service_goes_on(
    service: Service, client: OpenAI, body: dict, status: int, code: str | None, param: str | None
):
    request = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | body
    response = service.ask(request)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param
    assert client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=4
    ).choices


def test_broken_json_is_a_400(service: Service):
    response = httpx.post(
        f"{service.url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_stock_client_sees_errors_as_its_own(client: OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"
