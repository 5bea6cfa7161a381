"""Weights in 8 and 4 bits, unpacked in registers for the tiles of `models.kernels.tile_cpu`.

Whole numbers of so few bits are bfloat16 numbers, exactly, and are multiplied as such. A processor without
instructions for those multiplies them as they are, with inputs in 16 bits (`models.kernels.inputs_cpu`). How
they lie is said in `models.kernels.quantized_cpu`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

from models.kernels.rows_cpu import load
from models.kernels.tile_cpu import (
    F32,
    I64,
    LANES,
    MULTIPLIES_BFLOAT16,
    PANEL,
    VBF16,
    VECTORS,
    VF32,
    VI32,
)

GROUP = 32  # inputs that have a scale and a minimum of their own, in 4 bits
STEPS = GROUP // 2  # of two inputs
SHARED = 4  # steps whose numbers share a 16-bit lane
SCALES = 2  # rows of 2 · PANEL bytes that hold the scales of an 8-bit panel, after its numbers
GROUP_BYTES = GROUP * PANEL // 2 + 2 * 2 * PANEL  # a panel's numbers of a group, scales, minima

_WORDS = 2 * LANES
_WIDENS_HALVES = bool(llvm.get_host_cpu_features().get("f16c"))

_VI8 = ir.VectorType(ir.IntType(8), _WORDS)
_VI16 = ir.VectorType(ir.IntType(16), _WORDS)
_VH = ir.VectorType(ir.IntType(16), LANES)


def read_int8(b: Any, w_panel: Any, step: Any, vectors: range) -> list[Any]:
    """Of each output a step's two numbers, as they are multiplied."""
    start = b.add(w_panel, b.mul(step, ir.Constant(I64, 2 * PANEL)))
    return [_from_int8(b, b.add(start, ir.Constant(I64, _WORDS * v))) for v in vectors]


def int8_steps(b: Any, w_rows: Any) -> Any:
    return b.sub(w_rows, ir.Constant(I64, SCALES))


def scaled(b: Any, sums: list[list[Any]], w_panel: Any, steps: Any, vectors: range) -> list[list[Any]]:
    """Sums of whole numbers times the scales of a panel in 8 bits."""
    scales = b.add(w_panel, b.mul(steps, ir.Constant(I64, 2 * PANEL)))
    loaded = [load(b, b.add(scales, ir.Constant(I64, 4 * LANES * v)), VF32) for v in vectors]
    return [[b.fmul(t, s) for t, s in zip(row, loaded, strict=True)] for row in sums]


def read_int4(b: Any, w_panel: Any, group: Any, shared: Any, vectors: range) -> Iterator[list[Any]]:
    """As `read_int8`, of SHARED steps of a group in turn."""
    start = b.add(w_panel, b.mul(group, ir.Constant(I64, GROUP_BYTES)))
    start = b.add(start, b.mul(shared, ir.Constant(I64, 2 * _WORDS * VECTORS)))
    words = [load(b, b.add(start, ir.Constant(I64, 2 * _WORDS * v)), _VI16) for v in vectors]
    for i in range(SHARED):
        yield [_from_int4(b, word, i) for word in words]


def int4_group(b: Any, w_panel: Any, group: Any, v: int) -> tuple[Any, Any]:
    """Scales and minima of one vector of outputs."""
    start = b.add(w_panel, b.mul(group, ir.Constant(I64, GROUP_BYTES)))
    scales = b.add(start, ir.Constant(I64, GROUP * PANEL // 2 + 2 * LANES * v))
    return _half(b, scales), _half(b, b.add(scales, ir.Constant(I64, 2 * PANEL)))


def _from_int8(b: Any, place: Any) -> Any:
    loaded = b.load(b.inttoptr(place, _VI8.as_pointer()), align=1)
    if not MULTIPLIES_BFLOAT16:
        return b.bitcast(b.sext(loaded, _VI16), VI32)
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
    """0 … 15, from the i-th four bits of each 16."""
    shifted = b.lshr(words, ir.Constant(_VI16, [4 * i] * _WORDS))
    if MULTIPLIES_BFLOAT16:  # the permutation looks at five bits: the table is there twice
        kind = ir.FunctionType(_VI16, [_VI16, _VI16])
        permute = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.hi.512")
        return b.bitcast(b.call(permute, [ir.Constant(_VI16, _TABLE * 2), shifted]), VI32)
    return b.bitcast(b.and_(shifted, ir.Constant(_VI16, [15] * _WORDS)), VI32)


_TABLE = [struct.unpack("<I", struct.pack("<f", number))[0] >> 16 for number in range(16)]


def _half(b: Any, place: Any) -> Any:
    """LANES numbers of float16 as float32; no infinities."""
    if _WIDENS_HALVES:
        return b.fpext(load(b, place, ir.VectorType(ir.HalfType(), LANES)), VF32)
    bits = b.zext(load(b, place, _VH), VI32)
    sign = b.shl(b.and_(bits, ir.Constant(VI32, [0x8000] * LANES)), ir.Constant(VI32, [16] * LANES))
    rest = b.shl(b.and_(bits, ir.Constant(VI32, [0x7FFF] * LANES)), ir.Constant(VI32, [13] * LANES))
    rebased = b.fmul(b.bitcast(rest, VF32), ir.Constant(VF32, [ir.Constant(F32, 2.0**112)] * LANES))
    return b.bitcast(b.or_(b.bitcast(rebased, VI32), sign), VF32)
