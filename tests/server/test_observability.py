"""What an operator sees of a real service: metrics, logs and traces of one request in every process."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from service import Service, serving, until
from tiny_base import write_adapter, write_tiny_base

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
REQUEST_ID = "a-request-of-mine"
PREFIX = "llama_adapter:"

# What dashboards look for; the model is the adapter's id, the base's where the engine itself is meant.
OF_REQUESTS = {
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "expert_latency_seconds_count",
}
OF_ENGINES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
}


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP collector: keeps the spans it is sent, with the service that sent them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[tuple[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, service: str, name: str) -> list[Any]:
        return [span for of, span in self.spans if (of, span.name) == (f"llama-adapter-{service}", name)]


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = attributes(resource.resource)["service.name"]
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            self.server.spans += [(service, span) for span in spans]
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


def attributes(message: Any) -> dict[str, Any]:
    pairs = [(item.key, item.value) for item in message.attributes]
    return {key: getattr(value, value.WhichOneof("value")) for key, value in pairs}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def answered(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Any]]:
    """A service with traces on, after one request with an image to an adapter; and the answer."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_base(folder / "tiny")
    write_adapter(folder / "poet", "v1")
    arguments = (
        "--base",
        str(folder / "tiny"),
        "--adapter",
        f"poet={folder / 'poet'}",
        "--experts",
        "classifier",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with serving(*arguments) as service:
            headers = {"x-request-id": REQUEST_ID, "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
            url = f"{service.url}/v1/chat/completions"
            response = httpx.post(url, json=question(), headers=headers, timeout=60)
            assert response.status_code == 200, response.text
            yield service, response.json()


def question() -> dict[str, Any]:
    data = BytesIO()
    Image.new("RGB", (32, 32), "red").save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    return {"model": "poet", "messages": messages, "max_tokens": 12, "ignore_eos": True}


def test_every_metric_of_the_field_with_its_model(answered: tuple[Service, Any]) -> None:
    service, answer = answered
    samples = [
        sample
        for family in text_string_to_metric_families(httpx.get(f"{service.url}/metrics").text)
        for sample in family.samples
    ]

    def value(name: str, **labels: str) -> float:
        found = [s.value for s in samples if s.name == PREFIX + name and labels.items() <= s.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    for name in OF_REQUESTS:
        assert value(name, model="poet") >= 1, name
    for name in OF_ENGINES:
        assert value(name, model="tiny") >= 0, name
    assert value("prompt_tokens_total", model="poet") == answer["usage"]["prompt_tokens"]
    assert value("generation_tokens_total", model="poet") == 12
    assert value("request_success_total", model="poet", finished_reason="length") == 1
    assert value("request_queue_time_seconds_count", model="poet") == 1
    queued = value("request_queue_time_seconds_sum", model="poet")
    assert 0 < queued < value("time_to_first_token_seconds_sum", model="poet")
    assert value("expert_latency_seconds_count", model="poet", expert="classifier") == 1
    assert not any(REQUEST_ID in sample.labels.values() for sample in samples)


def test_the_requests_id_is_in_the_logs_of_every_process(answered: tuple[Service, Any]) -> None:
    service, _ = answered
    told: dict[str, list[dict[str, Any]]] = {"gateway": [], "worker": [], "experts": []}

    def look() -> bool:
        for lines in told.values():
            lines.clear()
        for line in service.text.splitlines():
            process, bar, text = line.partition("| ")
            process, text = (process.strip(), text) if bar else ("gateway", line)
            if text.startswith("{") and json.loads(text).get("request_id") == REQUEST_ID:
                told[process].append(json.loads(text))
        return all(told.values())

    until(look)
    paths = {process: {line.get("path") for line in lines} for process, lines in told.items()}
    assert "/v1/chat/completions" in paths["gateway"]
    assert "/generate" in paths["worker"]
    assert "/experts/classifier/read" in paths["experts"]


def test_one_trace_crosses_every_process(answered: tuple[Service, Any], collector: Collector) -> None:
    _, answer = answered
    until(lambda: bool(collector.named("gateway", "POST /v1/chat/completions")))
    until(lambda: bool(collector.named("worker", "POST /generate")))
    until(lambda: bool(collector.named("experts", "POST /experts/{name}/read")))
    [request] = collector.named("gateway", "POST /v1/chat/completions")
    [image] = collector.named("gateway", "image")
    [expert] = collector.named("gateway", "expert")
    [reading] = collector.named("experts", "POST /experts/{name}/read")
    [generate] = collector.named("worker", "POST /generate")
    queue, prefill, decode = (collector.named("worker", n)[0] for n in ("queue", "prefill", "decode"))
    assert {span.trace_id.hex() for _, span in collector.spans} == {TRACE_ID}
    assert request.parent_span_id.hex() == PARENT_ID
    for child, parent in (
        (image, request), (expert, request), (reading, expert), (generate, request),
        (queue, generate), (prefill, generate), (decode, generate),
    ):  # fmt: skip
        assert child.parent_span_id == parent.span_id, child.name
        assert parent.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
        # Whoever was asked closes its span after its answer is sent, which the asker may have read by then.
        asked = child in (generate, reading)
        assert asked or child.end_time_unix_nano <= parent.end_time_unix_nano, child.name
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert attributes(request)["http.response.status_code"] == 200
    assert attributes(request)["request.id"] == REQUEST_ID
    assert attributes(expert)["expert"] == "classifier"
    assert attributes(expert)["outcome"] in ("ok", "empty")
    assert attributes(generate)["gen_ai.request.model"] == "poet"
    assert attributes(generate)["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert attributes(decode)["gen_ai.usage.output_tokens"] == 12


def test_no_poll_is_traced(answered: tuple[Service, Any], collector: Collector) -> None:
    service, _ = answered
    httpx.get(f"{service.url}/health/ready").raise_for_status()
    assert not [span.name for _, span in collector.spans if span.name.startswith("GET")]


def test_top_shows_it(answered: tuple[Service, Any]) -> None:
    service, _ = answered
    command = [sys.executable, "-m", "server.cli", "top", service.url, "--once", "--interval", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "│" in line]
    [worker] = [row for row in rows if "worker" in row]
    assert "ready" in worker
    [model] = [row for row in rows if "poet" in row]
    assert model[2:4] == ["1", "0.0"]  # done, tokens per second just now
    [expert] = [row for row in rows if "classifier" in row]
    assert expert[2:5] == ["closed", "1", "0"]
