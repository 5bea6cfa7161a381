"""The report of a study: numbers and curves beside the claim. What follows from them the reader decides."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import fmean

from models.checkpoints.manifest import read_manifest
from models.checkpoints.native import load_unchecked
from train.errors import TrainError
from train.groups import Groups
from train.log import read_log
from train.recipe import Recipe, recipe_text
from train.report import columns, new_figure, seconds_in, smoothed, table
from train.study import Study, StudyRun

_LAST = 0.1  # share of a source's steps whose mean is the training loss at the end
_HALF_LIFE = 0.05  # of the drawn training losses, as a share of the steps

Points = list[tuple[int, float]]  # (step, loss)


@dataclass(frozen=True)
class Result:
    """What a finished training's log and adapter say, per measured source."""

    variant: str
    seed: int
    recipe: Recipe
    trained: int
    minutes: float
    training: dict[str, Points]
    held_out: dict[str, Points]

    def end_of_training(self, source: str) -> float:
        """NaN for a source that is not trained on."""
        losses = [loss for _, loss in self.training[source]]
        return fmean(losses[-max(1, round(_LAST * len(losses))) :]) if losses else nan

    def first(self, source: str) -> float:
        return self.held_out[source][0][1]

    def best(self, source: str) -> float:
        return min(loss for _, loss in self.held_out[source])

    def last(self, source: str) -> float:
        return self.held_out[source][-1][1]


def read_result(run: StudyRun, sources: Sequence[str]) -> Result:
    """Raises TrainError where no row of a source was held out."""
    folder = run.recipe.output
    log = read_log(folder)
    steps = [line for line in log if "loss" in line]
    evaluations = [line for line in log if "held_out" in line]
    adapter = load_unchecked(folder / "adapter", read_manifest(folder / "adapter"))
    result = Result(
        run.variant,
        run.seed,
        run.recipe,
        Groups(adapter, [source.trains for source in run.recipe.data.values()]).num_trained,
        seconds_in(steps) / 60,
        {
            name: [(line["step"], line["loss"]) for line in steps if line["source"] == name]
            for name in sources
        },
        {
            name: [(line["step"], line["held_out"][name]) for line in evaluations if name in line["held_out"]]
            for name in sources
        },
    )
    for name, points in result.held_out.items():
        if not points:
            raise TrainError(
                f"{folder}: no row of {name!r} was held out, so that nothing can be compared; raise "
                f"data.{name}.holdout or data.{name}.limit, and use another --output"
            )
    return result


def write_study_report(
    folder: Path, name: str, study: Study, given: Sequence[str], results: Sequence[Result]
) -> Path:
    """Write `report.md` and its plots, whose names begin with the study's, to `folder`."""
    plots = {"training": "Training loss", "held-out": "Held-out loss"}
    _plot_steps(folder / f"{name}-training.png", study, results, "training")
    _plot_steps(folder / f"{name}-held-out.png", study, results, "held_out")
    if study.x_label:
        plots["over-x"] = f"Losses over {study.x_label}"
        _plot_over_x(folder / f"{name}-over-x.png", study, results)
    variants = [
        (key, variant.what, " ".join(f"`{override}`" for override in variant.overrides))
        for key, variant in study.variants.items()
    ]
    parts = [
        f"# {study.title}",
        study.claim.strip(),
        f"```\n{shlex.join(['llama-adapter', 'study', name, *given])}\n```",
        table(("variant", "what", "overrides"), variants),
        "## Result",
        _note(study),
        _numbers(study, results),
        "\n".join(_ranking(study, results, source) for source in study.measure),
        *(f"![{text}]({name}-{kind}.png)" for kind, text in plots.items()),
        "## Recipe",
        f"Of {results[0].variant}, seed {results[0].seed}:",
        f"```yaml\n{recipe_text(results[0].recipe, brief=True)}```",
    ]
    file = folder / "report.md"
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def _note(study: Study) -> str:
    note = (
        "Loss is the mean −log p of an answer's token. Training loss is the mean over the last "
        f"{_LAST:.0%} of the steps; held-out loss is given before the first step, at its best and after "
        "the last step."
    )
    if len(study.seeds) > 1:
        note += f" Means over {len(study.seeds)} seeds, with the least and the greatest in brackets."
    return note


