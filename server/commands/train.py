"""`llama-adapter train`."""

from __future__ import annotations

from typing import Annotated

import typer

from server.options import load
from server.settings import WorkerSettings

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n\b\n"
    "  llama-adapter train smollm2-caption data.captions.path=captions.jsonl data.captions.images=.\n"
    "  llama-adapter train recipe.yaml optimizer.lr=0.001 resume=true\n"
    "  torchrun --nproc-per-node 8 --no-python llama-adapter train recipe.yaml"
)
def train(
    recipe: Annotated[str, typer.Argument(help="a recipe file, or the name of a shipped recipe")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="set keys of the recipe")
    ] = None,
) -> None:
    """Train an adapter by a recipe. SIGTERM and Ctrl-C save; resume=true goes on."""
    from train.main import train as run

    run(recipe, overrides or (), load(WorkerSettings, {}).cache_dir)
