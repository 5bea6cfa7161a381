"""The train job: parse, build, train, save, close.

llama-adapter train RECIPE.yaml [key=value …]
torchrun --nproc-per-node 2 --no-python llama-adapter train RECIPE.yaml [key=value …]
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from models.checkpoints.native import save_adapter
from train.build import build
from train.errors import Interrupted, TrainError
from train.log import open_log
from train.output import claimed
from train.processes import Processes, StopSignal, join, stop_signal
from train.recipe import Recipe, load_recipe
from train.report import write_report

_KEPT, _GO_ON = "what was saved before is kept", "go on with resume=true"


def train(recipe_name: str, overrides: Sequence[str], cache_dir: Path) -> None:
    """Train by a recipe. A signal saves and returns. Raises ModelError, which says what to do."""
    recipe = load_recipe(recipe_name, overrides)
    console = new_console()
    with stop_signal() as stop, join(recipe.compute.device) as processes:
        train_one(recipe, cache_dir, processes, stop, console)


def new_console() -> Console:
    """For what is told of a training: paths and rows hold brackets that are no markup."""
    return Console(stderr=True, markup=False)


def train_one(
    recipe: Recipe, cache_dir: Path, processes: Processes, stop: StopSignal, console: Console
) -> bool:
    """One training among these processes. False where a signal ended it; then all is saved."""
    try:
        with claimed(recipe.output) if processes.first else nullcontext():
            return _run(recipe, cache_dir, processes, stop, console)
    except Interrupted:
        console.print("Stopped before the first step; nothing is lost.")
        return False
    except (OSError, SafetensorError) as error:  # safetensors wraps OSErrors
        file, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise TrainError(
            f"{file or recipe.output}: {reason or error}; {_KEPT}: mend it and {_GO_ON}"
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TrainError(
            f"there is not enough memory; {_KEPT}: lower compute.pass_tokens, or set "
            f"compute.checkpointing=true, and {_GO_ON}"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainError(
            f"a process that reads rows has ended ({' '.join(str(error).split())}); {_KEPT}: give it more "
            f"memory (/dev/shm in a container), or set compute.workers=0, and {_GO_ON}"
        ) from error


def _run(recipe: Recipe, cache_dir: Path, processes: Processes, stop: StopSignal, console: Console) -> bool:
    run = build(recipe, cache_dir, processes, stop, console)
    start, total = run.trainer.finished_steps, len(run.plan)
    if not processes.first:
        return run.train(stop, None)
    console.print(f"{run.groups.num_trained:,} trained parameters, {total:,} steps, {recipe.output}")
    with open_log(recipe.output, start, total, console) as log:
        finished = run.train(stop, log)
    if not finished:
        console.print(f"Stopped and saved at step {run.trainer.finished_steps}; go on with resume=true.")
        return False
    save_adapter(run.adapter, recipe.output / "adapter")
    summaries = {name: store.summary for name, store in run.stores.items()}
    report = write_report(recipe.output, recipe, run.dtype, run.adapter, run.groups.num_trained, summaries)
    console.print(f"{recipe.output / 'adapter'} and {report}")
    return True
