"""Rows times one packed panel, in whatever precision its weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.group_tile_cpu import Rows, group_sums
from models.kernels.quantized_tile_cpu import int8_steps, scaled
from models.kernels.rows_cpu import LINE, address, fetch
from models.kernels.scalars_cpu import intrinsic, jit
from models.kernels.tile_cpu import (
    BLOCK,
    I64,
    LANES,
    MULTIPLIES_BFLOAT16,
    PANEL,
    ROWS,
    VECTORS,
    VF32,
    Read,
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


def _fetching(read: Read, w_panel: Any) -> Read:
    """Of a panel's first vector, with the other ones' lines asked for: they are between, and read next."""

    def read_first(b: Any, step: Any) -> list[list[Any]]:
        start = b.add(w_panel, b.mul(step, ir.Constant(I64, 4 * PANEL)))
        fetch(b, start, range(LINE, 4 * PANEL, LINE))
        return read(b, step)

    return read_first


def _tile(rows: int, unpacked: bool) -> Callable[..., None]:
    """The product of `rows` rows; what `tile_product` calls."""

    @intrinsic
    def tile(typing: Any, x: Any, groups: Any, row: Any, w: Any, panel: Any, y: Any, out: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            x_MK, groups_Mg2, w_PKF, y_MF = (
                context.make_array(kinds[i])(context, b, args[i]) for i in (0, 1, 3, 5)
            )
            x_row, w_panel = address(b, x_MK, args[2]), address(b, w_PKF, args[4])
            x_stride = cgutils.unpack_tuple(b, x_MK.strides)[0]
            K = cgutils.unpack_tuple(b, w_PKF.shape)[1]
            stored, paired = kinds[3].dtype, kinds[0].dtype == types.uint16
            by_groups = stored == types.uint8 or kinds[0].dtype == types.int16
            at = Rows(
                x_row,
                x_stride,
                address(b, groups_Mg2, args[2]),
                cgutils.unpack_tuple(b, groups_Mg2.strides)[0],
            )
            size = BLOCK if unpacked or rows > 2 else VECTORS  # so that all sums have registers
            for first in range(0, VECTORS, size):
                vectors = range(first, first + size)
                if by_groups:
                    count = cgutils.unpack_tuple(b, groups_Mg2.shape)[1]
                    totals = group_sums(b, rows, vectors, stored == types.uint8, w_panel, count, at)
                else:
                    read, steps = packed_panel(b, stored, w_panel, K, vectors)
                    if unpacked:
                        steps = b.mul(steps, ir.Constant(I64, step_inputs(stored)))
                        read = unpacked_panel(b, address(b, y_MF, ir.Constant(I64, ROWS)), steps, first)
                    elif vectors == range(1):
                        read = _fetching(read, w_panel)
                    totals = tile_sums(b, rows, size, read, steps, x_row, x_stride, paired)
                if stored == types.int8:
                    totals = scaled(b, totals, w_panel, int8_steps(b, K), vectors)
                for r, of_row in enumerate(totals):
                    y_row = address(b, y_MF, b.add(args[6], ir.Constant(I64, r)))
                    for v, total in zip(vectors, of_row, strict=True):
                        place = b.add(y_row, ir.Constant(I64, 4 * LANES * v))
                        b.store(total, b.inttoptr(place, VF32.as_pointer()), align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(x, groups, i, w, i, y, i), build

    made: Callable[..., None] = tile
    return made


_tile_8, _tile_6, _tile_4, _tile_2, _tile_1 = (_tile(rows, unpacked=False) for rows in (8, 6, 4, 2, 1))
_unpacked_8, _unpacked_6, _unpacked_4, _unpacked_2, _unpacked_1 = (
    _tile(rows, unpacked=True) for rows in (8, 6, 4, 2, 1)
)


@jit
def tile_product(
    x_MK: Any, groups_Mg2: Any, first: int, last: int, w_PKF: Any, panel: int, y_RF: Any
) -> None:
    """y = rows `first` … `last - 1` of x (at most ROWS) times one packed panel, in float32.

    `x_MK` and `groups_Mg2` are from `inputs` (`inputs_cpu`), `y_RF` from `outputs` of this panel.
    """
    if unpacks(w_PKF) and y_RF.shape[0] > ROWS:
        _unpacked_product(x_MK, groups_Mg2, first, last, w_PKF, panel, y_RF)
        return
    row, out = first, 0
    while row < last:
        left = last - row
        if left >= 8 and ROWS >= 8:
            _tile_8(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 8, out + 8
        elif left >= 6 and ROWS == 6:
            _tile_6(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 6, out + 6
        elif left >= 4:
            _tile_4(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 4, out + 4
        elif left >= 2:
            _tile_2(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 2, out + 2
        else:
            _tile_1(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 1, out + 1


@jit
def _unpacked_product(
    x_MK: Any, groups_Mg2: Any, first: int, last: int, w_PKF: Any, panel: int, y_RF: Any
) -> None:
    row, out = first, 0
    while row < last:
        left = last - row
        if left >= 8 and ROWS >= 8:
            _unpacked_8(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 8, out + 8
        elif left >= 6 and ROWS == 6:
            _unpacked_6(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 6, out + 6
        elif left >= 4:
            _unpacked_4(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 4, out + 4
        elif left >= 2:
            _unpacked_2(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 2, out + 2
        else:
            _unpacked_1(x_MK, groups_Mg2, row, w_PKF, panel, y_RF, out)
            row, out = row + 1, out + 1


@jit
def outputs(w_PKF: Any, panel: int, rows: int) -> Any:
    """Room for a tile's outputs, [ROWS, PANEL]; behind it, for many rows, the panel unpacked."""
    if rows > _UNPACKED_ABOVE and unpacks(w_PKF):
        y_RF = np.empty((ROWS + unpacked_rows(w_PKF), PANEL), np.float32)
        unpack(w_PKF, panel, y_RF, ROWS)
        return y_RF
    return np.empty((ROWS, PANEL), np.float32)
