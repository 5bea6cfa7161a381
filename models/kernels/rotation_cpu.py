"""Rotation of queries and keys on the CPU, in LLVM's instructions: numba makes no vectors of such a loop."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.rows_cpu import address, load, store
from models.kernels.scalars_cpu import intrinsic
from models.kernels.tile_cpu import I64, LANES, VF32, fma


@intrinsic
def rotate_head(
    typing: Any, x_NA: Any, n: Any, at: Any, cos_ND: Any, sin_ND: Any, out_MHD: Any, m: Any, h: Any
) -> Any:
    """out[m, h] = x[n, at …] with the pairs (i, i + D/2) turned by row n's angles; D is a multiple of 32."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        x, cos, sin, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 3, 4, 5))
        stored, D = kinds[5].dtype, cgutils.unpack_tuple(b, out.shape)[2]
        half = b.udiv(D, ir.Constant(I64, 2))
        places = [address(b, x, args[1], args[2]), address(b, out, args[6], args[7])]
        angles = [address(b, of, args[1]) for of in (cos, sin)]

        def part(place: Any, first: Any, size: int) -> Any:
            return b.add(place, b.mul(first, ir.Constant(I64, size)))

        with cgutils.for_range(b, b.udiv(half, ir.Constant(I64, LANES)), intp=I64) as loop:
            first = b.mul(loop.index, ir.Constant(I64, LANES))
            second = b.add(first, half)
            u, v = (load(b, part(places[0], i, 4), VF32) for i in (first, second))
            c, s = (load(b, part(angle, first, 4), VF32) for angle in angles)
            turned = fma(b, u, c, b.fneg(b.fmul(v, s))), fma(b, v, c, b.fmul(u, s))
            for i, value in zip((first, second), turned, strict=True):
                store(b, value, part(places[1], i, stored.bitwidth // 8), stored)
        return context.get_dummy_value()

    i = types.int64
    return types.void(x_NA, i, i, cos_ND, sin_ND, out_MHD, i, i), build
