"""Gated attention over the paged cache, compiled for the CPU by numba.

Each row is the query of one position, which sees its sequence up to itself: decodes and prompts' chunks are
the same. One task is a row and some query heads of one key/value head. It reads the sequence's blocks where
they lie (the cache is never gathered or copied), then the prompt's rows, and writes
softmax(qK)V + g·softmax(qK_a)V_a. Everything is accumulated in float32, and a row's result does not depend on
the other rows.

Shapes: N rows, B sequences, M blocks of the longest, P blocks of s positions, T positions, H query heads, G
key/value heads, R heads of a task, D head size, S prompt slots, K prompt rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from models.kernels.rows_cpu import HEAD_STEP, add_rows, prefetch_rows, score_rows
from models.kernels.scalars_cpu import (
    SUPPORTED_DTYPES,
    array,
    inlined_jit,
    narrow,
    parallel_jit,
    widen,
)
from models.kernels.softmax_cpu import softmax
from models.kernels.tile_cpu import LANES

__all__ = ["SUPPORTED_DTYPES", "add_block", "attend", "paged_attend"]

_FEW = 8  # tasks; where there are fewer of one per key/value head, each query head is one


@inlined_jit
def _score(
    q_NHD: Any, n: int, h: int, k_PsGD: Any, p: int, g: int, count: int, scale: Any, scores_RT: Any, at: int
) -> None:
    """As `score_rows` from the block's first row, of any head size."""
    D = q_NHD.shape[2]
    if D % HEAD_STEP == 0:
        score_rows(q_NHD, n, h, k_PsGD, p, 0, g, count, scale, scores_RT, at)
    else:
        for r in range(scores_RT.shape[0]):
            for i in range(count):
                total = np.float32(0)
                for d in range(D):
                    total += widen(q_NHD[n, h + r, d]) * widen(k_PsGD[p, i, g, d])
                scores_RT[r, at + i] = total * scale


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
                    out_RD[r, d] += weights_RT[r, at + i] * widen(v_PsGD[p, i, g, d])


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
) -> None:
    """Row n sees the first `lens_N[n]` positions of sequence `sequences_N[n]`, and the prompt in its slot."""
    N, H, D = q_NHD.shape
    s, G = k_PsGD.shape[1], k_PsGD.shape[2]
    group = H // G
    R = group if N * G >= _FEW else 1
    tasks = H // R  # of a row
    scale = np.float32(1 / np.sqrt(D))
    for task in numba.prange(N * tasks):
        # Rows from both ends in turn: threads take runs of tasks, and a chunk's later rows see more.
        place, first = np.int64(task) // tasks, np.int64(task) % tasks * R
        n = place // 2 if place % 2 == 0 else N - 1 - place // 2
        g = first // group
        b, T = np.int64(sequences_N[n]), np.int64(lens_N[n])
        slot = np.int64(slots_B[b])
        K = np.int64(prompt_lens_S[slot])
        scores = np.empty((R, (max(T, K) + 2 * LANES) // LANES * LANES), np.float32)
        total = np.zeros((R, D), np.float32)
        if K > 0:
            prefetch_rows(prompt_k_SKGD, slot, g)
            prefetch_rows(prompt_v_SKGD, slot, g)
        for start in range(0, T, s):
            block = np.int64(blocks_BM[b, start // s])
            prefetch_rows(v_PsGD, block, g)
            _score(q_NHD, n, first, k_PsGD, block, g, min(s, T - start), scale, scores, start)
        for r in range(R):
            softmax(scores, r, T, np.float32(1))
        for start in range(0, T, s):
            add_block(scores, start, v_PsGD, np.int64(blocks_BM[b, start // s]), g, min(s, T - start), total)
        if K > 0:
            _score(q_NHD, n, first, prompt_k_SKGD, slot, g, K, scale, scores, 0)
            for r in range(R):
                softmax(scores, r, K, gate_SH[slot, first + r])
            add_block(scores, 0, prompt_v_SKGD, slot, g, K, total)
        for r in range(R):
            for d in range(D):
                out_NHD[n, first + r, d] = narrow(total[r, d], out_NHD[n, first + r, d])


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
    )
    return out_NHD
