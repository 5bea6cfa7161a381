"""`llama-adapter plan`: what bases and adapters take of which devices, before anything is bought."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from models.adapter_config import LINEARS, AdapterConfig, BaseSpec, PromptConfig, ScaleBiasConfig
from models.config import ModelConfig
from server.serving import StartupError

if TYPE_CHECKING:
    from models.sizing import Plan

app = typer.Typer()

_WIDTHS = {"float32": 4, "bfloat16": 2}
_PIPED_WIDTH = 160


@app.command(
    name="plan",
    epilog="Examples:\n\n\b\n"
    "  llama-adapter plan\n"
    "  llama-adapter plan 7b --adapter v2 --sequences 64 --adapters 32 --engine vllm\n"
    "  llama-adapter plan ./Llama-3.2-1B --adapter ./poet --device h100 --json",
)
def plan_command(
    bases: Annotated[
        list[str] | None, typer.Argument(help="7b, 13b, 65b, or folders with a config.json")
    ] = None,
    *,
    adapter: Annotated[
        str, typer.Option(help="v1, v2, or the folder of a native adapter, for its own base only")
    ] = "v1",
    device: Annotated[list[str] | None, typer.Option(help="a100, h100, h200; default: each")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="running at once")] = 16,
    context: Annotated[int, typer.Option(min=1, help="tokens of each")] = 1024,
    adapters: Annotated[int, typer.Option(min=1, help="that they name")] = 8,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of all numbers")] = "bfloat16",
    engine: Annotated[Literal["native", "vllm"], typer.Option(help="whose way to keep adapters")] = "native",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Tell memory, devices and the least time of a decode step for bases, adapters and a load."""
    from models.sizing import BASES, DEVICES, Load, plan

    load = Load(sequences, context, min(adapters, sequences))
    found: list[tuple[str, str, Plan]] = []
    for name in bases or list(BASES):
        base = _base(name)
        config = _adapter(adapter, base)
        for device_name in device or list(DEVICES):
            if device_name not in DEVICES:
                raise StartupError(f"device {device_name!r} is unknown; known: {', '.join(DEVICES)}")
            planned = plan(base, config, DEVICES[device_name], load, width=_WIDTHS[dtype], engine=engine)
            found.append((name, device_name, planned))
    if as_json:
        print(json.dumps([{"base": b, "device": d} | asdict(planned) for b, d, planned in found], indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(_table(found))


def _base(name: str) -> ModelConfig:
    from models.checkpoints.huggingface import read_config
    from models.sizing import BASES

    if name in BASES:
        return BASES[name]
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        raise StartupError(f"{name!r} is neither {', '.join(BASES)} nor a folder with a config.json.")
    return read_config(file)


def _adapter(name: str, base: ModelConfig) -> AdapterConfig:
    """The papers' V1 (10 rows in all layers but two), their V2 on top of it, or a file's."""
    if name not in ("v1", "v2"):
        from models.checkpoints.manifest import read_manifest

        config = read_manifest(Path(name).expanduser())
        if (config.base.hidden_size, config.base.num_layers) != (base.hidden_size, base.num_layers):
            raise StartupError(f"{name} was made for another base; name its own, such as a folder.")
        return config
    spec = BaseSpec(
        hidden_size=base.hidden_size,
        num_layers=base.num_layers,
        num_heads=base.num_heads,
        num_kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        intermediate_size=base.intermediate_size,
        vocab_size=base.vocab_size,
    )
    prompt = PromptConfig(length=10, layers=tuple(range(min(2, base.num_layers - 1), base.num_layers)))
    if name == "v1":
        return AdapterConfig(base=spec, prompt=prompt)
    tuned = ScaleBiasConfig(scale="output", scale_targets=LINEARS, bias_targets=LINEARS)
    return AdapterConfig(base=spec, prompt=prompt, norms=True, final_norm=True, scale_bias=tuned)


def _table(found: list[tuple[str, str, Plan]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("base")
    table.add_column("device")
    for heading in (
        "devices",
        "weights",
        "KV of a token",
        "KV of the load",
        "an adapter",
        "an image",
        "adapters that fit",
        "a step reads",
        "in at least",
    ):
        table.add_column(heading, justify="right")
    for base, device, p in found:
        table.add_row(
            base,
            device,
            str(p.devices),
            *(_size(n) for n in (p.weights, p.kv_per_token, p.kv_of_load, p.adapter, p.image)),
            f"{p.adapters_that_fit:,}",
            _size(p.step_bytes),
            f"{1000 * p.step_seconds:.1f} ms",
        )
    return table


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
