"""A product's inputs as packed weights want them.

A group is GROUP inputs of a row. Weights in 4 bits have minima, which multiply a group's sum. Where weights
are whole numbers and the processor has no instructions for bfloat16, inputs become whole numbers, too:
x = s · q, in 16 bits, with one s a group, its greatest number over 32767. So a number is off by half of s at
most: the group's greatest by a 128th of what bfloat16 may be off by, and one a 128th as great by as much.

Shapes: M rows, K inputs, g groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.quantized_tile_cpu import GROUP
from models.kernels.rows_cpu import address, load, splat
from models.kernels.scalars_cpu import intrinsic, jit, parallel_jit, widen
from models.kernels.tile_cpu import (
    F32,
    I32,
    I64,
    LANES,
    MULTIPLIES_BFLOAT16,
    ROWS,
    VF32,
    VI32,
    fma,
)

_overload: Callable[..., Any] = numba.extending.overload
_MOST = 32767.0
# Added to a number below 2²² it leaves the nearest whole one in the last bits.
_ROUNDER = 1.5 * 2**23


def inputs(x_MK: Any, w_PKF: Any) -> Any:
    """Inputs as they are multiplied with these weights, [M, K], and their groups' scale and sum, [M, g, 2].

    Of what is not needed nothing is computed.
    """
    raise NotImplementedError  # in compiled code only


@_overload(inputs)
def _inputs(x_MK: Any, w_PKF: Any) -> Any:
    if w_PKF.dtype in (types.int8, types.uint8) and not MULTIPLIES_BFLOAT16:
        return _quantized
    return _summed if w_PKF.dtype == types.uint8 else _as_they_are


def _as_they_are(x_MK: Any, w_PKF: Any) -> Any:
    return x_MK, np.empty((0, 0, 2), np.float32)


def _quantized(x_MK: Any, w_PKF: Any) -> Any:
    M, K = x_MK.shape
    q_MK, groups_Mg2 = np.empty((M, K), np.int16), np.empty((M, K // GROUP, 2), np.float32)
    if M <= ROWS:
        for m in range(M):
            _quantize_row(m, x_MK, q_MK, groups_Mg2)
    else:
        _quantize_rows(x_MK, q_MK, groups_Mg2)
    return q_MK, groups_Mg2


def _summed(x_MK: Any, w_PKF: Any) -> Any:
    groups_Mg2 = np.empty((x_MK.shape[0], x_MK.shape[1] // GROUP, 2), np.float32)
    if x_MK.shape[0] <= ROWS:
        for m in range(x_MK.shape[0]):
            _sum_groups(m, x_MK, groups_Mg2)
    else:
        _sum_rows(x_MK, groups_Mg2)
    return x_MK, groups_Mg2


@parallel_jit
def _quantize_rows(x_MK: Any, q_MK: Any, groups_Mg2: Any) -> None:
    for task in numba.prange(x_MK.shape[0]):
        _quantize_row(np.int64(task), x_MK, q_MK, groups_Mg2)


@jit
def _quantize_row(m: int, x_MK: Any, q_MK: Any, groups_Mg2: Any) -> None:
    for g in range(groups_Mg2.shape[1]):
        _quantize_group(m, g, x_MK, q_MK, groups_Mg2)


@intrinsic
def _quantize_group(typing: Any, m: Any, g: Any, x_MK: Any, q_MK: Any, groups_Mg2: Any) -> Any:
    """What is not finite makes the scale so, and with it all outputs of the row. Zeros have any q."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, q, groups = (context.make_array(signature.args[i])(context, b, args[i]) for i in (2, 3, 4))
        first = b.mul(args[1], ir.Constant(I64, GROUP))
        x_place, q_place = address(b, x, args[0], first), address(b, q, args[0], first)
        parts = range(GROUP // LANES)
        numbers = [load(b, b.add(x_place, ir.Constant(I64, 4 * LANES * i)), VF32) for i in parts]
        most = _greatest(b, numbers)
        inverse = splat(b, b.fdiv(ir.Constant(F32, _MOST), most))
        for i, number in zip(parts, numbers, strict=True):
            rounded = fma(b, number, inverse, ir.Constant(VF32, [ir.Constant(F32, _ROUNDER)] * LANES))
            whole = b.trunc(b.bitcast(rounded, VI32), ir.VectorType(ir.IntType(16), LANES))
            place = b.add(q_place, ir.Constant(I64, 2 * LANES * i))
            b.store(whole, b.inttoptr(place, whole.type.as_pointer()), align=2)
        place = address(b, groups, args[0], args[1])
        scale = b.fdiv(most, ir.Constant(F32, _MOST))
        for offset, number in ((0, scale), (4, _sum(b, numbers))):
            b.store(number, b.inttoptr(b.add(place, ir.Constant(I64, offset)), F32.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, x_MK, q_MK, groups_Mg2), build


def _greatest(b: Any, vectors: list[Any]) -> Any:
    """Absolute value: of floats without sign the bits are in order, and those that are none come last."""
    positive = ir.Constant(VI32, [0x7FFFFFFF] * LANES)
    most, *others = [b.and_(b.bitcast(vector, VI32), positive) for vector in vectors]
    for bits in others:
        most = b.select(b.icmp_signed(">", bits, most), bits, most)
    kind = ir.FunctionType(I32, [VI32])
    reduce = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.smax.v{LANES}i32")
    return b.bitcast(b.call(reduce, [most]), F32)


def _sum(b: Any, vectors: list[Any]) -> Any:
    total, *others = vectors
    for vector in others:
        total = b.fadd(total, vector)
    kind = ir.FunctionType(F32, [F32, VF32])
    reduce = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return b.call(reduce, [ir.Constant(F32, -0.0), total], fastmath=("reassoc",))


@parallel_jit
def _sum_rows(x_MK: Any, groups_Mg2: Any) -> None:
    for task in numba.prange(x_MK.shape[0]):
        _sum_groups(np.int64(task), x_MK, groups_Mg2)


@jit
def _sum_groups(m: int, x_MK: Any, groups_Mg2: Any) -> None:
    for g in range(groups_Mg2.shape[1]):
        total = np.float32(0)
        for i in range(GROUP):
            total += widen(x_MK[m, g * GROUP + i])
        groups_Mg2[m, g, 1] = total
