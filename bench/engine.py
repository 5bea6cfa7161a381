"""The engine's speed on this machine, and the price of adapters: `python bench/engine.py`.

One engine serves the bare base, one V1 adapter, eight mixed, V2 adapters and adapters that see an image each;
a round asks all of them in turn, beside transformers with PEFT's adaption_prompt. So a drift of the machine
meets all alike, and ratios are taken within a round. Everything goes through the engine's own API; every
request has tokens of its own, so that no prefix cache answers.

decode tok/s   while all requests of a burst decode: from the last one's first token to the first one's end.
TTFT           sent to first token; of a burst, the median of its requests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from engine_client import EngineClient, start_engine

from server.processes import set_threads
from server.settings import WorkerSettings, default_cache_dir

BASE, PEFT = "bare base", "transformers + PEFT"
_MIXED = 8
_PROMPTS, _SKIPPED = 10, 2  # of an adapter: rows, and layers below them


@dataclass(frozen=True, slots=True)
class Contender:
    """What a burst's requests ask: request i takes the i-th of `models`, and so on in turn."""

    name: str
    models: tuple[str, ...]
    sees: bool = False


CONTENDERS = (
    Contender(BASE, ("smollm2-135m",)),
    Contender("one V1 adapter", ("v1-0",)),
    Contender("8 V1 adapters mixed", tuple(f"v1-{i}" for i in range(_MIXED))),
    Contender("one V2 adapter", ("v2-0",)),
    Contender("8 V2 adapters mixed", tuple(f"v2-{i}" for i in range(_MIXED))),
    Contender("image-conditioned", ("sight-0",), sees=True),
)


@dataclass(frozen=True, slots=True)
class Burst:
    """`at_once` requests sent together."""

    contender: str
    at_once: int
    prompt_tokens: int
    round: int
    decode: float  # tokens per second
    ttft: float  # seconds
    worst_gap: float  # seconds between two tokens of one request, the longest


@dataclass(frozen=True, slots=True)
class Load:
    rounds: int
    peft_rounds: int  # it is slow
    levels: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    threads: int


async def burst(
    client: EngineClient, contender: Contender, at_once: int, prompt_tokens: int, max_tokens: int, number: int
) -> Burst:
    runs = []
    for i in range(at_once):
        model = contender.models[i % len(contender.models)]
        images = (client.fresh_image(),) if contender.sees else ()
        runs.append(client.request(model, client.fresh_tokens(prompt_tokens), max_tokens, images))
    began = time.perf_counter()
    times = await asyncio.gather(*runs)
    begin, end = max(t[0][0] for t in times), min(t[-1][0] for t in times)
    tokens = sum(count for t in times for at, count in t if begin < at <= end)
    gaps = (later[0] - at[0] for t in times for at, later in itertools.pairwise(t))
    return Burst(
        contender.name,
        at_once,
        prompt_tokens,
        number,
        decode=tokens / (end - begin) if end > begin else 0.0,
        ttft=statistics.median(t[0][0] - began for t in times),
        worst_gap=max(gaps, default=0.0),
    )


