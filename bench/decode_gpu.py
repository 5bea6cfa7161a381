"""Decoding on a GPU, end to end, beside the bytes that must be read: `python bench/decode_gpu.py`.

A base of LLaMA-7B's shape with random weights, made on the device: the repository is all this needs. The
step loop runs whole, with its scheduler, sampling and text; in each round the bare base, V1 and V2 adapters
decode in turn. The floor is what a step must read (`models.sizing.decode_bytes`) by the measured bandwidth.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from kernels import copy_bandwidth
from machine import facts
from random_adapters import Kind, config

from models.adapter import Adapter, base_spec
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from models.kernels.choice import use_triton
from models.llama import Llama
from models.sizing import BASES, Load, decode_bytes
from server.worker.blocks import BlockManager
from server.worker.device import use_device
from server.worker.messages import SamplingParams
from server.worker.request import Prepared
from server.worker.runner import Runner
from server.worker.scheduler import Scheduler
from server.worker.sight import LoadedAdapter
from server.worker.step_loop import StepLoop

_MIXED = 8
_STEP_TOKENS = 4096
_BLOCK = 16
TINY = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
)


class Letters:
    """Stands for a tokenizer, which random weights have none of: every token is a letter."""

    eos_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def token_bytes(self, id: int) -> bytes:
        return b"a"


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    adapters: tuple[LoadedAdapter | None, ...]
    config: AdapterConfig  # for the floor


@dataclass(frozen=True, slots=True)
class Row:
    contender: str
    batch: int
    ms: float  # of a step in which all decode, median of the rounds' medians
    tokens_per_second: float
    of_floor: float  # the floor's time over this one's
    over_base: tuple[float, float, float]  # the bare base's time over this one's: median, least, greatest


def random_base(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    base = Llama(shape, dtype, device)
    for name, place in base.named_parameters():
        if "norm" in name:
            place.data.fill_(1)
        else:
            place.data.normal_(0, place.shape[-1] ** -0.5)
    return base


def contenders(base: Llama) -> list[Contender]:
    spec = base_spec(base.config)

    def adapters(kind: Kind) -> tuple[LoadedAdapter, ...]:
        made = []
        for number in range(_MIXED):
            adapter = Adapter(config(kind, spec)).to(base.device)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.01)
            made.append(LoadedAdapter((f"{kind}-{number}", 1), adapter))
        return tuple(made)

    v1, v2 = adapters(Kind.v1), adapters(Kind.v2)
    return [
        Contender("bare base", (None,), AdapterConfig(base=spec, norms=True)),  # of which it has none
        Contender("one V1 adapter", v1[:1], v1[0].adapter.config),
        Contender("8 V1 adapters mixed", v1, v1[0].adapter.config),
        Contender("one V2 adapter", v2[:1], v2[0].adapter.config),
        Contender("8 V2 adapters mixed", v2, v2[0].adapter.config),
    ]


def engine(base: Llama, batch: int, tokens: int) -> tuple[StepLoop, Scheduler]:
    """For `batch` sequences of `tokens` each, as `server.worker.build` puts it together."""
    blocks = BlockManager(batch * (-(-tokens // _BLOCK) + 1), _BLOCK, prefix_caching=False)
    scheduler = Scheduler(
        blocks, max_num_seqs=batch, max_num_batched_tokens=_STEP_TOKENS, max_model_len=tokens
    )
    runner = Runner(
        base,
        num_blocks=blocks.num_blocks,
        block_size=_BLOCK,
        max_hot_adapters=2 * _MIXED,
        prompt_slots=2 * _MIXED,
        kernels="triton" if use_triton("auto", base.device, base.dtype, base.config.head_dim) else "none",
        max_decodes=batch,
        max_model_len=tokens,
    )
    overlap = base.device.type == "cuda"
    return StepLoop(runner, scheduler, Letters(), overlap), scheduler  # type: ignore[arg-type]


def loading_steps(batch: int, context: int) -> int:
    """At most, until all prompts are computed: meanwhile the first ones decode, and must not end."""
    return -(-batch * context // max(1, _STEP_TOKENS - batch)) + 1


def step_seconds(
    loop: StepLoop, scheduler: Scheduler, prompts: Sequence[list[int]], own: Contender, steps: int
) -> float:
    """Median time of a step in which all prompts' sequences decode."""
    for i, prompt in enumerate(prompts):
        adapter = own.adapters[i % len(own.adapters)]
        sampling = SamplingParams(temperature=0, ignore_eos=True)
        max_tokens = loading_steps(len(prompts), len(prompt)) + steps + 8
        loop.add(Prepared(str(i), prompt, sampling, max_tokens, (), adapter), lambda event: None)
    while scheduler.num_decoding < len(prompts):
        loop.step()
    loop.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        loop.step()
        times.append(time.perf_counter() - began)
    for i in range(len(prompts)):
        loop.abort(str(i))
    return statistics.median(times)


