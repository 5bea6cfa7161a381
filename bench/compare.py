"""The engine beside transformers + PEFT, LitGPT, vLLM and llama.cpp, in one run: `python bench/compare.py`.

A round asks each contender in turn, with the same prompts, greedily, to the same number of tokens, on as
many threads; whoever is not asked sleeps. So a drift of the machine meets all alike, and ratios are taken
within a round. Ours runs with one V1 adapter, in bfloat16, and in 8 and 4 bits in processes of their own;
transformers with PEFT's adapter of that size, LitGPT with its own; the others have none, and run the bare
base. Peers live in environments of their own (`make peers`); one that is not there is left out, and the table
says so.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from bursts import Burst, Contender, burst, ratios, spread, summed_up, tell
from engine_client import EngineClient, start_engine
from machine import facts

from server.processes import prepare_torch
from server.settings import WorkerSettings, default_cache_dir

OURS = Contender("ours, one V1 adapter", ("v1-0",))
OURS_BARE = Contender("ours, bare base", ("smollm2-135m",))
PEFT, VLLM = "transformers + PEFT", "vLLM, compiled"
# Of weights in fewer bits: ours, and llama.cpp's that are nearest to them.
QUANTIZED = {
    "ours, int8, one V1 adapter": "llama.cpp, q8_0",
    "ours, int4, one V1 adapter": "llama.cpp, q4_1",
}
_ROOT = Path(__file__).resolve().parent.parent
_LONG = 512  # tokens of the prompt whose TTFT is measured
_LONG_TURNS = 3  # in a round: one prompt takes a sixth of a second, and one in six a quarter longer
_PAUSE = 0.3  # seconds for the threads of who was asked last to fall asleep


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    environment: str
    script: str
    arguments: tuple[str, ...]
    slow: bool = False  # it takes part in fewer rounds


def peers(base: Path, adapter: Path, threads: int) -> list[Peer]:
    count = str(threads)
    return [
        *(
            Peer(name, ".venv", "ours_quantized.py", (bits, count, str(adapter)))
            for name, bits in zip(QUANTIZED, ("int8", "int4"), strict=True)
        ),
        Peer(VLLM, ".venv-vllm", "vllm_bare.py", (str(base), count)),
        Peer("llama.cpp, bf16", ".venv-llama-cpp", "llama_cpp_bare.py", ("bf16", count)),
        Peer("llama.cpp, q8_0", ".venv-llama-cpp", "llama_cpp_bare.py", ("q8_0", count)),
        Peer("llama.cpp, q4_1", ".venv-llama-cpp", "llama_cpp_bare.py", ("q4_1", count)),
        Peer(PEFT, ".venv", "transformers_peft.py", (str(base), count), slow=True),
        Peer("LitGPT adapter", ".venv-litgpt", "litgpt_adapter.py", (count,), slow=True),
    ]


Save = Callable[[Sequence[Burst], dict[str, str]], None]


class Missing(Exception):
    """A peer is not installed, or does not run."""


class PeerProcess:
    """A peer in its environment; see `peers/driver.py`."""

    def __init__(self, peer: Peer, log: Path) -> None:
        """Begin to start it. Raises `Missing` where its environment is not there."""
        self.peer = peer
        python = _ROOT / peer.environment / "bin" / "python"
        if not python.exists():
            raise Missing(f"no {peer.environment} here: `make peers` makes it")
        self._log = log
        command = [python, _ROOT / "bench" / "peers" / peer.script, *peer.arguments]
        # What was set for our threads is not meant for theirs.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "NUMBA_"))}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def wait_until_ready(self) -> None:
        self._answer()

    def ask(self, prompts: Sequence[tuple[int, ...]], max_tokens: int, number: int) -> Burst:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        times = [[(at, 1) for at in own] for own in self._answer()]
        return summed_up(self.peer.name, len(prompts[0]), number, times)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def _died(self) -> Missing:
        return Missing(f"it ended with {self._process.wait()}; see {self._log.name}")


_SLOW_ROUNDS = 3  # in which slow peers take part


@dataclass(frozen=True, slots=True)
class Load:
    rounds: int
    levels: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    threads: int


class Comparison:
    """All contenders, started; `bursts` and who was `missing`, and why."""

    def __init__(self, client: EngineClient, load: Load, base: Path, adapter: Path, output: Path) -> None:
        self._client = client
        self._load = load
        self.bursts: list[Burst] = []
        self.missing: dict[str, str] = {}
        self._running: list[PeerProcess] = []
        for peer in peers(base, adapter, load.threads):
            log = output / (re.sub(r"\W+", "-", peer.name) + ".log")
            with self._noting(peer):
                self._running.append(PeerProcess(peer, log))

    @contextmanager
    def _noting(self, peer: Peer) -> Iterator[None]:
        """Go on without a peer that is missing."""
        try:
            yield
        except Missing as error:
            self.missing[peer.name] = str(error)
            print(f"{peer.name}: {error}", file=sys.stderr)

    async def run(self, save: Save) -> None:
        """`save` what there is after each round, for whoever has no time for all of them."""
        for running in self._running:
            with self._noting(running.peer):
                running.wait_until_ready()
                print(f"{running.peer.name} is ready", file=sys.stderr)
        await self._turn(max(self._load.levels), self._load.prompt_tokens, 4, -1)  # compile what is not yet
        await self._turn(1, _LONG, 2, -1)
        self.bursts.clear()
        for number in range(self._load.rounds):
            for level in self._load.levels:
                await self._turn(level, self._load.prompt_tokens, self._load.max_tokens, number)
            for _ in range(_LONG_TURNS):
                await self._turn(1, _LONG, 2, number)
            save(self.bursts, self.missing)
        for running in self._running:
            running.close()

    async def _turn(self, at_once: int, prompt_tokens: int, max_tokens: int, number: int) -> None:
        prompts = [self._client.fresh_tokens(prompt_tokens) for _ in range(at_once)]
        for contender in (OURS, OURS_BARE):
            self._note(await burst(self._client, contender, prompts, max_tokens, number))
        for running in self._running:
            peer = running.peer
            if peer.name not in self.missing and not (peer.slow and number >= _SLOW_ROUNDS):
                with self._noting(peer):
                    self._note(running.ask(prompts, max_tokens, number))

    def _note(self, burst: Burst) -> None:
        self.bursts.append(burst)
        tell(burst)
        time.sleep(_PAUSE)


def table(bursts: Sequence[Burst], missing: dict[str, str], load: Load) -> str:
    """Medians over the rounds; a ratio is the median of the rounds' own."""
    lines = [
        "| | at once | decode tok/s | min to max | ours with an adapter, over this | whole tok/s | TTFT ms |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    names = dict.fromkeys(burst.contender for burst in bursts)
    for level in load.levels:
        at_level = [b for b in bursts if b.at_once == level and b.prompt_tokens == load.prompt_tokens]
        ours = [burst for burst in at_level if burst.contender == OURS.name]
        for name in names:
            mine = [burst for burst in at_level if burst.contender == name]
            rates = [burst.decode for burst in mine]
            whole = statistics.median(burst.whole for burst in mine)
            ttft = 1e3 * statistics.median(burst.ttft for burst in mine)
            lines.append(
                f"| {name} | {level} | {statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} "
                f"| {spread(ratios(ours, mine))} | {whole:.1f} | {ttft:.0f} |"
            )
    lines += ["", f"| | TTFT of {_LONG} tokens, ms | min to max |", "|---|---:|---|"]
    for name in names:
        own = [1e3 * b.ttft for b in bursts if b.contender == name and b.prompt_tokens == _LONG]
        lines.append(f"| {name} | {statistics.median(own):.0f} | {min(own):.0f} to {max(own):.0f} |")
    lines += ["", *(f"Without {name}: {why}." for name, why in missing.items())]
    return "\n".join(lines).rstrip()


async def _measure(load: Load, base: Path, adapter: Path, dtype: str, output: Path, save: Save) -> None:
    settings = WorkerSettings(
        adapters=(f"v1-0={adapter}",), shipped_adapters=False, dtype=dtype, num_threads=load.threads
    )
    async with start_engine(settings) as client:
        await Comparison(client, load, base, adapter, output).run(save)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    quick: Annotated[bool, typer.Option(help="three rounds")] = False,
    levels: Annotated[str, typer.Option(help="requests at once, separated by commas")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 128,
    max_tokens: Annotated[int, typer.Option(min=4)] = 128,
    dtype: Annotated[str, typer.Option(help="of the engine")] = "auto",
    threads: Annotated[int, typer.Option(help="of each contender; they never run at once")] = os.cpu_count()
    or 1,
    output: Annotated[Path, typer.Option(help="folder for compare.json and compare.md")] = Path("bench/out"),
) -> None:
    """Measure decoding and TTFT of the engine and of its peers."""
    prepare_torch(threads)  # before torch is imported, which reads it once
    from random_adapters import Kind
    from random_adapters import main as write_adapters

    from models.pull import resolve_base

    base = resolve_base("smollm2-135m", default_cache_dir())
    output.mkdir(parents=True, exist_ok=True)
    load = Load(
        rounds=3 if quick else rounds,
        levels=tuple(int(level) for level in levels.split(",")),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        threads=threads,
    )

    def save(bursts: Sequence[Burst], missing: dict[str, str]) -> None:
        found = {"load": asdict(load), "missing": missing, "bursts": [asdict(burst) for burst in bursts]}
        (output / "compare.json").write_text(json.dumps(facts() | found, indent=2) + "\n")
        (output / "compare.md").write_text(table(bursts, missing, load) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), kind=Kind.v1)
        asyncio.run(_measure(load, base, Path(folder) / "v1-0", dtype, output, save))
    print((output / "compare.md").read_text())


if __name__ == "__main__":
    typer.run(main)
