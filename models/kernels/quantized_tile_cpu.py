"""Tiles of quantised weights on the CPU, beside those of `models.kernels.tile_cpu`: unpacked in registers.

Whole numbers of 8 or 4 bits are bfloat16 numbers, exactly, so they are multiplied as such; an output's or a
group's scale comes to the sums. How they lie is said in `models.kernels.quantized_cpu`.
"""

from __future__ import annotations

import struct
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import address, load
from models.kernels.scalars_cpu import intrinsic
from models.kernels.tile_cpu import (
    F32,
    I32,
    I64,
    LANES,
    MULTIPLIES_BFLOAT16,
    PANEL,
    VBF16,
    VECTORS,
    VF32,
    VI32,
    broadcast,
    fma,
    multiply_add,
)

GROUP = 32  # inputs that have a scale and a minimum of their own, in 4 bits
SCALES = 2  # rows of 2 · PANEL bytes that hold the scales of an 8-bit panel, after its numbers
GROUP_BYTES = GROUP * PANEL // 2 + 2 * 2 * PANEL  # a panel's numbers of a group, scales, minima

_STEPS = GROUP // 2  # of two inputs
_SHARED = 4  # steps whose numbers share a 16-bit lane
_WORDS = 2 * LANES
_MAX_ROWS = 4  # of 4 bits: their sums and a group's are held in registers side by side
_PERMUTES = bool(llvm.get_host_cpu_features().get("avx512bw")) and MULTIPLIES_BFLOAT16

_VI8 = ir.VectorType(ir.IntType(8), _WORDS)
_VI16 = ir.VectorType(ir.IntType(16), _WORDS)
_VH = ir.VectorType(ir.IntType(16), LANES)


def int8_sums(
    b: Any, rows: int, x_row: Any, x_stride: Any, w_panel: Any, w_rows: Any, unpacked: Any
) -> list[list[Any]]:
    """Scaled sums, a vector for each row and LANES outputs, of a panel in 8 bits.

    `unpacked`, unless None: where its numbers are already in bfloat16.
    """
    steps = b.sub(w_rows, ir.Constant(I64, SCALES))
    sums = [[_zero(b) for _ in range(VECTORS)] for _ in range(rows)]
    with cgutils.for_range(b, steps, intp=I64) as loop:
        x_step = b.mul(loop.index, ir.Constant(I64, 4))
        if unpacked is None:
            w_step = b.add(w_panel, b.mul(loop.index, ir.Constant(I64, 2 * PANEL)))
            ws = [_from_int8(b, b.add(w_step, ir.Constant(I64, _WORDS * v))) for v in range(VECTORS)]
        else:
            w_step = b.add(unpacked, b.mul(loop.index, ir.Constant(I64, 4 * PANEL)))
            ws = [load(b, b.add(w_step, ir.Constant(I64, 4 * LANES * v)), VI32) for v in range(VECTORS)]
        _accumulate(b, sums, ws, x_row, x_stride, x_step)
    scales = b.add(w_panel, b.mul(steps, ir.Constant(I64, 2 * PANEL)))
    loaded = [load(b, b.add(scales, ir.Constant(I64, 4 * LANES * v)), VF32) for v in range(VECTORS)]
    return [[b.fmul(b.load(t), s) for t, s in zip(row, loaded, strict=True)] for row in sums]


def int4_sums(
    b: Any, rows: int, x_row: Any, x_stride: Any, w_panel: Any, groups: Any, sums_row: Any, sums_stride: Any
) -> list[list[Any]]:
    """The same in 4 bits; at `sums_row` are float32 sums of each group's inputs, which minima multiply."""
    vectors: list[list[Any]] = []
    for first in range(0, rows, _MAX_ROWS):
        skipped = ir.Constant(I64, first)
        x = b.add(x_row, b.mul(x_stride, skipped))
        sums = b.add(sums_row, b.mul(sums_stride, skipped))
        count = min(_MAX_ROWS, rows - first)
        vectors += _int4_rows(b, count, x, x_stride, w_panel, groups, sums, sums_stride)
    return vectors


