"""Gated attention of prompts' chunks over the paged cache, in Triton: many sequences, flat tokens.

A program is one sequence, one key/value head and one tile of rows; a row is one token and one of the R
query heads that read this head, so that a group's heads share each load whatever R is. Keys that all of
a tile's tokens see come first and need no mask, those around the diagonal follow.

Shapes: N tokens, B sequences, H query heads, G key/value heads, R = H / G, D head size, P blocks of s
positions, M blocks of the longest sequence, S prompt slots, K prompt rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.tiles import (
    BLOCK_K,
    LOG2_E,
    assert_paged,
    block_dim,
    empty_tile,
    mean,
    see,
    see_prompts,
)


@triton.jit
def _see_pages(
    q_MD: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    position_M: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    block_stride: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    acc_MD: tl.tensor,
    top_M: tl.tensor,
    sum_M: tl.tensor,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:
    """The tile after the positions from `first` to `end`, of which there are whole blocks unless MASKED."""
    dims = tl.arange(0, BLOCK_D)
    for block_first in range(first, end, BLOCK_T):
        t = block_first + tl.arange(0, BLOCK_T)
        if MASKED:
            block = tl.load(blocks_ptr + t // PAGE, mask=t < end, other=0)
            known = (t < end)[:, None] & (dims < D)[None, :]
            seen_MT = t[None, :] <= position_M[:, None]
        else:
            block = tl.load(blocks_ptr + t // PAGE)
            known = (dims < D)[None, :]
            seen_MT = (t >= 0)[None, :]
        rows = block.to(tl.int64) * block_stride + (t % PAGE) * row_stride
        k_TD = tl.load(k_ptr + rows[:, None] + dims[None, :], mask=known, other=0.0)
        v_TD = tl.load(v_ptr + rows[:, None] + dims[None, :], mask=known, other=0.0)
        acc_MD, top_M, sum_M = see(q_MD, k_TD, v_TD, seen_MT, scale, acc_MD, top_M, sum_M)
    return acc_MD, top_M, sum_M


@triton.jit(
    do_not_specialize=["blocks_stride"],
    do_not_specialize_on_alignment=[
        "blocks_ptr",
        "starts_ptr",
        "lens_ptr",
        "slots_ptr",
        "prompt_lens_ptr",
        "gate_ptr",
    ],
)
def _prefill(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    prompt_k_ptr: tl.tensor,
    prompt_v_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    prompt_lens_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    blocks_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    g, b = tl.program_id(0), tl.program_id(2)
    # The last tokens see the most keys: they begin first, so that no long tile is left over at the end.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    start = tl.load(starts_ptr + b)
    num_tokens = tl.load(starts_ptr + b + 1) - start
    if first_row >= num_tokens * R:
        return
    length = tl.load(lens_ptr + b)
    context = length - num_tokens

    row, dims = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token, heads = row // R, g * R + row % R
    there = (token < num_tokens)[:, None] & (dims < D)[None, :]
    flat = (start + token).to(tl.int64)
    q_places = flat[:, None] * q_stride + heads[:, None] * D + dims[None, :]
    q_MD = tl.load(q_ptr + q_places, mask=there, other=0.0)

    acc_MD, top_M, sum_M = empty_tile(ROWS, BLOCK_D)
    position_M = context + token
    end = tl.minimum(context + (first_row + ROWS - 1) // R + 1, length)
    seen_by_all = (context + first_row // R + 1) // BLOCK_T * BLOCK_T
    k_head, v_head, own_blocks = k_ptr + g * D, v_ptr + g * D, blocks_ptr + b * blocks_stride
    acc_MD, top_M, sum_M = _see_pages(
        q_MD, k_head, v_head, own_blocks, position_M, 0, seen_by_all, block_stride, G * D, scale,
        acc_MD, top_M, sum_M, D, PAGE, BLOCK_T, BLOCK_D, False,
    )  # fmt: skip
    acc_MD, top_M, sum_M = _see_pages(
        q_MD, k_head, v_head, own_blocks, position_M, seen_by_all, end, block_stride, G * D, scale,
        acc_MD, top_M, sum_M, D, PAGE, BLOCK_T, BLOCK_D, True,
    )  # fmt: skip
    out_MD = mean(acc_MD, sum_M)

    slot = tl.load(slots_ptr + b)
    place = slot.to(tl.int64) * slot_stride + g * D
    num_rows = tl.load(prompt_lens_ptr + slot)
    prompt_MD, _top_M, prompt_sum_M = see_prompts(
        q_MD, prompt_k_ptr + place, prompt_v_ptr + place, num_rows, G * D, scale, D, ROWS, BLOCK_D, BLOCK_K
    )
    gate_M = tl.load(gate_ptr + slot * (G * R) + heads)
    out_MD += mean(prompt_MD, prompt_sum_M) * gate_M[:, None]
    places = flat[:, None] * (G * R * D) + heads[:, None] * D + dims[None, :]
    tl.store(out_ptr + places, out_MD, mask=there)


def paged_prefill(
    q_NHD: Tensor,
    k_PsGD: Tensor,
    v_PsGD: Tensor,
    blocks_BM: Tensor,
    starts: Tensor,
    lens_B: Tensor,
    longest: int,
    prompt_k_SKGD: Tensor,
    prompt_v_SKGD: Tensor,
    slots_B: Tensor,
    prompt_lens_S: Tensor,
    gate_SH: Tensor,
) -> Tensor:
    """Attention of chunks whose keys and values are in the cache already; [N, H, D] as q.

    Sequence b has the tokens `starts[b]:starts[b + 1]` of q, the last of its `lens_B[b]` positions; each
    sees itself, what came before, and all prompt rows. `longest`: tokens of the longest chunk, which the
    host knows. All else lies on the device, integers as int32.
    """
    H, D = q_NHD.shape[1:]
    page, G = k_PsGD.shape[1:3]
    R = H // G
    assert_paged(
        q_NHD,
        k_PsGD,
        v_PsGD,
        blocks_BM,
        lens_B,
        prompt_k_SKGD,
        prompt_v_SKGD,
        slots_B,
        prompt_lens_S,
        gate_SH,
    )
    assert starts.dtype == torch.int32
    assert starts.shape == (lens_B.shape[0] + 1,)
    assert 0 < longest <= q_NHD.shape[0]
    out_NHD = q_NHD.new_empty(q_NHD.shape)
    block_d = block_dim(D)
    rows, block_t, warps = _tile(longest * R, block_d, q_NHD.element_size())
    _prefill[(G, triton.cdiv(longest * R, rows), lens_B.shape[0])](
        q_NHD,
        k_PsGD,
        v_PsGD,
        blocks_BM,
        starts,
        lens_B,
        prompt_k_SKGD,
        prompt_v_SKGD,
        slots_B,
        prompt_lens_S,
        gate_SH,
        out_NHD,
        D**-0.5 * LOG2_E,
        q_NHD.stride(0),
        blocks_BM.stride(0),
        k_PsGD.stride(0),
        prompt_k_SKGD.stride(0),
        G=G,
        R=R,
        D=D,
        PAGE=page,
        ROWS=rows,
        BLOCK_T=block_t,
        BLOCK_K=BLOCK_K,
        BLOCK_D=block_d,
        num_warps=warps,
        num_stages=2,
    )
    return out_NHD


def _tile(rows: int, block_d: int, width: int) -> tuple[int, int, int]:
    """Rows, keys at once, and warps. Float32 has no tensor cores here and twice the bytes: small tiles.

    Two sizes at most: each is compiled when it is first met.
    """
    if width == 4 or block_d > 128:
        return 32, 32, 4
    return (128, 64, 8) if rows > 512 else (64, 64, 4)  # a short chunk makes more tiles of the smaller one
