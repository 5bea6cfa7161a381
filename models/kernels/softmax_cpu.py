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

from models.kernels.rows_cpu import address, load, store
from models.kernels.scalars_cpu import EXP_TERMS, LN_2, intrinsic
from models.kernels.tile_cpu import F32, I32, I64, LANES, VF32, VI32, broadcast, fma


@intrinsic
def exponentials(typing: Any, scores_RT: Any, r: Any, count: Any, weights_RT: Any) -> Any:
    """weights[r] = e^(score - the largest) of row r's first `count` scores; their sum is returned.

    Behind them are zeros up to a whole vector, and one vector more: rows have room for both.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        scores, weights = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 3))
        row, out = address(b, scores, args[1]), address(b, weights, args[1])
        stored = kinds[3].dtype
        lowest, zero, lanes = constant(float("-inf")), constant(0.0), ir.Constant(I64, LANES)
        whole = b.udiv(args[2], lanes)
        first = b.mul(whole, lanes)
        inside = b.icmp_signed(
            "<",
            ir.Constant(VI32, list(range(LANES))),
            broadcast(b, b.trunc(b.sub(args[2], first), I32)),
        )

        def score_at(number: Any) -> Any:
            return load(b, b.add(row, b.mul(number, ir.Constant(I64, 4))), VF32)

        def put(vector: Any, number: Any) -> None:
            size = ir.Constant(I64, stored.bitwidth // 8)
            store(b, vector, b.add(out, b.mul(number, size)), stored)

        # What lies past the end must not be seen, nor hidden in memory: reading it back would wait.
        rest = b.select(inside, score_at(first), lowest)
        tops = _fold(b, whole, rest, lambda number, top: larger(b, score_at(number), top))
        top = over_lanes(b, tops, partial(larger, b))
        rest = b.select(inside, exp(b, b.fsub(rest, top)), zero)
        put(rest, first)
        put(zero, b.add(first, lanes))

        def exponential(number: Any, total: Any) -> Any:
            e = exp(b, b.fsub(score_at(number), top))
            put(e, number)
            return b.fadd(total, e)

        totals = over_lanes(b, _fold(b, whole, rest, exponential), b.fadd)
        return b.extract_element(totals, ir.Constant(I32, 0))

    return types.float32(scores_RT, types.int64, types.int64, weights_RT), build


def _fold(b: Any, vectors: Any, start: Any, step: Callable[[Any, Any], Any]) -> Any:
    """Over so many vectors: `step` makes the next result of a vector's first number and the last result."""
    result = cgutils.alloca_once_value(b, start)
    with cgutils.for_range(b, vectors, intp=I64) as loop:
        b.store(step(b.mul(loop.index, ir.Constant(I64, LANES)), b.load(result)), result)
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
