"""Sums of weighted values on the CPU, in LLVM's instructions, as in `models.kernels.tile_cpu`.

Weights are stored as values are, so that of bfloat16 one instruction adds two positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import STEP, address, load
from models.kernels.scalars_cpu import inlined_jit, intrinsic
from models.kernels.tile_cpu import I32, I64, LANES, MANY_REGISTERS, VF32, VI32, broadcast, multiply_add

HEAD_STEP = 64  # numbers of a row that are taken at once


def _add(heads: int) -> Callable[..., None]:
    """`add_rows` for so many rows of weights, whose sums stay in registers."""

    @intrinsic
    def add(
        typing: Any,
        weights_RT: Any,
        r: Any,
        at: Any,
        v_PsGD: Any,
        p: Any,
        t: Any,
        g: Any,
        count: Any,
        out_RD: Any,
    ) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            weights, v, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 3, 8))
            size, paired = kinds[3].dtype.bitwidth // 8, kinds[3].dtype == types.uint16
            stride = cgutils.unpack_tuple(b, v.strides)[1]
            first = [address(b, weights, b.add(args[1], ir.Constant(I64, i)), args[2]) for i in range(heads)]
            places = [address(b, out, b.add(args[1], ir.Constant(I64, i))) for i in range(heads)]
            v_row = address(b, v, *args[4:7])
            D = cgutils.unpack_tuple(b, out.shape)[1]
            with cgutils.for_range(b, b.udiv(D, ir.Constant(I64, HEAD_STEP)), intp=I64) as part:
                start = b.mul(part.index, ir.Constant(I64, HEAD_STEP))
                v_part = b.add(v_row, b.mul(start, ir.Constant(I64, size)))
                out_part = b.mul(start, ir.Constant(I64, 4))
                vectors = range(HEAD_STEP // LANES)
                at_lanes = [ir.Constant(I64, 4 * LANES * i) for i in vectors]
                sums = [[cgutils.alloca_once(b, VF32) for _ in vectors] for _ in range(heads)]
                for place, row in zip(places, sums, strict=True):
                    for offset, total in zip(at_lanes, row, strict=True):
                        b.store(load(b, b.add(b.add(place, out_part), offset), VF32), total)
                (_sum_pairs if paired else _sum_single)(b, first, v_part, stride, args[7], sums)
                for place, row in zip(places, sums, strict=True):
                    for offset, total in zip(at_lanes, row, strict=True):
                        target = b.inttoptr(b.add(b.add(place, out_part), offset), VF32.as_pointer())
                        b.store(b.load(total), target, align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(weights_RT, i, i, v_PsGD, i, i, i, i, out_RD), build

    made: Callable[..., None] = add
    return made


def _sum_single(b: Any, weights: list[Any], v_row: Any, stride: Any, count: Any, sums: Any) -> None:
    """sums += weight · value over `count` values in float32, from addresses on."""
    with cgutils.for_range(b, count, intp=I64) as loop:
        row, offset = b.add(v_row, b.mul(loop.index, stride)), b.mul(loop.index, ir.Constant(I64, 4))
        values = [load(b, b.add(row, ir.Constant(I64, 4 * LANES * i)), VI32) for i in range(len(sums[0]))]
        _multiply(b, [load(b, b.add(weight, offset), I32) for weight in weights], values, sums, paired=False)


def _sum_pairs(b: Any, weights: list[Any], v_row: Any, stride: Any, count: Any, sums: Any) -> None:
    """As `_sum_single` in bfloat16, two values at once: an odd last one with itself, by no weight."""
    two = ir.Constant(I64, 2)

    def add(index: Any, lone: bool) -> None:
        row, offset = b.add(v_row, b.mul(b.mul(index, two), stride)), b.mul(index, ir.Constant(I64, 4))
        values = _interleaved(b, row, row if lone else b.add(row, stride), len(sums[0]))
        pairs = [load(b, b.add(weight, offset), I32) for weight in weights]
        if lone:
            pairs = [b.and_(pair, ir.Constant(I32, 0xFFFF)) for pair in pairs]
        _multiply(b, pairs, values, sums, paired=True)

    whole = b.udiv(count, two)
    with cgutils.for_range(b, whole, intp=I64) as loop:
        add(loop.index, lone=False)
    with b.if_then(b.icmp_signed("!=", b.mul(whole, two), count)):
        add(whole, lone=True)


def _interleaved(b: Any, row: Any, following: Any, vectors: int) -> list[Any]:
    """A lane is a number of 16 bits of one row and the same of the following one."""
    kind = ir.VectorType(ir.IntType(16), 2 * LANES)
    pairs = []
    for i in range(vectors // 2):
        both = [load(b, b.add(place, ir.Constant(I64, STEP * i)), kind) for place in (row, following)]
        for first in (0, LANES):
            lanes = [first + lane // 2 + 2 * LANES * (lane % 2) for lane in range(2 * LANES)]
            mask = ir.Constant(ir.VectorType(I32, 2 * LANES), lanes)
            pairs.append(b.bitcast(b.shuffle_vector(*both, mask), VI32))
    return pairs


def _multiply(b: Any, weights: list[Any], values: list[Any], sums: Any, paired: bool) -> None:
    for weight, totals in zip(weights, sums, strict=True):
        lanes = broadcast(b, weight)
        for value, total in zip(values, totals, strict=True):
            b.store(multiply_add(b, b.load(total), lanes, value, paired), total)


# Sums of 6 rows fill 24 of AVX-512's 32 registers; of one 8 of AVX2's 16.
_add_6, _add_4, _add_3, _add_2, _add_1 = (_add(heads) for heads in (6, 4, 3, 2, 1))


@inlined_jit
def add_rows(weights_RT: Any, at: int, v_PsGD: Any, p: int, t: int, g: int, count: int, out_RD: Any) -> None:
    """out[r] += Σ weights[r, at + i] · v[p, t + i, g] over `count` rows, for every r.

    Of bfloat16 positions are added in pairs from the first on. It may read one weight more than `count`.
    """
    r, R = 0, out_RD.shape[0]
    while r < R:
        left = R - r if MANY_REGISTERS else 1
        if left >= 6:
            _add_6(weights_RT, r, at, v_PsGD, p, t, g, count, out_RD)
            r += 6
        elif left >= 4:
            _add_4(weights_RT, r, at, v_PsGD, p, t, g, count, out_RD)
            r += 4
        elif left == 3:
            _add_3(weights_RT, r, at, v_PsGD, p, t, g, count, out_RD)
            r += 3
        elif left == 2:
            _add_2(weights_RT, r, at, v_PsGD, p, t, g, count, out_RD)
            r += 2
        else:
            _add_1(weights_RT, r, at, v_PsGD, p, t, g, count, out_RD)
            r += 1
