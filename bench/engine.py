"""The engine's speed on this machine, and the price of adapters: `python bench/engine.py`.

One engine serves the bare base, one V1 adapter, eight mixed, V2 adapters and adapters that see an image each;
a round asks all of them in turn. So a drift of the machine meets all alike, and ratios are taken within a
round. Everything goes through the engine's own API; every request has tokens of its own, so that no prefix
cache answers. `bench/compare.py` sets the engine beside others.
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
from engine_client import start_engine
from machine import facts

from server.processes import prepare_torch
from server.settings import WorkerSettings

_MIXED = 8
_LONG = 512  # tokens of the prompt whose TTFT is measured

BASE = Contender("bare base", ("smollm2-135m",))
ONE_V1 = Contender("one V1 adapter", ("v1-0",))
CONTENDERS = (
    BASE,
    ONE_V1,
    Contender("8 V1 adapters mixed", tuple(f"v1-{i}" for i in range(_MIXED))),
    Contender("one V2 adapter", ("v2-0",)),
    Contender("8 V2 adapters mixed", tuple(f"v2-{i}" for i in range(_MIXED))),
    Contender("image-conditioned", ("sight-0",), sees=True),
)


@dataclass(frozen=True, slots=True)
class Load:
    rounds: int
    levels: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    threads: int


def _write_adapters(folder: Path) -> Path:
    from random_adapters import Kind
    from random_adapters import main as write_adapters

    for kind, count in ((Kind.v1, _MIXED), (Kind.v2, _MIXED), (Kind.sight, 1)):
        write_adapters(folder, kind=kind, count=count)
    return folder


async def _measure(load: Load, settings: WorkerSettings) -> list[Burst]:
    """All contenders at one and at most requests at once, two of them between, for the curve."""
    bursts: list[Burst] = []
    async with start_engine(settings) as client:

        async def turn(contender: Contender, at_once: int, tokens: tuple[int, int], number: int) -> None:
            prompts = [client.fresh_tokens(tokens[0]) for _ in range(at_once)]
            bursts.append(await burst(client, contender, prompts, tokens[1], number))
            tell(bursts[-1])

        for contender in CONTENDERS:  # compile what is not yet, fill the banks
            await turn(contender, max(load.levels), (load.prompt_tokens, 4), -1)
        bursts.clear()
        for number in range(load.rounds):
            for level in load.levels:
                outer = level in (min(load.levels), max(load.levels))
                for contender in CONTENDERS if outer else (BASE, ONE_V1):
                    await turn(contender, level, (load.prompt_tokens, load.max_tokens), number)
            for contender in (BASE, ONE_V1):
                await turn(contender, 1, (_LONG, 2), number)
    return bursts


def _table(bursts: Sequence[Burst], load: Load) -> str:
    """Medians over the rounds; a ratio is the median of the rounds' own."""
    lines = [
        "| | at once | decode tok/s | min to max | over the bare base | TTFT ms |",
        "|---|---:|---:|---|---:|---:|",
    ]
    groups: dict[tuple[int, str], list[Burst]] = {}
    for one in bursts:
        if one.prompt_tokens == load.prompt_tokens:
            groups.setdefault((one.at_once, one.contender), []).append(one)
    for (level, name), mine in groups.items():
        rates = sorted(one.decode for one in mine)
        ttft = 1e3 * statistics.median(one.ttft for one in mine)
        lines.append(
            f"| {name} | {level} | {statistics.median(rates):.1f} | {rates[0]:.1f} to {rates[-1]:.1f} "
            f"| {spread(ratios(mine, groups[level, BASE.name]))} | {ttft:.0f} |"
        )
    lines += ["", f"| | TTFT of {_LONG} tokens, ms | min to max |", "|---|---:|---|"]
    for contender in (BASE, ONE_V1):
        own = sorted(
            1e3 * b.ttft for b in bursts if (b.contender, b.prompt_tokens) == (contender.name, _LONG)
        )
        lines.append(f"| {contender.name} | {statistics.median(own):.0f} | {own[0]:.0f} to {own[-1]:.0f} |")
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    quick: Annotated[bool, typer.Option(help="five rounds")] = False,
    levels: Annotated[str, typer.Option(help="requests at once, separated by commas")] = "1,2,4,8,16",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(min=4)] = 128,
    dtype: Annotated[str, typer.Option(help="of the engine")] = "auto",
    threads: Annotated[int, typer.Option(help="of the engine")] = os.cpu_count() or 1,
    output: Annotated[Path, typer.Option(help="folder for engine.json and engine.md")] = Path("bench/out"),
) -> None:
    """Measure decoding and TTFT of the engine with and without adapters."""
    prepare_torch(threads)  # before torch is imported, which reads it once
    load = Load(
        rounds=5 if quick else rounds,
        levels=tuple(int(level) for level in levels.split(",")),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        threads=threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        adapters = _write_adapters(Path(folder))
        settings = WorkerSettings(
            adapters=tuple(f"{path.name}={path}" for path in sorted(adapters.iterdir())),
            shipped_adapters=False,
            dtype=dtype,
            num_threads=threads,
        )
        bursts = asyncio.run(_measure(load, settings))
    table = _table(bursts, load)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    found = {"load": asdict(load), "bursts": [asdict(one) for one in bursts]}
    (output / "engine.json").write_text(json.dumps(facts() | found, indent=2) + "\n")
    (output / "engine.md").write_text(table + "\n")


if __name__ == "__main__":
    typer.run(main)
