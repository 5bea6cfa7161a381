"""Fused gated attention of single queries over the paged cache, compiled for the CPU by numba.

One task is one sequence and one key/value head: it streams the sequence's blocks where they lie (the
cache is never gathered or copied), then the prompt's rows, and writes softmax(qK)V + g·softmax(qK_a)V_a.
Everything is accumulated in float32. A sequence's result does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

SUPPORTED_DTYPES = frozenset({torch.float32, torch.bfloat16})

_jit = numba.njit(fastmath=True, nogil=True, error_model="numpy", cache=True)


def _widen(row: Any, bits: Any) -> None:
    """Write a stored row's float32 bits; float32 as it is, bfloat16 as the upper half."""
    raise NotImplementedError  # compiled code takes `_widen_by_width`


@overload(_widen, jit_options={"cache": True})  # type: ignore[typeddict-unknown-key]
def _widen_by_width(row: Any, bits: Any) -> Callable[[Any, Any], None]:
    shift = 32 - row.dtype.bitwidth

    def widen(row: Any, bits: Any) -> None:
        for d in range(row.shape[0]):
            bits[d] = np.uint32(row[d]) << np.uint32(shift)

    return widen


@_jit
def _softmax(scores_RT: Any, T: int) -> None:
    for r in range(scores_RT.shape[0]):
        top = scores_RT[r, 0]
        for t in range(1, T):
            top = max(top, scores_RT[r, t])
        total = np.float32(0)
        for t in range(T):
            scores_RT[r, t] = np.exp(scores_RT[r, t] - top)
            total += scores_RT[r, t]
        for t in range(T):
            scores_RT[r, t] /= total


@_jit
def _dots(q_RD: Any, row_D: Any, scale: Any, scores_RT: Any, t: int) -> None:
    for r in range(q_RD.shape[0]):
        total = np.float32(0)
        for d in range(row_D.shape[0]):
            total += q_RD[r, d] * row_D[d]
        scores_RT[r, t] = total * scale


@_jit
def _accumulate(scores_RT: Any, t: int, row_D: Any, out_RD: Any) -> None:
    for r in range(out_RD.shape[0]):
        weight = scores_RT[r, t]
        for d in range(row_D.shape[0]):
            out_RD[r, d] += weight * row_D[d]


@numba.njit(parallel=True, fastmath=True, nogil=True, error_model="numpy", cache=True)
def _decode(
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
    B, H, D = q_BHD.shape
    block_size, G = k_PsGD.shape[1], k_PsGD.shape[2]
    R = H // G
    scale = np.float32(1 / np.sqrt(D))
    for task in numba.prange(B * G):
        b, g = task // G, task % G
        T, slot = lens_B[b], slots_B[b]
        K = prompt_lens_S[slot]
        q_RD = q_BHD[b, g * R : (g + 1) * R]
        bits = np.empty(D, np.uint32)
        row_D = bits.view(np.float32)
        scores = np.empty((R, max(T, K)), np.float32)
        total = np.zeros((R, D), np.float32)
        for t in range(T):
            _widen(k_PsGD[blocks_BM[b, t // block_size], t % block_size, g], bits)
            _dots(q_RD, row_D, scale, scores, t)
        _softmax(scores, T)
        for t in range(T):
            _widen(v_PsGD[blocks_BM[b, t // block_size], t % block_size, g], bits)
            _accumulate(scores, t, row_D, total)
        if K > 0:
            for t in range(K):
                _widen(prompt_k_SKGD[slot, t, g], bits)
                _dots(q_RD, row_D, scale, scores, t)
            _softmax(scores, K)
            for r in range(R):
                for t in range(K):
                    scores[r, t] *= gate_SH[slot, g * R + r]
            for t in range(K):
                _widen(prompt_v_SKGD[slot, t, g], bits)
                _accumulate(scores, t, row_D, total)
        out_BHD[b, g * R : (g + 1) * R] = total


def _array(x: Tensor) -> Any:
    """The tensor's memory as unsigned integers of its width; nothing is copied."""
    width = torch.uint32 if x.dtype == torch.float32 else torch.uint16
    return x.view(width).numpy()


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

    Caches are float32 or bfloat16, one layer's: P blocks of s positions. Integer arrays are numpy's
    (int32): a sequence's blocks, its length (the query included), its prompt slot, rows per slot.
    """
    out_BHD = torch.empty(q_BHD.shape, dtype=torch.float32)
    _decode(
        q_BHD.float().contiguous().numpy(),
        _array(k_PsGD),
        _array(v_PsGD),
        blocks_BM,
        lens_B,
        _array(prompt_k_SKGD),
        _array(prompt_v_SKGD),
        slots_B,
        prompt_lens_S,
        gate_SH,
        out_BHD.numpy(),
    )
    return out_BHD.to(q_BHD.dtype)
