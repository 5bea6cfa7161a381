"""Rows times one packed panel, in whatever precision its weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.quantized_tile_cpu import GROUP, int4_sums, is_int4, scaled
from models.kernels.rows_cpu import address
from models.kernels.scalars_cpu import intrinsic, jit, parallel_jit, widen
from models.kernels.tile_cpu import (
    BLOCK,
    I64,
    LANES,
    MULTIPLIES_BFLOAT16,
    PANEL,
    ROWS,
    VECTORS,
    VF32,
    tile_sums,
)
from models.kernels.unpacked_cpu import (
    packed_panel,
    step_inputs,
    unpack,
    unpacked_panel,
    unpacked_rows,
    unpacks,
)

# Rows; for fewer it is sooner to unpack anew in registers.
_UNPACKED_ABOVE = 3 * ROWS if MULTIPLIES_BFLOAT16 else 4


def _tile(rows: int, unpacked: bool) -> Callable[..., None]:
    """The product of `rows` rows; what `tile_product` calls."""

    @intrinsic
    def tile(typing: Any, x: Any, sums: Any, row: Any, w: Any, panel: Any, y: Any, out: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            x_MK, sums_Mg, w_PKF, y_MF = (
                context.make_array(kinds[i])(context, b, args[i]) for i in (0, 1, 3, 5)
            )
            x_row, w_panel = address(b, x_MK, args[2]), address(b, w_PKF, args[4])
            x_stride = cgutils.unpack_tuple(b, x_MK.strides)[0]
            K = cgutils.unpack_tuple(b, w_PKF.shape)[1]
            stored, paired = kinds[3].dtype, kinds[0].dtype == types.uint16
            size = BLOCK if unpacked else VECTORS
            for first in range(0, VECTORS, size):
                vectors = range(first, first + size)
                read, steps = packed_panel(b, stored, w_panel, K, vectors)
                inputs = b.mul(steps, ir.Constant(I64, step_inputs(stored)))
                if unpacked:
                    read = unpacked_panel(b, address(b, y_MF, ir.Constant(I64, ROWS)), inputs, first)
                if stored == types.uint8:
                    sums_row = address(b, sums_Mg, args[2])
                    sums_stride = cgutils.unpack_tuple(b, sums_Mg.strides)[0]
                    given = read if unpacked else None
                    totals = int4_sums(
                        b, rows, vectors, given, w_panel, K, x_row, x_stride, sums_row, sums_stride
                    )
                else:
                    count = inputs if unpacked else steps
                    totals = tile_sums(b, rows, size, read, count, x_row, x_stride, paired)
                if stored == types.int8:
                    totals = scaled(b, totals, w_panel, steps, vectors)
                for r, of_row in enumerate(totals):
                    y_row = address(b, y_MF, b.add(args[6], ir.Constant(I64, r)))
                    for v, total in zip(vectors, of_row, strict=True):
                        place = b.add(y_row, ir.Constant(I64, 4 * LANES * v))
                        b.store(total, b.inttoptr(place, VF32.as_pointer()), align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(x, sums, i, w, i, y, i), build

    made: Callable[..., None] = tile
    return made


_tile_8, _tile_4, _tile_2, _tile_1 = (_tile(rows, unpacked=False) for rows in (8, 4, 2, 1))
_unpacked_8, _unpacked_6, _unpacked_4, _unpacked_2, _unpacked_1 = (
    _tile(rows, unpacked=True) for rows in (8, 6, 4, 2, 1)
)


@jit
def tile_product(x_MK: Any, sums_Mg: Any, first: int, last: int, w_PKF: Any, panel: int, y_RF: Any) -> None:
    """y = rows `first` … `last - 1` of x (at most ROWS) times one packed panel, in float32.

    `sums_Mg` is from `group_sums`, `y_RF` from `outputs` of this panel.
    """
    if unpacks(w_PKF) and y_RF.shape[0] > ROWS:
        _unpacked_product(x_MK, sums_Mg, first, last, w_PKF, panel, y_RF)
        return
    row, out = first, 0
    while row < last:
        left = last - row
        if left >= 8 and ROWS >= 8:
            _tile_8(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 8, out + 8
        elif left >= 4 and ROWS >= 8:
            _tile_4(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 4, out + 4
        elif left >= 2:
            _tile_2(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 2, out + 2
        else:
            _tile_1(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 1, out + 1


@jit
def _unpacked_product(
    x_MK: Any, sums_Mg: Any, first: int, last: int, w_PKF: Any, panel: int, y_RF: Any
) -> None:
    row, out = first, 0
    while row < last:
        left = last - row
        if left >= 8 and ROWS >= 8:
            _unpacked_8(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 8, out + 8
        elif left >= 6 and ROWS == 6:
            _unpacked_6(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 6, out + 6
        elif left >= 4:
            _unpacked_4(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 4, out + 4
        elif left >= 2:
            _unpacked_2(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 2, out + 2
        else:
            _unpacked_1(x_MK, sums_Mg, row, w_PKF, panel, y_RF, out)
            row, out = row + 1, out + 1


@jit
def outputs(w_PKF: Any, panel: int, rows: int) -> Any:
    """Room for a tile's outputs, [ROWS, PANEL]; behind it, for many rows, the panel unpacked."""
    if rows > _UNPACKED_ABOVE and unpacks(w_PKF):
        y_RF = np.empty((ROWS + unpacked_rows(w_PKF), PANEL), np.float32)
        unpack(w_PKF, panel, y_RF, ROWS)
        return y_RF
    return np.empty((ROWS, PANEL), np.float32)


@jit
def group_sums(x_MK: Any, w_PKF: Any) -> Any:
    """Sums of the inputs of each group, float32 [M, g], which minima of weights in 4 bits multiply."""
    if not is_int4(w_PKF):
        return np.empty((0, 0), np.float32)
    sums_Mg = np.empty((x_MK.shape[0], w_PKF.shape[1]), np.float32)
    if x_MK.shape[0] <= ROWS:
        for m in range(x_MK.shape[0]):
            _sum_groups(m, x_MK, sums_Mg)
    else:
        _sum_rows(x_MK, sums_Mg)
    return sums_Mg


@parallel_jit
def _sum_rows(x_MK: Any, sums_Mg: Any) -> None:
    for task in numba.prange(x_MK.shape[0]):
        _sum_groups(np.int64(task), x_MK, sums_Mg)


@jit
def _sum_groups(m: int, x_MK: Any, sums_Mg: Any) -> None:
    for g in range(sums_Mg.shape[1]):
        total = np.float32(0)
        for i in range(GROUP):
            total += widen(x_MK[m, g * GROUP + i])
        sums_Mg[m, g] = total
