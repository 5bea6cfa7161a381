"""Gated attention of single queries over the paged cache, compiled for the CPU by numba.

One task is one sequence and some query heads of one key/value head: it reads the sequence's blocks where
they lie (the cache is never gathered or copied), then the prompt's rows, and writes
softmax(qK)V + g·softmax(qK_a)V_a. Everything is accumulated in float32. A sequence's result does not depend
on its neighbours.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from models.kernels.scalars_cpu import SUPPORTED_DTYPES, array, exp, jit, narrow, parallel_jit, widen

__all__ = ["SUPPORTED_DTYPES", "attend_singles", "paged_decode"]

_FEW = 8  # tasks; where there are fewer of one per key/value head, each query head is one


@jit
def _softmax(scores_RT: Any, T: int) -> None:
    for r in range(scores_RT.shape[0]):
        top = scores_RT[r, 0]
        for t in range(1, T):
            if scores_RT[r, t] > top:
                top = scores_RT[r, t]
        total = np.float32(0)
        for t in range(T):
            scores_RT[r, t] = exp(scores_RT[r, t] - top)
        for t in range(T):
            total += scores_RT[r, t]
        inverse = np.float32(1) / total
        for t in range(T):
            scores_RT[r, t] *= inverse


@jit
def _dots(q_RD: Any, row_D: Any, scale: Any, scores_RT: Any, t: int) -> None:
    for r in range(q_RD.shape[0]):
        total = np.float32(0)
        for d in range(row_D.shape[0]):
            total += q_RD[r, d] * widen(row_D[d])
        scores_RT[r, t] = total * scale


@jit
def _accumulate(scores_RT: Any, t: int, row_D: Any, out_RD: Any) -> None:
    for r in range(out_RD.shape[0]):
        weight = scores_RT[r, t]
        for d in range(row_D.shape[0]):
            out_RD[r, d] += weight * widen(row_D[d])


@parallel_jit
def attend_singles(
    q_BHD: Any,
    k_PsGD: Any,
    v_PsGD: Any,
    blocks_BM: Any,
    lens_B: Any,
    prompt_k_SKGD: Any,
    prompt_v_SKGD: Any,
    slots_B: Any,
    prompt_lens_S: Any,
    gate_SH: Any,
    out_BHD: Any,
) -> None:
    """`paged_decode` on numpy's arrays, into `out_BHD`."""
    B, H, D = q_BHD.shape
    s, G = k_PsGD.shape[1], k_PsGD.shape[2]
    R = H // G if B * G >= _FEW else 1
    tasks_per_row = H // R
    heads_per_group = H // G
    scale = np.float32(1 / np.sqrt(D))
    for task in numba.prange(B * tasks_per_row):
        b, first = np.int64(task) // tasks_per_row, np.int64(task) % tasks_per_row * R
        g = first // heads_per_group
        T, slot = np.int64(lens_B[b]), np.int64(slots_B[b])
        K = np.int64(prompt_lens_S[slot])
        q_RD = np.empty((R, D), np.float32)
        for r in range(R):
            for d in range(D):
                q_RD[r, d] = widen(q_BHD[b, first + r, d])
        scores = np.empty((R, max(T, K)), np.float32)
        total = np.zeros((R, D), np.float32)
        for start in range(0, T, s):
            block = np.int64(blocks_BM[b, start // s])
            for t in range(start, min(start + s, T)):
                _dots(q_RD, k_PsGD[block, t - start, g], scale, scores, t)
        _softmax(scores, T)
        for start in range(0, T, s):
            block = np.int64(blocks_BM[b, start // s])
            for t in range(start, min(start + s, T)):
                _accumulate(scores, t, v_PsGD[block, t - start, g], total)
        if K > 0:
            for t in range(K):
                _dots(q_RD, prompt_k_SKGD[slot, t, g], scale, scores, t)
            _softmax(scores, K)
            for r in range(R):
                for t in range(K):
                    scores[r, t] *= gate_SH[slot, first + r]
            for t in range(K):
                _accumulate(scores, t, prompt_v_SKGD[slot, t, g], total)
        for r in range(R):
            for d in range(D):
                out_BHD[b, first + r, d] = narrow(total[r, d], out_BHD[b, first + r, d])


def paged_decode(
    q_BHD: Tensor,
    k_PsGD: Tensor,
    v_PsGD: Tensor,
    blocks_BM: Any,
    lens_B: Any,
    prompt_k_SKGD: Tensor,
    prompt_v_SKGD: Tensor,
    slots_B: Any,
    prompt_lens_S: Any,
    gate_SH: Any,
) -> Tensor:
    """Attention of one query per sequence, its own key and value already in the cache; [B, H, D] as q.

    Queries and caches are float32 or bfloat16, one layer's: P blocks of s positions. Integer arrays are
    numpy's (int32): a sequence's blocks, its length (the query included), its prompt slot, rows per slot.
    """
    out_BHD = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    attend_singles(
        array(q_BHD.contiguous()),
        array(k_PsGD),
        array(v_PsGD),
        blocks_BM,
        lens_B,
        array(prompt_k_SKGD),
        array(prompt_v_SKGD),
        slots_B,
        prompt_lens_S,
        gate_SH,
        array(out_BHD),
    )
    return out_BHD
