"""Gated attention to prompts that lie in blocks of vLLM's KV cache, compiled for the CPU by numba.

vLLM's vector kernels keep a block's keys by column, [D, s], and its values by row, [s, D]. A query's row of
scores is then one vector or two, summed over D, and of the values only the prompt's rows are read. One thread
does all: a step's rows take microseconds, and a second pool of threads would wait for vLLM's.

Shapes: N tokens of a step, H query heads, G key/value heads, D head size, P blocks of s positions,
S adapter slots, F facts of a slot, R query heads of one key/value head, T columns of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils

from models.kernels.paged_cpu import add_block
from models.kernels.rows_cpu import address, load, prefetch, splat, store, widened
from models.kernels.scalars_cpu import inlined_jit, intrinsic, jit, narrow, widen
from models.kernels.softmax_cpu import constant, exp, larger, over_lanes
from models.kernels.tile_cpu import F32, I32, I64, LANES, VF32, VI32, broadcast, fma


def _weigh(heads: int) -> Callable[..., None]:
    """`_weigh_rows` for so many heads, whose scores stay in registers."""

    @intrinsic
    def weigh(
        typing: Any,
        q_RD: Any,
        r: Any,
        k_PGDs: Any,
        p: Any,
        g: Any,
        count: Any,
        gate_R: Any,
        weights_RT: Any,
        ahead: Any,
    ) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            q, k, gates, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2, 6, 7))
            rows = [b.add(args[1], ir.Constant(I64, i)) for i in range(heads)]

            def write(vectors: int) -> None:
                scores = _scores(b, q, rows, k, args[3:5], kinds[2].dtype, vectors, args[8])
                for row, scores_T in zip(rows, scores, strict=True):
                    factor = load(b, address(b, gates, row), F32)
                    for i, weights in enumerate(_softmax(b, scores_T, args[5], factor)):
                        place = address(b, out, row, ir.Constant(I64, LANES * i))
                        store(b, weights, place, kinds[7].dtype)

            with b.if_else(b.icmp_signed(">", args[5], ir.Constant(I64, LANES))) as (wide, narrow):
                with wide:
                    write(2)
                with narrow:
                    write(1)
            return context.get_dummy_value()

        i = types.int64
        return types.void(q_RD, i, k_PGDs, i, i, i, gate_R, weights_RT, i), build

    made: Callable[..., None] = weigh
    return made


def _scores(
    b: Any, q: Any, rows: list[Any], k: Any, block: list[Any], stored: Any, vectors: int, ahead: Any
) -> list[list[Any]]:
    """Vectors of q[row] · k[block] over the columns, for each row; `ahead` is asked for meanwhile."""
    q_rows, column = [address(b, q, row) for row in rows], address(b, k, *block)
    stride, D = cgutils.unpack_tuple(b, k.strides)[2], cgutils.unpack_tuple(b, q.shape)[1]
    # Two of each, for even and odd numbers: one would wait for itself.
    sums = [[[cgutils.alloca_once(b, VF32) for _ in range(2)] for _ in range(vectors)] for _ in rows]
    for place in (place for row in sums for pair in row for place in pair):
        b.store(ir.Constant(VF32, None), place)
    with cgutils.for_range(b, b.udiv(D, ir.Constant(I64, 2)), intp=I64) as loop:
        for half in range(2):
            d = b.add(b.mul(loop.index, ir.Constant(I64, 2)), ir.Constant(I64, half))
            first = b.add(column, b.mul(d, stride))
            prefetch(b, b.add(ahead, b.mul(d, stride)))
            offsets = [ir.Constant(I64, LANES * i * stored.bitwidth // 8) for i in range(vectors)]
            keys = [widened(b, b.add(first, offset), stored) for offset in offsets]
            for q_row, row in zip(q_rows, sums, strict=True):
                number = splat(b, load(b, b.add(q_row, b.mul(d, ir.Constant(I64, 4))), F32))
                for key, pair in zip(keys, row, strict=True):
                    b.store(fma(b, number, key, b.load(pair[half])), pair[half])
    return [[b.fadd(*map(b.load, pair)) for pair in row] for row in sums]


def _softmax(b: Any, scores: list[Any], count: Any, factor: Any) -> list[Any]:
    """factor · softmax of the first `count` numbers of a row; of the others it is next to none."""
    left = broadcast(b, b.trunc(count, I32))
    lanes = [ir.Constant(VI32, list(range(LANES * i, LANES * (i + 1)))) for i in range(len(scores))]
    inside = [b.icmp_signed("<", lane, left) for lane in lanes]
    scores = [b.select(*pair, constant(float("-inf"))) for pair in zip(inside, scores, strict=True)]
    top = over_lanes(b, reduce(partial(larger, b), scores), partial(larger, b))
    powers = [exp(b, b.fsub(score, top)) for score in scores]
    scale = b.fdiv(splat(b, factor), over_lanes(b, reduce(b.fadd, powers), b.fadd))
    return [b.fmul(power, scale) for power in powers]


_weigh_4, _weigh_3, _weigh_2, _weigh_1 = (_weigh(heads) for heads in (4, 3, 2, 1))


@inlined_jit
def _weigh_rows(
    q_RD: Any, k_PGDs: Any, p: int, g: int, count: int, gate_R: Any, weights_RT: Any, ahead: int
) -> None:
    """weights[r] = gate[r] · softmax(q[r] · k[p, g]) of the first `count` columns, two vectors at most.

    What follows them, up to a multiple of LANES, is written too, and means nothing. Meanwhile the keys at the
    address `ahead` are asked for: memory takes as long as the sums.
    """
    r, R = 0, q_RD.shape[0]
    while r < R:
        left = R - r
        if left >= 4:
            _weigh_4(q_RD, r, k_PGDs, p, g, count, gate_R, weights_RT, ahead)
        elif left == 3:
            _weigh_3(q_RD, r, k_PGDs, p, g, count, gate_R, weights_RT, ahead)
        elif left == 2:
            _weigh_2(q_RD, r, k_PGDs, p, g, count, gate_R, weights_RT, ahead)
        else:
            _weigh_1(q_RD, r, k_PGDs, p, g, count, gate_R, weights_RT, ahead)
        r += min(left, 4)


@intrinsic
def _place(typing: Any, x_PGab: Any, p: Any, g: Any) -> Any:
    """The address of one head's part of a block."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return address(b, context.make_array(signature.args[0])(context, b, args[0]), *args[1:])

    return types.int64(x_PGab, types.int64, types.int64), build


