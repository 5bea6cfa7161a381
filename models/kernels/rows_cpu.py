"""Attention's innermost loops on the CPU, in LLVM's instructions, as in `models.kernels.tile_cpu`.

`score_rows` and `add_rows` take some rows of keys or values as they lie in a cache: row t of key/value head g
of an array [T, G, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from models.kernels.scalars_cpu import jit
from models.kernels.tile_cpu import I32, I64, LANES, VF32, VI32, broadcast, fma, multiply_add

_VI16 = ir.VectorType(ir.IntType(16), LANES)
_STEP = 64  # bytes of a row that are taken at once
HEAD_STEP = 64  # numbers of a row that `add_rows` takes at once


@intrinsic
def score_rows(
    typing: Any, q_RD: Any, r: Any, k_TGD: Any, t: Any, g: Any, count: Any, scale: Any, scores_RT: Any, at: Any
) -> Any:
    """scores[r, at + i] = scale · (q[r] · k[t + i, g]) for `count` rows, at most LANES.

    LANES scores are written whatever the count; a row's size in bytes is a multiple of 64.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        q, k, scores = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2, 7))
        paired = kinds[0].dtype == types.uint16
        q_row = _address(b, q, args[1])
        k_row = _address(b, k, args[3], args[4])
        stride = cgutils.unpack_tuple(b, k.strides)[0]
        last = b.sub(args[5], ir.Constant(I64, 1))
        rows = []
        for i in range(LANES):  # past the last row it is read again, not what lies behind it
            index = ir.Constant(I64, i)
            index = b.select(b.icmp_signed("<", index, last), index, last)
            rows.append(b.add(k_row, b.mul(index, stride)))
        sums = [cgutils.alloca_once(b, VF32) for _ in range(LANES)]
        for place in sums:
            b.store(ir.Constant(VF32, None), place)
        size = b.mul(cgutils.unpack_tuple(b, q.shape)[1], ir.Constant(I64, kinds[0].dtype.bitwidth // 8))
        with cgutils.for_range(b, b.udiv(size, ir.Constant(I64, _STEP)), intp=I64) as loop:
            offset = b.mul(loop.index, ir.Constant(I64, _STEP))
            q_part = _load(b, b.add(q_row, offset), VI32)
            for row, place in zip(rows, sums, strict=True):
                k_part = _load(b, b.add(row, offset), VI32)
                b.store(multiply_add(b, b.load(place), k_part, q_part, paired), place)
        total = b.fmul(_sum_each(b, [b.load(place) for place in sums]), _splat(b, args[6]))
        place = _address(b, scores, args[1], args[8])
        b.store(total, b.inttoptr(place, VF32.as_pointer()), align=4)
        return context.get_dummy_value()

    number = types.int64
    kinds = (q_RD, number, k_TGD, number, number, number, types.float32, scores_RT, number)
    return types.void(*kinds), build


def _address(b: Any, array: Any, *indices: Any) -> Any:
    """Of array[indices], as a number."""
    address = b.ptrtoint(array.data, I64)
    for index, stride in zip(indices, cgutils.unpack_tuple(b, array.strides), strict=False):
        address = b.add(address, b.mul(index, stride))
    return address


def _load(b: Any, address: Any, kind: Any) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=2)


def _splat(b: Any, value: Any) -> Any:
    return b.bitcast(broadcast(b, b.bitcast(value, I32)), VF32)


def _sum_each(b: Any, vectors: list[Any]) -> Any:
    """One vector: the sum over the lanes of each of LANES vectors, by adding neighbours four times."""
    even = ir.Constant(VI32, list(range(0, 2 * LANES, 2)))
    odd = ir.Constant(VI32, list(range(1, 2 * LANES, 2)))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(b.shuffle_vector(x, y, even), b.shuffle_vector(x, y, odd)) for x, y in pairs]
    return vectors[0]


