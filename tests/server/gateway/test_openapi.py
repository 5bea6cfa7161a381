"""/openapi.json tells the truth of routes, bodies, errors and keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from fastapi.routing import APIRoute

from server.gateway.app import create_app
from server.gateway.routes import adapters, chat, completions, health, models, responses, tokens
from server.settings import GatewaySettings
from tests.server.gateway.scripted import Launch, ScriptedWorker, Stack


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def validator(document: dict[str, Any], name: str) -> Any:
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", **document})


async def test_every_route_is_described_with_its_error(gateway: Stack) -> None:
    document = (await gateway.http.get("/openapi.json")).json()
    described = {(path, method) for path, operations in document["paths"].items() for method in operations}
    served = {
        (route.path.replace(":path", ""), method.lower())
        for module in (adapters, chat, completions, health, models, responses, tokens)
        for route in module.router.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods
    }
    assert described == served
    assert ("/v1/chat/completions", "post") in described
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], reference
    for path, method in described:
        answers = document["paths"][path][method]["responses"]
        assert answers["default"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
        assert "422" not in answers


def security(**settings: Any) -> dict[str, Any]:
    document = create_app(GatewaySettings(**settings), {}).state.openapi
    paths = {path: next(iter(operations.values())) for path, operations in document["paths"].items()}
    asks = {
        path: operation.get("security", document.get("security", [])) for path, operation in paths.items()
    }
    return {path: bool(asked) for path, asked in asks.items()}


def test_where_a_key_is_asked_for() -> None:
    keyed = security(api_keys=("one",))
    assert {path for path, asked in keyed.items() if not asked} == {
        "/health",
        "/health/live",
        "/health/ready",
    }
    assert {path for path, asked in security().items() if asked} == {"/v1/adapters", "/v1/adapters/{id}"}


ANSWERS = {
    "ChatRequest": ("/v1/chat/completions", "ChatCompletion"),
    "ResponseRequest": ("/v1/responses", "ResponseObject"),
    "CompletionRequest": ("/v1/completions", "Completion"),
}


@pytest.mark.parametrize(
    ("schema", "body", "status"),
    [
        ("ChatRequest", {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "stop": ["a"]}, 200),
        ("ChatRequest", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, 200),
        ("ChatRequest", {"messages": []}, 400),
        ("ChatRequest", {"messages": [{"role": "nobody", "content": "Hi"}]}, 400),
        ("ChatRequest", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 3}, 400),
        ("ChatRequest", {"messages": [{"role": "user", "content": "Hi"}], "audio": {}}, 400),
        ("ResponseRequest", {"input": "Hi", "max_output_tokens": 3, "include": []}, 200),
        ("ResponseRequest", {"input": [{"role": "user", "content": "Hi"}], "store": True}, 200),
        ("ResponseRequest", {"input": [{"role": "user", "content": [{"type": "text"}]}]}, 400),
        ("ResponseRequest", {"input": "Hi", "previous_response_id": "resp_1"}, 400),
        ("CompletionRequest", {"prompt": [1, 2], "max_tokens": 3, "logit_bias": {"5": -1}}, 200),
        ("CompletionRequest", {"prompt": [1, "a"]}, 400),
        ("CompletionRequest", {"prompt": "a", "suffix": "b"}, 400),
    ],
)
async def test_bodies_are_described_as_they_are_read(
    gateway: Stack, schema: str, body: dict[str, Any], status: int
) -> None:
    document = gateway.app.state.openapi
    path, described = ANSWERS[schema]
    body = {"model": "base", **body}
    assert validator(document, schema).is_valid(body) == (status == 200)
    response = await gateway.http.post(path, json=body)
    assert response.status_code == status, response.text
    answer = "Error" if status == 400 else described
    assert validator(document, answer).is_valid(response.json())


async def test_the_description_needs_a_key_like_everything(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, api_keys=("one",))
    assert (await gateway.http.get("/openapi.json")).status_code == 401


SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


async def test_every_answer_carries_the_security_headers(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, cors_origins=("https://app.example",))
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    answers = [
        await gateway.chat(),
        await gateway.chat(stream=True),
        await gateway.chat(model="none"),
        await gateway.http.get("/health"),
        await gateway.http.get("/nothing"),
        await gateway.http.get("/openapi.json"),
        await gateway.http.put("/v1/models"),
        await gateway.http.post("/v1/adapters", json={}),
        await gateway.http.options("/v1/models", headers=preflight),
        await gateway.http.options("/v1/models", headers=preflight | {"origin": "https://evil.example"}),
    ]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
    exposed = (await gateway.http.get("/health", headers={"origin": "https://app.example"})).headers
    assert "x-ratelimit-remaining-tokens" in exposed["access-control-expose-headers"]
    assert json.loads(answers[0].text)["object"] == "chat.completion"