@intrinsic
def _prefetch(typing: Any, place: Any, size: Any) -> Any:
    """Ask for memory before it is needed."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        line = ir.Constant(I64, 64)
        with cgutils.for_range(b, b.udiv(args[1], line), intp=I64) as loop:
            prefetch(b, b.add(args[0], b.mul(loop.index, line)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


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
    rows, two vectors at most, and the gates; a slot below zero sees none.
    """
    N, G, D, s = len(blocks_N), k_PGDs.shape[1], k_PGDs.shape[2], k_PGDs.shape[3]
    R = heads // G
    q_NHD = carray(_pointer(q_place, k_PGDs), (N, q_stride, D))
    out_NHD = carray(_pointer(out_place, k_PGDs), (N, heads, D))
    q_RD, total_RD = np.empty((R, D), np.float32), np.empty((R, D), np.float32)
    gate_R, weights_RT = np.empty(R, np.float32), np.empty((R, 2 * LANES), v_PsGD.dtype)
    for n in range(N):
        slot, block = np.int64(slots_N[n]), np.int64(blocks_N[n])
        if slot < 0:
            continue
        count = np.int64(widen(facts_SF[slot, length_at]))
        if count == 0:
            continue
        for g in range(G):
            following, head = (block, g + 1) if g + 1 < G else (np.int64(blocks_N[min(n + 1, N - 1)]), 0)
            ahead = _place(k_PGDs, following, head)
            for r in range(R):
                gate_R[r] = widen(facts_SF[slot, gates_at + g * R + r])
                for d in range(D):
                    q_RD[r, d] = widen(q_NHD[n, g * R + r, d]) * np.float32(scale)
                for d in range(D):
                    total_RD[r, d] = widen(out_NHD[n, g * R + r, d])
            _weigh_rows(q_RD, k_PGDs, block, g, count, gate_R, weights_RT, ahead)
            _prefetch(ahead + k_PGDs.itemsize * D * s, k_PGDs.itemsize * D * count)
            add_block(weights_RT, 0, v_PsGD, block, g, count, total_RD)
            for r in range(R):
                for d in range(D):
                    out_NHD[n, g * R + r, d] = narrow(total_RD[r, d], out_NHD[n, g * R + r, d])
