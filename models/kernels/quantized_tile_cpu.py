"""Tiles of quantised weights on the CPU, beside those of `models.kernels.tile_cpu`: unpacked in registers.

Whole numbers of 8 or 4 bits are bfloat16 numbers, exactly, so they are multiplied as such, or as float32; an
output's or a group's scale comes to the sums. How they lie is said in `models.kernels.quantized_cpu`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import load
from models.kernels.scalars_cpu import intrinsic
from models.kernels.tile_cpu import (
    F32,
    I32,
    I64,
    LANES,
    MANY_REGISTERS,
    MULTIPLIES_BFLOAT16,
    PANEL,
    ROWS,
    VBF16,
    VECTORS,
    VF32,
    VI32,
    Read,
    accumulate,
    broadcast,
    fma,
    zeros,
)

GROUP = 32  # inputs that have a scale and a minimum of their own, in 4 bits
SCALES = 2  # rows of 2 · PANEL bytes that hold the scales of an 8-bit panel, after its numbers
GROUP_BYTES = GROUP * PANEL // 2 + 2 * 2 * PANEL  # a panel's numbers of a group, scales, minima

_STEPS = GROUP // 2  # of two inputs
_SHARED = 4  # steps whose numbers share a 16-bit lane
_WORDS = 2 * LANES
_MAX_ROWS = (
    4 if MANY_REGISTERS else ROWS
)  # of 4 bits: their sums and a group's are held in registers side by side
_PERMUTES = bool(llvm.get_host_cpu_features().get("avx512bw")) and MULTIPLIES_BFLOAT16

_VI8 = ir.VectorType(ir.IntType(8), _WORDS)
_VI16 = ir.VectorType(ir.IntType(16), _WORDS)
_VH = ir.VectorType(ir.IntType(16), LANES)


def read_int8(b: Any, w_panel: Any, step: Any, vectors: range) -> list[list[Any]]:
    """Of two inputs, as they are multiplied (`Read` in `tile_cpu`)."""
    start = b.add(w_panel, b.mul(step, ir.Constant(I64, 2 * PANEL)))
    return _in_turn([_from_int8(b, b.add(start, ir.Constant(I64, _WORDS * v))) for v in vectors])


def int8_steps(b: Any, w_rows: Any) -> Any:
    return b.sub(w_rows, ir.Constant(I64, SCALES))


def scaled(b: Any, sums: list[list[Any]], w_panel: Any, steps: Any, vectors: range) -> list[list[Any]]:
    """Sums of whole numbers times the scales of a panel in 8 bits."""
    scales = b.add(w_panel, b.mul(steps, ir.Constant(I64, 2 * PANEL)))
    loaded = [load(b, b.add(scales, ir.Constant(I64, 4 * LANES * v)), VF32) for v in vectors]
    return [[b.fmul(t, s) for t, s in zip(row, loaded, strict=True)] for row in sums]


def read_int4(b: Any, w_panel: Any, group: Any, vectors: range) -> Iterator[list[Any]]:
    """Of a group's inputs, in turn."""
    start = b.add(w_panel, b.mul(group, ir.Constant(I64, GROUP_BYTES)))
    for shared in range(_STEPS // _SHARED):
        offset = 2 * _WORDS * VECTORS * shared
        words = [load(b, b.add(start, ir.Constant(I64, offset + 2 * _WORDS * v)), _VI16) for v in vectors]
        for i in range(_SHARED):
            yield from _in_turn([_from_int4(b, word, i) for word in words])


def int4_sums(
    b: Any,
    rows: int,
    vectors: range,
    unpacked: Read | None,
    w_panel: Any,
    groups: Any,
    x_row: Any,
    x_stride: Any,
    sums_row: Any,
    sums_stride: Any,
) -> list[list[Any]]:
    """Sums of a panel in 4 bits, whose numbers `unpacked`, unless None, reads where they were unpacked.

    At `sums_row` are float32 sums of each group's inputs, which minima multiply.
    """
    totals: list[list[Any]] = []
    for first in range(0, rows, _MAX_ROWS):
        skipped = ir.Constant(I64, first)
        x, sums = b.add(x_row, b.mul(x_stride, skipped)), b.add(sums_row, b.mul(sums_stride, skipped))
        count = min(_MAX_ROWS, rows - first)
        totals += _int4_rows(b, count, vectors, unpacked, w_panel, groups, x, x_stride, sums, sums_stride)
    return totals


def _int4_rows(
    b: Any,
    rows: int,
    vectors: range,
    unpacked: Read | None,
    w_panel: Any,
    groups: Any,
    x_row: Any,
    x_stride: Any,
    sums_row: Any,
    sums_stride: Any,
) -> list[list[Any]]:
    totals, own = zeros(b, rows, len(vectors)), zeros(b, rows, len(vectors))
    lanes = GROUP // 2 if MULTIPLIES_BFLOAT16 else GROUP  # of 32 bits, of a row's inputs
    with cgutils.for_range(b, groups, intp=I64) as loop:
        for place in (place for row in own for place in row):
            b.store(ir.Constant(VF32, None), place)
        x_group = b.add(x_row, b.mul(loop.index, ir.Constant(I64, 4 * lanes)))
        if unpacked is None:
            accumulate(
                b, own, read_int4(b, w_panel, loop.index, vectors), x_group, x_stride, MULTIPLIES_BFLOAT16
            )
        else:
            first = b.mul(loop.index, ir.Constant(I64, lanes))
            with cgutils.for_range(b, ir.Constant(I64, lanes), intp=I64) as inner:
                x = b.add(x_group, b.mul(inner.index, ir.Constant(I64, 4)))
                accumulate(b, own, unpacked(b, b.add(first, inner.index)), x, x_stride, MULTIPLIES_BFLOAT16)
        group = b.add(w_panel, b.mul(loop.index, ir.Constant(I64, GROUP_BYTES)))
        scales = b.add(group, ir.Constant(I64, GROUP * PANEL // 2))
        for i, v in enumerate(vectors):
            scale = _half(b, b.add(scales, ir.Constant(I64, 2 * LANES * v)))
            least = _half(b, b.add(scales, ir.Constant(I64, 2 * PANEL + 2 * LANES * v)))
            for r in range(rows):
                place = b.add(sums_row, b.mul(sums_stride, ir.Constant(I64, r)))
                place = b.add(place, b.mul(loop.index, ir.Constant(I64, 4)))
                inputs = b.bitcast(broadcast(b, load(b, place, I32)), VF32)
                total = fma(b, b.load(own[r][i]), scale, b.load(totals[r][i]))
                b.store(fma(b, inputs, least, total), totals[r][i])
    return [[b.load(total) for total in row] for row in totals]


def _in_turn(vectors: list[tuple[Any, ...]]) -> list[list[Any]]:
    """From what each vector holds of a step's inputs, each input's vectors."""
    return [list(of_input) for of_input in zip(*vectors, strict=True)]


def _from_int8(b: Any, place: Any) -> tuple[Any, ...]:
    """From pairs of bytes pairs of bfloat16, or the first and the second ones as float32."""
    loaded = b.load(b.inttoptr(place, _VI8.as_pointer()), align=1)
    if not MULTIPLIES_BFLOAT16:
        return _signed_halves(b, b.bitcast(b.sext(loaded, _VI16), VI32))
    halves = []
    for start in (0, LANES):
        mask = ir.Constant(VI32, list(range(start, start + LANES)))
        half = b.shuffle_vector(loaded, ir.Constant(_VI8, ir.Undefined), mask)
        halves.append(b.sitofp(b.sext(half, VI32), VF32))
    kind = ir.FunctionType(VBF16, [VF32, VF32])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    packed = b.call(cgutils.get_or_insert_function(b.module, kind, name), [halves[1], halves[0]])
    return (b.bitcast(packed, VI32),)


def _from_int4(b: Any, words: Any, i: int) -> tuple[Any, ...]:
    """The same, 0 … 15, from the i-th four bits of each 16."""
    shifted = b.lshr(words, ir.Constant(_VI16, [4 * i] * _WORDS))
    if _PERMUTES:  # which looks at five bits: the table is there twice
        kind = ir.FunctionType(_VI16, [_VI16, _VI16])
        permute = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.hi.512")
        return (b.bitcast(b.call(permute, [ir.Constant(_VI16, _TABLE * 2), shifted]), VI32),)
    masked = b.bitcast(b.and_(shifted, ir.Constant(_VI16, [15] * _WORDS)), VI32)
    return _signed_halves(b, masked)


def _signed_halves(b: Any, pairs: Any) -> tuple[Any, Any]:
    """The first and the second of pairs of whole numbers of 16 bits, as float32."""
    sixteen = ir.Constant(VI32, [16] * LANES)
    low, high = b.ashr(b.shl(pairs, sixteen), sixteen), b.ashr(pairs, sixteen)
    return b.sitofp(low, VF32), b.sitofp(high, VF32)


_TABLE = [struct.unpack("<I", struct.pack("<f", number))[0] >> 16 for number in range(16)]


def _half(b: Any, place: Any) -> Any:
    """LANES numbers of float16 as float32; no infinities."""
    bits = b.zext(load(b, place, _VH), VI32)
    sign = b.shl(b.and_(bits, ir.Constant(VI32, [0x8000] * LANES)), ir.Constant(VI32, [16] * LANES))
    rest = b.shl(b.and_(bits, ir.Constant(VI32, [0x7FFF] * LANES)), ir.Constant(VI32, [13] * LANES))
    rebased = b.fmul(b.bitcast(rest, VF32), ir.Constant(VF32, [ir.Constant(F32, 2.0**112)] * LANES))
    return b.bitcast(b.or_(b.bitcast(rebased, VI32), sign), VF32)


@intrinsic
def is_int8(typing: Any, w_PKF: Any) -> Any:
    """Known when it is compiled, so that what is not for this type costs nothing."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.boolean, signature.args[0].dtype == types.int8)

    return types.boolean(w_PKF), build


@intrinsic
def is_int4(typing: Any, w_PKF: Any) -> Any:
    """As `is_int8`."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.boolean, signature.args[0].dtype == types.uint8)

    return types.boolean(w_PKF), build
