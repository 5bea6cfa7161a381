"""`serve --workers 2` under faults: a worker that is killed, a drain in time and one past its deadline."""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from service import Service, serving, until
from tiny_base import write_tiny_base

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

STREAMS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    write_tiny_base(folder, positions=4096)
    return folder


@dataclass
class Stream:
    """One streamed answer, read by a thread of its own; times are of the monotonic clock."""

    service: Service
    prompt: str
    max_tokens: int = 400
    events: list[Any] = field(default_factory=list)
    ended: float | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        url = f"{self.service.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    data = line.removeprefix("data: ")
                    self.events.append(data if data == "[DONE]" else json.loads(data))
        self.ended = time.monotonic()

    @property
    def begun(self) -> bool:
        return bool(self.events)

    @property
    def has_text(self) -> bool:
        """Nobody but the worker that gave it can go on with it; what precedes text may be told by another."""
        chunks = [event for event in self.events if event != "[DONE]" and "choices" in event]
        return any(choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"])

    @property
    def outcome(self) -> str:
        self.thread.join(60)
        assert not self.thread.is_alive(), "a stream never ended"
        last = self.events[-1]
        return "done" if last == "[DONE]" else last["error"]["type"]


def workers(service: Service) -> list[psutil.Process]:
    children = psutil.Process(service.process.pid).children()
    return sorted(
        (c for c in children if "worker" in c.cmdline()), key=lambda c: c.environ()["LLAMA_ADAPTER_UDS"]
    )


def ready_workers(service: Service) -> dict[str, float]:
    text = httpx.get(f"{service.url}/metrics").text
    [family] = [f for f in text_string_to_metric_families(text) if f.name == "llama_adapter:worker_ready"]
    return {sample.labels["worker"]: sample.value for sample in family.samples}


def start_streams(service: Service) -> list[Stream]:
    streams = [Stream(service, f"{i}: tell") for i in range(STREAMS)]
    until(lambda: all(stream.begun for stream in streams))
    return streams


def nothing_comes(streams: list[Stream], service: Service) -> bool:
    """Whether the gateway, which was not idle meanwhile, had nothing more to tell any stream."""
    before = [len(stream.events) for stream in streams]
    for _ in range(3):
        ready_workers(service)
    return [len(stream.events) for stream in streams] == before


def streams_cut_at(
    worker: psutil.Process, other: psutil.Process, service: Service
) -> tuple[list[Stream], list[Stream]]:
    """Streams that `worker` had given text of before it was stopped far from their end, and all the rest.

    The other worker stands still until then, so each stream that has text is `worker`'s.
    """
    other.suspend()
    streams = [Stream(service, f"{i}: tell", max_tokens=3000) for i in range(STREAMS)]
    until(lambda: any(stream.has_text for stream in streams))
    until(lambda: all(stream.has_text for stream in streams if stream.begun))  # all that it has taken
    worker.suspend()
    until(lambda: worker.status() == psutil.STATUS_STOPPED)
    until(lambda: nothing_comes(streams, service))
    cut = [stream for stream in streams if stream.has_text and stream.events[-1] != "[DONE]"]
    other.resume()
    assert cut, "every stream was over before its worker could be stopped"
    return cut, [stream for stream in streams if stream not in cut]


def test_what_a_killed_worker_had_not_begun_goes_to_the_other(base: Path) -> None:
    with serving("--base", str(base), "--experts", "", "--workers", "2") as service:
        assert ready_workers(service) == {"worker-0": 1, "worker-1": 1}
        first, second = workers(service)
        threads = {worker.environ()["LLAMA_ADAPTER_NUM_THREADS"] for worker in (first, second)}
        assert threads == {str(max(1, (psutil.cpu_count() or 1) // 2))}
        for worker in (first, second):
            worker.suspend()  # so that none can begin before one is killed
        streams = [Stream(service, f"{i}: tell") for i in range(STREAMS)]
        second.resume()
        until(lambda: any(stream.ended for stream in streams))
        assert not all(stream.ended for stream in streams), "the first worker got none of them"
        first.kill()
        assert [stream.outcome for stream in streams] == ["done"] * STREAMS
        until(lambda: ready_workers(service) == {"worker-0": 1, "worker-1": 1}, 90)
        assert workers(service)[0].pid != first.pid
        assert workers(service)[1].pid == second.pid
        assert "the worker-0 was killed by SIGKILL" in service.text


def test_a_worker_killed_mid_stream_ends_that_stream_with_an_error_event(base: Path) -> None:
    with serving("--base", str(base), "--experts", "", "--workers", "2") as service:
        first, second = workers(service)
        cut, others = streams_cut_at(first, second, service)
        killed = time.monotonic()
        first.kill()
        assert [stream.outcome for stream in cut] == ["server_error"] * len(cut)
        assert all(stream.ended is not None and stream.ended - killed < 5 for stream in cut)
        assert [stream.outcome for stream in others] == ["done"] * len(others)


def test_a_worker_that_hangs_is_started_again(base: Path) -> None:
    arguments = ("--base", str(base), "--experts", "", "--workers", "2", "--liveness-seconds", "4")
    with serving(*arguments) as service:
        first, second = workers(service)
        cut, others = streams_cut_at(first, second, service)
        until(lambda: ready_workers(service) == {"worker-0": 0, "worker-1": 1})
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        assert service.ask(body).status_code == 200
        assert [stream.outcome for stream in cut] == ["server_error"] * len(cut)  # their worker was killed
        assert [stream.outcome for stream in others] == ["done"] * len(others)
        until(lambda: ready_workers(service) == {"worker-0": 1, "worker-1": 1}, 90)
        assert workers(service)[0].pid != first.pid
        assert workers(service)[1].pid == second.pid
        assert "the worker-0 has not answered for" in service.text


def test_sigterm_lets_streams_finish(base: Path) -> None:
    with serving("--base", str(base), "--experts", "", "--workers", "2") as service:
        streams = start_streams(service)
        service.process.send_signal(signal.SIGTERM)
        assert [stream.outcome for stream in streams] == ["done"] * STREAMS
        assert service.process.wait(60) == 0
    assert "Traceback" not in service.text


def test_sigterm_ends_what_runs_past_the_deadline(base: Path) -> None:
    arguments = ("--base", str(base), "--experts", "", "--drain-seconds", "1")
    with serving(*arguments) as service:
        [worker] = workers(service)
        stream = Stream(service, "tell")
        until(lambda: stream.begun)
        worker.suspend()
        assert stream.events[-1] != "[DONE]"
        asked = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert stream.outcome == "server_error"
        assert stream.ended is not None
        assert 0.9 < stream.ended - asked < 5
        assert service.process.wait(60) == 0  # the worker cannot hear its own signal, and is killed
    assert not worker.is_running()