def _int4_rows(
    b: Any, rows: int, x_row: Any, x_stride: Any, w_panel: Any, groups: Any, sums_row: Any, sums_stride: Any
) -> list[list[Any]]:
    totals = [[_zero(b) for _ in range(VECTORS)] for _ in range(rows)]
    own = [[cgutils.alloca_once(b, VF32) for _ in range(VECTORS)] for _ in range(rows)]
    with cgutils.for_range(b, groups, intp=I64) as loop:
        group = b.add(w_panel, b.mul(loop.index, ir.Constant(I64, GROUP_BYTES)))
        for place in (place for row in own for place in row):
            b.store(ir.Constant(VF32, None), place)
        x_group = b.mul(loop.index, ir.Constant(I64, 2 * GROUP))
        for shared in range(_STEPS // _SHARED):
            offset = 2 * _WORDS * VECTORS * shared
            words = [
                load(b, b.add(group, ir.Constant(I64, offset + 2 * _WORDS * v)), _VI16)
                for v in range(VECTORS)
            ]
            for i in range(_SHARED):
                ws = [_from_int4(b, word, i) for word in words]
                _accumulate(
                    b, own, ws, x_row, x_stride, b.add(x_group, ir.Constant(I64, 4 * (_SHARED * shared + i)))
                )
        scales = b.add(group, ir.Constant(I64, GROUP * PANEL // 2))
        for v in range(VECTORS):
            scale = _half(b, b.add(scales, ir.Constant(I64, 2 * LANES * v)))
            least = _half(b, b.add(scales, ir.Constant(I64, 2 * PANEL + 2 * LANES * v)))
            for r in range(rows):
                place = b.add(sums_row, b.mul(sums_stride, ir.Constant(I64, r)))
                place = b.add(place, b.mul(loop.index, ir.Constant(I64, 4)))
                inputs = b.bitcast(broadcast(b, load(b, place, I32)), VF32)
                total = fma(b, b.load(own[r][v]), scale, b.load(totals[r][v]))
                b.store(fma(b, inputs, least, total), totals[r][v])
    return [[b.load(total) for total in row] for row in totals]


def _zero(b: Any) -> Any:
    place = cgutils.alloca_once(b, VF32)
    b.store(ir.Constant(VF32, None), place)
    return place


def _accumulate(b: Any, sums: list[list[Any]], ws: list[Any], x_row: Any, x_stride: Any, offset: Any) -> None:
    """Add each row's pair of inputs times the pairs of weights."""
    for r, row in enumerate(sums):
        place = b.add(b.add(x_row, b.mul(x_stride, ir.Constant(I64, r))), offset)
        x = broadcast(b, load(b, place, I32))
        for total, w in zip(row, ws, strict=True):
            b.store(multiply_add(b, b.load(total), x, w, paired=True), total)


def _from_int8(b: Any, place: Any) -> Any:
    """Pairs of bfloat16 from pairs of bytes."""
    loaded = b.load(b.inttoptr(place, _VI8.as_pointer()), align=1)
    if not MULTIPLIES_BFLOAT16:
        return _pairs(b, b.bitcast(b.sext(loaded, _VI16), VI32), 16)
    halves = []
    for start in (0, LANES):
        mask = ir.Constant(VI32, list(range(start, start + LANES)))
        half = b.shuffle_vector(loaded, ir.Constant(_VI8, ir.Undefined), mask)
        halves.append(b.sitofp(b.sext(half, VI32), VF32))
    kind = ir.FunctionType(VBF16, [VF32, VF32])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    packed = b.call(cgutils.get_or_insert_function(b.module, kind, name), [halves[1], halves[0]])
    return b.bitcast(packed, VI32)


def _from_int4(b: Any, words: Any, i: int) -> Any:
    """Pairs of bfloat16, 0 … 15, from the i-th four bits of each 16."""
    shifted = b.lshr(words, ir.Constant(_VI16, [4 * i] * _WORDS))
    if _PERMUTES:  # which looks at five bits: the table is there twice
        kind = ir.FunctionType(_VI16, [_VI16, _VI16])
        permute = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.hi.512")
        return b.bitcast(b.call(permute, [ir.Constant(_VI16, _TABLE * 2), shifted]), VI32)
    masked = b.and_(shifted, ir.Constant(_VI16, [15] * _WORDS))
    return _pairs(b, b.bitcast(masked, VI32), 16)


_TABLE = [struct.unpack("<I", struct.pack("<f", number))[0] >> 16 for number in range(16)]


def _pairs(b: Any, pairs: Any, bits: int) -> Any:
    """Pairs of bfloat16 from pairs of small whole numbers of 16 bits, on any processor."""
    shift = ir.Constant(VI32, [bits] * LANES)
    low = b.bitcast(b.sitofp(b.ashr(b.shl(pairs, shift), shift), VF32), VI32)
    high = b.bitcast(b.sitofp(b.ashr(pairs, shift), VF32), VI32)
    return b.or_(b.lshr(low, shift), high)  # what is exact ends in zeros


def _half(b: Any, place: Any) -> Any:
    """LANES numbers of float16 as float32; no infinities."""
    bits = b.zext(load(b, place, _VH), VI32)
    sign = b.shl(b.and_(bits, ir.Constant(VI32, [0x8000] * LANES)), ir.Constant(VI32, [16] * LANES))
    rest = b.shl(b.and_(bits, ir.Constant(VI32, [0x7FFF] * LANES)), ir.Constant(VI32, [13] * LANES))
    rebased = b.fmul(b.bitcast(rest, VF32), ir.Constant(VF32, [ir.Constant(F32, 2.0**112)] * LANES))
    return b.bitcast(b.or_(b.bitcast(rebased, VI32), sign), VF32)


@intrinsic
def unpack_int8(typing: Any, w_PKF: Any, panel: Any, out_RF: Any, row: Any) -> Any:
    """A panel's numbers as bfloat16, those of a step into each row of `out_RF` from `row` on."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        w, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2))
        w_panel, out_panel = address(b, w, args[1]), address(b, out, args[3])
        steps = b.sub(cgutils.unpack_tuple(b, w.shape)[1], ir.Constant(I64, SCALES))
        with cgutils.for_range(b, steps, intp=I64) as loop:
            w_step = b.add(w_panel, b.mul(loop.index, ir.Constant(I64, 2 * PANEL)))
            out_step = b.add(out_panel, b.mul(loop.index, ir.Constant(I64, 4 * PANEL)))
            for v in range(VECTORS):
                pairs = _from_int8(b, b.add(w_step, ir.Constant(I64, _WORDS * v)))
                place = b.add(out_step, ir.Constant(I64, 4 * LANES * v))
                b.store(pairs, b.inttoptr(place, VI32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(w_PKF, types.int64, out_RF, types.int64), build


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
