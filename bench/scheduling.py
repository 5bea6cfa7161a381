"""How even the engine is under mixed load: `python bench/scheduling.py`.

Requests arrive at random times, whether or not earlier ones are done (open loop): short chats over eight
adapters, long prompts, and pictures, all through the engine's own API. Then a prompt of 512 tokens is asked
anew and again, for what the prefix cache saves; and adapters are loaded, replaced and unloaded beside running
requests, for what that costs them.

ITL    between two tokens of one request.          TTFT   sent to first token.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from engine_client import EngineClient, start_engine
from machine import facts

from server.processes import prepare_torch
from server.settings import WorkerSettings

_ADAPTERS = 8
# Requests beside whom adapters come and go; with a visitor's two rows they still fill one tile of a product.
_RUNNING = 6
_STRETCH = 1.2  # times the median: what a step may take while they do


@dataclass(frozen=True, slots=True)
class Sort:
    """One kind of request, and its share of those that arrive."""

    name: str
    share: float
    prompt_tokens: int
    max_tokens: int
    sees: bool = False


SORTS = (Sort("chat", 0.7, 48, 48), Sort("long prompt", 0.15, 1024, 24), Sort("picture", 0.15, 48, 24, True))


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it came, when it had its first token, and the gaps between the others."""

    sort: str
    model: str
    ttft: float
    gaps: tuple[float, ...]


async def _ask(client: EngineClient, model: str, sort: Sort, prompt: tuple[int, ...] | None = None) -> Sample:
    sent = time.perf_counter()
    ids = prompt or client.fresh_tokens(sort.prompt_tokens)
    images = (client.fresh_image(),) if sort.sees else ()
    times = await client.request(model, ids, sort.max_tokens, images)
    gaps = tuple((later - at) / count for (at, _), (later, count) in itertools.pairwise(times))
    return Sample(sort.name, model, times[0][0] - sent, gaps)


