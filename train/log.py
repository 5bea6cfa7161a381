"""What a training tells: a progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from train.errors import TrainError
from train.output import write_whole

LOG = "log.jsonl"
_TELL_SECONDS = 30.0


class Log:
    """One line and one point per step and per evaluation; lines of steps that are done again are dropped.

    Where there is no terminal to show a progress bar, a line every half minute stands for it.
    """

    def __init__(self, folder: Path, start: int, total: int, console: Console) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainError("training needs tensorboard; install llama-adapter-server[train]") from error

        folder.mkdir(parents=True, exist_ok=True)
        # Without a step to go on from, what is there tells of another training, perhaps by another recipe.
        kept = [line for line in read_log(folder) if line["step"] <= start] if start else []
        self._evaluated = {line["step"] for line in kept if "held_out" in line}
        write_whole(folder / LOG, map(_line, kept))
        self._lines = (folder / LOG).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)
        self._total, self._told = total, time.monotonic()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._task: TaskID = self._progress.add_task("", total=total, completed=start, loss=0.0, speed=0.0)
        self._progress.start()

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """`values` hold `loss` and `tokens_per_second` at least."""
        self._write(step, values)
        self._progress.update(
            self._task, completed=step, loss=values["loss"], speed=values["tokens_per_second"]
        )
        console = self._progress.console
        if not console.is_terminal and time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            console.print(
                f"step {step:,} of {self._total:,}: loss {values['loss']:.3f}, "
                f"{values['tokens_per_second']:,.0f} tokens/s",
                highlight=False,
            )

    def evaluation(self, step: int, losses: Mapping[str, float], gates: list[float]) -> None:
        """Held-out loss by source, and the mean gate magnitude of each gated layer. Told once for a step."""
        if step in self._evaluated:
            return
        self._evaluated.add(step)
        self._write(step, {"held_out": dict(losses), "gates": gates})
        if losses:
            text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self._progress.console.print(f"step {step}: held-out loss {text}", highlight=False)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self._lines.write(_line({"step": step, **values}))
        self._lines.flush()
        for name, value in _points(values):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._progress.stop()
        self._lines.close()
        self._board.close()


@contextmanager
def open_log(folder: Path, start: int, total: int, console: Console) -> Iterator[Log]:
    log = Log(folder, start, total, console)
    try:
        yield log
    finally:
        log.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a log, in order, with NaN where there was no number.

    Raises TrainError for a damaged line, unless it is the last: that one is torn where the run was killed.
    """
    file = folder / LOG
    texts = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text, object_hook=_with_nan)
        except ValueError:
            line = None
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
        elif number < len(texts):
            raise TrainError(f"{file}:{number}: is damaged; remove the line, whose numbers are lost")
    return lines


def _line(values: Mapping[str, Any]) -> str:
    """JSON has neither NaN nor infinity: null stands for both."""
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}


def _points(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        elif isinstance(value, int | float):
            yield name, value
