"""What weights in 8 and 4 bits gain and cost: `python bench/quantization.py`.

Error: logits of every position of real text (this project's pages, in windows), against plain torch in
float32 on the checkpoint's own weights. Speed: an engine of each mode, asked in turn.

decode tok/s   while all requests of a burst decode: from the last one's first token to the first one's end.
TTFT           sent to first token, of a prompt of 512 tokens.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from engine_client import EngineClient, start_engine

from server.processes import prepare_torch
from server.settings import WorkerSettings, default_cache_dir

MODES = ("bfloat16", "int8", "int4")
_BLOCK = 16
_PAGES = Path(__file__).parent.parent / "docs"


def error_table(base_path: Path, tokens: int, window: int) -> str:
    """Of each mode the greatest and mean difference of a logit, and how often the first token is the same."""
    import torch

    from models.attention import DenseAttend
    from models.checkpoints.base import load_base
    from models.tokenizer import load_tokenizer

    text = "\n".join(path.read_text() for path in sorted(_PAGES.glob("*.md")))
    ids = load_tokenizer(base_path).encode(text)[:tokens]
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    exact = load_base(base_path, torch.float32)[0]
    runners = {mode: _runner(base_path, mode, window) for mode in MODES}
    greatest, total, same = (dict.fromkeys(MODES, 0.0) for _ in range(3))
    for chunk in windows:
        with torch.inference_mode():
            hidden_NC = exact(torch.tensor(chunk), torch.arange(len(chunk)), DenseAttend(1))
            expected_NV = exact.logits(hidden_NC)
        for mode, runner in runners.items():
            logits_NV = _logits(runner, chunk)
            off_NV = (logits_NV - expected_NV).abs()
            greatest[mode] = max(greatest[mode], float(off_NV.max()))
            total[mode] += float(off_NV.mean()) * len(chunk)
            same[mode] += float((logits_NV.argmax(1) == expected_NV.argmax(1)).sum())
    lines = [
        f"| {len(ids)} tokens of text | greatest | mean | the same first token |",
        "|---|---:|---:|---:|",
    ]
    for mode in MODES:
        share = same[mode] / len(ids)
        lines.append(f"| {mode} | {greatest[mode]:.2f} | {total[mode] / len(ids):.3f} | {share:.1%} |")
    return "\n".join(lines)


def _runner(base_path: Path, mode: str, window: int) -> Any:
    import torch

    from models.checkpoints.base import load_base
    from server.worker.runner import Runner

    if mode == "bfloat16":
        base = load_base(base_path, torch.bfloat16)[0].pack()
    else:
        base = load_base(base_path, torch.float32)[0].pack(mode)  # type: ignore[arg-type]
    blocks = -(-window // _BLOCK)
    return Runner(base, num_blocks=blocks, block_size=_BLOCK, max_hot_adapters=1, prompt_slots=1)


def _logits(runner: Any, ids: list[int]) -> Any:
    from server.worker.runner import StepItem

    return runner.run([StepItem(ids, 0, range(-(-len(ids) // _BLOCK)), None, None, slice(None))])


async def decode_rate(client: EngineClient, at_once: int, tokens: int) -> float:
    """Tokens per second of a burst; 0 if a request ended before another began: give --tokens more."""
    prompts = [client.fresh_tokens(128) for _ in range(at_once)]
    times = await asyncio.gather(*(client.request("smollm2-135m", ids, tokens) for ids in prompts))
    begin, end = max(t[0][0] for t in times), min(t[-1][0] for t in times)
    counted = sum(count for t in times for at, count in t if begin < at <= end)
    return counted / (end - begin) if end > begin else 0.0


async def first_token(client: EngineClient) -> float:
    """Milliseconds."""
    ids = client.fresh_tokens(512)
    began = time.perf_counter()
    return 1e3 * ((await client.request("smollm2-135m", ids, 2))[0][0] - began)


def _serve(pipe: Connection, mode: str, tokens: int, threads: int) -> None:
    """An engine in a process of its own, as idle threads of others would disturb it: figures when asked."""
    prepare_torch(threads)
    settings = WorkerSettings.model_validate(
        {
            "dtype": "bfloat16",
            "quantization": "none" if mode == "bfloat16" else mode,
            "num_threads": threads,
            "kv_cache_mib": 256,
            "shipped_adapters": False,
        }
    )

    async def answer() -> None:
        async with start_engine(settings) as client:
            while pipe.recv():
                rates = [await decode_rate(client, at_once, tokens) for at_once in (1, 16)]
                pipe.send((*rates, await first_token(client)))

    asyncio.run(answer())


def speed_table(rounds: int, tokens: int, threads: int) -> str:
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for mode in MODES:
        pipes[mode], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs, mode, tokens, threads), daemon=True))
        processes[-1].start()
        theirs.close()
    found: dict[str, list[tuple[float, ...]]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode, pipe in pipes.items():
            pipe.send(True)
            figures = pipe.recv()
            if number:  # the first warms up
                found[mode].append(figures)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return _table(found)


def _table(found: dict[str, list[tuple[float, ...]]]) -> str:
    """Medians over the rounds; a ratio is the median of the rounds' own."""
    lines = [
        "| median (min to max) | decode tok/s, 1 request | 16 requests | TTFT of 512 tokens, ms |",
        "|---|---:|---:|---:|",
    ]
    for mode, rows in found.items():
        columns = zip(*rows, strict=True)
        cells = [f"{statistics.median(own):.1f} ({min(own):.1f} to {max(own):.1f})" for own in columns]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    for mode in MODES[1:]:
        pairs = zip(zip(*found[mode], strict=True), zip(*found[MODES[0]], strict=True), strict=True)
        ratios = ([a / b for a, b in zip(*pair, strict=True) if b] for pair in pairs)
        cells = [f"{statistics.median(own):.2f}" if own else "" for own in ratios]
        lines.append(f"| {mode} over bfloat16 | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    tokens: Annotated[int, typer.Option(min=4, help="that each request decodes")] = 160,
    text_tokens: Annotated[int, typer.Option(min=1, help="whose logits are compared")] = 4096,
    window: Annotated[int, typer.Option(min=1, help="tokens of text at once")] = 256,
    speed: Annotated[bool, typer.Option(help="measure speed too")] = True,
    error: Annotated[bool, typer.Option(help="compare logits too")] = True,
    threads: Annotated[int, typer.Option(help="of each engine")] = os.cpu_count() or 1,
) -> None:
    """Compare weights in bfloat16, 8 bits and 4 bits."""
    prepare_torch(threads)  # before torch is imported, which reads it once

    from models.pull import resolve_base

    if error:
        print(error_table(resolve_base("smollm2-135m", default_cache_dir()), text_tokens, window))
    if speed:
        print(speed_table(rounds, tokens, threads))


if __name__ == "__main__":
    typer.run(main)
