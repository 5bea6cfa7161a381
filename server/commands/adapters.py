"""`llama-adapter inspect`, `verify` and `convert`: adapter files, without serving them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from server.options import load
from server.settings import WorkerSettings

if TYPE_CHECKING:
    from models.checkpoints.adapters import AdapterOptions
    from models.checkpoints.inspect import Base

app = typer.Typer()

Given = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="what the file cannot say: gate=tanh|raw, template=NAME, color=rgb|bgr, litgpt=VERSION, "
        "length=ROWS, encoder=NAME",
    ),
]
Source = Annotated[Path, typer.Argument(help="An adapter folder or file, of any format.")]
_BASE = "the base it is for: a path, or an id that `pull` knows"
BasePath = Annotated[str | None, typer.Option("--base", help=_BASE)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command(epilog="Example:\n\n\b\n  llama-adapter inspect ./poet --json")
def inspect(path: Source, option: Given = None, as_json: AsJson = False) -> None:
    """Tell what an adapter is: variant, shapes, parameters, and the base it needs."""
    from models.checkpoints.inspect import describe

    _print(describe(path.expanduser(), _options(option)), as_json)


@app.command(epilog="Example:\n\n\b\n  llama-adapter verify ./poet smollm2-135m")
def verify(
    path: Source,
    base: Annotated[str | None, typer.Argument(help=_BASE)] = None,
    option: Given = None,
    as_json: AsJson = False,
) -> None:
    """Read every value of an adapter and check it. With its base: whether it fits, and a first answer."""
    from models.checkpoints.inspect import verify as check

    path, known = path.expanduser(), _base(base)
    told = check(path, known, _options(option))
    if base is not None:
        from server.commands.trial import answer

        told["answer"] = answer(base, ",".join([str(path), *(option or ())]))
    _print(told, as_json)


@app.command(
    epilog="Example:\n\n\b\n"
    "  llama-adapter convert llama_adapter_len10_layer30_release.pth ./alpaca --base ~/models/7B"
)
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Where to write the adapter.")],
    to: Annotated[
        str,
        typer.Option(
            help="native, peft, litgpt, or reference: which of reference-v1, reference-v1-caption, "
            "reference-7b and chat-65b it is follows from the adapter"
        ),
    ] = "native",
    base: BasePath = None,
    option: Given = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="how values are stored; 16 bits halve the file and round"),
    ] = "float32",
) -> None:
    """Write an adapter in another format. Only native folders tell all of their base themselves."""
    import torch

    from models.checkpoints.inspect import convert as write

    stored = getattr(torch, dtype)
    write(source.expanduser(), target.expanduser(), to, _base(base), _options(option), stored)
    print(target)


def _options(given: list[str] | None) -> AdapterOptions:
    from models.checkpoints.adapters import parse_adapter_argument

    return parse_adapter_argument(",".join(["adapter=file", *(given or ())]))[2]


def _base(name: str | None) -> Base | None:
    if name is None:
        return None
    from models.checkpoints.inspect import read_base
    from models.pull import resolve_base

    return read_base(resolve_base(name, load(WorkerSettings, {}).cache_dir))


def _print(description: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(description, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "value", show_header=False, box=None, pad_edge=False)
    tensors = description.pop("tensors")
    for key, value in description.items():
        shown = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, shown)
    table.add_row("tensors", f"{len(tensors)}; --json lists them")
    Console(highlight=False, markup=False).print(table)
