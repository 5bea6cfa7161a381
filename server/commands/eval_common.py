"""What the subcommands of `llama-adapter eval` share: options, data, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from server.options import load
from server.serving import StartupError
from server.settings import EvaluationSettings, WorkerSettings

if TYPE_CHECKING:
    from train.evaluation.results import Result
    from train.evaluation.samples import Wanted
    from train.recipe import SourceRecipe

FIRST = ("adapter", "base", "url", "model")  # the options that say what is evaluated

Data = Annotated[list[Path], typer.Argument(help="Data files, as a recipe's `path`.", metavar="DATA...")]
Images = Annotated[Path | None, typer.Option(help="folder that the data's image paths are relative to")]
Columns = Annotated[
    str | None, typer.Option(help="names of the columns of a TSV file without a header, by commas")
]
Split = Annotated[
    Literal["all", "held-out"], typer.Option(help="held-out: the rows that a training keeps apart")
]
Holdout = Annotated[float, typer.Option(min=0, max=0.5, help="the recipe's `holdout`, for --split held-out")]
BadRows = Annotated[Literal["stop", "skip"], typer.Option(help="at a row that cannot be used")]
MaxTokens = Annotated[int, typer.Option(min=1, help="greatest length of an answer")]
NoExperts = Annotated[
    bool, typer.Option("--no-experts", help="tell a llama-adapter --url to leave its experts out")
]


def settings_of(given: dict[str, Any]) -> EvaluationSettings:
    """The settings, once it is sure that what they name can be written. Raises `StartupError`."""
    settings = load(EvaluationSettings, given)
    for file in (settings.output, settings.predictions):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise StartupError(f"{file}: no file can be written there; make its folder, or name another.")
    return settings


def source_of(data: Sequence[Path], columns: str | None = None, **fields: Any) -> SourceRecipe:
    """The data as a recipe's source."""
    from train.recipe import SourceRecipe

    names = tuple(columns.split(",")) if columns else None
    return SourceRecipe(path=tuple(data), columns=names, **fields)


def wanted_rows(split: str, holdout: float) -> Wanted:
    from train.evaluation.samples import all_rows, held_out_rows

    return held_out_rows(holdout) if split == "held-out" else all_rows


def learnt_rows(split: str, holdout: float) -> Wanted:
    """The rows that whoever is evaluated on such a split may know."""
    from train.evaluation.samples import all_rows, trained_rows

    return trained_rows(holdout) if split == "held-out" else all_rows


def cache_dir() -> Path:
    return load(WorkerSettings, {}).cache_dir


def tell(faults: Sequence[str]) -> None:
    """The first rows that are left out, and how many they are."""
    for fault in faults[:3]:
        typer.echo(fault, err=True)
    if faults:
        typer.echo(f"{len(faults)} rows cannot be used and are left out.", err=True)


def report(result: Result, settings: EvaluationSettings) -> None:
    """The table, and the files that were asked for. Raises `StartupError` where they cannot be written."""
    from train.evaluation.results import prediction_line

    print(result.table())
    lines = "".join(map(prediction_line, result.predictions))
    for file, text in ((settings.output, result.as_json() + "\n"), (settings.predictions, lines)):
        if file is None:
            continue
        try:
            # A lone surrogate in an answer is written as the escape that JSON has for it.
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise StartupError(f"{file}: cannot be written ({error.strerror}); name another file.") from error
