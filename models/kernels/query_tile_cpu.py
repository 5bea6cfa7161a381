"""Scores of many queries of one sequence on the CPU, in LLVM's instructions, as in `models.kernels.rows_cpu`.

`score_rows` there adds up a vector's lanes for each query and key, which costs more than the product. For
many queries LANES keys are transposed once: a lane is a key, and what lanes were are vectors, summed in the
same order. So scores are equal to those of `score_rows`, to the last bit.

Shapes: R queries, D head size, W numbers of 32 bits in a row of D, T positions; others as in `rows_cpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import STEP, address, load, row_addresses, splat
from models.kernels.scalars_cpu import exact_jit, intrinsic
from models.kernels.tile_cpu import I32, I64, LANES, MANY_REGISTERS, VF32, VI32, broadcast, multiply_add

HEAD_SIZES = (64, 128)  # that `score_queries` knows


@intrinsic
def transpose_rows(typing: Any, k_PsGD: Any, p: Any, t: Any, g: Any, count: Any, keys_WT: Any) -> Any:
    """keys[w, i] = the w-th 32 bits of k[p, t + i, g] for i < LANES; past `count` rows the last again.

    A row's size is a multiple of STEP bytes, and rows lie at even distances.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        k, keys = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 5))
        rows = row_addresses(b, k, args[1:4], args[4])
        steps = b.udiv(cgutils.unpack_tuple(b, keys.shape)[0], ir.Constant(I64, LANES))
        with cgutils.for_range(b, steps, intp=I64) as loop:
            offset = b.mul(loop.index, ir.Constant(I64, STEP))
            columns = _transposed(b, [load(b, b.add(row, offset), VI32) for row in rows])
            first = address(b, keys, b.mul(loop.index, ir.Constant(I64, LANES)))
            for i, column in enumerate(columns):
                place = b.add(first, ir.Constant(I64, 4 * LANES * i))
                b.store(column, b.inttoptr(place, VI32.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(k_PsGD, i, i, i, i, keys_WT), build


def _transposed(b: Any, rows: list[Any]) -> list[Any]:
    """Of LANES vectors; a perfect shuffle of the first half with the second, four times."""
    low = [i // 2 + LANES * (i % 2) for i in range(LANES)]
    high = [i + LANES // 2 for i in low]
    masks = [ir.Constant(VI32, mask) for mask in (low, high)]
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [b.shuffle_vector(x, y, mask) for x, y in pairs for mask in masks]
    return rows


def _score(queries: int) -> Callable[..., None]:
    """`score_queries` of so many."""

    @intrinsic
    def score(typing: Any, q_RD: Any, r: Any, keys_WT: Any, scale: Any, scores_RT: Any, at: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            q, keys, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2, 4))
            rows = [b.add(args[1], ir.Constant(I64, i)) for i in range(queries)]
            q_rows = [address(b, q, row) for row in rows]
            first, paired = address(b, keys), kinds[0].dtype == types.uint16
            factor, W = splat(b, args[3]), cgutils.unpack_tuple(b, keys.shape)[0]
            for size in HEAD_SIZES:
                steps = size * kinds[0].dtype.bitwidth // 8 // STEP
                with b.if_then(b.icmp_signed("==", W, ir.Constant(I64, LANES * steps))):
                    totals = _dots(b, q_rows, first, steps, paired)
                    for row, total in zip(rows, totals, strict=True):
                        place = b.inttoptr(address(b, out, row, args[5]), VF32.as_pointer())
                        b.store(b.fmul(total, factor), place, align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(q_RD, i, keys_WT, types.float32, scores_RT, i), build

    made: Callable[..., None] = score
    return made


def _dots(b: Any, q_rows: list[Any], keys: Any, steps: int, paired: bool) -> list[Any]:
    """LANES keys times each query. Sums are taken in the order in which `score_rows` adds up lanes."""
    partial: list[tuple[int, list[Any]]] = []  # of how many lanes, most first
    for lane in range(LANES):
        size, sums = 1, [ir.Constant(VF32, None)] * len(q_rows)
        for step in range(steps):
            k_part = load(b, b.add(keys, ir.Constant(I64, 4 * LANES * (LANES * step + lane))), VI32)
            for i, row in enumerate(q_rows):
                q_part = broadcast(b, load(b, b.add(row, ir.Constant(I64, STEP * step + 4 * lane)), I32))
                sums[i] = multiply_add(b, sums[i], k_part, q_part, paired)
        while partial and partial[-1][0] == size:
            sums = [b.fadd(x, y) for x, y in zip(partial.pop()[1], sums, strict=True)]
            size *= 2
        partial.append((size, sums))
    return partial[0][1]


# Sums and partial sums of 6 queries fill 30 of AVX-512's 32 registers. AVX2's 16 hold no more of 6 than of 2,
# which are sooner compiled.
_score_6, _score_2, _score_1 = (_score(queries) for queries in (6, 2, 1))


@exact_jit
def score_queries(q_RD: Any, keys_WT: Any, scale: Any, scores_RT: Any, at: int) -> None:
    """scores[r, at + i] = scale · (q[r] · key i) for LANES keys from `transpose_rows`, for every r."""
    r, R = 0, q_RD.shape[0]
    while r < R:
        left = R - r if MANY_REGISTERS else min(R - r, 2)
        if left >= 6:
            _score_6(q_RD, r, keys_WT, scale, scores_RT, at)
            r += 6
        elif left >= 2:
            _score_2(q_RD, r, keys_WT, scale, scores_RT, at)
            r += 2
        else:
            _score_1(q_RD, r, keys_WT, scale, scores_RT, at)
            r += 1
