"""Where a panel's outputs go, in LLVM's instructions: numba makes no vectors of such a loop.

Shapes: N rows, of which a tile has `first` … `last - 1`, F features of a panel, R rows and more, A features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import address, load, store
from models.kernels.scalars_cpu import exp, inlined_jit, intrinsic, narrow
from models.kernels.softmax_cpu import constant
from models.kernels.softmax_cpu import exp as exp_lanes
from models.kernels.tile_cpu import I64, LANES, PANEL, VECTORS, VF32


@inlined_jit
def put_outputs(y_RF: Any, first: int, last: int, panel: int, out_NA: Any) -> None:
    """out = y in a panel's features, as far as `out_NA` has them."""
    start, A = panel * PANEL, out_NA.shape[1]
    if start + PANEL <= A:
        _put(y_RF, first, last, start, out_NA)
    else:
        for n in range(first, last):
            for a in range(start, A):
                out_NA[n, a] = y_RF[n - first, a - start]


@inlined_jit
def add_outputs(y_RF: Any, first: int, last: int, panel: int, x_NC: Any) -> None:
    """x += y, as `put_outputs`."""
    start, C = panel * PANEL, x_NC.shape[1]
    if start + PANEL <= C:
        _add(y_RF, first, last, start, x_NC)
    else:
        for n in range(first, last):
            for c in range(start, C):
                x_NC[n, c] += y_RF[n - first, c - start]


@inlined_jit
def activate_outputs(gate_RF: Any, up_RF: Any, first: int, last: int, panel: int, act_NI: Any) -> None:
    """act = silu(gate) ⊙ up, as `put_outputs`."""
    start, I = panel * PANEL, act_NI.shape[1]
    if start + PANEL <= I:
        _activate(gate_RF, up_RF, first, last, start, act_NI)
    else:
        for n in range(first, last):
            for i in range(start, I):
                gate = gate_RF[n - first, i - start]
                value = gate / (np.float32(1) + exp(-gate)) * up_RF[n - first, i - start]
                act_NI[n, i] = narrow(value, act_NI[n, i])


@intrinsic
def _put(typing: Any, y_RF: Any, first: Any, last: Any, start: Any, out_NA: Any) -> Any:
    return _each_vector((y_RF,), out_NA, lambda b, place, y: y)


@intrinsic
def _add(typing: Any, y_RF: Any, first: Any, last: Any, start: Any, x_NC: Any) -> Any:
    return _each_vector((y_RF,), x_NC, lambda b, place, y: b.fadd(load(b, place, VF32), y))


@intrinsic
def _activate(typing: Any, gate_RF: Any, up_RF: Any, first: Any, last: Any, start: Any, act_NI: Any) -> Any:
    def silu(b: Any, place: Any, gate: Any, up: Any) -> Any:
        return b.fmul(b.fdiv(gate, b.fadd(constant(1.0), exp_lanes(b, b.fneg(gate)))), up)

    return _each_vector((gate_RF, up_RF), act_NI, silu)


def _each_vector(of: tuple[Any, ...], out_NA: Any, value: Callable[..., Any]) -> Any:
    """For an intrinsic: out[n, start + f] = value of all `of` [n - first, f], vectors of a whole panel.

    `value` is given the builder, where the result goes, and a vector of each input.
    """

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        *inputs, out = (
            context.make_array(kind)(context, b, arg)
            for kind, arg in zip(signature.args, args, strict=True)
            if kind != types.int64
        )
        first, last, start = args[len(of) : -1]
        stored = out_NA.dtype
        with cgutils.for_range(b, b.sub(last, first), intp=I64) as loop:
            rows = [address(b, y, loop.index) for y in inputs]
            out_row = address(b, out, b.add(first, loop.index), start)
            for v in range(VECTORS):
                place = b.add(out_row, ir.Constant(I64, stored.bitwidth // 8 * LANES * v))
                ys = [load(b, b.add(row, ir.Constant(I64, 4 * LANES * v)), VF32) for row in rows]
                store(b, value(b, place, *ys), place, stored)
        return context.get_dummy_value()

    i = types.int64
    return types.void(*of, i, i, i, out_NA), build
