"""Tiles whose sums are taken group by group: of weights in 4 bits, and of inputs in 16.

Within a group whole numbers are multiplied, and scales and minima come to its sums. Where inputs are whole
numbers as well these are exact: 32 products of 127 and 32767 at most are below 2²⁷.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from models.kernels.quantized_tile_cpu import GROUP_BYTES, SHARED, STEPS, int4_group, read_int4, read_int8
from models.kernels.rows_cpu import LINE, fetch, load, splat
from models.kernels.tile_cpu import (
    F32,
    I64,
    MANY_REGISTERS,
    MULTIPLIES_BFLOAT16,
    PANEL,
    ROWS,
    VF32,
    VI32,
    accumulate,
    fma,
    zeros,
)

# A group's sums and those of all are held in registers side by side.
_MAX_ROWS = 4 if MANY_REGISTERS else ROWS
# Steps written out. Of a whole group LLVM would keep the inputs in registers that are not there.
_UNROLLED = STEPS if MANY_REGISTERS else SHARED


class Rows(NamedTuple):
    """Addresses of a tile's first row, and how far the next one lies: of its inputs, and of their groups."""

    x: Any
    x_stride: Any
    groups: Any
    groups_stride: Any


def group_sums(
    b: Any, rows: int, vectors: range, int4: bool, w_panel: Any, groups: Any, at: Rows
) -> list[list[Any]]:
    """Sums of a packed panel. In 8 bits they are still to be `scaled`."""
    totals: list[list[Any]] = []
    for first in range(0, rows, _MAX_ROWS):
        count = min(_MAX_ROWS, rows - first)
        totals += _sums(b, count, vectors, int4, w_panel, groups, _skip(b, at, first))
    return totals


def _sums(
    b: Any, rows: int, vectors: range, int4: bool, w_panel: Any, groups: Any, at: Rows
) -> list[list[Any]]:
    totals = zeros(b, rows, len(vectors))
    own = zeros(b, rows, len(vectors), VF32 if MULTIPLIES_BFLOAT16 else VI32)
    size = GROUP_BYTES if int4 else 2 * PANEL * STEPS
    with cgutils.for_range(b, groups, intp=I64) as loop:
        group = loop.index
        if vectors == range(1):  # the other ones' lines are between these: asked for in the order of memory
            fetch(b, b.add(w_panel, b.mul(group, ir.Constant(I64, size))), range(0, size, LINE))
        for place in (place for row in own for place in row):
            b.store(ir.Constant(place.type.pointee, None), place)
        _accumulate_group(b, own, vectors, int4, w_panel, group, at)
        for i, v in enumerate(vectors):
            of_outputs = int4_group(b, w_panel, group, v) if int4 else None
            for r in range(rows):
                of_inputs = b.add(_skip(b, at, r).groups, b.mul(group, ir.Constant(I64, 8)))
                total = _added(b, b.load(totals[r][i]), b.load(own[r][i]), of_inputs, of_outputs)
                b.store(total, totals[r][i])
    return [[b.load(total) for total in row] for row in totals]


def _accumulate_group(
    b: Any, own: list[list[Any]], vectors: range, int4: bool, w_panel: Any, group: Any, at: Rows
) -> None:
    first = b.mul(group, ir.Constant(I64, STEPS))
    with cgutils.for_range(b, ir.Constant(I64, STEPS // _UNROLLED), intp=I64) as loop:
        step = b.add(first, b.mul(loop.index, ir.Constant(I64, _UNROLLED)))
        weights: Iterable[list[Any]]
        if int4:
            shared = b.mul(loop.index, ir.Constant(I64, _UNROLLED // SHARED))
            parts = (b.add(shared, ir.Constant(I64, i)) for i in range(_UNROLLED // SHARED))
            weights = chain.from_iterable(read_int4(b, w_panel, group, part, vectors) for part in parts)
        else:
            steps = (b.add(step, ir.Constant(I64, i)) for i in range(_UNROLLED))
            weights = (read_int8(b, w_panel, one, vectors) for one in steps)
        accumulate(b, own, weights, b.add(at.x, b.mul(step, ir.Constant(I64, 4))), at.x_stride, paired=True)


def _added(b: Any, total: Any, own: Any, of_inputs: Any, of_outputs: tuple[Any, Any] | None) -> Any:
    """A group's own sums, made of whole numbers, added to those of all.

    At `of_inputs` are the group's scale of inputs and their sum, which minima multiply.
    """
    factor = None
    if not MULTIPLIES_BFLOAT16:
        own, factor = b.sitofp(own, VF32), splat(b, load(b, of_inputs, F32))
    if of_outputs is None:
        return fma(b, own, factor, total)
    scale, least = of_outputs
    x_sum = splat(b, load(b, b.add(of_inputs, ir.Constant(I64, 4)), F32))
    total = fma(b, own, scale if factor is None else b.fmul(scale, factor), total)
    return fma(b, x_sum, least, total)


def _skip(b: Any, at: Rows, rows: int) -> Rows:
    x, groups = (
        b.add(start, b.mul(stride, ir.Constant(I64, rows)))
        for start, stride in ((at.x, at.x_stride), (at.groups, at.groups_stride))
    )
    return at._replace(x=x, groups=groups)
