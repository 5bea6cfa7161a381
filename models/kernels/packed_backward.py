"""Backward kernels of `models.kernels.packed`: one for queries, one for keys, one for the prompts.

Probabilities come from the scores and the forward pass's log sums, in powers of two (`scale` holds log₂e,
`plain_scale` does not). Rows behind a sequence's end are zeros in q and dO, so they add nothing.

Shapes: M rows, T keys, K prompt rows, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.kernels.packed_forward import load_rows
from models.kernels.tiles import product


@triton.jit
def backward_queries(
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
    grad_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    prompt_log_sum_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    prompt_delta_ptr: tl.tensor,
    scale: tl.tensor,
    plain_scale: tl.tensor,
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
    """dq of a tile of rows, and both δ of each row for the kernels that follow."""
    g, b = tl.program_id(0), tl.program_id(2)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
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
    places = flat[:, None] * (G * R * D) + heads[:, None] * D + dims[None, :]
    q_MD = tl.load(q_ptr + q_places, mask=there, other=0.0)
    grad_MD = tl.load(grad_ptr + places, mask=there, other=0.0)
    out_MD = tl.load(out_ptr + places, mask=there, other=0.0)
    of_rows = flat * (G * R) + heads

    slot = tl.load(slots_ptr + b)
    num_rows = tl.load(prompt_lens_ptr + slot)
    gate_M = tl.load(gate_ptr + slot * (G * R) + heads)
    log_sum_M = tl.load(prompt_log_sum_ptr + of_rows, mask=there_M, other=0.0)
    prompt = slot.to(tl.int64) * slot_stride + g * D
    delta_M = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_rows, BLOCK_K):
        k_KD = load_rows(prompt_k_ptr + prompt, 0, first, num_rows, G * D, D, BLOCK_K, BLOCK_D)
        v_KD = load_rows(prompt_v_ptr + prompt, 0, first, num_rows, G * D, D, BLOCK_K, BLOCK_D)
        seen_MK = (first + tl.arange(0, BLOCK_K) < num_rows)[None, :]
        scores_MK = tl.where(seen_MK, product(q_MD, tl.trans(k_KD)) * scale, float("-inf"))
        delta_M += tl.sum(tl.exp2(scores_MK - log_sum_M[:, None]) * product(grad_MD, tl.trans(v_KD)), 1)
    dq_MD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, num_rows, BLOCK_K):
        k_KD = load_rows(prompt_k_ptr + prompt, 0, first, num_rows, G * D, D, BLOCK_K, BLOCK_D)
        v_KD = load_rows(prompt_v_ptr + prompt, 0, first, num_rows, G * D, D, BLOCK_K, BLOCK_D)
        seen_MK = (first + tl.arange(0, BLOCK_K) < num_rows)[None, :]
        scores_MK = tl.where(seen_MK, product(q_MD, tl.trans(k_KD)) * scale, float("-inf"))
        p_MK = tl.exp2(scores_MK - log_sum_M[:, None]) * gate_M[:, None]
        ds_MK = p_MK * (product(grad_MD, tl.trans(v_KD)) - delta_M[:, None])
        dq_MD += product(ds_MK.to(k_KD.dtype), k_KD)
    tl.store(prompt_delta_ptr + of_rows, delta_M, mask=there_M)

    both_M = tl.sum(grad_MD.to(tl.float32) * out_MD.to(tl.float32), 1)
    delta_M = both_M - gate_M * delta_M
    tl.store(delta_ptr + of_rows, delta_M, mask=there_M)
    log_sum_M = tl.load(log_sum_ptr + of_rows, mask=there_M, other=0.0)
    end = tl.minimum((first_row + ROWS - 1) // R + 1, num_tokens)
    for first in range(0, end, BLOCK_T):
        k_TD = load_rows(k_ptr + g * D, start, first, num_tokens, k_stride, D, BLOCK_T, BLOCK_D)
        v_TD = load_rows(v_ptr + g * D, start, first, num_tokens, v_stride, D, BLOCK_T, BLOCK_D)
        seen_MT = (first + tl.arange(0, BLOCK_T))[None, :] <= token[:, None]
        scores_MT = tl.where(seen_MT, product(q_MD, tl.trans(k_TD)) * scale, float("-inf"))
        p_MT = tl.exp2(scores_MT - log_sum_M[:, None])
        ds_MT = p_MT * (product(grad_MD, tl.trans(v_TD)) - delta_M[:, None])
        dq_MD += product(ds_MT.to(k_TD.dtype), k_TD)
    tl.store(dq_ptr + places, dq_MD * plain_scale, mask=there)


@triton.jit
def backward_keys(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    scale: tl.tensor,
    plain_scale: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """dk and dv of a block of keys, over the rows of all tokens from its first on."""
    g, b = tl.program_id(0), tl.program_id(2)
    first_key = tl.program_id(1) * BLOCK_T  # the first ones are seen by the most rows
    start = tl.load(starts_ptr + b)
    num_tokens = tl.load(starts_ptr + b + 1) - start
    if first_key >= num_tokens:
        return
    t, dims = first_key + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    k_TD = load_rows(k_ptr + g * D, start, first_key, num_tokens, k_stride, D, BLOCK_T, BLOCK_D)
    v_TD = load_rows(v_ptr + g * D, start, first_key, num_tokens, v_stride, D, BLOCK_T, BLOCK_D)
    dk_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dv_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(first_key * R, num_tokens * R, ROWS):
        row = first + tl.arange(0, ROWS)
        token, heads = row // R, g * R + row % R
        there_M = token < num_tokens
        there = there_M[:, None] & (dims < D)[None, :]
        flat = (start + token).to(tl.int64)
        of_heads = heads[:, None] * D + dims[None, :]
        q_MD = tl.load(q_ptr + flat[:, None] * q_stride + of_heads, mask=there, other=0.0)
        grad_MD = tl.load(grad_ptr + flat[:, None] * (G * R * D) + of_heads, mask=there, other=0.0)
        log_sum_M = tl.load(log_sum_ptr + flat * (G * R) + heads, mask=there_M, other=0.0)
        delta_M = tl.load(delta_ptr + flat * (G * R) + heads, mask=there_M, other=0.0)
        seen_TM = t[:, None] <= token[None, :]
        scores_TM = tl.where(seen_TM, product(k_TD, tl.trans(q_MD)) * scale, float("-inf"))
        p_TM = tl.exp2(scores_TM - log_sum_M[None, :])
        dv_TD += product(p_TM.to(grad_MD.dtype), grad_MD)
        ds_TM = p_TM * (product(v_TD, tl.trans(grad_MD)) - delta_M[None, :])
        dk_TD += product(ds_TM.to(q_MD.dtype), q_MD)
    places = (start + t).to(tl.int64)[:, None] * (G * D) + g * D + dims[None, :]
    there = (t < num_tokens)[:, None] & (dims < D)[None, :]
    tl.store(dk_ptr + places, dk_TD * plain_scale, mask=there)
    tl.store(dv_ptr + places, dv_TD, mask=there)


@triton.jit
def backward_prompts(
    q_ptr: tl.tensor,
    prompt_k_ptr: tl.tensor,
    prompt_v_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    prompt_lens_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    prompt_log_sum_ptr: tl.tensor,
    prompt_delta_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    dgate_ptr: tl.tensor,
    scale: tl.tensor,
    plain_scale: tl.tensor,
    q_stride: tl.tensor,
    slot_stride: tl.tensor,
    room: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One sequence's and one query head's part of the prompts' gradients, and of the gate's.

    Parts are float32, [B, room, H, D] and [B, H], and zero where nothing is written.
    """
    h, b = tl.program_id(0), tl.program_id(1)
    first_row = tl.program_id(2) * BLOCK_K
    slot = tl.load(slots_ptr + b)
    num_rows = tl.load(prompt_lens_ptr + slot)
    if first_row >= num_rows:
        return
    start = tl.load(starts_ptr + b)
    num_tokens = tl.load(starts_ptr + b + 1) - start
    rows, dims = first_row + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    prompt = slot.to(tl.int64) * slot_stride + h // R * D
    k_KD = load_rows(prompt_k_ptr + prompt, 0, first_row, num_rows, G * D, D, BLOCK_K, BLOCK_D)
    v_KD = load_rows(prompt_v_ptr + prompt, 0, first_row, num_rows, G * D, D, BLOCK_K, BLOCK_D)
    gate = tl.load(gate_ptr + slot * (G * R) + h)
    dk_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dgate_M = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_tokens, ROWS):
        t = first + tl.arange(0, ROWS)
        of_tokens = (start + t).to(tl.int64) * (G * R) + h
        q_MD = load_rows(q_ptr + h * D, start, first, num_tokens, q_stride, D, ROWS, BLOCK_D)
        grad_MD = load_rows(grad_ptr + h * D, start, first, num_tokens, G * R * D, D, ROWS, BLOCK_D)
        log_sum_M = tl.load(prompt_log_sum_ptr + of_tokens, mask=t < num_tokens, other=0.0)
        delta_M = tl.load(prompt_delta_ptr + of_tokens, mask=t < num_tokens, other=0.0)
        scores_KM = tl.where((rows < num_rows)[:, None], product(k_KD, tl.trans(q_MD)) * scale, float("-inf"))
        p_KM = tl.exp2(scores_KM - log_sum_M[None, :]) * gate
        dv_KD += product(p_KM.to(grad_MD.dtype), grad_MD)
        ds_KM = p_KM * (product(v_KD, tl.trans(grad_MD)) - delta_M[None, :])
        dk_KD += product(ds_KM.to(q_MD.dtype), q_MD)
        dgate_M += delta_M
    part = b.to(tl.int64) * room * (G * R * D) + h * D
    places = part + rows[:, None] * (G * R * D) + dims[None, :]
    there = (rows < num_rows)[:, None] & (dims < D)[None, :]
    tl.store(dk_ptr + places, dk_KD * plain_scale, mask=there)
    tl.store(dv_ptr + places, dv_KD, mask=there)
    if first_row == 0:
        tl.store(dgate_ptr + b * (G * R) + h, tl.sum(dgate_M, 0))
