"""Fused gated attention of single queries over the paged cache, in Triton: the GPU's `paged_cpu`.

A program is one sequence and one key/value head: the head's R queries share each load of a key and a
value. Where there are too few of those to fill the GPU, a sequence's keys are split among several
programs, one more sees the prompts, and a second kernel adds the parts up.

Shapes: B sequences, H query heads, G key/value heads, R = H / G, D head size, P blocks of s positions,
M blocks of the longest sequence, S prompt slots, K prompt rows, X splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.tiles import (
    BLOCK_K,
    LOG2_E,
    SMALLEST_TILE,
    assert_paged,
    block_dim,
    empty_tile,
    log_sum,
    mean,
    see,
    see_prompts,
)

_SHORTEST_SPLIT = 256  # positions: the sums of a shorter one would cost more than a hundredth of its keys
_MOST_SPLITS = 64
_PROGRAMS_PER_SM = 4  # enough loads under way on each multiprocessor to keep the memory busy


@triton.jit(
    do_not_specialize=["num_splits", "blocks_stride"],
    # Parts of larger tensors, a layer's or a step's: aligned or not, one variant is compiled.
    do_not_specialize_on_alignment=["blocks_ptr", "lens_ptr", "slots_ptr", "prompt_lens_ptr", "gate_ptr"],
)
def _decode(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    prompt_k_ptr: tl.tensor,
    prompt_v_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    prompt_lens_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    scale: tl.tensor,
    num_splits: tl.tensor,
    q_stride: tl.tensor,
    blocks_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    g, b, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    heads = g * R + r
    there = (r < R)[:, None] & (dims < D)[None, :]
    q_places = b.to(tl.int64) * q_stride + heads[:, None] * D + dims[None, :]
    q_RD = tl.load(q_ptr + q_places, mask=there, other=0.0)
    acc_RD, top_R, sum_R = empty_tile(ROWS, BLOCK_D)

    if split < num_splits:
        length = tl.load(lens_ptr + b)
        part = tl.cdiv(length, num_splits * BLOCK_T) * BLOCK_T
        end = tl.minimum(split * part + part, length)
        for first in range(split * part, end, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            block = tl.load(blocks_ptr + b * blocks_stride + t // PAGE, mask=t < end, other=0)
            rows = block.to(tl.int64) * block_stride + (t % PAGE) * (G * D) + g * D
            known = (t < end)[:, None] & (dims < D)[None, :]
            k_TD = tl.load(k_ptr + rows[:, None] + dims[None, :], mask=known, other=0.0)
            v_TD = tl.load(v_ptr + rows[:, None] + dims[None, :], mask=known, other=0.0)
            acc_RD, top_R, sum_R = see(q_RD, k_TD, v_TD, (t < end)[None, :], scale, acc_RD, top_R, sum_R)
    out_RD = mean(acc_RD, sum_R)

    if split == tl.num_programs(2) - 1:  # the only program, or one more than there are splits
        slot = tl.load(slots_ptr + b)
        place = slot.to(tl.int64) * slot_stride + g * D
        num_rows = tl.load(prompt_lens_ptr + slot)
        prompt_RD, _top_R, prompt_sum_R = see_prompts(
            q_RD,
            prompt_k_ptr + place,
            prompt_v_ptr + place,
            num_rows,
            G * D,
            scale,
            D,
            ROWS,
            BLOCK_D,
            BLOCK_K,
        )
        gate_R = tl.load(gate_ptr + slot * (G * R) + heads, mask=r < R, other=0.0)
        out_RD += mean(prompt_RD, prompt_sum_R) * gate_R[:, None]

    if SPLIT:
        row = b.to(tl.int64) * (G * R) + heads
        places = (row * (num_splits + 1) + split)[:, None] * D + dims[None, :]
        tl.store(part_ptr + places, out_RD, mask=there)
        if split < num_splits:
            tl.store(log_sum_ptr + row * num_splits + split, log_sum(top_R, sum_R), mask=r < R)
    else:
        places = b.to(tl.int64) * (G * R * D) + heads[:, None] * D + dims[None, :]
        tl.store(out_ptr + places, out_RD, mask=there)


@triton.jit(do_not_specialize=["num_splits"])
def _add_up(
    part_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_splits: tl.tensor,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One query head: the splits' means, weighted by their sums, and the prompts' part as it is."""
    row = tl.program_id(0).to(tl.int64)
    x, dims = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_D)
    log_sum_X = tl.load(log_sum_ptr + row * num_splits + x, mask=x < num_splits, other=float("-inf"))
    top = tl.max(log_sum_X, 0)
    weight_X = tl.exp2(log_sum_X - tl.where(top > float("-inf"), top, 0.0))  # no keys at all: no weights
    total = tl.sum(weight_X, 0)
    parts = part_ptr + row * (num_splits + 1) * D
    there = (x < num_splits)[:, None] & (dims < D)[None, :]
    part_XD = tl.load(parts + x[:, None] * D + dims[None, :], mask=there, other=0.0)
    out_D = tl.sum(part_XD * weight_X[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_D += tl.load(parts + num_splits * D + dims, mask=dims < D, other=0.0)
    tl.store(out_ptr + row * D + dims, out_D, mask=dims < D)


def paged_decode(
    q_BHD: Tensor,
    k_PsGD: Tensor,
    v_PsGD: Tensor,
    blocks_BM: Tensor,
    lens_B: Tensor,
    prompt_k_SKGD: Tensor,
    prompt_v_SKGD: Tensor,
    slots_B: Tensor,
    prompt_lens_S: Tensor,
    gate_SH: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of one query per sequence, its own key and value already in the cache; [B, H, D] as q.

    Everything lies on the device, integers as int32. A sequence of length 0 sees its prompts alone.
    `num_splits`, at most 64: default by the shapes.
    """
    (B, H, D), (page, G), M = q_BHD.shape, k_PsGD.shape[1:3], blocks_BM.shape[1]
    assert_paged(
        q_BHD,
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
    assert lens_B.shape[0] == B
    X = num_splits or _num_splits(B * G, M * page, q_BHD.device)
    assert 1 <= X <= _MOST_SPLITS
    out_BHD = q_BHD.new_empty(B, H, D)
    parts = X + 1 if X > 1 else 0  # the prompts' is the last
    part_BHXD = torch.empty(B, H, parts, D, dtype=torch.float32, device=q_BHD.device)
    log_sum_BHX = torch.empty(B, H, X, dtype=torch.float32, device=q_BHD.device)
    block_d = block_dim(D)
    _decode[(G, B, parts or 1)](
        q_BHD,
        k_PsGD,
        v_PsGD,
        blocks_BM,
        lens_B,
        prompt_k_SKGD,
        prompt_v_SKGD,
        slots_B,
        prompt_lens_S,
        gate_SH,
        out_BHD,
        part_BHXD,
        log_sum_BHX,
        D**-0.5 * LOG2_E,
        X,
        q_BHD.stride(0),
        blocks_BM.stride(0),
        k_PsGD.stride(0),
        prompt_k_SKGD.stride(0),
        G=G,
        R=H // G,
        D=D,
        PAGE=page,
        SPLIT=X > 1,
        ROWS=max(SMALLEST_TILE, triton.next_power_of_2(H // G)),
        BLOCK_T=_block_keys(block_d, q_BHD.element_size()),
        BLOCK_K=BLOCK_K,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=2,
    )
    if parts:
        _add_up[(B * H,)](
            part_BHXD, log_sum_BHX, out_BHD, X, D=D, BLOCK_X=_MOST_SPLITS, BLOCK_D=block_d, num_warps=4
        )
    return out_BHD


def _num_splits(num_programs: int, longest: int, device: torch.device) -> int:
    """By what is known without asking the device: a context's end is not, so the longest counts for all."""
    if device.type != "cuda":
        return 1
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = _PROGRAMS_PER_SM * multiprocessors // num_programs
    return max(1, min(wanted, longest // _SHORTEST_SPLIT, _MOST_SPLITS))


def _block_keys(block_d: int, width: int) -> int:
    """Keys at once: 16 KiB of them and as much of values, twice since the next block is loaded meanwhile."""
    return max(SMALLEST_TILE, min(128, 16384 // (block_d * width)))
