"""Forward kernel of `models.kernels.packed`: a tile of rows against its sequence's keys and the prompts.

A row is one token and one of the R query heads that share a key/value head.

Shapes: M rows, T keys, D head size.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from models.kernels.tiles import empty_tile, log_sum, mean, see, see_prompts


@triton.jit
def load_rows(
    ptr: tl.tensor,
    start: tl.tensor,
    first: tl.tensor,
    num_tokens: tl.tensor,
    stride: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> Any:
    """One head of the tokens `first` … `first + ROWS - 1` of a sequence; zeros behind its end."""
    t, dims = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    places = (start + t).to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(ptr + places, mask=(t < num_tokens)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def forward(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    prompt_k_ptr: tl.tensor,
    prompt_v_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    prompt_lens_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    out_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    prompt_log_sum_ptr: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    slot_stride: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    g, b = tl.program_id(0), tl.program_id(2)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # the longest first
    start = tl.load(starts_ptr + b)
    num_tokens = tl.load(starts_ptr + b + 1) - start
    if first_row >= num_tokens * R:
        return
    row, dims = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token, heads = row // R, g * R + row % R
    there_M = token < num_tokens
    there = there_M[:, None] & (dims < D)[None, :]
    flat = (start + token).to(tl.int64)
    q_places = flat[:, None] * q_stride + heads[:, None] * D + dims[None, :]
    q_MD = tl.load(q_ptr + q_places, mask=there, other=0.0)

    acc_MD, top_M, sum_M = empty_tile(ROWS, BLOCK_D)
    end = tl.minimum((first_row + ROWS - 1) // R + 1, num_tokens)
    for first in range(0, end, BLOCK_T):
        k_TD = load_rows(k_ptr + g * D, start, first, num_tokens, k_stride, D, BLOCK_T, BLOCK_D)
        v_TD = load_rows(v_ptr + g * D, start, first, num_tokens, v_stride, D, BLOCK_T, BLOCK_D)
        seen_MT = (first + tl.arange(0, BLOCK_T))[None, :] <= token[:, None]
        acc_MD, top_M, sum_M = see(q_MD, k_TD, v_TD, seen_MT, scale, acc_MD, top_M, sum_M)
    out_MD = mean(acc_MD, sum_M)
    tl.store(log_sum_ptr + flat * (G * R) + heads, log_sum(top_M, sum_M), mask=there_M)

    slot = tl.load(slots_ptr + b)
    place = slot.to(tl.int64) * slot_stride + g * D
    num_rows = tl.load(prompt_lens_ptr + slot)
    acc_MD, top_M, sum_M = see_prompts(
        q_MD, prompt_k_ptr + place, prompt_v_ptr + place, num_rows, G * D, scale, D, ROWS, BLOCK_D, BLOCK_K
    )
    gate_M = tl.load(gate_ptr + slot * (G * R) + heads)
    out_MD += mean(acc_MD, sum_M) * gate_M[:, None]
    tl.store(prompt_log_sum_ptr + flat * (G * R) + heads, log_sum(top_M, sum_M), mask=there_M)
    places = flat[:, None] * (G * R * D) + heads[:, None] * D + dims[None, :]
    tl.store(out_ptr + places, out_MD, mask=there)
