"""What the attention kernels share: one step of the online softmax, and the gated prompts.

A tile is M rows of queries that read the same key/value head, times a block of keys. Scores are
float32 in powers of two (`scale` holds log₂e: a GPU has exp2, not exp), and a tile keeps for each row
the largest score so far, the sum of exp2(score − largest), and the sum weighted by the values.

Shapes: M rows, T keys of a block, D head size, padded to BLOCK_D, a power of two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.choice import TRITON_DTYPES, TRITON_HEAD_DIM

LOG2_E = math.log2(math.e)
BLOCK_K = 32  # prompt rows at once: 10 and 20 are usual; one size, so that one variant is compiled
SMALLEST_TILE = 16  # of each side of a product that tensor cores compute
# The interpreter keeps bfloat16 as integers and would multiply those.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def block_dim(head_dim: int) -> int:
    assert head_dim <= TRITON_HEAD_DIM
    return max(SMALLEST_TILE, int(triton.next_power_of_2(head_dim)))


def assert_heads(*tensors: Tensor) -> None:
    """Rows may be apart, as parts of a larger product are; a row's heads are one after another."""
    for x in tensors:
        assert x.dtype in TRITON_DTYPES
        assert x.stride(-1) == 1 or x.shape[-1] == 1, f"heads of strides {x.stride()}"
        assert x.stride(-2) == x.shape[-1] or x.shape[-2] == 1, f"heads of strides {x.stride()}"


@triton.jit
def empty_tile(ROWS: tl.constexpr, BLOCK_D: tl.constexpr) -> Any:
    """A tile that has seen no key."""
    acc_MD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top_M = tl.full([ROWS], float("-inf"), tl.float32)
    return acc_MD, top_M, tl.zeros([ROWS], tl.float32)


@triton.jit
def product(a: tl.tensor, b: tl.tensor) -> Any:
    """a·b with sums in float32. "ieee": float32 as it is, where a GPU would take the 10 bits of TF32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def see(
    q_MD: tl.tensor,
    k_TD: tl.tensor,
    v_TD: tl.tensor,
    seen_MT: tl.tensor,
    scale: tl.tensor,
    acc_MD: tl.tensor,
    top_M: tl.tensor,
    sum_M: tl.tensor,
) -> Any:
    """The tile after one more block of keys. Every row must have seen a key by the end of its first block."""
    scores_MT = product(q_MD, tl.trans(k_TD)) * scale
    scores_MT = tl.where(seen_MT, scores_MT, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(scores_MT, 1))
    p_MT = tl.exp2(scores_MT - new_top_M[:, None])
    shrink_M = tl.exp2(top_M - new_top_M)
    sum_M = sum_M * shrink_M + tl.sum(p_MT, 1)
    acc_MD = acc_MD * shrink_M[:, None] + product(p_MT.to(v_TD.dtype), v_TD)
    return acc_MD, new_top_M, sum_M


@triton.jit
def see_prompts(
    q_MD: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """A tile that has seen all prompt rows of one slot and head, of which there may be none."""
    dims = tl.arange(0, BLOCK_D)
    acc_MD, top_M, sum_M = empty_tile(ROWS, BLOCK_D)
    for first in range(0, num_rows, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        there = (rows < num_rows)[:, None] & (dims < D)[None, :]
        places = rows[:, None] * row_stride + dims[None, :]
        k_KD = tl.load(k_ptr + places, mask=there, other=0.0)
        v_KD = tl.load(v_ptr + places, mask=there, other=0.0)
        seen_MK = (rows < num_rows)[None, :]
        acc_MD, top_M, sum_M = see(q_MD, k_KD, v_KD, seen_MK, scale, acc_MD, top_M, sum_M)
    return acc_MD, top_M, sum_M


@triton.jit
def mean(acc_MD: tl.tensor, sum_M: tl.tensor) -> Any:
    """The softmax's weighted mean of the values; zero of nothing."""
    return acc_MD / tl.where(sum_M > 0, sum_M, 1.0)[:, None]


@triton.jit
def log_sum(top_M: tl.tensor, sum_M: tl.tensor) -> Any:
    """log₂ Σ exp2(score); minus infinity of nothing."""
    return top_M + tl.log2(tl.where(sum_M > 0, sum_M, 1.0))


def assert_paged(
    q_NHD: Tensor,
    k_PsGD: Tensor,
    v_PsGD: Tensor,
    blocks_BM: Tensor,
    lens_B: Tensor,
    prompt_k_SKGD: Tensor,
    prompt_v_SKGD: Tensor,
    slots_B: Tensor,
    prompt_lens_S: Tensor,
    gate_SH: Tensor,
) -> None:
    """The arguments that decode and prefill share fit each other. What they hold is not read."""
    (H, D), G, B = q_NHD.shape[1:], k_PsGD.shape[2], lens_B.shape[0]
    S, K = prompt_k_SKGD.shape[:2]
    assert k_PsGD.shape == v_PsGD.shape
    assert k_PsGD.shape[3] == D
    assert H % G == 0
    assert prompt_k_SKGD.shape == prompt_v_SKGD.shape == (S, K, G, D)
    assert gate_SH.shape == (S, H)
    assert gate_SH.dtype == torch.float32
    assert prompt_lens_S.shape == (S,)
    assert blocks_BM.shape[0] == slots_B.shape[0] == B
    assert blocks_BM.stride(1) == 1
    assert_heads(q_NHD)
    for x in (k_PsGD, v_PsGD, prompt_k_SKGD, prompt_v_SKGD):
        assert x.dtype == q_NHD.dtype
    for x in (k_PsGD, v_PsGD, prompt_k_SKGD, prompt_v_SKGD, gate_SH, lens_B, slots_B, prompt_lens_S):
        assert x.is_contiguous()
    for x in (blocks_BM, lens_B, slots_B, prompt_lens_S):
        assert x.dtype == torch.int32
