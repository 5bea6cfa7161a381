"""`llama-adapter plan`: what bases and adapters take of which devices, before anything is bought."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

app = typer.Typer()


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
    from server.commands.planned import print_plans

    print_plans(bases, adapter, device, sequences, context, adapters, dtype, engine, as_json)
