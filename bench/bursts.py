"""Requests sent together, and what their tokens' times say.

decode tok/s   while all requests of a burst decode: from the last one's first token to the first one's end.
whole tok/s    of all its tokens, reading the prompts and the time when few are left included.
TTFT           sent to first token; of a burst, the median of its requests.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine_client import EngineClient


@dataclass(frozen=True, slots=True)
class Contender:
    """What a burst's requests ask: request i takes the i-th of `models`, and so on in turn."""

    name: str
    models: tuple[str, ...]
    sees: bool = False


@dataclass(frozen=True, slots=True)
class Burst:
    """`at_once` requests sent together."""

    contender: str
    at_once: int
    prompt_tokens: int
    round: int
    decode: float  # tokens per second
    whole: float  # the same from when they were sent to the last one's end
    ttft: float  # seconds
    worst_gap: float  # seconds between two tokens of one request, the longest


Times = Sequence[tuple[float, int]]  # of a request: seconds since it was sent, and how many tokens came


def summed_up(contender: str, prompt_tokens: int, number: int, times: Sequence[Times]) -> Burst:
    begin, end = max(own[0][0] for own in times), min(own[-1][0] for own in times)
    tokens = sum(count for own in times for at, count in own if begin < at <= end)
    gaps = (later[0] - at[0] for own in times for at, later in itertools.pairwise(own))
    return Burst(
        contender,
        len(times),
        prompt_tokens,
        number,
        decode=tokens / (end - begin) if end > begin else 0.0,
        whole=sum(count for own in times for _, count in own) / max(own[-1][0] for own in times),
        ttft=statistics.median(own[0][0] for own in times),
        worst_gap=max(gaps, default=0.0),
    )


async def burst(
    client: EngineClient,
    contender: Contender,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    number: int,
) -> Burst:
    """One request for each prompt to the engine, in round `number`."""
    runs = []
    for i, prompt in enumerate(prompts):
        images = (client.fresh_image(),) if contender.sees else ()
        runs.append(client.request(contender.models[i % len(contender.models)], prompt, max_tokens, images))
    began = time.perf_counter()
    times = [[(at - began, count) for at, count in own] for own in await asyncio.gather(*runs)]
    return summed_up(contender.name, len(prompts[0]), number, times)


def tell(burst: Burst) -> None:
    print(
        f"{burst.contender:24} × {burst.at_once:<3} {burst.decode:8.1f} tok/s  "
        f"TTFT {1e3 * burst.ttft:6.0f} ms ({burst.prompt_tokens} tokens)",
        file=sys.stderr,
    )


def ratios(mine: Sequence[Burst], other: Sequence[Burst]) -> list[float]:
    """Tokens per second of `mine` over those of `other`, of the rounds that both ran in, ascending.

    A burst whose first request ended before its last began says nothing.
    """
    by_round = {burst.round: burst.decode for burst in other if burst.decode}
    return sorted(own.decode / by_round[own.round] for own in mine if own.decode and own.round in by_round)


def spread(ratios: Sequence[float]) -> str:
    """Median, and least and greatest."""
    if not ratios:
        return "–"
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
