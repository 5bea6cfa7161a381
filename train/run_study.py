"""The study job: train what is not trained yet, then report.

llama-adapter study NAME [key=value …]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from train.build import RECIPE, WHERE, check_same
from train.errors import TrainError
from train.main import new_console, train_one
from train.processes import Processes, StopSignal, join, stop_signal
from train.study import StudyRun, load_study, plan_runs
from train.study_report import read_result, write_study_report


def run_study(name: str, overrides: Sequence[str], output: Path | None, cache_dir: Path) -> None:
    """Train every variant, then report. A signal saves and returns; the same call goes on.

    Raises ModelError, which says what to do.
    """
    file, study = load_study(name)
    output = output or Path("runs") / "studies" / file.stem
    runs = plan_runs(file, study, overrides, output)
    for run in runs:
        if run.begun:
            check_same(run.recipe.output / RECIPE, run.recipe, WHERE)
    console = new_console()
    with stop_signal() as stop, join(runs[0].recipe.compute.device) as processes:
        for number, run in enumerate(runs, 1):
            console.print(f"{number} of {len(runs)}: {run.variant}, seed {run.seed}", highlight=False)
            if not _train(run, study.measure, cache_dir, processes, stop, console):
                console.print("The same command goes on with the study.")
                return
    if not processes.first:
        return
    results = [read_result(run, study.measure) for run in runs]
    try:
        report = write_study_report(output, file.stem, study, overrides, results)
    except OSError as error:
        raise TrainError(f"{output}: {error.strerror}; mend it and repeat the command") from error
    console.print(str(report))


def _train(
    run: StudyRun,
    measure: Sequence[str],
    cache_dir: Path,
    processes: Processes,
    stop: StopSignal,
    console: Console,
) -> bool:
    """False where a signal came before the end. Raises TrainError where the run cannot be compared."""
    if run.finished:
        console.print("trained already")
    elif stop.requested or not train_one(run.recipe, cache_dir, processes, stop, console):
        return False
    if processes.first:
        read_result(run, measure)
    return True
