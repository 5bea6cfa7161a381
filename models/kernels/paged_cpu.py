"""Gated attention over the paged cache, compiled for the CPU by numba.

Each row is the query of one position, which sees its sequence up to itself. A task is a tile of rows that
follow one another in a sequence, or a decode's only one, and some query heads of one key/value head. It reads
the sequence's blocks where they lie (the cache is never gathered or copied), then the prompt's rows, and
writes softmax(qK)V + g·softmax(qK_a)V_a. Weights are stored as values are, and sums are in float32; a row's
result depends neither on the other rows nor on its tile, to the last bit.

Shapes: N rows, B sequences, M blocks of the longest, P blocks of s positions, T positions, H query heads, G
key/value heads, R queries of a task, D head size, S prompt slots, K prompt rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from models.kernels.query_tile_cpu import HEAD_SIZES, score_queries, transpose_rows
from models.kernels.rows_cpu import prefetch_rows, score_rows
from models.kernels.scalars_cpu import (
    SUPPORTED_DTYPES,
    array,
    inlined_jit,
    jit,
    narrow,
    parallel_jit,
    widen,
)
from models.kernels.softmax_cpu import exponentials
from models.kernels.tile_cpu import LANES
from models.kernels.values_cpu import HEAD_STEP, add_rows

__all__ = ["SUPPORTED_DTYPES", "add_block", "attend", "paged_attend"]

TILE = 16  # rows; half of it of fewer than _MANY rows, which would leave a thread without a task
_MANY = 128
assert TILE <= LANES, "the zeros behind a row's weights reach to its tile's last position"
_AHEAD = 2  # blocks whose keys a single query asks for before it needs them
_FEW = 8  # tasks; where there are fewer of one per key/value head, each query head is one


@jit
def _score(
    q_NHD: Any,
    n: int,
    h: int,
    q_RD: Any,
    k_PsGD: Any,
    v_PsGD: Any,
    blocks_BM: Any,
    b: int,
    g: int,
    T: int,
    scores_RT: Any,
) -> None:
    """Scores of the queries `q_RD`, or without any of row n's heads from h on, with a sequence's T keys.

    A single row asks for keys and values on the way. Scores past the last, up to a multiple of LANES, mean
    nothing.
    """
    s, D = k_PsGD.shape[1], q_NHD.shape[2]
    scale = np.float32(1 / np.sqrt(D))
    if q_RD.shape[0] > 0:
        keys_WT = np.empty((D * q_NHD.itemsize // 4, LANES), np.float32)
        for start in range(0, T, s):
            block, some = np.int64(blocks_BM[b, start // s]), min(s, T - start)
            for t in range(0, some, LANES):
                transpose_rows(k_PsGD, block, t, g, some - t, keys_WT)
                score_queries(q_RD, keys_WT, scale, scores_RT, start + t)
    else:
        for start in range(0, T, s):
            block, some = np.int64(blocks_BM[b, start // s]), min(s, T - start)
            if start + _AHEAD * s < T:
                prefetch_rows(k_PsGD, np.int64(blocks_BM[b, start // s + _AHEAD]), g)
            prefetch_rows(v_PsGD, block, g)
            if D % HEAD_STEP == 0:
                score_rows(q_NHD, n, h, k_PsGD, block, 0, g, some, scale, scores_RT, start)
            else:
                _score_plain(q_NHD, n, h, k_PsGD, block, g, some, scale, scores_RT, start)


@inlined_jit
def _gather(q_NHD: Any, n: int, h: int, R: int, count: int) -> Any:
    """The queries of `count` rows from n on, R // count heads of each from h on, one after another."""
    heads, D = R // count, q_NHD.shape[2]
    q_RD = np.empty((R, D), q_NHD.dtype)
    for r in range(R):
        row, head = n + r // heads, h + r % heads
        for d in range(D):
            q_RD[r, d] = q_NHD[row, head, d]
    return q_RD


@inlined_jit
def _score_plain(
    q_NHD: Any, n: int, h: int, k_PsGD: Any, p: int, g: int, count: int, scale: Any, scores_RT: Any, at: int
) -> None:
    """As `score_rows` from the block's first row, of any head size."""
    for r in range(scores_RT.shape[0]):
        for i in range(count):
            total = np.float32(0)
            for d in range(q_NHD.shape[2]):
                total += widen(q_NHD[n, h + r, d]) * widen(k_PsGD[p, i, g, d])
            scores_RT[r, at + i] = total * scale


