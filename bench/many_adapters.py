"""The price of adapters over their number, a thousand of them registered: `python bench/many_adapters.py`.

One engine has them all; a round asks the bare base, then 1, 2, 4, 8, 16 and 64 adapters in turn, as many
requests at once each time. Beside it the same engine with eight registered, so that a thousand in memory are
paid for too. Adapters are V1 of the papers' size, and what the 64 are hot in is what the engine gives by
itself. Ratios are taken within a round.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from bursts import Burst, Contender, burst, ratios, spread, tell
from engine_client import EngineClient, start_engine
from machine import facts

from server.processes import prepare_torch
from server.settings import WorkerSettings

NUMBERS = (1, 2, 4, 8, 16, 64)
BASE = Contender("bare base", ("smollm2-135m",))
FEW = Contender("8 of 8 registered", tuple(f"v1-{i}" for i in range(8)))
_FILES = 64  # more are loaded from these under other names


@dataclass(frozen=True, slots=True)
class Load:
    rounds: int
    registered: int
    at_once: int
    prompt_tokens: int
    max_tokens: int
    threads: int


def contenders(registered: int) -> list[Contender]:
    return [
        Contender(f"{n} of {registered} registered", tuple(f"v1-{i * (registered // n)}" for i in range(n)))
        for n in NUMBERS
        if n <= registered
    ]


async def measure(load: Load, settings: WorkerSettings, few: WorkerSettings) -> list[Burst]:
    bursts: list[Burst] = []

    async def turn(client: EngineClient, contender: Contender, max_tokens: int, number: int) -> None:
        prompts = [client.fresh_tokens(load.prompt_tokens) for _ in range(load.at_once)]
        bursts.append(await burst(client, contender, prompts, max_tokens, number))
        tell(bursts[-1])

    many = contenders(load.registered)
    async with start_engine(settings) as client, start_engine(few) as other:
        for contender in many:  # compile what is not yet, fill the bank
            await turn(client, contender, 4, -1)
        for number in range(load.rounds):
            await turn(client, BASE, load.max_tokens, -1)  # an engine that has slept begins slowly
            for contender in (BASE, *many):
                await turn(client, contender, load.max_tokens, number)
            await turn(other, FEW, load.max_tokens, -1)
            await turn(other, FEW, load.max_tokens, number)
    return [one for one in bursts if one.round >= 0]


def table(bursts: Sequence[Burst], load: Load) -> str:
    """Medians over the rounds; a ratio is the median of the rounds' own."""
    by_name: dict[str, list[Burst]] = {}
    for one in bursts:
        by_name.setdefault(one.contender, []).append(one)
    lines = [
        f"{load.at_once} requests at once.",
        "",
        "| adapters | decode tok/s | over the bare base | over 8 of 8 | TTFT ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, mine in by_name.items():
        rate = statistics.median(one.decode for one in mine)
        ttft = 1e3 * statistics.median(one.ttft for one in mine)
        over = [spread(ratios(mine, by_name[other])) for other in (BASE.name, FEW.name)]
        lines.append(f"| {name} | {rate:.1f} | {over[0]} | {over[1]} | {ttft:.0f} |")
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    quick: Annotated[bool, typer.Option(help="three rounds")] = False,
    registered: Annotated[int, typer.Option(min=8)] = 1000,
    at_once: Annotated[int, typer.Option(min=1, help="requests")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    max_tokens: Annotated[int, typer.Option(min=4)] = 128,
    threads: Annotated[int, typer.Option(help="of the engine")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="folder for many_adapters.json and .md")] = Path("bench/out"),
) -> None:
    """Measure what the number of adapters costs, those asked for and those registered."""
    prepare_torch(threads)  # before torch is imported, which reads it once
    from random_adapters import Kind
    from random_adapters import main as write_adapters

    load = Load(3 if quick else rounds, registered, at_once, prompt_tokens, max_tokens, threads)
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), kind=Kind.v1, count=min(_FILES, registered))

        def settings(count: int) -> WorkerSettings:
            return WorkerSettings(
                adapters=tuple(f"v1-{i}={folder}/v1-{i % _FILES}" for i in range(count)),
                shipped_adapters=False,
                num_threads=threads,
            )

        bursts = asyncio.run(measure(load, settings(registered), settings(8)))
    text = table(bursts, load)
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    found = {"load": asdict(load), "bursts": [asdict(one) for one in bursts]}
    (output / "many_adapters.json").write_text(json.dumps(facts() | found, indent=2) + "\n")
    (output / "many_adapters.md").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
