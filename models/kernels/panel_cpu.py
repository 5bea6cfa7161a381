"""What adapters do to a panel of outputs, in LLVM's instructions: numba makes no vectors of such a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from models.kernels.rows_cpu import address, load, widened
from models.kernels.scalars_cpu import intrinsic
from models.kernels.tile_cpu import I64, LANES, VECTORS, VF32


def _on_panel(instruction: str) -> Callable[..., None]:
    @intrinsic
    def apply(typing: Any, y_RF: Any, r: Any, v_LSO: Any, layer: Any, slot: Any, start: Any) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            y, v = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2))
            stored = kinds[2].dtype
            y_row, v_row = address(b, y, args[1]), address(b, v, *args[3:6])
            for i in range(VECTORS):
                place = b.add(y_row, ir.Constant(I64, 4 * LANES * i))
                value = widened(b, b.add(v_row, ir.Constant(I64, stored.bitwidth // 8 * LANES * i)), stored)
                result = getattr(b, instruction)(load(b, place, VF32), value)
                b.store(result, b.inttoptr(place, VF32.as_pointer()), align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(y_RF, i, v_LSO, i, i, i), build

    made: Callable[..., None] = apply
    return made


# A row r of PANEL outputs plus, or times, an adapter's vector from feature `start` on.
add_to_panel, scale_panel = _on_panel("fadd"), _on_panel("fmul")
