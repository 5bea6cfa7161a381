"""The app as a whole: errors, ids, keys, limits, health, drain, metrics, adapters, tokens."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidRequest
from server.serving import Drain
from server.worker.messages import Delta, Finished, Started, Usage
from tests.server.gateway.scripted import (
    BASE,
    TEXT_ADAPTER,
    Launch,
    ScriptedExpert,
    ScriptedWorker,
    Stack,
    picture,
    serving,
    until,
)


def assert_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] == code
    assert response.headers["x-request-id"]
    return error


POST_ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/adapters"]


async def test_errors_have_one_shape_on_every_route(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, admin_keys=("root",))
    http = gateway.http
    http.headers["authorization"] = "Bearer root"
    for route in POST_ROUTES:
        assert_error(await http.post(route, json={}), 400)
        assert_error(await http.post(route, content=b"{"), 400, "invalid_json")
        assert_error(await http.post(route, json=[1]), 400, "invalid_json")
        assert_error(await http.post(route), 400, "invalid_json")
        assert_error(await http.post(route, data={"a": "b"}), 415, "unsupported_media_type")
        assert_error(await http.put(route, json={}), 405, "method_not_allowed")
        assert_error(await http.post(route + "/", json={}), 404, "not_found")
    assert "POST" in (await http.get("/v1/completions")).headers["allow"]
    for path in ("/v1", "/v1/nothing", "/docs", "/redoc", "/v1/chat/completions/%ff%00"):
        assert_error(await http.get(path), 404, "not_found")
    assert_error(await http.get("/v1/models/nothing"), 404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/v1/embeddings", "/chat/completions"])
async def test_a_route_of_openais_that_is_not_here_tells_which_are(gateway: Stack, path: str) -> None:
    error = assert_error(
        await gateway.http.post(path, json={"model": "base", "input": "Hi"}), 404, "not_found"
    )
    assert f"POST {path}" in error["message"]
    assert "/v1/chat/completions" in error["message"]


async def test_a_compressed_body_is_told_from_a_damaged_one(gateway: Stack, worker: ScriptedWorker) -> None:
    body = json.dumps({"model": "base", "prompt": "Hi"}).encode()
    headers = {"content-type": "application/json"}
    for coding, sent in (("gzip", gzip.compress(body)), ("BR", b"x"), ("gzip, identity", b"x")):
        answer = await gateway.http.post(
            "/v1/completions", content=sent, headers=headers | {"content-encoding": coding}
        )
        assert coding.lower() in assert_error(answer, 415, "unsupported_media_type")["message"]
    assert worker.requests == []
    plain = headers | {"content-encoding": "identity"}
    assert (await gateway.http.post("/v1/completions", content=body, headers=plain)).status_code == 200


async def test_our_own_bug_is_a_500_that_tells_nothing(
    launch: Launch, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await launch(worker)

    def broken(_: str) -> None:
        raise RuntimeError("secret insides")

    monkeypatch.setattr(gateway.app.state.gateway.pool, "model", broken)
    for stream in (False, True):
        response = await gateway.chat(stream=stream)
        assert_error(response, 500, "internal_error")
        assert "secret" not in response.text
    assert "secret insides" in caplog.text


async def test_request_ids(gateway: Stack) -> None:
    async def id_for(sent: str | None) -> str:
        headers = {} if sent is None else {"x-request-id": sent}
        return (await gateway.http.get("/v1/models", headers=headers)).headers["x-request-id"]

    assert await id_for("my-Trace_1.2") == "my-Trace_1.2"
    assert await id_for(None) != await id_for(None)
    for mad in ("", "a b", "x" * 129, '"},{"', "a/b"):
        assert (await id_for(mad)).startswith("req-")
    stream = await gateway.chat(stream=True)
    assert stream.headers["x-request-id"].startswith("req-")


async def test_the_access_log_carries_the_request_id(
    gateway: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "server.gateway"):
        await gateway.http.get("/v1/models?secret=1", headers={"x-request-id": "abc"})
    line = next(record for record in caplog.records if record.message == "request")
    assert (line.method, line.path, line.status) == ("GET", "/v1/models", 200)


async def test_api_keys(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, api_keys=("one", "zwei-ü"), admin_keys=("root",))
    for path in ("/v1/models", "/metrics", "/nothing", "/v1/adapters"):
        response = await gateway.http.get(path)
        assert_error(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert_error(await gateway.chat(), 401, "invalid_api_key")
    assert worker.requests == []
    for path in ("/health", "/health/live", "/health/ready"):
        assert (await gateway.http.get(path)).status_code == 200
    for key, status in (("one", 200), ("zwei-ü", 200), ("root", 200), ("on", 401), ("onee", 401), ("x", 401)):
        headers = {"authorization": f"Bearer {key}".encode()}
        assert (await gateway.http.get("/v1/models", headers=headers)).status_code == status, key
    assert (await gateway.http.get("/v1/models", headers={"authorization": "Basic one"})).status_code == 401


async def test_without_keys_any_token_is_accepted(gateway: Stack) -> None:
    headers = {"authorization": "Bearer whatever"}
    assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 200


async def test_adapters_need_an_admin_key(launch: Launch, worker: ScriptedWorker, gateway: Stack) -> None:
    assert_error(await gateway.http.get("/v1/adapters"), 403, "permission_denied")
    assert_error(await gateway.http.delete("/v1/adapters/alpaca"), 403, "permission_denied")
    guarded = await launch(worker, api_keys=("one",), admin_keys=("root",))
    body = {"id": "new", "path": "new-folder"}
    for key, status, code in ((None, 401, "invalid_api_key"), ("one", 403, "permission_denied")):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert_error(await guarded.http.post("/v1/adapters", json=body, headers=headers), status, code)
    assert [info.id for info in worker.models] == ["base", "alpaca", "org/sees"]


async def test_adapters_come_and_go(launch: Launch) -> None:
    workers = [ScriptedWorker(), ScriptedWorker()]
    gateway = await launch(*workers, admin_keys=("root",))
    gateway.http.headers["authorization"] = "Bearer root"
    created = await gateway.http.post("/v1/adapters", json={"id": "new", "path": "new-folder"})
    assert created.status_code == 201
    assert (created.json()["id"], created.json()["object"], created.json()["parent"]) == (
        "new",
        "model",
        "base",
    )
    listed = (await gateway.http.get("/v1/adapters")).json()["data"]
    assert sorted(item["id"] for item in listed) == ["alpaca", "new", "org/sees"]
    assert (await gateway.chat(model="new")).status_code == 200  # at once, without waiting for a poll
    deleted = await gateway.http.delete("/v1/adapters/new")
    assert (deleted.status_code, deleted.json()) == (200, {"id": "new", "object": "model", "deleted": True})
    assert all("new" not in [info.id for info in worker.models] for worker in workers)
    assert_error(await gateway.chat(model="new"), 404, "model_not_found")
    assert_error(await gateway.http.delete("/v1/adapters/new"), 404, "not_found")
    assert_error(await gateway.http.delete("/v1/adapters/base"), 409, "conflict")


async def test_an_adapter_is_loaded_everywhere_or_nowhere(launch: Launch) -> None:
    good, bad = (
        ScriptedWorker(),
        ScriptedWorker(loading_refusal=InvalidRequest("outside the root", param="path")),
    )
    gateway = await launch(good, bad, admin_keys=("root",))
    headers = {"authorization": "Bearer root"}
    response = await gateway.http.post("/v1/adapters", json={"id": "new", "path": "../x"}, headers=headers)
    assert assert_error(response, 400)["param"] == "path"
    assert "new" not in [info.id for info in good.models]


async def test_who_does_not_wait_for_an_adapter_leaves_it_nowhere_half(launch: Launch) -> None:
    asked, go_on, given_back = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Slow(ScriptedWorker):
        async def _load(self, request: Request) -> Response:
            asked.set()
            await go_on.wait()
            return await super()._load(request)

        async def _unload(self, request: Request) -> Response:
            given_back.set()
            return await super()._unload(request)

    slow, bad = Slow(), ScriptedWorker(loading_refusal=InvalidRequest("no room", param="path"))
    gateway = await launch(slow, bad, admin_keys=("root",))
    gateway.http.headers["authorization"] = "Bearer root"
    asking = asyncio.create_task(gateway.http.post("/v1/adapters", json={"id": "new", "path": "x"}))
    await asyncio.wait_for(asked.wait(), 10)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: not gateway.app.state.gateway.limiter._running)  # the gateway has seen it leave
    go_on.set()
    await asyncio.wait_for(given_back.wait(), 10)
    assert "new" not in [info.id for info in slow.models]


async def test_a_new_version_that_one_refuses_takes_no_old_one_away(launch: Launch) -> None:
    good, bad = ScriptedWorker(), ScriptedWorker(loading_refusal=InvalidRequest("no room", param="path"))
    gateway = await launch(good, bad, admin_keys=("root",))
    gateway.http.headers["authorization"] = "Bearer root"
    assert_error(await gateway.http.post("/v1/adapters", json={"id": "alpaca", "path": "newer"}), 400)
    for worker in (good, bad):
        assert "alpaca" in [info.id for info in worker.models]
    assert (await gateway.chat(model="alpaca")).status_code == 200


async def test_models(gateway: Stack) -> None:
    body = (await gateway.http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [item["id"] for item in body["data"]] == ["base", "alpaca", "org/sees"]
    alpaca = body["data"][1]
    fields = {name: alpaca[name] for name in ("object", "created", "root", "parent")}
    assert fields == {"object": "model", "created": 1_700_000_001, "root": "alpaca-folder", "parent": "base"}
    assert isinstance(alpaca["owned_by"], str)
    for id in ("alpaca", "org/sees", "org%2Fsees"):
        assert (await gateway.http.get(f"/v1/models/{id}")).json()["id"] == id.replace("%2F", "/")


async def test_tokens(gateway: Stack) -> None:
    body = {"model": "alpaca", "prompt": "Hi"}
    answer = (await gateway.http.post("/tokenize", json=body)).json()
    assert answer == {"tokens": [1, 72, 105], "count": 3, "max_model_len": 2048}
    answer = (await gateway.http.post("/tokenize", json=body | {"add_special_tokens": False})).json()
    assert answer["tokens"] == [72, 105]
    messages = [{"role": "user", "content": "Hi"}]
    talk = {"model": "base", "messages": messages}
    answer = (await gateway.http.post("/tokenize", json=talk)).json()
    assert answer["count"] == 3
    tool = {"type": "function", "function": {"name": "now"}}
    answer = (await gateway.http.post("/tokenize", json=talk | {"tools": [tool, tool]})).json()
    assert answer["count"] == 5  # the scripted worker's template has a token for each
    refused = await gateway.http.post("/tokenize", json=body | {"tools": [tool]})
    assert_error(refused, 400)
    answer = (await gateway.http.post("/detokenize", json={"model": "base", "tokens": [72, 105]})).json()
    assert answer == {"prompt": "Hi"}
    for path, rest in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert_error(await gateway.http.post(path, json={"model": "no"} | rest), 404, "model_not_found")


async def test_a_body_over_the_limit(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, max_body_bytes=10_000)
    assert (await gateway.chat("x" * 9_000)).status_code == 200
    assert_error(await gateway.chat("x" * 10_000), 413, "request_too_large")

    async def pieces():
        for _ in range(2000):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    response = await gateway.http.post("/v1/chat/completions", content=pieces(), headers=headers)
    assert_error(response, 413, "request_too_large")
    big = await gateway.http.post("/v1/chat/completions", content=b" " * 20_000_000, headers=headers)
    assert_error(big, 413, "request_too_large")
    assert len(worker.requests) == 1


async def test_a_body_of_too_many_values(launch: Launch, worker: ScriptedWorker) -> None:
    """What is small in bytes may be large to parse: it is refused before that."""
    gateway = await launch(worker)
    for crowded in (b"[]," * 4_000_000, b"{" * 5_000_000, b"0," * 5_000_000):
        body = b'{"model": "base", "prompt": [' + crowded + b"0]}"
        begun = time.process_time()  # the client's share is in it
        response = await gateway.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert time.process_time() - begun < 1
        assert "max_body_values" in assert_error(response, 413, "request_too_large")["message"]
    narrow = await launch(worker, max_body_values=40)
    ids = {"model": "base", "prompt": [1] * 30}
    assert (await narrow.http.post("/v1/completions", json=ids)).status_code == 200
    response = await narrow.http.post("/v1/completions", json=ids | {"prompt": [1] * 50})
    assert_error(response, 413, "request_too_large")
    assert worker.requests


async def test_a_client_that_does_not_read_its_stream_is_not_waited_for(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its deadline passes, and then there is no room for the event that says so, either."""
    monkeypatch.setattr("server.gateway.middleware._LAST_WORD_SECONDS", 0.2)
    caplog.set_level(logging.INFO, "server.gateway.middleware")

    async def script(_: object):
        yield Started(1)
        while True:
            yield Delta("x" * 2**16, (1,))
            await asyncio.sleep(0.001)

    gateway = await launch(ScriptedWorker(script=script), request_seconds=1)
    body = json.dumps({"model": "base", "stream": True, "messages": [{"role": "user", "content": "Hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (gateway.http.base_url.host, gateway.http.base_url.port))
        await loop.sock_sendall(client, (head + body).encode())
        await until(lambda: any(record.message == "request" for record in caplog.records))


async def test_a_body_that_comes_too_slowly(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, body_seconds=0.2)

    async def pieces():
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    headers = {"content-type": "application/json"}
    response = await gateway.http.post("/v1/chat/completions", content=pieces(), headers=headers)
    assert_error(response, 408, "request_timeout")


async def _until_told(go_on: asyncio.Event):
    yield Started(1)
    yield Delta("x", (1,))
    await go_on.wait()
    yield Finished("stop", Usage(1, 1))


async def test_admission_is_bounded(launch: Launch, worker: ScriptedWorker) -> None:
    go_on = asyncio.Event()
    worker.script = lambda _: _until_told(go_on)
    gateway = await launch(worker, max_concurrent_requests=2)
    running = [asyncio.create_task(gateway.chat(stream=stream)) for stream in (True, False)]
    await until(lambda: len(worker.requests) == 2)
    refused = await gateway.chat()
    assert_error(refused, 429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    assert (await gateway.http.get("/v1/models")).status_code == 200
    go_on.set()
    assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
    assert (await gateway.chat()).status_code == 200


async def test_draining(launch: Launch, worker: ScriptedWorker) -> None:
    go_on = asyncio.Event()
    worker.script = lambda _: _until_told(go_on)
    drain = Drain()
    gateway = await launch(worker, drain=drain)
    running = [asyncio.create_task(gateway.chat()), asyncio.create_task(gateway.chunks())]
    await until(lambda: len(worker.requests) == 2)
    drain.ask()
    for path in ("/health", "/health/ready"):
        response = await gateway.http.get(path)
        assert_error(response, 503, "unavailable")
        assert response.headers["retry-after"]
    assert (await gateway.http.get("/health/live")).status_code == 200
    refused = await gateway.chat()
    assert_error(refused, 503, "unavailable")
    assert refused.headers["retry-after"]
    assert refused.headers["connection"] == "close", "the next try shall find another gateway"
    go_on.set()  # what runs is finished
    answer, chunks = await asyncio.gather(*running)
    assert answer.headers["connection"] == "close"
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1] == "[DONE]"


async def test_an_expired_drain_ends_what_runs_with_an_error(launch: Launch, worker: ScriptedWorker) -> None:
    worker.script = lambda _: _until_told(asyncio.Event())
    drain = Drain()
    gateway = await launch(worker, drain=drain)
    answer = asyncio.create_task(gateway.chat())
    body = {"model": "base", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if '"x"' in line:
                break
        await until(lambda: len(worker.requests) == 2)
        drain.ask()
        drain.expired.set()
        rest = [line async for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
    assert_error(await answer, 503, "unavailable")
    await asyncio.wait_for(worker.closed.wait(), 5)


async def test_readiness_follows_the_workers(launch: Launch, worker: ScriptedWorker) -> None:
    worker.is_ready = False
    gateway = await launch(worker)
    response = await gateway.http.get("/health/ready")
    assert_error(response, 503, "unavailable")
    assert_error(await gateway.chat(), 503, "unavailable")
    assert (await gateway.http.get("/health/live")).status_code == 200
    assert (await gateway.http.head("/health")).status_code == 503
    worker.is_ready = True
    async with asyncio.timeout(5):
        while (await gateway.http.get("/health")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (await gateway.chat()).status_code == 200


async def test_cors(launch: Launch, worker: ScriptedWorker, gateway: Stack) -> None:
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert_error(await gateway.http.options("/v1/models", headers=preflight), 405, "method_not_allowed")
    assert (
        "access-control-allow-origin" not in (await gateway.http.get("/v1/models", headers=preflight)).headers
    )
    open_ = await launch(worker, cors_origins=("https://app.example",), api_keys=("one",))
    allowed = await open_.http.options(
        "/v1/chat/completions", headers=preflight | {"access-control-request-headers": "authorization"}
    )
    assert allowed.status_code == 200  # a preflight carries no key
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    # An error must be readable by the page too.
    refused = await open_.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert_error(refused, 401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    other = await open_.http.options("/v1/models", headers=preflight | {"origin": "https://evil.example"})
    assert_error(other, 400, "cors")
    assert "access-control-allow-origin" not in other.headers


async def test_metrics(launch: Launch, worker: ScriptedWorker) -> None:
    experts = {"ocr": ScriptedExpert("ocr", "text")}
    gateway = await launch(worker, experts=experts, image_allow_private=True)
    await gateway.chat(n=2)
    await gateway.chat(model="unknown-to-all")
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    await gateway.chat(model="alpaca", messages=[{"role": "user", "content": content}])
    text = (await gateway.http.get("/metrics")).text
    values = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    p = "llama_adapter:"
    assert values[p + 'request_success_total{finished_reason="stop",model="base"}'] == 2
    assert values[p + 'request_success_total{finished_reason="stop",model="alpaca"}'] == 1
    assert values[p + 'generation_tokens_total{model="base"}'] == 4
    assert values[p + 'prompt_tokens_total{model="base"}'] == 5  # the prompt of both choices once
    assert values[p + 'time_to_first_token_seconds_count{model="base"}'] == 2
    assert values[p + 'inter_token_latency_seconds_count{model="base"}'] == 2
    assert values[p + 'e2e_request_latency_seconds_count{model="base"}'] == 2
    assert values[p + 'expert_latency_seconds_count{expert="ocr",model="alpaca",outcome="ok"}'] == 1
    assert values[p + 'http_requests_total{route="/v1/chat/completions",status="404"}'] == 1
    assert values[p + 'request_prompt_tokens_sum{model="base"}'] == 5
    assert values[p + 'request_generation_tokens_sum{model="base"}'] == 4
    assert values["process_resident_memory_bytes"] > 1e6
    assert values["process_open_fds"] > 0
    assert values[p + f'build_info{{version="{version("llama-adapter-server")}"}}'] == 1
    engine = {name.partition("{")[0].removeprefix(p): v for name, v in values.items() if "worker=" in name}
    assert engine == {
        "num_requests_running": 3,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 40,
        "prefix_cache_hits_total": 16,
        "num_preemptions_total": 2,
        "engine_steps_total": 99,
        "adapters_loaded": 2,
        "adapters_hot": 1,
        "prompt_slots_used": 1,
        "worker_ready": 1,
    }
    assert "unknown-to-all" not in text


def test_the_gateway_starts_without_torch() -> None:
    code = """
import sys, asyncio
from server.gateway.app import create_app
from server.settings import GatewaySettings
app = create_app(GatewaySettings(), {})
async def live():
    sent = []
    async def receive(): return {"type": "http.request", "body": b"", "more_body": False}
    async def send(message): sent.append(message)
    scope = {"type": "http", "method": "GET", "path": "/health/live", "raw_path": b"/health/live",
             "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "root_path": ""}
    await app(scope, receive, send)
    return sent[0]["status"]
assert asyncio.run(live()) == 200
print(sorted({"torch", "numpy", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


async def test_a_worker_on_a_unix_socket(launch: Launch, worker: ScriptedWorker, tmp_path) -> None:
    async with serving(worker.app, uds=str(tmp_path / "w.sock")) as url:
        gateway = await launch(worker_urls=(url,))
        assert (await gateway.chat()).status_code == 200


async def test_garbage_on_the_wire_leaves_the_server_alive(gateway: Stack) -> None:
    host, port = gateway.http.base_url.host, gateway.http.base_url.port
    for raw in (
        b"\x00\xff\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /%zz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection((host, port), 5) as sock:
            sock.sendall(raw)
            await asyncio.sleep(0.05)
    assert (await gateway.chat()).status_code == 200


async def test_models_of_several_workers(launch: Launch) -> None:
    one = ScriptedWorker(models=[BASE, TEXT_ADAPTER])
    other = ScriptedWorker(models=[BASE])
    gateway = await launch(one, other)
    ids = [item["id"] for item in (await gateway.http.get("/v1/models")).json()["data"]]
    assert ids == ["base", "alpaca"]
    assert json.loads((await gateway.http.get("/v1/models/alpaca")).text)["version"] == 1
