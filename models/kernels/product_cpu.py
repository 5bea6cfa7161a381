"""Rows times one packed panel, in whatever precision its weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.quantized_tile_cpu import (
    GROUP,
    SCALES,
    int4_sums,
    int8_sums,
    is_int4,
    is_int8,
    unpack_int8,
)
from models.kernels.rows_cpu import address
from models.kernels.scalars_cpu import intrinsic, jit, parallel_jit, widen
from models.kernels.tile_cpu import I64, LANES, PANEL, ROWS, VF32, tile_sums

_UNPACKED_ABOVE = 3 * ROWS  # rows; for fewer it is sooner to unpack 8 bits anew in registers


def _tile(rows: int) -> Callable[..., None]:
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
            stored = kinds[3].dtype

            def store(totals: list[list[Any]]) -> None:
                for r, row in enumerate(totals):
                    y_row = address(b, y_MF, b.add(args[6], ir.Constant(I64, r)))
                    for v, total in enumerate(row):
                        place = b.add(y_row, ir.Constant(I64, 4 * LANES * v))
                        b.store(total, b.inttoptr(place, VF32.as_pointer()), align=4)

            if stored == types.int8:
                size = cgutils.unpack_tuple(b, y_MF.shape)[0]
                with b.if_else(b.icmp_signed(">", size, ir.Constant(I64, ROWS))) as (behind, packed):
                    with behind:
                        unpacked = address(b, y_MF, ir.Constant(I64, ROWS))
                        store(int8_sums(b, rows, x_row, x_stride, w_panel, K, unpacked))
                    with packed:
                        store(int8_sums(b, rows, x_row, x_stride, w_panel, K, None))
            elif stored == types.uint8:
                sums_row = address(b, sums_Mg, args[2])
                sums_stride = cgutils.unpack_tuple(b, sums_Mg.strides)[0]
                store(int4_sums(b, rows, x_row, x_stride, w_panel, K, sums_row, sums_stride))
            else:
                store(tile_sums(b, rows, x_row, x_stride, w_panel, K, stored == types.uint16))
            return context.get_dummy_value()

        i = types.int64
        return types.void(x, sums, i, w, i, y, i), build

    made: Callable[..., None] = tile
    return made


_tile_8, _tile_4, _tile_2, _tile_1 = (_tile(rows) for rows in (8, 4, 2, 1))


@jit
def tile_product(x_MK: Any, sums_Mg: Any, first: int, last: int, w_PKF: Any, panel: int, y_RF: Any) -> None:
    """y = rows `first` … `last - 1` of x (at most ROWS) times one packed panel, in float32.

    `sums_Mg` is from `group_sums`, `y_RF` from `outputs` of this panel.
    """
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
def outputs(w_PKF: Any, panel: int, rows: int) -> Any:
    """Room for a tile's outputs, [ROWS, PANEL]; behind it, for many rows, a panel in 8 bits unpacked."""
    if is_int8(w_PKF) and rows > _UNPACKED_ABOVE:
        y_RF = np.empty((ROWS + w_PKF.shape[1] - SCALES, PANEL), np.float32)
        unpack_int8(w_PKF, panel, y_RF, ROWS)
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
