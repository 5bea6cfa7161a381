"""`llama-adapter data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.commands.installed import installed

app = typer.Typer()


@app.command(epilog="Example:\n\n\b\n  llama-adapter data ./data --gsm8k train.jsonl")
def data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to write it; made if it is not there")],
    openclipart_deb: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Debian's openclipart-png 1:0.18+dfsg-19; default: apt-get fetches it"
        ),
    ] = None,
    emoji_tgz: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="emoji-datasource-google 16.0.0; default: npm fetches it"),
    ] = None,
    gsm8k: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="GSM8K's train.jsonl; without it no math.jsonl is made"),
    ] = None,
) -> None:
    """Make the shipped recipes' training data from public packages. What is there already is kept."""
    from rich.console import Console
    from rich.progress import Progress

    with installed("worker,train"):
        from train.datasets.make import make_data

    with Progress(console=Console(stderr=True)) as progress:
        told = make_data(folder, progress, openclipart_deb, emoji_tgz, gsm8k)
    print("\n".join(told))
