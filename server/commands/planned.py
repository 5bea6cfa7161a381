"""What `llama-adapter plan` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from models.adapter_config import LINEARS, AdapterConfig, BaseSpec, PromptConfig, ScaleBiasConfig
from models.config import ModelConfig
from models.sizing import BASES, DEVICES, Load, Plan, plan
from server.serving import StartupError

_WIDTHS = {"float32": 4, "bfloat16": 2}
_PIPED_WIDTH = 160


def print_plans(
    bases: Sequence[str] | None,
    adapter: str,
    devices: Sequence[str] | None,
    sequences: int,
    context: int,
    adapters: int,
    dtype: Literal["float32", "bfloat16"],
    engine: Literal["native", "vllm"],
    as_json: bool,
) -> None:
    """A row for each base on each device. Raises StartupError for a name that is not known."""
    load = Load(sequences, context, min(adapters, sequences))
    found: list[tuple[str, str, Plan]] = []
    for name in bases or list(BASES):
        base = _base(name)
        config = _adapter(adapter, base)
        for device_name in devices or list(DEVICES):
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
    if name in BASES:
        return BASES[name]
    from models.checkpoints.huggingface import read_config

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
