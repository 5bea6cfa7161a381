"""A training step against PEFT and full fine-tuning: `python bench/train_step.py` (needs the extra `dev`).

The same base, tokens and targets for all; every contender is a process of its own, so that its peak memory
is its own. First each runs alone in float32 and, on a processor that multiplies in it, in bfloat16, and its
better precision is kept; then all step in turn, round by round, and ratios are taken within a round. The
first losses must agree: all start from the untouched base.

ours            this project: a V1 adapter, 10 prompts in all layers but the first two
adaption_prompt PEFT's adapter of the same size          lora   PEFT's, r = 8 on queries and values
full            all weights                              each: AdamW, one step = forward, backward, update
"""

from __future__ import annotations

import json
import multiprocessing as mp
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from models.pull import resolve_base
from server.settings import default_cache_dir
from train.products import multiplies_bfloat16

CONTENDERS = ("ours", "adaption_prompt", "lora", "full")
_SKIPPED = 2  # layers below the adapter
_PROMPTS = 10
_AGREE = {"float32": 1e-3, "bfloat16": 0.05}

Step = Callable[[], float]


@dataclass(frozen=True)
class Batch:
    """Token ids of B sequences; every token but the first is a target."""

    ids_B: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.ids_B)

    @classmethod
    def random(cls, lens: tuple[int, ...], vocab_size: int) -> Batch:
        generator = torch.Generator().manual_seed(0)
        return cls(tuple(torch.randint(vocab_size, (length,), generator=generator) for length in lens))


def build_ours(base_path: Path, dtype: torch.dtype, batch: Batch) -> Step:
    from models.adapter import Adapter, base_spec
    from models.adapter_config import AdapterConfig, PromptConfig
    from models.checkpoints.base import load_base
    from train.data.batches import Pass
    from train.forward import Forward
    from train.memory import keep_freed_memory
    from train.products import pack_products

    keep_freed_memory()  # as `llama-adapter train` does
    base, fingerprint = load_base(base_path, dtype, torch.device("cpu"))
    pack_products(base)  # likewise
    layers = tuple(range(_SKIPPED, base.config.num_layers))
    config = AdapterConfig(
        base=base_spec(base.config, fingerprint), prompt=PromptConfig(length=_PROMPTS, layers=layers)
    )
    adapter = Adapter(config).start_from(base)
    forward = Forward(base, adapter, None, live=False, checkpointing=False)
    lens = [len(ids) for ids in batch.ids_B]
    tokens_N = torch.cat(batch.ids_B)
    positions_N = torch.cat([torch.arange(length) for length in lens])
    targets = (positions_N > 0).nonzero()[:, 0]
    whole = Pass(tokens_N, positions_N, tuple(lens), targets - 1, tokens_N[targets], None, (-1,) * len(lens))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = forward.backward(whole, 1 / len(targets))
        optimizer.step()
        return float(loss) / len(targets)

    return step


