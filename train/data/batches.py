"""From a step's rows to what forward passes take: tokens without padding, targets, images.

Shapes: N tokens of a pass (its sequences one after another), B sequences, M targets, J images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.data.plan import Plan
from train.data.store import NO_IMAGE, Store
from train.data.workers import quiet_worker, worker_start
from train.errors import TrainError


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass. Position `predicting_M[i]` of the flat tokens predicts `targets_M[i]`.

    `images` are features or pixels of J images; sequence b has number `image_B[b]` of them, or -1.
    """

    tokens_N: Tensor
    positions_N: Tensor
    lens_B: tuple[int, ...]
    predicting_M: Tensor
    targets_M: Tensor
    images: Tensor | None
    image_B: tuple[int, ...]

    def to(self, device: torch.device) -> Pass:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            tokens_N=move(self.tokens_N),
            positions_N=move(self.positions_N),
            predicting_M=move(self.predicting_M),
            targets_M=move(self.targets_M),
            images=None if self.images is None else move(self.images),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One process's share of a step. `targets` and `tokens` count over all processes."""

    number: int
    source: int
    passes: tuple[Pass, ...]
    targets: int
    tokens: int


class ImageReader(Protocol):
    """What an image is to the trainer: cached features, or pixels."""

    def __call__(self, store: Store, image: int, seed: int | None) -> Tensor:
        """Image number `image` of a store; with a seed, varied as the recipe says."""


class Steps(Dataset[Step | str]):
    """All steps of a plan, as the process `rank` of `world` sees them; in place of one, why there is none.

    What is raised in a worker process would arrive with the traceback in its sentence.
    """

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[Store],
        read_image: ImageReader,
        pass_tokens: int,
        rank: int,
        world: int,
        seed: int,
    ) -> None:
        self._plan = plan
        self._stores = stores
        self._read_image = read_image
        self._pass_tokens = pass_tokens
        self._rank = rank
        self._world = world
        self._seed = seed

    def __getitem__(self, number: int) -> Step | str:
        try:
            return self._step(number)
        except TrainError as error:
            return str(error)

    def _step(self, number: int) -> Step:
        source = int(self._plan.source_of_step[number])
        store = self._stores[source]
        rows = self._plan.rows(number)
        mine = share(rows.tolist(), store, self._rank, self._world)
        passes = make_passes(
            store, mine, self._read_image, self._pass_tokens, seed=self._seed * 1_000_003 + number
        )
        return Step(
            number,
            source,
            tuple(passes),
            targets=int(store.targets_R[rows].sum()),
            tokens=sum(store.length(row) for row in rows.tolist()),
        )

    def load(self, start: int, workers: int) -> Iterator[Step]:
        """Steps from `start` on, read ahead by worker processes. Raises TrainError at one that cannot be."""
        loader: DataLoader[Step | str] = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, len(self._plan)),
            num_workers=workers,
            worker_init_fn=quiet_worker,
            multiprocessing_context=worker_start(workers),
        )
        return map(_checked, iter(loader))


def _checked(step: Step | str) -> Step:
    if isinstance(step, str):
        raise TrainError(step)
    return step


def share(rows: Iterable[int], store: Store, rank: int, world: int) -> list[int]:
    """One process's rows: dealt out by length, so that all have about as much to do."""
    by_length = sorted(rows, key=lambda row: (store.length(row), row))
    return by_length[rank::world]


def make_passes(
    store: Store, rows: Sequence[int], read_image: ImageReader, pass_tokens: int, seed: int | None = None
) -> Iterator[Pass]:
    """Rows of similar length together, up to `pass_tokens` at once; one row at least.

    `seed` is that of the step in training; without one images are read as they are.
    """
    group: list[int] = []
    size = 0
    for row in sorted(rows, key=lambda row: (store.length(row), row)):
        if group and size + store.length(row) > pass_tokens:
            yield _make_pass(store, group, read_image, seed)
            group, size = [], 0
        group.append(row)
        size += store.length(row)
    if group:
        yield _make_pass(store, group, read_image, seed)


def _make_pass(store: Store, rows: Sequence[int], read_image: ImageReader, seed: int | None) -> Pass:
    ids, generated = zip(*(store.tokens(row) for row in rows), strict=True)
    lens = tuple(len(row) for row in ids)
    filler = _filler(lens)
    starts = np.concatenate([[0], np.cumsum(lens)])[:-1]
    written = np.concatenate(generated).copy()
    written[starts] = False  # nothing predicts a sequence's first token
    targets = np.flatnonzero(written)
    tokens = torch.from_numpy(np.concatenate([*ids, *map(np.zeros, filler)]).astype(np.int64))
    chosen = [int(store.image_R[row]) for row in rows]
    images = sorted({image for image in chosen if image != NO_IMAGE})
    chosen += chosen[-1:] * len(filler)
    read = [read_image(store, image, None if seed is None else seed + image) for image in images]
    return Pass(
        tokens_N=tokens,
        positions_N=torch.cat([torch.arange(length) for length in (*lens, *filler)]),
        lens_B=(*lens, *filler),
        predicting_M=torch.from_numpy(targets - 1),
        targets_M=tokens[torch.from_numpy(targets)],
        images=torch.stack(read) if read else None,
        image_B=tuple(images.index(image) if image != NO_IMAGE else -1 for image in chosen),
    )


def _filler(lens: Sequence[int]) -> tuple[int, ...]:
    """Lengths of sequences that predict nothing and make a pass's tokens a round number, 1/16 more at most.

    oneDNN compiles a kernel for each number of rows and keeps its code: a thousand passes of as many
    different sizes took a gigabyte.
    """
    total = sum(lens)
    missing = -total % max(1, 1 << total.bit_length() - 1 >> 4)
    longest = max(lens)
    whole, rest = divmod(missing, longest)
    return (longest,) * whole + (rest,) * (rest > 0)
