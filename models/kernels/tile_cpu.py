"""The innermost loops of the CPU's kernels, which numba cannot say in Python: LLVM instructions by hand.

`tile_sums` multiplies a few rows with a panel of packed weights and keeps the sums in registers. It is
written for vectors of sixteen float32; LLVM cuts them to what the processor has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

LANES = 16
VECTORS = 3
PANEL = LANES * VECTORS  # output features that are computed at once

_FEATURES = llvm.get_host_cpu_features()
# Weights in 16, 8 or 4 bits are then multiplied in pairs of bfloat16, with pairs of inputs; else those in 16
# as float32, and those in fewer in pairs of whole numbers.
MULTIPLIES_BFLOAT16 = bool(_FEATURES.get("avx512bf16"))
# Sums of 8 rows fill 24 of AVX-512's 32 registers; of 2 rows, or of 6 a vector at a time, 12 of AVX2's 16.
MANY_REGISTERS = bool(_FEATURES.get("avx512f"))
ROWS = 8 if MANY_REGISTERS else 6
BLOCK = VECTORS if MANY_REGISTERS else 1  # vectors at a time, where rows are many
# By what a processor has: instructions that multiply pairs of 16 bits and add both products, and the lanes of
# 32 bits that they fill.
_PAIR_PRODUCTS = {"avx512bw": ("llvm.x86.avx512.pmaddw.d.512", 16), "avx2": ("llvm.x86.avx2.pmadd.wd", 8)}

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

# (builder, step) → vectors of weights, for each of the step's inputs or pairs of inputs.
Read = Callable[[Any, Any], list[list[Any]]]


def accumulate(
    b: Any, sums: list[list[Any]], weights: Iterable[list[Any]], x_row: Any, x_stride: Any, paired: bool
) -> None:
    """Add inputs times weights to each row's sums, of as many vectors as the weights of an input have.

    At `x_row` is the first row's first input, 32 bits of it; `x_stride` bytes further the next row's.
    """
    for i, ws in enumerate(weights):
        xs: dict[int, Any] = {}
        for r, v in _order(len(sums), len(ws)):
            if r not in xs:
                place = b.add(b.add(x_row, b.mul(x_stride, ir.Constant(I64, r))), ir.Constant(I64, 4 * i))
                xs[r] = broadcast(b, b.load(b.inttoptr(place, I32.as_pointer()), align=2))
            b.store(multiply_add(b, b.load(sums[r][v]), xs[r], ws[v], paired), sums[r][v])


def _order(rows: int, vectors: int) -> list[tuple[int, int]]:
    """Of a tile's products. Where registers are few, a vector of weights is done with before the next."""
    if MANY_REGISTERS:
        return [(r, v) for r in range(rows) for v in range(vectors)]
    return [(r, v) for v in range(vectors) for r in range(rows)]


def tile_sums(
    b: Any, rows: int, vectors: int, read: Read, steps: Any, x_row: Any, x_stride: Any, paired: bool
) -> list[list[Any]]:
    """Emit the loop over steps: rows × vectors sums, in registers as soon as LLVM optimises."""
    sums = zeros(b, rows, vectors)
    with cgutils.for_range(b, steps, intp=I64) as loop:
        weights = read(b, loop.index)
        x_step = b.add(x_row, b.mul(loop.index, ir.Constant(I64, 4 * len(weights))))
        accumulate(b, sums, weights, x_step, x_stride, paired)
    return [[b.load(total) for total in row] for row in sums]


def zeros(b: Any, rows: int, vectors: int, kind: Any = VF32) -> list[list[Any]]:
    """Places of sums."""
    sums = [[cgutils.alloca_once(b, kind) for _ in range(vectors)] for _ in range(rows)]
    for place in (place for row in sums for place in row):
        b.store(ir.Constant(kind, None), place)
    return sums


def load_lanes(b: Any, start: Any, index: Any, width: int, vectors: range) -> list[Any]:
    """Some vectors of the index-th `width` ones from an address on."""
    step = b.add(start, b.mul(index, ir.Constant(I64, 4 * LANES * width)))
    places = (b.add(step, ir.Constant(I64, 4 * LANES * v)) for v in vectors)
    return [b.load(b.inttoptr(place, VI32.as_pointer()), align=4) for place in places]


def bfloat16_halves(b: Any, pairs: Any) -> tuple[Any, Any]:
    """The first and the second of each pair, as float32."""
    high, sixteen = ir.Constant(VI32, [0xFFFF0000] * LANES), ir.Constant(VI32, [16] * LANES)
    return b.bitcast(b.shl(pairs, sixteen), VF32), b.bitcast(b.and_(pairs, high), VF32)


def broadcast(b: Any, value: Any) -> Any:
    """32 bits in every lane."""
    undefined = ir.Constant(VI32, ir.Undefined)
    vector = b.insert_element(undefined, value, ir.Constant(I32, 0))
    return b.shuffle_vector(vector, undefined, ir.Constant(VI32, None))


def multiply_add(b: Any, total: Any, x: Any, w: Any, paired: bool) -> Any:
    """total + x·w by 32-bit lanes.

    `paired`: each lane holds two bfloat16, or two whole numbers where the total is one, and both products are
    added.
    """
    if total.type == VI32:
        return b.add(total, _whole_products(b, x, w))
    if not paired:
        return fma(b, b.bitcast(x, VF32), b.bitcast(w, VF32), total)
    if MULTIPLIES_BFLOAT16:
        kind = ir.FunctionType(VF32, [VF32, VBF16, VBF16])
        dot = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return b.call(dot, [total, b.bitcast(x, VBF16), b.bitcast(w, VBF16)])
    (x_1, x_2), (w_1, w_2) = bfloat16_halves(b, x), bfloat16_halves(b, w)
    return fma(b, x_2, w_2, fma(b, x_1, w_1, total))


def _whole_products(b: Any, x: Any, w: Any) -> Any:
    """Of pairs of 16 bits, added by lanes of 32."""
    feature = next((name for name in _PAIR_PRODUCTS if _FEATURES.get(name)), None)
    if feature is None:
        sixteen = ir.Constant(VI32, [16] * LANES)
        (x_1, x_2), (w_1, w_2) = ((b.ashr(b.shl(v, sixteen), sixteen), b.ashr(v, sixteen)) for v in (x, w))
        return b.add(b.mul(x_1, w_1), b.mul(x_2, w_2))
    name, lanes = _PAIR_PRODUCTS[feature]
    halves, sums = ir.VectorType(ir.IntType(16), 2 * lanes), ir.VectorType(I32, lanes)
    instruction = cgutils.get_or_insert_function(b.module, ir.FunctionType(sums, [halves, halves]), name)
    parts = []
    for first in range(0, LANES, lanes):
        mask = ir.Constant(sums, list(range(first, first + lanes)))
        part = (b.bitcast(b.shuffle_vector(v, v, mask), halves) for v in (x, w))
        parts.append(b.call(instruction, list(part)))
    mask = ir.Constant(VI32, list(range(LANES)))
    return b.shuffle_vector(parts[0], parts[-1], mask) if len(parts) > 1 else parts[0]


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z."""
    kind = ir.FunctionType(VF32, [VF32, VF32, VF32])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, y, z])
