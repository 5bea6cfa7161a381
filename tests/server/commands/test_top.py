"""The terminal view: figures from a gateway's real metrics, and sentences for everything that is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from server.cli import app
from server.commands.top import Reading, frame
from server.gateway.metrics import GatewayMetrics
from server.serving import StartupError
from server.worker.messages import Delta, Finished, Scheduled, Started, Usage
from tests.server.gateway.scripted import STATS

WORKERS = [("unix:/run/x/worker-0.sock", "tiny", STATS), ("http://10.0.0.5:8001", "", None)]


def rows(before: Reading, now: Reading) -> dict[str, list[str]]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(frame(before, now))
    lines = [line.split("│")[1:-1] for line in capture.get().splitlines() if "│" in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def read(metrics: GatewayMetrics, at: float) -> Reading:
    families = text_string_to_metric_families(metrics.render().decode())
    return Reading(at, tuple(sample for family in families for sample in family.samples))


def test_a_frame_tells_rates_and_means_since_the_last() -> None:
    steps = [STATS]
    metrics = GatewayMetrics(lambda: [(WORKERS[0][0], "tiny", steps[-1]), WORKERS[1]])
    metrics.experts.labels("poet", "ocr", "ok").observe(0.25)
    metrics.experts.labels("poet", "ocr", "skipped").observe(0.0)
    metrics.open_circuits.labels("ocr").set(1)
    before = read(metrics, 10.0)
    choice = metrics.observe("poet", 0.0)
    choice.see(Started(30))
    choice.see(Scheduled(0.5))
    for _ in range(8):
        choice.see(Delta("x", (1,)))
    choice.see(Finished("stop", Usage(30, 8)))
    steps.append(replace(STATS, steps=STATS.steps + 40))
    shown = rows(before, read(metrics, 12.0))
    # state running waiting KV prefix-hits preempted hot loaded prompts steps/s
    assert shown["worker-0.sock"] == ["ready", "3", "1", "25%", "40%", "2", "1", "2", "1", "20.0"]
    assert shown["10.0.0.5:8001"] == ["not ready", *["–"] * 9]
    done, tokens, prompt_tokens, _, _, queued, _ = shown["poet"]
    assert (done, tokens, prompt_tokens, queued) == ("1", "4.0", "15.0", "500 ms")
    assert shown["ocr"] == ["open", "1", "1", "125 ms"]


def test_the_first_frame_has_no_rates() -> None:
    metrics = GatewayMetrics(lambda: WORKERS)
    metrics.observe("poet", 0.0).see(Started(30))
    first = read(metrics, 1.0)
    assert rows(first, first)["poet"][1:] == ["–"] * 6


class Scripted(BaseHTTPRequestHandler):
    answers: tuple[int, str] = (200, "")

    def do_GET(self) -> None:
        status, text = self.answers
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Scripted) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ((401, ""), "--api-key"),
        ((404, ""), "is it a gateway"),
        ((200, "<html> is not"), "no Prometheus text"),
    ],
)
def test_what_is_no_gateway_is_said_to_be_none(
    url: str, answer: tuple[int, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "answers", answer)
    result = CliRunner().invoke(app, ["top", url, "--once"])
    assert isinstance(result.exception, StartupError)
    assert word in str(result.exception)


def test_a_key_that_no_header_can_carry(url: str) -> None:
    result = CliRunner().invoke(app, ["top", url, "--once", "--api-key", "sk-\u200bé"])
    assert isinstance(result.exception, StartupError), result.output


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:1", "localhost:1", "http://[", "ftp://x"])
def test_an_address_where_nobody_answers(wrong: str) -> None:
    result = CliRunner().invoke(app, ["top", wrong, "--once"])
    assert isinstance(result.exception, StartupError), result.output


@pytest.mark.parametrize("variable", ["LLAMA_ADAPTER_API_KEY", "OPENAI_API_KEY"])
def test_the_key_comes_from_the_environment_too(
    url: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service's own variable, as `llama-adapter eval` reads it, before that of OpenAI's clients."""
    sent: list[str | None] = []
    monkeypatch.setattr(Scripted, "answers", (401, ""))
    monkeypatch.setattr(Scripted, "log_message", lambda self, *_: sent.append(self.headers["authorization"]))
    monkeypatch.setenv("OPENAI_API_KEY", "another's")
    monkeypatch.setenv(variable, "ours")
    CliRunner().invoke(app, ["top", url, "--once"])
    assert sent == ["Bearer ours"]
