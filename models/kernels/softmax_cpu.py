"""Softmax of a row of scores on the CPU, in LLVM's instructions, as in `models.kernels.tile_cpu`.

Numba computes what is left over from whole vectors number by number, which for ten prompt rows is everything.
Here the last vector is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import address, load, splat
from models.kernels.scalars_cpu import EXP_TERMS, LN_2, intrinsic
from models.kernels.tile_cpu import F32, I32, I64, LANES, VF32, VI32, broadcast, fma


@intrinsic
def softmax(typing: Any, scores_RT: Any, r: Any, count: Any, factor: Any) -> Any:
    """The first `count` scores of row r become factor · softmax; there is room for whole vectors."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        scores = context.make_array(signature.args[0])(context, b, args[0])
        row, count = address(b, scores, args[1]), args[2]
        lowest = constant(float("-inf"))

        def score_at(place: Any, first: Any) -> Any:
            """What lies past the end must not be seen, nor hidden in memory: reading it back would wait."""
            left = broadcast(b, b.trunc(b.sub(count, first), I32))
            inside = b.icmp_signed("<", ir.Constant(VI32, list(range(LANES))), left)
            return b.select(inside, load(b, place, VF32), lowest)

        tops = _fold(b, row, count, lowest, lambda place, first, top: larger(b, score_at(place, first), top))
        top = over_lanes(b, tops, partial(larger, b))

        def exponential(place: Any, first: Any, total: Any) -> Any:
            e = exp(b, b.fsub(score_at(place, first), top))
            _store(b, e, place)
            return b.fadd(total, e)

        totals = _fold(b, row, count, constant(0.0), exponential)
        scale = b.fdiv(splat(b, args[3]), over_lanes(b, totals, b.fadd))

        def scaled(place: Any, first: Any, nothing: Any) -> Any:
            _store(b, b.fmul(load(b, place, VF32), scale), place)
            return nothing

        _fold(b, row, count, lowest, scaled)
        return context.get_dummy_value()

    return types.void(scores_RT, types.int64, types.int64, types.float32), build


def _fold(b: Any, row: Any, count: Any, start: Any, step: Callable[[Any, Any, Any], Any]) -> Any:
    """Over vectors of `count` numbers: `step` makes the next result of a place, its first number and one."""
    result = cgutils.alloca_once_value(b, start)
    vectors = b.udiv(b.add(count, ir.Constant(I64, LANES - 1)), ir.Constant(I64, LANES))
    with cgutils.for_range(b, vectors, intp=I64) as loop:
        first = b.mul(loop.index, ir.Constant(I64, LANES))
        place = b.add(row, b.mul(first, ir.Constant(I64, 4)))
        b.store(step(place, first, b.load(result)), result)
    return b.load(result)


def larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def over_lanes(b: Any, vector: Any, fold: Callable[[Any, Any], Any]) -> Any:
    """All lanes folded into each lane."""
    shift = LANES // 2
    while shift:
        lanes = ir.Constant(VI32, [(i + shift) % LANES for i in range(LANES)])
        vector = fold(vector, b.shuffle_vector(vector, vector, lanes))
        shift //= 2
    return vector


def exp(b: Any, x: Any) -> Any:
    """e^x in every lane, as `models.kernels.scalars_cpu.exp`."""
    x = b.select(b.fcmp_ordered("<", x, constant(-87.0)), constant(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, constant(88.0)), constant(88.0), x)
    kind = ir.FunctionType(VF32, [VF32])
    floor = cgutils.get_or_insert_function(b.module, kind, f"llvm.floor.v{LANES}f32")
    n = b.call(floor, [fma(b, x, constant(1.4426950408889634), constant(0.5))])
    f = x
    for part in LN_2:
        f = fma(b, n, constant(-part), f)
    p = constant(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        p = fma(b, p, f, constant(term))
    p = b.fadd(fma(b, b.fmul(p, f), f, f), constant(1.0))
    biased = b.add(b.fptosi(n, VI32), ir.Constant(VI32, [127] * LANES))
    return b.fmul(p, b.bitcast(b.shl(biased, ir.Constant(VI32, [23] * LANES)), VF32))


def constant(value: float) -> Any:
    return ir.Constant(VF32, [ir.Constant(F32, value)] * LANES)


def _store(b: Any, vector: Any, place: Any) -> None:
    b.store(vector, b.inttoptr(place, VF32.as_pointer()), align=4)