def measure(base: Llama, batch: int, context: int, steps: int, rounds: int, bandwidth: float) -> list[Row]:
    loop, scheduler = engine(base, batch, context + loading_steps(batch, context) + steps + 16)
    everyone, vocab = contenders(base), base.config.vocab_size
    times: dict[str, list[float]] = {own.name: [] for own in everyone}
    for number in range(rounds + 1):
        for own in everyone:
            prompts = torch.randint(vocab, (batch, context)).tolist()
            took = step_seconds(loop, scheduler, prompts, own, steps)
            if number:  # the first records graphs
                times[own.name].append(took)
                print(f"{own.name:20} × {batch:<3} {1e3 * took:8.2f} ms", file=sys.stderr)
    rows = []
    for own in everyone:
        mine = times[own.name]
        ratios = sorted(other / ours for other, ours in zip(times["bare base"], mine, strict=True))
        adapters = len({*own.adapters[:batch]} - {None})
        load = Load(batch, context + steps // 2, adapters)
        seconds = statistics.median(mine)
        floor = decode_bytes(base.config, own.config, load, base.dtype.itemsize) / bandwidth
        spread = (statistics.median(ratios), ratios[0], ratios[-1])
        rows.append(Row(own.name, batch, 1e3 * seconds, batch / seconds, floor / seconds, spread))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| | at once | ms a step | tok/s | of the byte floor | over the bare base |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        middle, least, most = row.over_base
        lines.append(
            f"| {row.contender} | {row.batch} | {row.ms:.2f} | {row.tokens_per_second:.0f} "
            f"| {row.of_floor:.2f} | {middle:.3f} ({least:.3f} to {most:.3f}) |"
        )
    return "\n".join(lines)


def main(
    shape: Annotated[str, typer.Option(help="7b, 13b, 65b or tiny")] = "7b",
    device: Annotated[str, typer.Option(help="the GPU")] = "cuda",
    batches: Annotated[str, typer.Option(help="sequences at once, separated by commas")] = "1,32,128",
    context: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="that are timed, in each round")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="folder for the table and the figures")] = Path("bench/out"),
) -> None:
    """Measure decoding with and without adapters; minutes for a base of 7B."""
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    use_device(where)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth() if on_gpu else 1e10
    base = random_base((BASES | {"tiny": TINY})[shape], torch.bfloat16 if on_gpu else torch.float32, where)
    rows: list[Row] = []
    for batch in map(int, batches.split(",")):
        rows += measure(base, batch, context, steps, rounds, bandwidth)
        if on_gpu:
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(where) if on_gpu else "a processor, whose bandwidth is made up"
    text = f"{shape} on {name}, {bandwidth / 1e9:.0f} GB/s.\n\n{table(rows)}"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    found = {"bandwidth": bandwidth, "context": context, "rows": [asdict(row) for row in rows]}
    (output / "decode_gpu.json").write_text(json.dumps(facts() | found, indent=2) + "\n")
    (output / "decode_gpu.md").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