def build_theirs(kind: str, base_path: Path, dtype: torch.dtype, batch: Batch) -> Step:
    # Nothing here needs torchvision, and PyPI's build of it breaks transformers' import beside a CPU torch.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(base_path, dtype=dtype)
    layers = model.config.num_hidden_layers - _SKIPPED
    if kind == "adaption_prompt":
        config = AdaptionPromptConfig(adapter_len=_PROMPTS, adapter_layers=layers, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    elif kind == "lora":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    model.train()
    ids_BT = torch.nn.utils.rnn.pad_sequence(list(batch.ids_B), batch_first=True)
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in batch.ids_B], batch_first=True)
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    padded = bool((mask_BT == 0).any())

    def step() -> float:
        optimizer.zero_grad()
        mask = {"attention_mask": mask_BT} if padded else {}
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False, **mask).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def _work(pipe: Connection, name: str, base_path: Path, dtype: str, batch: Batch, threads: int) -> None:
    """A contender's process: for each message a step; back go its seconds, loss and peak memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    precision: torch.dtype = getattr(torch, dtype)
    if name == "ours":
        step = build_ours(base_path, precision, batch)
    else:
        step = build_theirs(name, base_path, precision, batch)
    while pipe.recv():
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        pipe.send((seconds, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


class Contender:
    """A process that steps when it is told to. `losses` and `peak_gib` are of all its steps."""

    def __init__(self, name: str, dtype: str, base_path: Path, batch: Batch, threads: int) -> None:
        self.name, self.dtype = name, dtype
        self.losses: list[float] = []
        self.peak_gib = 0.0
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, name, base_path, dtype, batch, threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def step(self) -> float:
        """Seconds of one step."""
        self._pipe.send(True)
        seconds, loss, self.peak_gib = self._pipe.recv()
        self.losses.append(loss)
        return float(seconds)

    def close(self) -> None:
        self._pipe.send(False)
        self._process.join()


def _alone(name: str, dtype: str, base_path: Path, batch: Batch, threads: int) -> dict[str, Any]:
    """Two steps after a first one, alone on the machine."""
    contender = Contender(name, dtype, base_path, batch, threads)
    contender.step()
    seconds = min(contender.step() for _ in range(2))
    contender.close()
    typer.echo(f"{name:16} {dtype:9} {1e3 * seconds:8.0f} ms  {contender.peak_gib:.2f} GiB", err=True)
    return {
        "name": name,
        "dtype": dtype,
        "ms": 1e3 * seconds,
        "peak_gib": contender.peak_gib,
        "first_loss": contender.losses[0],
    }


def _in_turn(
    best: dict[str, str], rounds: int, base_path: Path, batch: Batch, threads: int
) -> dict[str, Any]:
    """Every contender's seconds per round, and its peak memory."""
    contenders = [Contender(name, dtype, base_path, batch, threads) for name, dtype in best.items()]
    for contender in contenders:
        contender.step()
    seconds: dict[str, list[float]] = {name: [] for name in best}
    for number in range(rounds):
        for contender in contenders:
            seconds[contender.name].append(contender.step())
        typer.echo(f"round {number + 1} of {rounds}", err=True)
    for contender in contenders:
        contender.close()
    return {"seconds": seconds, "peak_gib": {c.name: c.peak_gib for c in contenders}}


def _check_losses(alone: list[dict[str, Any]]) -> None:
    """All start from the same function; a contender with another loss does something else."""
    exact = next(run["first_loss"] for run in alone if run["dtype"] == "float32")
    for run in alone:
        if abs(run["first_loss"] - exact) > _AGREE[run["dtype"]] * exact:
            raise SystemExit(f"{run['name']} in {run['dtype']} begins at {run['first_loss']}, not {exact}")


def _table(best: dict[str, str], turns: dict[str, Any]) -> str:
    lines = [
        "| | precision | ms/step, median | over ours, median (min to max) | peak GiB |",
        "|---|---|---:|---:|---:|",
    ]
    ours = turns["seconds"]["ours"]
    for name, dtype in best.items():
        seconds = turns["seconds"][name]
        ratios = sorted(own / base for own, base in zip(seconds, ours, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        peak = turns["peak_gib"][name]
        lines.append(f"| {name} | {dtype} | {1e3 * statistics.median(seconds):.0f} | {spread} | {peak:.2f} |")
    return "\n".join(lines)


def main(
    base: Annotated[str, typer.Option(help="by id, or a folder in Hugging Face's format")] = "smollm2-135m",
    lens: Annotated[str, typer.Option(help="tokens of each sequence")] = "256,256,256,256",
    rounds: Annotated[int, typer.Option(min=5)] = 7,
    threads: Annotated[int, typer.Option(min=1, help="of each contender; they never step at once")] = 2,
    output: Annotated[Path, typer.Option(help="a folder for train_step.json and train_step.md")] = Path(
        "bench/out"
    ),
) -> None:
    """Measure a training step of ours, PEFT's adaption_prompt and LoRA, and full fine-tuning."""
    base_path = resolve_base(base, default_cache_dir())
    vocab_size = json.loads((base_path / "config.json").read_text())["vocab_size"]
    batch = Batch.random(tuple(int(length) for length in lens.split(",")), vocab_size)
    # Without its instructions a step in bfloat16 takes minutes, and is nobody's better precision.
    dtypes = ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",)
    alone = [_alone(name, dtype, base_path, batch, threads) for name in CONTENDERS for dtype in dtypes]
    _check_losses(alone)
    best = {
        name: min((run for run in alone if run["name"] == name), key=lambda run: run["ms"])["dtype"]
        for name in CONTENDERS
    }
    turns = _in_turn(best, rounds, base_path, batch, threads)
    table = _table(best, turns)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "base": base,
        "lens": lens,
        "tokens": batch.tokens,
        "threads": threads,
        "torch": torch.__version__,
    }
    (output / "train_step.json").write_text(
        json.dumps({**facts, "alone": alone, "best": best, **turns}, indent=2)
    )
    (output / "train_step.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