def _add(heads: int) -> Callable[..., None]:
    """`add_rows` for so many heads of scores, whose sums stay in registers."""

    @intrinsic
    def add(
        typing: Any, weights_RT: Any, r: Any, at: Any, v_TGD: Any, t: Any, g: Any, count: Any, out_RD: Any
    ) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            weights, v, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 3, 7))
            stored, bytes_each = kinds[3].dtype, kinds[3].dtype.bitwidth // 8
            stride = cgutils.unpack_tuple(b, v.strides)[0]
            first = [_address(b, weights, b.add(args[1], ir.Constant(I64, i)), args[2]) for i in range(heads)]
            places = [_address(b, out, b.add(args[1], ir.Constant(I64, i))) for i in range(heads)]
            v_row = _address(b, v, args[4], args[5])
            D = cgutils.unpack_tuple(b, out.shape)[1]
            with cgutils.for_range(b, b.udiv(D, ir.Constant(I64, HEAD_STEP)), intp=I64) as part:
                start = b.mul(part.index, ir.Constant(I64, HEAD_STEP))
                v_part = b.add(v_row, b.mul(start, ir.Constant(I64, bytes_each)))
                out_part = b.mul(start, ir.Constant(I64, 4))
                vectors = range(HEAD_STEP // LANES)
                at_lanes = [ir.Constant(I64, 4 * LANES * i) for i in vectors]
                sums = [[cgutils.alloca_once(b, VF32) for _ in vectors] for _ in range(heads)]
                for place, row in zip(places, sums, strict=True):
                    for offset, total in zip(at_lanes, row, strict=True):
                        b.store(_load(b, b.add(b.add(place, out_part), offset), VF32), total)
                with cgutils.for_range(b, args[6], intp=I64) as loop:
                    row = b.add(v_part, b.mul(loop.index, stride))
                    values = [
                        _widened(b, b.add(row, ir.Constant(I64, bytes_each * LANES * i)), stored) for i in vectors
                    ]
                    for weight_row, totals in zip(first, sums, strict=True):
                        place = b.add(weight_row, b.mul(loop.index, ir.Constant(I64, 4)))
                        weight = b.bitcast(broadcast(b, _load(b, place, I32)), VF32)
                        for value, total in zip(values, totals, strict=True):
                            b.store(fma(b, weight, value, b.load(total)), total)
                for place, row in zip(places, sums, strict=True):
                    for offset, total in zip(at_lanes, row, strict=True):
                        target = b.inttoptr(b.add(b.add(place, out_part), offset), VF32.as_pointer())
                        b.store(b.load(total), target, align=4)
            return context.get_dummy_value()

        number = types.int64
        return types.void(weights_RT, number, number, v_TGD, number, number, number, out_RD), build

    return add  # type: ignore[no-any-return]


def _widened(b: Any, address: Any, stored: Any) -> Any:
    """LANES stored numbers as float32."""
    if stored == types.float32:
        return _load(b, address, VF32)
    bits = b.zext(_load(b, address, _VI16), VI32)
    return b.bitcast(b.shl(bits, ir.Constant(VI32, [16] * LANES)), VF32)


_add_4, _add_2, _add_1 = (_add(heads) for heads in (4, 2, 1))


@jit
def add_rows(weights_RT: Any, at: int, v_TGD: Any, t: int, g: int, count: int, out_RD: Any) -> None:
    """out[r] += Σ weights[r, at + i] · v[t + i, g] over `count` rows, for every r."""
    r, R = 0, out_RD.shape[0]
    while r < R:
        if R - r >= 4:
            _add_4(weights_RT, r, at, v_TGD, t, g, count, out_RD)
            r += 4
        elif R - r >= 2:
            _add_2(weights_RT, r, at, v_TGD, t, g, count, out_RD)
            r += 2
        else:
            _add_1(weights_RT, r, at, v_TGD, t, g, count, out_RD)
            r += 1