@jit
def _add(weights_RT: Any, v_PsGD: Any, blocks_BM: Any, b: int, g: int, T: int, out_RD: Any) -> None:
    """out[r] += Σ weights[r, t] · v[t] over a sequence's first T values, for every r."""
    s = v_PsGD.shape[1]
    for start in range(0, T, s):
        add_block(weights_RT, start, v_PsGD, np.int64(blocks_BM[b, start // s]), g, min(s, T - start), out_RD)


@inlined_jit
def add_block(weights_RT: Any, at: int, v_PsGD: Any, p: int, g: int, count: int, out_RD: Any) -> None:
    """As `add_rows` from the block's first row, of any head size."""
    R, D = out_RD.shape
    if D % HEAD_STEP == 0:
        add_rows(weights_RT, at, v_PsGD, p, 0, g, count, out_RD)
    else:
        for i in range(count):
            for r in range(R):
                for d in range(D):
                    out_RD[r, d] += widen(weights_RT[r, at + i]) * widen(v_PsGD[p, i, g, d])


@jit
def _tiles(sequences_N: Any, lens_N: Any, most: int) -> Any:
    """Where runs of at most `most` rows that follow one another in a sequence begin; N at the end."""
    N = len(sequences_N)
    firsts, count = np.empty(N + 1, np.int64), 0
    for n in range(N):
        follows = n > 0 and sequences_N[n] == sequences_N[n - 1] and lens_N[n] == lens_N[n - 1] + 1
        if not follows or n - firsts[count - 1] == most:
            firsts[count] = n
            count += 1
    firsts[count] = N
    return firsts[: count + 1]


@inlined_jit
def from_ends(place: int, count: int) -> int:
    """Of `count` things the one whose turn it is if they are taken from both ends."""
    return place // 2 if place % 2 == 0 else count - 1 - place // 2


@parallel_jit
def attend(
    q_NHD: Any,
    k_PsGD: Any,
    v_PsGD: Any,
    blocks_BM: Any,
    sequences_N: Any,
    lens_N: Any,
    prompt_k_SKGD: Any,
    prompt_v_SKGD: Any,
    slots_B: Any,
    prompt_lens_S: Any,
    gate_SH: Any,
    out_NHD: Any,
    in_order: bool,
) -> None:
    """Row n sees the first `lens_N[n]` positions of sequence `sequences_N[n]`, and the prompt in its slot.

    Threads take runs of tasks, and a prompt's later rows see more: where rows lie `in_order`, tiles of them
    are taken from both ends in turn.
    """
    N, H, D = q_NHD.shape
    G = k_PsGD.shape[2]
    group = H // G
    heads = group if N * G >= _FEW else 1  # of a task
    tasks = H // heads  # of a tile
    most = TILE if N >= _MANY else TILE // 2
    firsts = _tiles(sequences_N, lens_N, most if D in HEAD_SIZES else 1)
    tiles = len(firsts) - 1
    # A prompt is a cache of one block. Of one type with the other cache's, so that both are compiled once.
    slots_B1 = slots_B.astype(blocks_BM.dtype).reshape(len(slots_B), 1)
    for task in numba.prange(tiles * tasks):
        place, first = np.int64(task) // tasks, np.int64(task) % tasks * heads
        tile = from_ends(place, tiles) if in_order else place
        n, count = firsts[tile], firsts[tile + 1] - firsts[tile]
        g, R = first // group, count * heads
        b, T = np.int64(sequences_N[n]), np.int64(lens_N[n + count - 1])
        slot = np.int64(slots_B[b])
        K = np.int64(prompt_lens_S[slot])
        width = (max(T, K) + 2 * LANES) // LANES * LANES
        scores, weights = np.empty((R, width), np.float32), np.empty((R, width), q_NHD.dtype)
        total, prompt_total = np.zeros((R, D), np.float32), np.zeros((R, D), np.float32)
        share_R, prompt_share_R = np.empty(R, np.float32), np.zeros(R, np.float32)
        q_RD = _gather(q_NHD, n, first, R if count > 1 else 0, count)
        if K > 0:
            prefetch_rows(prompt_k_SKGD, slot, g)
            prefetch_rows(prompt_v_SKGD, slot, g)
        _score(q_NHD, n, first, q_RD, k_PsGD, v_PsGD, blocks_BM, b, g, T, scores)
        for r in range(R):
            seen = T - count + 1 + r // heads
            share_R[r] = np.float32(1) / exponentials(scores, r, seen, weights)
        _add(weights, v_PsGD, blocks_BM, b, g, T, total)
        if K > 0:
            _score(q_NHD, n, first, q_RD, prompt_k_SKGD, prompt_v_SKGD, slots_B1, b, g, K, scores)
            for r in range(R):
                prompt_share_R[r] = gate_SH[slot, first + r % heads] / exponentials(scores, r, K, weights)
            _add(weights, prompt_v_SKGD, slots_B1, b, g, K, prompt_total)
        for r in range(R):
            row, head = n + r // heads, first + r % heads
            for d in range(D):
                value = share_R[r] * total[r, d] + prompt_share_R[r] * prompt_total[r, d]
                out_NHD[row, head, d] = narrow(value, out_NHD[row, head, d])


def paged_attend(
    q_NHD: Tensor,
    k_PsGD: Tensor,
    v_PsGD: Tensor,
    blocks_BM: Any,
    sequences_N: Any,
    lens_N: Any,
    prompt_k_SKGD: Tensor,
    prompt_v_SKGD: Tensor,
    slots_B: Any,
    prompt_lens_S: Any,
    gate_SH: Any,
) -> Tensor:
    """Attention of N queries, their own keys and values already in the cache; [N, H, D] as q.

    Queries and caches are float32 or bfloat16, one layer's. Integer arrays are numpy's: a sequence's blocks,
    a row's sequence and how many positions it sees (its own included), a sequence's prompt slot, and rows
    per slot.
    """
    out_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
    attend(
        array(q_NHD.contiguous()),
        array(k_PsGD),
        array(v_PsGD),
        blocks_BM,
        sequences_N,
        lens_N,
        array(prompt_k_SKGD),
        array(prompt_v_SKGD),
        slots_B,
        prompt_lens_S,
        gate_SH,
        array(out_NHD),
        True,
    )
    return out_NHD
