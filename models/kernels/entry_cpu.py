"""A step's rows before the first layer, compiled by numba: whose they are, where they lie, what they embed.

Shapes: N rows, B sequences, M blocks of the longest, V vocabulary, C hidden size, D head size.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from models.kernels.paged_cpu import TILE, from_ends
from models.kernels.scalars_cpu import jit, parallel_jit, widen

SERIAL_ROWS = 8  # so few rows are done sooner than a second thread has begun


@jit
def enter(embed_VC: Any, frequencies_D: Any, batch: Any, rows: Any, block_size: int) -> None:
    """Fill of `rows`, as in `layers_cpu`, the residual stream and all that a row has of its own.

    Sequence b's rows are its last ones of `lens_B[b]` positions; `frequencies_D` has D / 2, in float64.
    """
    _arrange(batch.starts, rows.at_N)
    for b in range(batch.lens_B.shape[0]):
        first, end = batch.starts[b], batch.starts[b + 1]
        for n in range(first, end):
            row, position = rows.at_N[n], np.int64(batch.lens_B[b]) - end + n
            rows.tokens_N[row] = batch.tokens_N[n]
            rows.sequences_N[row] = b
            rows.lens_N[row] = position + 1
            block = np.int64(batch.blocks_BM[b, position // block_size])
            rows.places_N[row] = block * block_size + position % block_size
            rows.slots_N[row] = batch.slots_B[b]
    N = rows.x_NC.shape[0]
    if N <= SERIAL_ROWS:
        for n in range(N):
            _enter_row(n, embed_VC, frequencies_D, rows)
    else:
        _enter_rows(embed_VC, frequencies_D, rows)


@jit
def _arrange(starts: Any, at_N: Any) -> None:
    """Which row each token has: tiles of a sequence's tokens, taken from both ends of the step in turn.

    Threads take runs of rows, and a prompt's later ones see more: so each has as much to attend to.
    """
    N = at_N.shape[0]
    firsts, tiles = np.empty(N + 1, np.int64), 0
    for b in range(starts.shape[0] - 1):
        for first in range(starts[b], starts[b + 1], TILE):
            firsts[tiles] = first
            tiles += 1
    firsts[tiles] = N
    row = 0
    for place in range(tiles):
        tile = from_ends(place, tiles)
        for n in range(firsts[tile], firsts[tile + 1]):
            at_N[n] = row
            row += 1


@parallel_jit
def _enter_rows(embed_VC: Any, frequencies_D: Any, rows: Any) -> None:
    for task in numba.prange(rows.x_NC.shape[0]):
        _enter_row(np.int64(task), embed_VC, frequencies_D, rows)


@jit
def _enter_row(n: int, embed_VC: Any, frequencies_D: Any, rows: Any) -> None:
    token = rows.tokens_N[n]
    for c in range(embed_VC.shape[1]):
        rows.x_NC[n, c] = widen(embed_VC[token, c])
    position = np.float64(rows.lens_N[n] - 1)
    for d in range(frequencies_D.shape[0]):
        angle = position * frequencies_D[d]
        rows.cos_ND[n, d] = np.float32(np.cos(angle))
        rows.sin_ND[n, d] = np.float32(np.sin(angle))
