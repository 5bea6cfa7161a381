"""What a model recommends counts where a request says nothing, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.server.gateway.scripted import BASE, TEXT_ADAPTER, Launch, ScriptedWorker

RECOMMENDED = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
OPENAIS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"input": "Hi"},
    "/v1/completions": {"prompt": "Hi"},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("alpaca", {}, RECOMMENDED),
        ("base", {}, OPENAIS),
        ("alpaca", OPENAIS, OPENAIS),
        ("alpaca", {"temperature": None, "top_k": None}, RECOMMENDED),
        ("alpaca", {"temperature": 0}, RECOMMENDED | {"temperature": 0.0}),
        ("alpaca", {"top_k": -1}, RECOMMENDED | {"top_k": 0}),
        ("alpaca", {"top_p": 0}, RECOMMENDED | {"top_p": 1.0, "top_k": 1}),
        ("base", {"top_p": 0.5, "top_k": 3}, OPENAIS | {"top_p": 0.5, "top_k": 3}),
    ],
)
async def test_sampling(
    launch: Launch,
    worker: ScriptedWorker,
    route: str,
    model: str,
    given: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    worker.models = [BASE, replace(TEXT_ADAPTER, sampling=RECOMMENDED)]
    gateway = await launch(worker)
    response = await gateway.http.post(route, json={"model": model, **ROUTES[route], **given})
    assert response.status_code == 200, response.text
    (request,) = worker.requests
    assert {name: getattr(request.sampling, name) for name in expected} == expected
    if route == "/v1/responses":
        told = response.json()
        assert told["temperature"] == expected["temperature"]
        assert told["top_p"] == given.get("top_p", expected["top_p"])


async def test_the_model_object_tells(launch: Launch, worker: ScriptedWorker) -> None:
    worker.models = [BASE, replace(TEXT_ADAPTER, sampling=RECOMMENDED)]
    gateway = await launch(worker)
    models = (await gateway.http.get("/v1/models")).json()["data"]
    assert [model["sampling"] for model in models] == [{}, RECOMMENDED]
