"""What adapters do to a panel of outputs, in LLVM's instructions: numba makes no vectors of such a loop.

L layers, S slots of the adapter bank, O output features of a linear, R rows and F features of a panel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import address, load, prefetch, widened
from models.kernels.scalars_cpu import intrinsic
from models.kernels.tile_cpu import I64, LANES, PANEL, VECTORS, VF32

_LINE = 64  # bytes that memory gives at once


@intrinsic
def add_and_scale(
    typing: Any, y_RF: Any, r: Any, bias_LSO: Any, scale_LSO: Any, layer: Any, slot: Any, start: Any
) -> Any:
    """Row r of a panel's outputs becomes s ⊙ (y + b), of an adapter's vectors from feature `start` on.

    Vectors without layers are left out.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        y, bias, scale = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2, 3))
        y_row = address(b, y, args[1])
        places = [b.add(y_row, ir.Constant(I64, 4 * LANES * i)) for i in range(VECTORS)]
        sums = [cgutils.alloca_once_value(b, load(b, place, VF32)) for place in places]
        for vector, kind, instruction in ((bias, kinds[2], b.fadd), (scale, kinds[3], b.fmul)):
            size = kind.dtype.bitwidth // 8
            with b.if_then(_has_layers(b, vector)):
                first = address(b, vector, *args[4:7])
                for i, total in enumerate(sums):
                    value = widened(b, b.add(first, ir.Constant(I64, size * LANES * i)), kind.dtype)
                    b.store(instruction(b.load(total), value), total)
        for place, total in zip(places, sums, strict=True):
            b.store(b.load(total), b.inttoptr(place, VF32.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(y_RF, i, bias_LSO, scale_LSO, i, i, i), build


@intrinsic
def prefetch_panel(typing: Any, v_LSO: Any, layer: Any, slot: Any, start: Any) -> Any:
    """Ask for an adapter's vector from feature `start` on, as far as a panel goes; without layers: for none.

    Adapters' vectors lie here and there in the bank, where the processor does not foresee them.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        vector = context.make_array(kind)(context, b, args[0])
        size = PANEL * kind.dtype.bitwidth // 8
        with b.if_then(_has_layers(b, vector)):
            first = address(b, vector, *args[1:4])
            for offset in [*range(0, size, _LINE), size - 1]:  # it need not begin with a line
                prefetch(b, b.add(first, ir.Constant(I64, offset)))
        return context.get_dummy_value()

    i = types.int64
    return types.void(v_LSO, i, i, i), build


def _has_layers(b: Any, vector_LSO: Any) -> Any:
    return b.icmp_signed(">", cgutils.unpack_tuple(b, vector_LSO.shape)[0], ir.Constant(I64, 0))
