"""The innermost loops of the CPU's kernels, which numba cannot say in Python: LLVM instructions by hand.

`tile_sums` multiplies a few rows with a panel of packed weights and keeps the sums in registers. It is
written for vectors of sixteen float32; LLVM cuts them to what the processor has.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

LANES = 16
VECTORS = 3
PANEL = LANES * VECTORS  # output features that are computed at once

_FEATURES = llvm.get_host_cpu_features()
MULTIPLIES_BFLOAT16 = bool(_FEATURES.get("avx512bf16"))
# Sums of 8 rows fill 24 of AVX-512's 32 registers; of 2 rows 12 of AVX2's 16.
ROWS = 8 if _FEATURES.get("avx512f") else 2

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
VI32, VF32 = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bfloat, which llvmlite has no name for."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)

    def _to_string(self) -> str:
        return "bfloat"


VBF16 = ir.VectorType(_BFloat(), 2 * LANES)


def tile_sums(
    b: Any, rows: int, x_row: Any, x_stride: Any, w_panel: Any, K: Any, paired: bool
) -> list[list[Any]]:
    """Emit the loop over K steps: rows × VECTORS vectors of sums, in registers as soon as LLVM optimises.

    At the addresses `x_row` and `w_panel` are the first row, `x_stride` bytes before the next, and the panel.
    """
    sums = [[cgutils.alloca_once(b, VF32) for _ in range(VECTORS)] for _ in range(rows)]
    for row in sums:
        for place in row:
            b.store(ir.Constant(VF32, None), place)
    with cgutils.for_range(b, K, intp=I64) as loop:
        w_step = b.add(w_panel, b.mul(loop.index, ir.Constant(I64, 4 * PANEL)))
        ws = []
        for v in range(VECTORS):
            place = b.inttoptr(b.add(w_step, ir.Constant(I64, 4 * LANES * v)), VI32.as_pointer())
            ws.append(b.load(place, align=4))
        x_step = b.add(x_row, b.mul(loop.index, ir.Constant(I64, 4)))
        for r in range(rows):
            place = b.inttoptr(b.add(x_step, b.mul(x_stride, ir.Constant(I64, r))), I32.as_pointer())
            x = broadcast(b, b.load(place, align=2))
            for v in range(VECTORS):
                b.store(multiply_add(b, b.load(sums[r][v]), x, ws[v], paired), sums[r][v])
    return [[b.load(total) for total in row] for row in sums]


def broadcast(b: Any, value: Any) -> Any:
    """32 bits in every lane."""
    undefined = ir.Constant(VI32, ir.Undefined)
    vector = b.insert_element(undefined, value, ir.Constant(I32, 0))
    return b.shuffle_vector(vector, undefined, ir.Constant(VI32, None))


def multiply_add(b: Any, total: Any, x: Any, w: Any, paired: bool) -> Any:
    """total + x·w by 32-bit lanes; `paired`: each holds two bfloat16, and both products are added."""
    if not paired:
        return fma(b, b.bitcast(x, VF32), b.bitcast(w, VF32), total)
    if MULTIPLIES_BFLOAT16:
        kind = ir.FunctionType(VF32, [VF32, VBF16, VBF16])
        dot = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return b.call(dot, [total, b.bitcast(x, VBF16), b.bitcast(w, VBF16)])
    high, sixteen = ir.Constant(VI32, [0xFFFF0000] * LANES), ir.Constant(VI32, [16] * LANES)
    x_1, w_1 = (b.bitcast(b.shl(v, sixteen), VF32) for v in (x, w))
    x_2, w_2 = (b.bitcast(b.and_(v, high), VF32) for v in (x, w))
    return fma(b, x_2, w_2, fma(b, x_1, w_1, total))


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z."""
    kind = ir.FunctionType(VF32, [VF32, VF32, VF32])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, y, z])
