"""`llama-adapter train` and `llama-adapter study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.commands.installed import installed
from server.options import load
from server.settings import WorkerSettings

app = typer.Typer()


@app.command(
    epilog="Shipped recipes:\n\n\b\n"
    "  smollm2-text smollm2-caption smollm2-visual smollm2-math\n"
    "  v1-instruct v1-caption v1-scienceqa v2-chat v2-joint v2-joint-lora\n"
    "  released-7b-pretrain released-7b-finetune lora\n\n"
    "Examples:\n\n\b\n"
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
    with installed("worker,train"):
        from train.main import train as run
    run(recipe, overrides or (), load(WorkerSettings, {}).cache_dir)


@app.command(
    epilog="Studies, each about ten minutes on two cores:\n\n\b\n"
    "  zero-init     gates that start at zero, at random, or are not there (V1, Table 4, Figure 7)\n"
    "  layers        prompts in 5 to 30 layers (V1, Table 3)\n"
    "  epochs        15 to 60 passes over few rows (V1, Table 6)\n"
    "  unlocking     prompts only, or with norm, bias and scale (V2, section 4.1)\n"
    "  interference  disjoint joint training and early fusion, or naive ones (V2, sections 4.2, 4.3)\n\n"
    "Examples:\n\n\b\n"
    "  llama-adapter study zero-init data.instruct.path=instruct.jsonl\n"
    "  llama-adapter study layers optimizer.max_steps=400 --output runs/studies/layers-400\n"
    "  llama-adapter study ./my-study.yaml"
)
def study(
    name: Annotated[str, typer.Argument(help="the name of a shipped study, or a study file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="set keys of the recipe, for all variants"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="folder of report and trainings", show_default="runs/studies/NAME"),
    ] = None,
) -> None:
    """Train variants of a recipe one after another and compare their losses: OUTPUT/report.md.

    What is trained already is not trained again. SIGTERM and Ctrl-C save; the same command goes on.
    """
    with installed("worker,train"):
        from train.run_study import run_study
    run_study(name, overrides or (), output, load(WorkerSettings, {}).cache_dir)
