"""How a packed panel is read, whatever its weights are stored in; and panels unpacked once for many rows.

Unpacked, a number has 32 bits, as it is multiplied: a float32, or a pair of bfloat16 where the processor
multiplies such. The numbers of BLOCK vectors lie together, of all inputs, and then those of the next ones: so
a tile of many rows, which has registers for no more, reads straight on.

Shapes: a packed weight's P panels, each of K steps of F numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.quantized_tile_cpu import int8_steps, read_int8
from models.kernels.rows_cpu import address
from models.kernels.scalars_cpu import intrinsic
from models.kernels.tile_cpu import (
    BLOCK,
    I64,
    LANES,
    MULTIPLIES_BFLOAT16,
    VECTORS,
    Read,
    bfloat16_halves,
    load_lanes,
)


def packed_panel(b: Any, stored: Any, w_panel: Any, w_rows: Any, vectors: range) -> tuple[Any, Any]:
    """How a packed panel is read, and in how many steps. Not in 4 bits, which are read by groups."""
    if stored == types.int8:
        return (lambda b, step: [read_int8(b, w_panel, step, vectors)]), int8_steps(b, w_rows)

    def read(b: Any, step: Any) -> list[list[Any]]:
        lanes = load_lanes(b, w_panel, step, VECTORS, vectors)
        if MULTIPLIES_BFLOAT16 or stored == types.float32:
            return [lanes]
        return [list(halves) for halves in zip(*(bfloat16_halves(b, pairs) for pairs in lanes), strict=True)]

    return read, w_rows


def step_inputs(stored: Any) -> int:
    """Of a step, counted as they are multiplied: pairs, but those of bfloat16 only by some processors."""
    return 2 if stored == types.uint16 and not MULTIPLIES_BFLOAT16 else 1


def unpacked_panel(b: Any, start: Any, inputs: Any, first: int) -> Read:
    """How BLOCK vectors from the `first` on are read, an input a step, of what `unpack` left at `start`."""
    of_block = b.add(start, b.mul(inputs, ir.Constant(I64, 4 * LANES * first)))
    return lambda b, step: [load_lanes(b, of_block, step, BLOCK, range(BLOCK))]


@intrinsic
def unpacks(typing: Any, w_PKF: Any) -> Any:
    """Whether it is sooner to unpack these weights once for many rows; known when it is compiled."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        stored = signature.args[0].dtype
        of_whole_numbers = stored in (types.int8, types.uint8)
        sooner = stored == types.int8 if MULTIPLIES_BFLOAT16 else not of_whole_numbers
        return context.get_constant(types.boolean, sooner)

    return types.boolean(w_PKF), build


@intrinsic
def unpacked_rows(typing: Any, w_PKF: Any) -> Any:
    """Of a panel's numbers, 32 bits each: one for each input as it is multiplied."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, stored = context.make_array(signature.args[0])(context, b, args[0]), signature.args[0].dtype
        K = cgutils.unpack_tuple(b, w.shape)[1]
        _, steps = packed_panel(b, stored, None, K, range(VECTORS))
        return b.mul(steps, ir.Constant(I64, step_inputs(stored)))

    return types.int64(w_PKF), build


@intrinsic
def unpack(typing: Any, w_PKF: Any, panel: Any, out_RF: Any, row: Any) -> Any:
    """A panel's numbers as they are multiplied: of BLOCK vectors those of all inputs, then of the next."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        w, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 2))
        w_panel, start = address(b, w, args[1]), address(b, out, args[3])
        K = cgutils.unpack_tuple(b, w.shape)[1]
        read, steps = packed_panel(b, kinds[0].dtype, w_panel, K, range(VECTORS))
        inputs = b.mul(steps, ir.Constant(I64, step_inputs(kinds[0].dtype)))
        with cgutils.for_range(b, steps, intp=I64) as loop:
            weights = read(b, loop.index)
            first = b.mul(loop.index, ir.Constant(I64, len(weights)))
            for i, vectors in enumerate(weights):
                for v, vector in enumerate(vectors):
                    before = b.mul(inputs, ir.Constant(I64, v // BLOCK * BLOCK))
                    own = b.mul(b.add(first, ir.Constant(I64, i)), ir.Constant(I64, BLOCK))
                    place = b.add(b.add(before, own), ir.Constant(I64, v % BLOCK))
                    place = b.add(start, b.mul(place, ir.Constant(I64, 4 * LANES)))
                    b.store(vector, b.inttoptr(place, vector.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(w_PKF, types.int64, out_RF, types.int64), build