def _numbers(study: Study, results: Sequence[Result]) -> str:
    header = ["variant", "trained parameters", "minutes"]
    for source in study.measure:
        header += [f"{source}: {column}" for column in ("training", "held out, first", "best", "last")]
    rows = []
    for name in study.variants:
        of_variant = _of(results, name)
        cells = [name, f"{of_variant[0].trained:,}", f"{fmean(r.minutes for r in of_variant):.1f}"]
        for source in study.measure:
            cells += [
                _spread([loss(result, source) for result in of_variant])
                for loss in (Result.end_of_training, Result.first, Result.best, Result.last)
            ]
        rows.append(cells)
    return table(tuple(header), rows)


def _spread(values: Sequence[float]) -> str:
    if any(value != value for value in values):
        return "–"
    text = f"{fmean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f}–{max(values):.3f})"


def _ranking(study: Study, results: Sequence[Result], source: str) -> str:
    """The variants by their last held-out loss, and whether seeds can tell the first two apart."""
    losses = {name: [result.last(source) for result in _of(results, name)] for name in study.variants}
    first, second, *rest = sorted(losses, key=lambda name: fmean(losses[name]))
    others = ", ".join(f"{fmean(losses[name]):.3f} ({name})" for name in (second, *rest))
    line = f"- Lowest last held-out loss, {source}: {first}, {fmean(losses[first]):.3f} against {others}."
    if len(study.seeds) > 1:
        apart = max(losses[first]) < min(losses[second])
        line += f" The seeds' ranges of the first two {'do not overlap' if apart else 'overlap'}."
    return line


def _of(results: Sequence[Result], variant: str) -> list[Result]:
    return [result for result in results if result.variant == variant]


def _plot_steps(file: Path, study: Study, results: Sequence[Result], kind: str) -> None:
    """Loss over steps: an axis per source, a colour per variant, a line per seed."""
    figure = new_figure(7 * len(study.measure), 4.5)
    for place, source in enumerate(study.measure, 1):
        axes = figure.add_subplot(1, len(study.measure), place)
        for index, name in enumerate(study.variants):
            for result in _of(results, name):
                label = name if result.seed == study.seeds[0] else None
                if kind == "held_out":
                    axes.plot(
                        *columns(result.held_out[source]), "o-", color=f"C{index}", label=label, markersize=4
                    )
                elif result.training[source]:
                    points = smoothed(result.training[source], _HALF_LIFE)
                    axes.plot(*columns(points), color=f"C{index}", label=label)
        title = f"{source}, {'held out' if kind == 'held_out' else 'training, smoothed'}"
        axes.set(xlabel="step", ylabel="loss (−log p per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)


def _plot_over_x(file: Path, study: Study, results: Sequence[Result]) -> None:
    """Losses over the variants' x: lines through the means, a dot per seed."""
    kinds: dict[str, Callable[[Result, str], float]] = {
        "training, at the end": Result.end_of_training,
        "held out, best": Result.best,
        "held out, last": Result.last,
    }
    placed = sorted((variant.x, name) for name, variant in study.variants.items() if variant.x is not None)
    figure = new_figure(7 * len(study.measure), 4.5)
    for place, source in enumerate(study.measure, 1):
        axes = figure.add_subplot(1, len(study.measure), place)
        for index, (label, loss) in enumerate(kinds.items()):
            points = [(x, loss(result, source)) for x, name in placed for result in _of(results, name)]
            means = [(x, fmean(loss(r, source) for r in _of(results, name))) for x, name in placed]
            axes.plot(*columns(points), "o", color=f"C{index}", markersize=4)
            axes.plot(*columns(means), color=f"C{index}", label=label)
        axes.set(xlabel=study.x_label, ylabel="loss (−log p per token)", title=source)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)
