"""What adapters cost under vLLM: `.venv-vllm/bin/python bench/vllm_plugin.py`, after `make vllm`.

vLLM with this project's plugin, and bare vLLM on the bare base, each in a process of its own, without
servers: requests go to vLLM's engine, which steps until all have ended. A round asks all contenders in turn,
so a drift of the machine meets all alike, and ratios are taken within a round. Bare vLLM runs twice: as it
comes, which is compiled, and eagerly. Every request has tokens of its own, so that no prefix cache answers;
of an image the rows that its adapter sees are at hand, random ones, for its encoder runs outside of vLLM.

decode tok/s   while all requests of a burst decode: from the last one's first token to the first one's end.
tok/s          all tokens over the burst's whole time, prompts and their placeholders included.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

from models.pull import resolve_base
from server.settings import default_cache_dir

BARE, EAGER = "bare vLLM", "bare vLLM, eager"
_MIXED = 8
# contender → its process, its requests' adapters in turn, whether each sees an image
CONTENDERS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    BARE: (BARE, (), False),
    EAGER: (EAGER, (), False),
    "plugin, base": ("plugin", (), False),
    "plugin, one adapter": ("plugin", ("v1-0",), False),
    "plugin, 8 adapters mixed": ("plugin", tuple(f"v1-{i}" for i in range(_MIXED)), False),
    "plugin, an image each": ("plugin", ("sight-0",), True),
}
LIMITS = {
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "kv_cache_memory_bytes": 512 << 20,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
}
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine steps where it is asked
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


@dataclass(frozen=True, slots=True)
class Load:
    at_once: int
    prompt_tokens: int
    max_tokens: int
    adapters: tuple[str, ...] = ()
    sees: bool = False


@dataclass(frozen=True, slots=True)
class Burst:
    contender: str
    at_once: int
    round: int
    decode: float  # tokens per second
    whole: float  # tokens per second


def _bare(base: Path, options: dict[str, Any], _: Path) -> tuple[Any, Callable[[Load, int], tuple[Any, Any]]]:
    from vllm import LLM

    engine = LLM(str(base), max_model_len=2048, **LIMITS | options).llm_engine
    vocab_size = engine.model_config.get_vocab_size()
    return engine, lambda load, _: ({"type": "token", "prompt_token_ids": _tokens(load, vocab_size)}, None)


def _plugin(
    base: Path, options: dict[str, Any], adapters: Path
) -> tuple[Any, Callable[[Load, int], tuple[Any, Any]]]:
    import torch
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from models.checkpoints.base import open_base
    from models.vllm_plugin import register
    from models.vllm_plugin.carriers import ROWS, Room
    from models.vllm_plugin.options import engine_options, placeholders
    from models.vllm_plugin.sight import seeing_prompt

    register()
    config, names = open_base(base).config, sorted(path.name for path in adapters.iterdir())
    made_for = engine_options(
        base, config, room=Room(images=True), max_model_len=2048, max_adapters=len(names)
    )
    engine = LLM(**made_for | LIMITS | options).llm_engine

    def prompt(load: Load, i: int) -> tuple[Any, Any]:
        lora = None
        if load.adapters:
            name = load.adapters[i % len(load.adapters)]
            lora = LoRARequest(name, names.index(name) + 1, str(adapters / name))
        ids = _tokens(load, config.vocab_size)
        if not load.sees:
            return {"type": "token", "prompt_token_ids": placeholders(config) + ids}, lora
        rows_RC = 0.02 * torch.randn(ROWS, config.hidden_size)
        return seeing_prompt(placeholders(config), ids, rows_RC, engine.model_config.dtype), lora

    return engine, prompt


def _tokens(load: Load, vocab_size: int) -> list[int]:
    import torch

    tokens: list[int] = torch.randint(1000, vocab_size, (load.prompt_tokens,)).tolist()
    return tokens


def _serve(pipe: Connection, start: Any, base: Path, options: dict[str, Any], adapters: Path) -> None:
    """The times of the tokens of each request of each load, in seconds since the load was sent."""
    from llvmlite.binding import ffi

    # For vLLM, which looks at the attributes of everything in every module, and trips over this object of
    # the native engine's kernels: asked for any name, it makes up a function.
    ffi.lib._fntab["__dict__"] = {}
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, prompt = start(base, options, adapters)
    pipe.send(None)
    numbers = itertools.count()
    while (load := pipe.recv()) is not None:
        params = SamplingParams(
            temperature=0,
            max_tokens=load.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        asked = [prompt(load, i) for i in range(load.at_once)]
        began, times = time.perf_counter(), {}
        for given, lora in asked:
            times[id := str(next(numbers))] = []
            engine.add_request(id, given, params, lora_request=lora)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                times[output.request_id] += [now] * len(output.outputs[0].token_ids)
        pipe.send(list(times.values()))


class Engine:
    def __init__(self, start: Any, base: Path, options: dict[str, Any], adapters: Path) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, start, base, options, adapters)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait for its start; all may start at once."""
        self._pipe.recv()

    def times(self, load: Load) -> list[list[float]]:
        self._pipe.send(load)
        times: list[list[float]] = self._pipe.recv()
        return times

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join(30)
        self._process.kill()


