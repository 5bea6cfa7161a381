"""What adapters do to a panel of outputs, in LLVM's instructions: numba makes no vectors of such a loop.

L layers, S slots of the adapter bank, A outputs of a packed weight, N rows of a step, R rows and F features
of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import LINE, address, fetch, load, store, widened
from models.kernels.scalars_cpu import intrinsic
from models.kernels.tile_cpu import I64, LANES, PANEL, VECTORS, VF32


@intrinsic
def add_and_scale(
    typing: Any,
    y_RF: Any,
    bias_LSA: Any,
    scale_LSA: Any,
    layer: Any,
    panel: Any,
    slots_N: Any,
    first: Any,
    last: Any,
) -> Any:
    """A panel's outputs y of the rows `first` … `last - 1` become s ⊙ (y + b), each by its row's slot.

    Vectors without layers are left out.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        y, bias, scale, slots = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 1, 2, 5))
        steps = ((bias, kinds[1], b.fadd), (scale, kinds[2], b.fmul))
        with _rows(b, slots, *args[6:8]) as (r, slot):
            y_row = address(b, y, r)
            places = [b.add(y_row, ir.Constant(I64, 4 * LANES * i)) for i in range(VECTORS)]
            sums = [cgutils.alloca_once(b, VF32) for _ in places]
            for place, total in zip(places, sums, strict=True):
                b.store(load(b, place, VF32), total)
            for vector, kind, instruction in steps:
                size = kind.dtype.bitwidth // 8
                with b.if_then(_has_layers(b, vector)):
                    start = address(b, vector, args[3], slot, _first_feature(b, args[4]))
                    for i, total in enumerate(sums):
                        value = widened(b, b.add(start, ir.Constant(I64, size * LANES * i)), kind.dtype)
                        b.store(instruction(b.load(total), value), total)
            for place, total in zip(places, sums, strict=True):
                store(b, b.load(total), place, types.float32)
        return context.get_dummy_value()

    i = types.int64
    return types.void(y_RF, bias_LSA, scale_LSA, i, i, slots_N, i, i), build


@intrinsic
def prefetch_panel(
    typing: Any, v_LSA: Any, layer: Any, panel: Any, slots_N: Any, first: Any, last: Any
) -> Any:
    """Ask for what a panel's rows `first` … `last - 1` will need of adapters' vectors, if there are any."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        vector, slots = (context.make_array(signature.args[i])(context, b, args[i]) for i in (0, 3))
        size = PANEL * kind.dtype.bitwidth // 8
        with b.if_then(_has_layers(b, vector)), _rows(b, slots, *args[4:6]) as (_, slot):
            start = address(b, vector, args[1], slot, _first_feature(b, args[2]))
            fetch(b, start, [*range(0, size, LINE), size - 1])  # it need not begin with a line
        return context.get_dummy_value()

    i = types.int64
    return types.void(v_LSA, i, i, slots_N, i, i), build


@contextmanager
def _rows(b: Any, slots_N: Any, first: Any, last: Any) -> Iterator[tuple[Any, Any]]:
    """Emit a loop over rows: the row's number, counted from `first`, and its slot."""
    with cgutils.for_range(b, b.sub(last, first), intp=I64) as loop:
        yield loop.index, load(b, address(b, slots_N, b.add(first, loop.index)), I64)


def _first_feature(b: Any, panel: Any) -> Any:
    return b.mul(panel, ir.Constant(I64, PANEL))


def _has_layers(b: Any, vector_LSA: Any) -> Any:
    return b.icmp_signed(">", cgutils.unpack_tuple(b, vector_LSA.shape)[0], ir.Constant(I64, 0))
