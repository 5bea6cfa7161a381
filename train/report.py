"""The report of a finished training: Markdown with plots of loss and gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from models.adapter import Adapter
from train.data.store import Summary
from train.errors import TrainError
from train.log import read_log
from train.recipe import Recipe, recipe_text

X = TypeVar("X", int, float)


def write_report(
    folder: Path,
    recipe: Recipe,
    dtype: torch.dtype,
    adapter: Adapter,
    trained: int,
    sources: Mapping[str, Summary],
) -> Path:
    """Write `report.md`, `loss.png` and `gates.png` to `folder`, from its log and the final adapter.

    `dtype` is what the base was computed in.
    """
    log = read_log(folder)
    steps = [line for line in log if "loss" in line]
    held_out = [line for line in log if line.get("held_out")]
    _plot_loss(folder / "loss.png", steps, held_out, list(sources))
    plots = ["![Loss](loss.png)"]
    if adapter.config.gated_layers:
        _plot_gates(folder / "gates.png", adapter)
        plots.append("![Gate magnitude per layer and head](gates.png)")
    file = folder / "report.md"
    parts = [
        f"# {recipe.output.name}",
        adapter.config.description,
        _facts(recipe, dtype, adapter, trained, steps),
        "## Data",
        _data(sources),
        "## Loss",
        _losses(held_out, steps),
        *plots,
        "## Recipe",
        f"```yaml\n{recipe_text(recipe, brief=True)}```",
    ]
    file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return file


def _facts(
    recipe: Recipe, dtype: torch.dtype, adapter: Adapter, trained: int, steps: list[dict[str, Any]]
) -> str:
    tokens = sum(line["tokens"] for line in steps)
    seconds = seconds_in(steps)
    rows = [
        ("base", recipe.base),
        ("variant", adapter.config.variant),
        ("trained parameters", f"{trained:,}"),
        ("steps", f"{len(steps):,} of {recipe.optimizer.batch_size} rows"),
        ("tokens", f"{tokens:,}"),
        ("time in steps", f"{seconds / 60:.1f} min"),
        ("speed", f"{tokens / seconds:,.0f} tokens/s" if seconds else "–"),
        ("computed", f"{str(dtype).removeprefix('torch.')}, torch {torch.__version__}"),
    ]
    return table(("", ""), rows)


def seconds_in(steps: list[dict[str, Any]]) -> float:
    """Time that a log's steps took; evaluations and checkpoints do not count."""
    return float(sum(line["tokens"] / line["tokens_per_second"] for line in steps))


def _data(sources: Mapping[str, Summary]) -> str:
    header = ("source", "rows read", "trained on", "held out", "truncated", "bad", "tokens", "targets")
    rows = [
        (name, s.read, s.used, s.held_out, s.truncated, s.bad, s.tokens, s.targets)
        for name, s in sources.items()
    ]
    text = table(header, [(name, *(f"{number:,}" for number in numbers)) for name, *numbers in rows])
    faults = [f"- `{fault}`" for s in sources.values() for fault in s.faults or ()]
    return "\n\n".join([text, *(["Bad rows, the first of them:\n\n" + "\n".join(faults)] if faults else [])])


def _losses(held_out: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    if not held_out:
        return f"The last step's loss is {steps[-1]['loss']:.4f}; no rows were held out." if steps else ""
    names = list(held_out[0]["held_out"])
    rows = [(f"{line['step']:,}", *(f"{line['held_out'][name]:.4f}" for name in names)) for line in held_out]
    note = (
        "Held-out loss (mean −log p of a token). At step 0 nothing is learnt: with gates at zero it is the "
        "base's own."
    )
    return note + "\n\n" + table(("step", *names), rows)


def table(header: tuple[str, ...], rows: list[Any]) -> str:
    """Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def new_figure(width: float, height: float) -> Any:
    """An empty one of matplotlib's, in inches, that needs no screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainError("the report needs matplotlib; install llama-adapter-server[train]") from error
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plot_loss(
    file: Path, steps: list[dict[str, Any]], held_out: list[dict[str, Any]], names: list[str]
) -> None:
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        points = [(line["step"], line["loss"]) for line in steps if line["source"] == name]
        color = f"C{index}"
        axes.plot(*columns(points), color=color, alpha=0.3, linewidth=0.8)
        axes.plot(*columns(smoothed(points)), color=color, label=f"{name}, training")
        kept = [(line["step"], line["held_out"][name]) for line in held_out if name in line["held_out"]]
        if kept:
            axes.plot(*columns(kept), "o--", color=color, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss (−log p per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def columns(points: list[tuple[X, float]]) -> tuple[list[X], list[float]]:
    """What matplotlib plots."""
    return [x for x, _ in points], [y for _, y in points]


def smoothed(points: list[tuple[int, float]], half_life: float = 0.02) -> list[tuple[int, float]]:
    """An exponential mean that forgets half within 2 % of the points, or `half_life` of them."""
    keep = 0.5 ** (1 / max(1.0, half_life * len(points)))
    smooth, mean = [], None
    for step, loss in points:
        mean = loss if mean is None else keep * mean + (1 - keep) * loss
        smooth.append((step, mean))
    return smooth


@torch.no_grad()
def _plot_gates(file: Path, adapter: Adapter) -> None:
    """|effective gate|: layers upwards, heads to the right."""
    gates_LH = adapter.gates().abs().float().cpu().numpy()
    figure = new_figure(2 + 0.22 * gates_LH.shape[1], 2 + 0.18 * gates_LH.shape[0])
    axes = figure.add_subplot()
    image = axes.imshow(gates_LH, aspect="auto", origin="lower", cmap="viridis", vmin=0)
    axes.set(xlabel="head", ylabel="layer", title="gate magnitude")
    figure.colorbar(image)
    figure.savefig(file, dpi=110)
