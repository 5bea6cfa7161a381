"""`llama-adapter top`: what a running gateway does, read off its metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.metrics import PREFIX
from server.serving import StartupError

app = typer.Typer()

_NOTHING = "–"
_SECONDS = 5.0  # for one answer
_PIPED_WIDTH = 160


@app.command(epilog="Examples:\n\n\b\n  llama-adapter top\n  llama-adapter top http://10.0.0.4:8000 --once")
def top(
    url: Annotated[str, typer.Argument(help="of the gateway")] = "http://127.0.0.1:8000",
    *,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="print one frame and end")] = False,
    api_key: Annotated[
        str,
        typer.Option(
            help="where the gateway asks for one", envvar=["LLAMA_ADAPTER_API_KEY", "OPENAI_API_KEY"]
        ),
    ] = "",
) -> None:
    """Watch a gateway: queues, batches, caches, adapters, tokens per second. Ctrl-C ends it."""
    if not api_key.isascii():
        raise StartupError("the API key holds a character, maybe an invisible one, that no header can carry")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    with httpx.Client(base_url=url, headers=headers, timeout=_SECONDS) as client:
        before = _look(client)  # what is wrong at the start is wrong for good
        if once:
            time.sleep(interval)
            console.print(frame(before, _look(client)))
            return
        try:
            _watch(client, before, interval, console)
        except KeyboardInterrupt:
            return


def _watch(client: httpx.Client, before: Reading, interval: float, console: Console) -> None:
    with Live(frame(before, before), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                now = _look(client)
            except StartupError as error:  # it may come back
                live.update(Text(str(error)), refresh=True)
                continue
            live.update(frame(before, now), refresh=True)
            before = now


@dataclass(frozen=True, slots=True)
class Reading:
    """The metrics at one moment of the monotonic clock."""

    at: float
    samples: tuple[Sample, ...]

    def matching(self, name: str, **labels: str) -> Iterator[Sample]:
        for sample in self.samples:
            if sample.name == PREFIX + name and labels.items() <= sample.labels.items():
                yield sample

    def total(self, name: str, **labels: str) -> float:
        """The sum over every label that is not given; 0 where there is nothing."""
        return sum(sample.value for sample in self.matching(name, **labels))

    def values(self, name: str, label: str) -> list[str]:
        return sorted({sample.labels[label] for sample in self.matching(name)})


def _look(client: httpx.Client) -> Reading:
    """Raises `StartupError` where there is no gateway, or it wants a key."""
    try:
        response = client.get("/metrics")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StartupError(f"no gateway answers at {client.base_url} ({error}); give its URL.") from error
    if response.status_code in (401, 403):
        raise StartupError(f"{client.base_url} asks for a key; give --api-key or set LLAMA_ADAPTER_API_KEY.")
    if response.status_code != 200:
        raise StartupError(f"{client.base_url}metrics answers {response.status_code}; is it a gateway?")
    try:
        families = list(text_string_to_metric_families(response.text))
    except ValueError as error:
        raise StartupError(f"{client.base_url}metrics is no Prometheus text; is it a gateway?") from error
    return Reading(time.monotonic(), tuple(sample for family in families for sample in family.samples))


def frame(before: Reading, now: Reading) -> RenderableType:
    """Workers, models and experts at `now`, with rates since `before`."""
    change = _Change(before, now)
    return Group(_workers(change), _models(change), *([_experts(change)] if _has_experts(now) else []))


@dataclass(frozen=True, slots=True)
class _Change:
    before: Reading
    now: Reading

    def rate(self, name: str, **labels: str) -> str:
        """Per second."""
        seconds = self.now.at - self.before.at
        if seconds <= 0:
            return _NOTHING
        return f"{(self.now.total(name, **labels) - self.before.total(name, **labels)) / seconds:.1f}"

    def mean(self, name: str, **labels: str) -> str:
        """A histogram's mean since `before`; where nothing was seen since then, of all time."""
        count, total = (self.now.total(f"{name}_{part}", **labels) for part in ("count", "sum"))
        old_count, old_total = (self.before.total(f"{name}_{part}", **labels) for part in ("count", "sum"))
        if count > old_count:
            count, total = count - old_count, total - old_total
        return f"{1000 * total / count:.0f} ms" if count else _NOTHING

    def share(self, part: str, whole: str, **labels: str) -> str:
        """Of all time."""
        total = self.now.total(whole, **labels)
        return f"{self.now.total(part, **labels) / total:.0%}" if total else _NOTHING


def _workers(change: _Change) -> Table:
    table = _table(
        "worker", "state", "running", "waiting", "KV cache", "prefix hits",
        "preempted", "adapters hot", "loaded", "prompts", "steps/s",
    )  # fmt: skip
    now = change.now
    for name in now.values("worker_ready", "worker"):
        ready = now.total("worker_ready", worker=name) == 1
        if not ready:
            table.add_row(_short(name), "not ready", *[_NOTHING] * 9)
            continue
        table.add_row(
            _short(name),
            "ready",
            f"{now.total('num_requests_running', worker=name):.0f}",
            f"{now.total('num_requests_waiting', worker=name):.0f}",
            f"{now.total('kv_cache_usage_perc', worker=name):.0%}",
            change.share("prefix_cache_hits_total", "prefix_cache_queries_total", worker=name),
            f"{now.total('num_preemptions_total', worker=name):.0f}",
            f"{now.total('adapters_hot', worker=name):.0f}",
            f"{now.total('adapters_loaded', worker=name):.0f}",
            f"{now.total('prompt_slots_used', worker=name):.0f}",
            change.rate("engine_steps_total", worker=name),
        )
    return table


def _short(worker: str) -> str:
    """`host:port` of a URL; a socket's name is short already."""
    return worker.rpartition("/")[2]


def _models(change: _Change) -> Table:
    table = _table("model", "done", "tok/s", "prompt tok/s", "TTFT", "between", "queued", "whole")
    for name in change.now.values("prompt_tokens_total", "model"):
        table.add_row(
            name,
            f"{change.now.total('request_success_total', model=name):.0f}",
            change.rate("generation_tokens_total", model=name),
            change.rate("prompt_tokens_total", model=name),
            change.mean("time_to_first_token_seconds", model=name),
            change.mean("inter_token_latency_seconds", model=name),
            change.mean("request_queue_time_seconds", model=name),
            change.mean("e2e_request_latency_seconds", model=name),
        )
    return table


def _has_experts(now: Reading) -> bool:
    return bool(now.values("expert_circuit_open", "expert"))


def _experts(change: _Change) -> Table:
    table = _table("expert", "circuit", "read", "not read", "mean")
    now = change.now
    for name in now.values("expert_circuit_open", "expert"):
        good = sum(now.total("expert_latency_seconds_count", expert=name, outcome=o) for o in ("ok", "empty"))
        every = now.total("expert_latency_seconds_count", expert=name)
        table.add_row(
            name,
            "open" if now.total("expert_circuit_open", expert=name) else "closed",
            f"{good:.0f}",
            f"{every - good:.0f}",
            change.mean("expert_latency_seconds", expert=name),
        )
    return table


def _table(first: str, *rest: str) -> Table:
    table = Table(expand=False)
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, justify="right")
    return table
