"""Load on a running server, as a client sees it: `python bench/serve.py --url http://127.0.0.1:8000`.

Each round asks every model in turn, at each concurrency, for the same number of tokens; so a drift of
the machine meets all models alike, and ratios between them stand where absolute figures do not.

TTFT   sent → first content.            TPOT   (end − first content) / (tokens − 1).
tok/s  all generated tokens of a burst / its wall time.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_WORDS = ("river", "stone", "lantern", "copper", "winter", "market", "engine", "garden", "letter", "island")


@dataclass(frozen=True, slots=True)
class Load:
    """What one request asks for, how many at once, how often."""

    levels: tuple[int, ...]
    rounds: int
    prompt_words: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One request."""

    tokens: int
    ttft: float
    total: float

    @property
    def tpot(self) -> float:
        return (self.total - self.ttft) / max(1, self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Burst:
    """`concurrency` requests sent at once to one model."""

    model: str
    concurrency: int
    round: int
    tokens_per_second: float
    ttft: float
    tpot: float


def main(
    url: Annotated[str, typer.Option(help="of the server")] = "http://127.0.0.1:8000",
    models: Annotated[str, typer.Option(help="ids, separated by commas; empty: all that are served")] = "",
    concurrency: Annotated[str, typer.Option(help="requests at once, separated by commas")] = "1,16",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    prompt_words: Annotated[int, typer.Option(min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY")] = "none",
    out: Annotated[Path, typer.Option(help="folder for serve.json and serve.md")] = Path("bench/out"),
) -> None:
    """Measure tokens per second, TTFT and TPOT of each model at each concurrency."""
    levels = tuple(int(level) for level in concurrency.split(","))
    load = Load(levels, rounds, prompt_words, max_tokens)
    headers = {"authorization": f"Bearer {api_key}"}
    bursts = asyncio.run(_measure(url, headers, [name for name in models.split(",") if name], load))
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "url": url,
        "machine": platform.platform(),
        "load": asdict(load),
        "bursts": [asdict(b) for b in bursts],
    }
    (out / "serve.json").write_text(json.dumps(report, indent=2) + "\n")
    table = _table(bursts)
    (out / "serve.md").write_text(table)
    Console().print(Markdown(table))


async def _measure(url: str, headers: dict[str, str], models: list[str], load: Load) -> list[Burst]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    limits = httpx.Limits(max_connections=max(load.levels))
    client = httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False)
    async with client:
        models = models or await _served(client)
        for model in models:  # compile, fill the adapter's prompt, open connections
            await _burst(client, model, max(load.levels), -1, replace(load, max_tokens=4))
        plan = [
            (number, level, model)
            for number in range(load.rounds)
            for level in load.levels
            for model in models
        ]
        bursts = []
        with Progress(*columns) as progress:
            task = progress.add_task("measuring", total=len(plan))
            for number, level, model in plan:
                progress.update(task, description=f"{model} × {level}")
                bursts.append(await _burst(client, model, level, number, load))
                progress.advance(task)
    return bursts


async def _served(client: httpx.AsyncClient) -> list[str]:
    response = (await client.get("/v1/models")).raise_for_status()
    return [model["id"] for model in response.json()["data"]]


async def _burst(client: httpx.AsyncClient, model: str, concurrency: int, number: int, load: Load) -> Burst:
    # Every prompt is its own, so that no prefix cache answers for the model.
    rng = random.Random(f"{model} {concurrency} {number} {time.time_ns()}")
    prompts = [" ".join(rng.choices(_WORDS, k=load.prompt_words)) for _ in range(concurrency)]
    started = time.perf_counter()
    samples = await asyncio.gather(*(_request(client, model, prompt, load.max_tokens) for prompt in prompts))
    seconds = time.perf_counter() - started
    return Burst(
        model,
        concurrency,
        number,
        tokens_per_second=sum(sample.tokens for sample in samples) / seconds,
        ttft=statistics.median(sample.ttft for sample in samples),
        tpot=statistics.median(sample.tpot for sample in samples),
    )


async def _request(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Sample:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Write a story with these words: {prompt}"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "experts": [],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first: float | None = None
    tokens = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{model}: {response.status_code} {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            chunk = _chunk(line)
            if chunk.get("error"):
                raise SystemExit(f"{model}: {chunk['error']['message']}")
            if first is None and any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                first = time.perf_counter()
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    ended = time.perf_counter()
    return Sample(tokens, (first or ended) - started, ended - started)


def _chunk(line: str) -> dict[str, Any]:
    data = line.removeprefix("data:").strip()
    chunk: dict[str, Any] = json.loads(data) if line.startswith("data:") and data != "[DONE]" else {}
    return chunk


def _table(bursts: list[Burst]) -> str:
    """Medians over the rounds; the ratio to the first model is the median of each round's own ratio."""
    reference = bursts[0].model
    groups: dict[tuple[int, str], list[Burst]] = {}
    for burst in bursts:
        groups.setdefault((burst.concurrency, burst.model), []).append(burst)
    lines = [
        f"| model | at once | tok/s | spread | ratio to {reference} | TTFT ms | TPOT ms |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for (level, model), mine in groups.items():
        rates = [burst.tokens_per_second for burst in mine]
        pairs = zip(mine, groups[level, reference], strict=True)
        ratio = statistics.median(ours.tokens_per_second / first.tokens_per_second for ours, first in pairs)
        ttft = 1000 * statistics.median(burst.ttft for burst in mine)
        tpot = 1000 * statistics.median(burst.tpot for burst in mine)
        lines.append(
            f"| {model} | {level} | {statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} "
            f"| {ratio:.2f} | {ttft:.0f} | {tpot:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
