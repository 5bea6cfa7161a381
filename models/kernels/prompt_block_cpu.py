"""Gated attention to prompts that lie in blocks of vLLM's KV cache, compiled for the CPU by numba.

vLLM's vector kernels keep a block's keys by column, [D, s], and its values by row, [s, D]. A query's row of
scores is then one vector or two, summed over D, and of the values only the prompt's rows are read. One thread
does all: a step's rows take microseconds, and a second pool of threads would wait for vLLM's.

Shapes: N tokens of a step, H query heads, G key/value heads, D head size, P blocks of s positions,
S adapter slots, F facts of a slot, R query heads of one key/value head, T columns of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils

from models.kernels.paged_cpu import add_block
from models.kernels.rows_cpu import address, load, prefetch, widened
from models.kernels.scalars_cpu import inlined_jit, intrinsic, jit, narrow, widen
from models.kernels.softmax_cpu import softmax
from models.kernels.tile_cpu import I32, I64, LANES, VF32, broadcast, fma

_LINE = 64  # bytes of memory that are fetched at once


def _score(heads: int) -> Callable[..., None]:
    """`_score_columns` for so many heads, whose sums stay in registers."""

    @intrinsic
    def score(typing: Any, q_RD: Any, r: Any, k_PGDs: Any, p: Any, g: Any, at: Any, scores_RT: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            q, k, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2, 6))
            rows = [b.add(args[1], ir.Constant(I64, i)) for i in range(heads)]
            first = [address(b, q, row) for row in rows]
            column, stride = address(b, k, *args[3:5]), cgutils.unpack_tuple(b, k.strides)[2]
            column = b.add(column, b.mul(args[5], ir.Constant(I64, kinds[2].dtype.bitwidth // 8)))
            sums = [[cgutils.alloca_once(b, VF32) for _ in range(2)] for _ in range(heads)]
            for places in sums:  # two of each: one would wait for itself
                for place in places:
                    b.store(ir.Constant(VF32, None), place)
            D = cgutils.unpack_tuple(b, q.shape)[1]
            with cgutils.for_range(b, b.udiv(D, ir.Constant(I64, 2)), intp=I64) as loop:
                for half in range(2):
                    d = b.add(b.mul(loop.index, ir.Constant(I64, 2)), ir.Constant(I64, half))
                    keys = widened(b, b.add(column, b.mul(d, stride)), kinds[2].dtype)
                    for q_row, places in zip(first, sums, strict=True):
                        number = load(b, b.add(q_row, b.mul(d, ir.Constant(I64, 4))), I32)
                        weight = b.bitcast(broadcast(b, number), VF32)
                        b.store(fma(b, weight, keys, b.load(places[half])), places[half])
            for row, places in zip(rows, sums, strict=True):
                place = b.inttoptr(address(b, out, row, args[5]), VF32.as_pointer())
                b.store(b.fadd(b.load(places[0]), b.load(places[1])), place, align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(q_RD, i, k_PGDs, i, i, i, scores_RT), build

    made: Callable[..., None] = score
    return made


_score_4, _score_3, _score_2, _score_1 = (_score(heads) for heads in (4, 3, 2, 1))


@inlined_jit
def _score_columns(q_RD: Any, k_PGDs: Any, p: int, g: int, count: int, scores_RT: Any) -> None:
    """scores[r, i] = q[r] · k[p, g, :, i] over `count` columns, for every r.

    What follows the last of them, up to a multiple of LANES, is written too, and means nothing.
    """
    R = q_RD.shape[0]
    for at in range(0, count, LANES):
        r = 0
        while r < R:
            left = R - r
            if left >= 4:
                _score_4(q_RD, r, k_PGDs, p, g, at, scores_RT)
            elif left == 3:
                _score_3(q_RD, r, k_PGDs, p, g, at, scores_RT)
            elif left == 2:
                _score_2(q_RD, r, k_PGDs, p, g, at, scores_RT)
            else:
                _score_1(q_RD, r, k_PGDs, p, g, at, scores_RT)
            r += min(left, 4)


@intrinsic
def _prefetch(typing: Any, k_PGDs: Any, p: Any, g: Any, count: Any) -> Any:
    """Ask for a block's keys of one head, and for the first `count` rows of its values, right behind."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        k = context.make_array(signature.args[0])(context, b, args[0])
        first, (_, _, D, s) = address(b, k, args[1], args[2]), cgutils.unpack_tuple(b, k.shape)
        numbers = b.mul(D, b.add(s, args[3]))
        size = signature.args[0].dtype.bitwidth // 8
        with cgutils.for_range(b, b.udiv(numbers, ir.Constant(I64, _LINE // size)), intp=I64) as line:
            prefetch(b, b.add(first, b.mul(line.index, ir.Constant(I64, _LINE))))
        return context.get_dummy_value()

    return types.void(k_PGDs, types.int64, types.int64, types.int64), build


@intrinsic
def _pointer(typing: Any, place: Any, like: Any) -> Any:
    """An address as one of numbers as they are stored in an array."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), build


@jit
def add_prompts(
    q_place: int,
    q_stride: int,
    out_place: int,
    heads: int,
    scale: float,
    k_PGDs: Any,
    v_PsGD: Any,
    blocks_N: Any,
    slots_N: Any,
    facts_SF: Any,
    length_at: int,
    gates_at: int,
) -> None:
    """out[n] += g · softmax(q[n]·kᵀ · scale)·v over the first rows of token n's block, for every n.

    Queries, `q_stride` heads apart, and the output [N, H, D] are given by address, which is quicker to ask
    a tensor for than an array; numbers are stored as in the cache. The facts of the token's slot say how many
    rows, which may be s at most, and the gates; a slot below zero sees none.
    """
    N, G, D, s = len(blocks_N), k_PGDs.shape[1], k_PGDs.shape[2], k_PGDs.shape[3]
    R = heads // G
    q_NHD = carray(_pointer(q_place, k_PGDs), (N, q_stride, D))
    out_NHD = carray(_pointer(out_place, k_PGDs), (N, heads, D))
    q_RD, total_RD = np.empty((R, D), np.float32), np.empty((R, D), np.float32)
    scores_RT = np.empty((R, (s + LANES - 1) // LANES * LANES), np.float32)
    for n in range(N):
        slot, block = np.int64(slots_N[n]), np.int64(blocks_N[n])
        if slot < 0:
            continue
        count = np.int64(widen(facts_SF[slot, length_at]))
        if count == 0:
            continue
        for g in range(G):
            if g + 1 < G:
                _prefetch(k_PGDs, block, g + 1, count)
            elif n + 1 < N:
                _prefetch(k_PGDs, np.int64(blocks_N[n + 1]), 0, count)
            for r in range(R):
                for d in range(D):
                    q_RD[r, d] = widen(q_NHD[n, g * R + r, d]) * np.float32(scale)
                for d in range(D):
                    total_RD[r, d] = widen(out_NHD[n, g * R + r, d])
            _score_columns(q_RD, k_PGDs, block, g, count, scores_RT)
            for r in range(R):
                softmax(scores_RT, r, count, widen(facts_SF[slot, gates_at + g * R + r]))
            add_block(scores_RT, 0, v_PsGD, block, g, count, total_RD)
            for r in range(R):
                for d in range(D):
                    out_NHD[n, g * R + r, d] = narrow(total_RD[r, d], out_NHD[n, g * R + r, d])