def _summed_up(contender: str, number: int, times: list[list[float]]) -> Burst:
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    decoded = sum(begin < at <= end for own in times for at in own)
    whole = sum(map(len, times)) / max(own[-1] for own in times)
    return Burst(contender, len(times), number, decode=decoded / (end - begin), whole=whole)


def _measure(
    engines: dict[str, Engine], levels: list[int], rounds: int, tokens: tuple[int, int]
) -> list[Burst]:
    bursts = []
    for number in range(-1, rounds):  # the first compiles what is not yet, and fills the slots
        for level in levels:
            for contender, (engine, adapters, sees) in CONTENDERS.items():
                load = Load(level, tokens[0], tokens[1] if number >= 0 else 8, adapters, sees)
                burst = _summed_up(contender, number, engines[engine].times(load))
                if number >= 0:
                    print(f"{contender:26} × {level:<3} {burst.decode:8.1f} tok/s", file=sys.stderr)
                    bursts.append(burst)
    return bursts


def _table(bursts: list[Burst]) -> str:
    lines = [
        "| | at once | decode tok/s | over bare vLLM | over it, eager | tok/s | over bare vLLM |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[int, str], list[Burst]] = {}
    for burst in bursts:
        groups.setdefault((burst.at_once, burst.contender), []).append(burst)
    for (level, name), mine in groups.items():
        bare, eager = groups[level, BARE], groups[level, EAGER]
        decode, whole = ([getattr(burst, what) for burst in mine] for what in ("decode", "whole"))
        lines.append(
            f"| {name} | {level} | {statistics.median(decode):.1f} | {_ratio(mine, bare, 'decode')} "
            f"| {_ratio(mine, eager, 'decode')} | {statistics.median(whole):.1f} "
            f"| {_ratio(mine, bare, 'whole')} |"
        )
    return "\n".join(lines)


def _ratio(mine: list[Burst], other: list[Burst], what: str) -> str:
    """The median of the rounds' own, and the least and the greatest."""
    ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(mine, other, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    quick: Annotated[bool, typer.Option(help="three rounds")] = False,
    levels: Annotated[str, typer.Option(help="requests at once, separated by commas")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(min=4)] = 64,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    threads: Annotated[int, typer.Option(help="of each contender; they never run at once")] = 0,
    output: Annotated[Path, typer.Option(help="folder for what was found")] = Path("bench/out"),
) -> None:
    """Measure vLLM with this project's adapters over bare vLLM on the bare base."""
    threads = threads or len(os.sched_getaffinity(0))
    os.environ |= {"OMP_NUM_THREADS": str(threads), **_ENVIRONMENT}
    base = resolve_base("smollm2-135m", default_cache_dir())
    rounds = 3 if quick else rounds
    with tempfile.TemporaryDirectory() as folder:
        adapters = _exported(base, Path(folder))
        options = {"dtype": dtype}
        engines = {
            BARE: Engine(_bare, base, options, adapters),
            EAGER: Engine(_bare, base, options | {"enforce_eager": True}, adapters),
            "plugin": Engine(_plugin, base, options, adapters),
        }
        for engine in engines.values():
            engine.ready()
        bursts = _measure(engines, [int(l) for l in levels.split(",")], rounds, (prompt_tokens, max_tokens))
        for engine in engines.values():
            engine.stop()
    table = _table(bursts)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    load = {"rounds": rounds, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "dtype": dtype}
    facts: dict[str, Any] = {"machine": platform.platform(), "threads": threads, "load": load}
    facts |= {"bursts": [asdict(burst) for burst in bursts]}
    (output / "vllm_plugin.json").write_text(json.dumps(facts, indent=2) + "\n")
    (output / "vllm_plugin.md").write_text(table + "\n")


def _exported(base: Path, folder: Path) -> Path:
    """Random adapters of the paper's shapes, as vLLM reads them."""
    from random_adapters import Kind
    from random_adapters import main as write_adapters

    from models.checkpoints.base import open_base
    from models.checkpoints.native import load_adapter
    from models.vllm_plugin.carriers import Room
    from models.vllm_plugin.export import export_adapter

    config = open_base(base).config
    for kind, count in ((Kind.v1, _MIXED), (Kind.sight, 1)):
        write_adapters(folder / "native", kind=kind, count=count)
    for path in (folder / "native").iterdir():
        export_adapter(load_adapter(path, config), folder / "exported" / path.name, Room(images=True))
    return folder / "exported"


if __name__ == "__main__":
    typer.run(main)
