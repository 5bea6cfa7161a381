"""What the CPU's kernels compute number by number, in numba; loops over them become vectors.

Numbers are stored as float32, or as bfloat16 in arrays of uint16, since numpy has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba.extending
import numpy as np
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from models.kernels.compiled_cache import cached_jit

SUPPORTED_DTYPES = frozenset({torch.float32, torch.bfloat16})

_I32, _F32 = ir.IntType(32), ir.FloatType()
_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},  # sums in any order; what is no number stays none
    "nogil": True,
    "error_model": "numpy",
}

# What it decorates takes numba's typing context first, which callers do not pass.
intrinsic: Callable[..., Any] = numba.extending.intrinsic
jit = cached_jit(**_OPTIONS)
# Of a function with many arrays a call costs tens of nanoseconds.
inlined_jit = cached_jit(forceinline=True, **_OPTIONS)
# Compiled with its caller only: LLVM would do all that it calls once more.
merged_jit = cached_jit(inline="always", **_OPTIONS)
# Sums stay in the order in which they are written.
exact_jit = cached_jit(forceinline=True, **(_OPTIONS | {"fastmath": False}))
parallel_jit = cached_jit(parallel=True, **_OPTIONS)


def array(x: Tensor) -> Any:
    """The tensor's memory as numpy's, with uint16 for bfloat16. Nothing is copied."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@intrinsic
def widen(typing: Any, value: Any) -> Any:
    """A stored number as float32."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        return b.bitcast(b.shl(b.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(value), build


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
    """A float32 as it is stored where `like` is: to bfloat16 the nearest, of two the even one."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if signature.args[1] == types.float32:
            return args[0]
        return rounded_bfloat16(b, args[0])

    return like(types.float32, like), build


def rounded_bfloat16(b: Any, value: Any) -> Any:
    """A float32, or a vector of them, as bfloat16's bits."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else None

    def kind(of: Any) -> Any:
        return of if lanes is None else ir.VectorType(of, lanes)

    def constant(n: int) -> Any:
        return ir.Constant(kind(_I32), n if lanes is None else [n] * lanes)

    bits = b.bitcast(value, kind(_I32))
    odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    rounded = b.lshr(b.add(b.add(bits, constant(0x7FFF)), odd), constant(16))
    # Not a number must stay so; the addition may carry it away.
    quiet = b.or_(b.lshr(bits, constant(16)), constant(0x40))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(is_nan, quiet, rounded), kind(ir.IntType(16)))


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2^n as float32 for an int32 n in -126 … 127."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        biased = b.add(args[0], ir.Constant(_I32, 127))
        return b.bitcast(b.shl(biased, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int32), build


# ln 2 in two parts, of which the first times n is exact; and of e^f's polynomial the terms from f⁷ to f².
LN_2 = (0.693359375, -2.12194440e-4)
EXP_TERMS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LN_2_HIGH, _LN_2_LOW = (np.float32(part) for part in LN_2)
_TERM_6, _TERM_5, _TERM_4, _TERM_3, _TERM_2, _TERM_1 = (np.float32(term) for term in EXP_TERMS)


@jit
def exp(x: Any) -> Any:
    """e^x to a few units in the last place, without a branch or a call; below -87 it is e^-87."""
    if x < np.float32(-87):
        x = np.float32(-87)
    if x > np.float32(88):
        x = np.float32(88)
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    f = x - n * _LN_2_HIGH - n * _LN_2_LOW
    p = _TERM_6
    p = p * f + _TERM_5
    p = p * f + _TERM_4
    p = p * f + _TERM_3
    p = p * f + _TERM_2
    p = p * f + _TERM_1
    p = p * f * f + f + np.float32(1)
    return p * power_of_two(np.int32(n))
