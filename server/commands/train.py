"""`llama-adapter train`."""

from __future__ import annotations

from typing import Annotated

import typer

from server.options import load
from server.serving import StartupError
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
    try:
        from train.main import train as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("train", "models"):
            raise
        raise StartupError(
            f"{error.name} is not installed; install llama-adapter-server[worker,train]."
        ) from error
    run(recipe, overrides or (), load(WorkerSettings, {}).cache_dir)