async def open_loop(client: EngineClient, rate: float, seconds: float, seed: int) -> list[Sample]:
    """Poisson arrivals at `rate` a second; every adapter in turn."""
    rng = random.Random(seed)
    running: list[asyncio.Task[Sample]] = []
    began, at, number = time.perf_counter(), 0.0, 0
    while (at := at + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        [sort] = rng.choices(SORTS, [sort.share for sort in SORTS])
        model = "sight-0" if sort.sees else f"v1-{number % _ADAPTERS}"
        number += not sort.sees
        running.append(asyncio.create_task(_ask(client, model, sort)))
    return await asyncio.gather(*running)


async def prefix_hits(client: EngineClient, rounds: int) -> list[tuple[float, float]]:
    """TTFT of 512 new tokens, and of the same asked again."""
    sort = Sort("512 tokens", 0, 512, 2)
    pairs = []
    for _ in range(rounds):
        ids = client.fresh_tokens(sort.prompt_tokens)
        first, again = [await _ask(client, "v1-0", sort, ids) for _ in range(2)]
        pairs.append((first.ttft, again.ttft))
    return pairs


async def swaps(client: EngineClient, folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Gaps of running requests while a visitor comes ten times a second: to an adapter that is there,
    and to one that is loaded anew for each, which retires the one before."""
    sort, visit = Sort("decode", 0, 32, 160), Sort("visit", 0, 2, 1)
    quiet: list[float] = []
    disturbed: list[float] = []
    for _ in range(rounds):
        for gaps, visited in ((quiet, "v1-0"), (disturbed, "new")):
            running = [asyncio.create_task(_ask(client, f"v1-{i}", sort)) for i in range(_RUNNING)]
            while not all(task.done() for task in running):
                if visited == "new":
                    await client.engine.load_adapter(visited, str(folder / "v1-0"))
                await _ask(client, visited, visit)
                await asyncio.sleep(0.1)
            for sample in await asyncio.gather(*running):
                gaps += sample.gaps[_RUNNING:-_RUNNING]  # not while others are still reading their prompts
    await client.engine.unload_adapter("new")
    return quiet, disturbed


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _spread(values: Sequence[float]) -> str:
    return " | ".join(_ms(percentile(values, share)) for share in (0.5, 0.9, 0.99))


def _share_over(gaps: Sequence[float]) -> float:
    most = _STRETCH * statistics.median(gaps)
    return sum(gap > most for gap in gaps) / len(gaps)


def report(
    samples: list[Sample], hits: list[tuple[float, float]], gaps: tuple[list[float], list[float]]
) -> str:
    itl = [gap for sample in samples for gap in sample.gaps]
    ratio = percentile(itl, 0.99) / statistics.median(itl)
    lines = [
        f"{len(samples)} requests. ITL: p99 is {ratio:.2f} times the median.",
        "",
        "| | ms, median | p90 | p99 |",
        "|---|---:|---:|---:|",
        f"| ITL, all | {_spread(itl)} |",
    ]
    for sort in SORTS:
        mine = [sample for sample in samples if sample.sort == sort.name]
        lines.append(f"| ITL, {sort.name} | {_spread([gap for sample in mine for gap in sample.gaps])} |")
        lines.append(f"| TTFT, {sort.name} | {_spread([sample.ttft for sample in mine])} |")
    chats: dict[str, list[float]] = {}
    for sample in samples:
        if sample.sort == SORTS[0].name:
            chats.setdefault(sample.model, []).append(sample.ttft)
    medians = [statistics.median(ttfts) for ttfts in chats.values()]
    ratios = sorted(first / again for first, again in hits)
    quiet, disturbed = gaps
    lines += [
        "",
        f"Median TTFT of a chat, by adapter: {_ms(min(medians))} to {_ms(max(medians))} ms.",
        "",
        f"512 tokens asked again: TTFT {_ms(statistics.median(first for first, _ in hits))} to "
        f"{_ms(statistics.median(again for _, again in hits))} ms, "
        f"{statistics.median(ratios):.1f} times less ({ratios[0]:.1f} to {ratios[-1]:.1f}).",
        "",
        f"Gaps of {_RUNNING} running requests beside visitors, ms:",
        "",
        f"| | median | p90 | p99 | longest | over {_STRETCH} × the median |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {_spread(own)} | {_ms(max(own))} | {_share_over(own):.1%} |"
            for name, own in (
                ("of an adapter that is there", quiet),
                ("of one that is loaded for each", disturbed),
            )
        ),
    ]
    return "\n".join(lines)


async def _measure(settings: WorkerSettings, folder: Path, rate: float, seconds: float, rounds: int) -> Any:
    async with start_engine(settings) as client:
        await open_loop(client, rate, 5, seed=1)  # compile what is not yet, fill the banks
        samples = await open_loop(client, rate, seconds, seed=0)
        return samples, await prefix_hits(client, rounds), await swaps(client, folder, rounds)


def main(
    rate: Annotated[float, typer.Option(min=0.01, help="requests that arrive in a second")] = 2.0,
    seconds: Annotated[float, typer.Option(min=1)] = 60.0,
    rounds: Annotated[int, typer.Option(min=1, help="of prefix hits and of swaps")] = 5,
    quick: Annotated[bool, typer.Option(help="half a minute, three rounds")] = False,
    max_prefill_chunk: Annotated[int, typer.Option(help="as of the worker; 0: its default")] = 0,
    threads: Annotated[int, typer.Option(help="of the engine")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="folder for scheduling.json and .md")] = Path("bench/out"),
) -> None:
    """Measure inter-token latency under mixed load, prefix hits, and the price of swapping adapters."""
    prepare_torch(threads)  # before torch is imported, which reads them once
    if quick:
        seconds, rounds = 30.0, 3
    from random_adapters import Kind
    from random_adapters import main as write_adapters

    chunk: dict[str, Any] = {"max_prefill_chunk": max_prefill_chunk} if max_prefill_chunk else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, count in ((Kind.v1, _ADAPTERS), (Kind.sight, 1)):
            write_adapters(folder, kind=kind, count=count)
        settings = WorkerSettings(
            adapters=tuple(f"{path.name}={path}" for path in sorted(folder.iterdir())),
            adapter_root=folder,
            shipped_adapters=False,
            num_threads=threads,
            **chunk,
        )
        samples, hits, gaps = asyncio.run(_measure(settings, folder, rate, seconds, rounds))
    text = report(samples, hits, gaps)
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    load = {"rate": rate, "seconds": seconds, "rounds": rounds, "max_prefill_chunk": max_prefill_chunk}
    found = {
        "load": load,
        "samples": [asdict(s) for s in samples],
        "hits": hits,
        "quiet": gaps[0],
        "disturbed": gaps[1],
    }
    (output / "scheduling.json").write_text(json.dumps(facts() | found) + "\n")
    (output / "scheduling.md").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
