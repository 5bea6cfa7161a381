"""Which rows each step trains on: a function of the recipe and the step's number, of nothing else.

So a run resumes at any step, and any number of processes shares the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.errors import TrainError


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """`rows`: the numbers of the rows to train on; `epochs`: passes over them, 0 for none."""

    name: str
    rows: NDArray[np.int64]
    epochs: float


class Plan:
    """Steps of one source each, the sources shuffled in proportion; the last rows of an epoch that fill
    no batch are left out, others each time."""

    def __init__(
        self, sources: Sequence[SourcePlan], batch_size: int, seed: int, max_steps: int | None = None
    ) -> None:
        self._sources = sources
        self._batch_size = batch_size
        self._seed = seed
        self._permutations: dict[int, tuple[int, NDArray[np.int64]]] = {}
        counts = [self._steps(source) for source in sources]
        order = np.repeat(np.arange(len(sources), dtype=np.uint32), counts)
        np.random.default_rng([seed, 0]).shuffle(order)
        self.source_of_step: NDArray[np.uint32] = order[:max_steps]

    def __len__(self) -> int:
        return len(self.source_of_step)

    def rows(self, step: int) -> NDArray[np.int64]:
        """The `batch_size` rows of a step, all of the source `source_of_step[step]`."""
        number = int(self.source_of_step[step])
        nth = int((self.source_of_step[:step] == number).sum())
        per_epoch = len(self._sources[number].rows) // self._batch_size
        epoch, index = divmod(nth, per_epoch)
        start = index * self._batch_size
        return self._permutation(number, epoch)[start : start + self._batch_size]

    def _permutation(self, number: int, epoch: int) -> NDArray[np.int64]:
        """The source's rows in this epoch's order; the last one asked for is kept."""
        kept, rows = self._permutations.get(number, (-1, None))
        if kept != epoch or rows is None:
            rng = np.random.default_rng([self._seed, 1, number, epoch])
            rows = rng.permutation(self._sources[number].rows)
            self._permutations[number] = (epoch, rows)
        return rows

    def _steps(self, source: SourcePlan) -> int:
        if source.epochs == 0:
            return 0
        per_epoch = len(source.rows) // self._batch_size
        if per_epoch == 0:
            raise TrainError(
                f"data.{source.name}: has {len(source.rows)} rows to train on, fewer than one step's "
                f"{self._batch_size}; lower optimizer.batch_size"
            )
        return max(1, round(source.epochs * per_epoch))