def _peft_process(pipe: Connection, base_path: Path, threads: int) -> None:
    """transformers with adaption_prompt in a process of its own: for each message a static batch."""
    # Nothing here needs torchvision, and PyPI's build of it breaks transformers' import beside a CPU torch.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    import torch
    from peft import AdaptionPromptConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
    layers = model.config.num_hidden_layers - _SKIPPED
    config = AdaptionPromptConfig(adapter_len=_PROMPTS, adapter_layers=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()

    def generate(ids: Any, count: int) -> float:
        began = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    while (order := pipe.recv()) is not None:
        at_once, prompt_tokens, max_tokens = order
        ids = torch.randint(1000, model.config.vocab_size, (at_once, prompt_tokens))
        with torch.inference_mode():
            first = generate(ids, 1)
            whole = generate(ids, max_tokens) if max_tokens > 1 else first
        pipe.send((first, whole))


class Peft:
    def __init__(self, base_path: Path, threads: int) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_peft_process, args=(theirs, base_path, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.burst(1, 8, 2, -1)

    def burst(self, at_once: int, prompt_tokens: int, max_tokens: int, number: int) -> Burst:
        self._pipe.send((at_once, prompt_tokens, max_tokens))
        first, whole = self._pipe.recv()
        decode = at_once * (max_tokens - 1) / (whole - first) if max_tokens > 1 else 0.0
        return Burst(PEFT, at_once, prompt_tokens, number, decode, first, 0.0)

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _write_adapters(folder: Path) -> Path:
    from random_adapters import Kind
    from random_adapters import main as write_adapters

    for kind, count in ((Kind.v1, _MIXED), (Kind.v2, _MIXED), (Kind.sight, 1)):
        write_adapters(folder, kind=kind, count=count)
    return folder


async def _measure(load: Load, settings: WorkerSettings, peft: Peft | None) -> list[Burst]:
    bursts: list[Burst] = []

    def note(burst: Burst) -> None:
        bursts.append(burst)
        print(
            f"{burst.contender:22} × {burst.at_once:<3} {burst.decode:8.1f} tok/s  "
            f"TTFT {1e3 * burst.ttft:6.0f} ms ({burst.prompt_tokens} tokens)",
            file=sys.stderr,
        )

    async with start_engine(settings) as client:
        for contender in CONTENDERS:  # compile what is not yet, fill the banks
            await burst(client, contender, max(load.levels), load.prompt_tokens, 4, -1)
        for number in range(load.rounds):
            for level in load.levels:
                for contender in CONTENDERS:
                    note(await burst(client, contender, level, load.prompt_tokens, load.max_tokens, number))
                if peft is not None and number < load.peft_rounds:
                    note(peft.burst(level, load.prompt_tokens, load.max_tokens, number))
            for contender in CONTENDERS[:2]:
                note(await burst(client, contender, 1, 512, 2, number))
            if peft is not None and number < load.peft_rounds:
                note(peft.burst(1, 512, 1, number))
    return bursts


def _table(bursts: list[Burst], load: Load) -> str:
    """Medians over the rounds; a ratio is the median of the rounds' own."""
    lines = [
        "| | at once | decode tok/s | min to max | over the bare base | TTFT ms |",
        "|---|---:|---:|---|---:|---:|",
    ]
    groups: dict[tuple[int, str], list[Burst]] = {}
    for burst in bursts:
        if burst.prompt_tokens == load.prompt_tokens:
            groups.setdefault((burst.at_once, burst.contender), []).append(burst)
    for (level, name), mine in groups.items():
        pairs = list(zip(mine, groups[level, BASE], strict=False))
        ratios = sorted(own.decode / base.decode for own, base in pairs)
        rates = sorted(burst.decode for burst in mine)
        ttft = 1e3 * statistics.median(burst.ttft for burst in mine)
        lines.append(
            f"| {name} | {level} | {statistics.median(rates):.1f} | {rates[0]:.1f} to {rates[-1]:.1f} "
            f"| {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) | {ttft:.0f} |"
        )
    lines += ["", "| | TTFT of 512 tokens, ms | min to max |", "|---|---:|---|"]
    for name in dict.fromkeys(burst.contender for burst in bursts if burst.prompt_tokens == 512):
        own = sorted(1e3 * b.ttft for b in bursts if b.contender == name and b.prompt_tokens == 512)
        lines.append(f"| {name} | {statistics.median(own):.0f} | {own[0]:.0f} to {own[-1]:.0f} |")
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    quick: Annotated[bool, typer.Option(help="three rounds, of which PEFT runs in two")] = False,
    levels: Annotated[str, typer.Option(help="requests at once, separated by commas")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(min=4)] = 128,
    dtype: Annotated[str, typer.Option(help="of the engine")] = "auto",
    peft: Annotated[bool, typer.Option(help="measure transformers + PEFT beside it")] = True,
    threads: Annotated[int, typer.Option(help="of each contender; they never run at once")] = os.cpu_count()
    or 1,
    output: Annotated[Path, typer.Option(help="folder for engine.json and engine.md")] = Path("bench/out"),
) -> None:
    """Measure decoding and TTFT of the engine with and without adapters."""
    threads = threads or len(os.sched_getaffinity(0))
    set_threads(threads)  # before torch is imported, which reads it once

    from models.pull import resolve_base

    base_path = resolve_base("smollm2-135m", default_cache_dir())
    load = Load(
        rounds=3 if quick else rounds,
        peft_rounds=2 if quick else 3,
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
        other = Peft(base_path, threads) if peft else None
        bursts = asyncio.run(_measure(load, settings, other))
        if other is not None:
            other.close()
    table = _table(bursts, load)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    facts = {"machine": platform.platform(), "load": asdict(load), "bursts": [asdict(b) for b in bursts]}
    (output / "engine.json").write_text(json.dumps(facts, indent=2) + "\n")
    (output / "engine.md").write_text(table + "\n")


if __name__ == "__main__":
    typer.run(main)
