"""A query's scores on the CPU, in LLVM's instructions, as in `models.kernels.tile_cpu`.

`score_rows` takes some rows of keys as they lie in a cache, [P, s, G, D]: of block p the rows from t on, of
key/value head g; so does `add_rows` of `values_cpu` with values. They take whole arrays and indices: a slice
would count references, which the threads then share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from models.kernels.scalars_cpu import inlined_jit, intrinsic, rounded_bfloat16
from models.kernels.tile_cpu import (
    I32,
    I64,
    LANES,
    MULTIPLIES_BFLOAT16,
    VBF16,
    VF32,
    VI32,
    broadcast,
    multiply_add,
)

_VI16 = ir.VectorType(ir.IntType(16), LANES)
STEP = 64  # bytes of a row that are taken at once
LINE = 64  # bytes that memory gives at once


def _score(clamped: bool) -> Callable[..., None]:
    """`score_rows`; `clamped` where LANES rows from the first may reach past the array's end."""

    @intrinsic
    def score(
        typing: Any,
        q_NHD: Any,
        n: Any,
        h: Any,
        k_PsGD: Any,
        p: Any,
        t: Any,
        g: Any,
        count: Any,
        scale: Any,
        scores_RT: Any,
        r: Any,
        at: Any,
    ) -> Any:
        def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            q, k, out = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 3, 9))
            rows = row_addresses(b, k, args[4:7], args[7] if clamped else None)
            size = b.mul(cgutils.unpack_tuple(b, q.shape)[2], ir.Constant(I64, kinds[0].dtype.bitwidth // 8))
            paired = kinds[0].dtype == types.uint16
            sums = _dot_each(b, address(b, q, args[1], args[2]), rows, size, paired)
            total = b.fmul(_sum_each(b, sums), splat(b, args[8]))
            place = b.inttoptr(address(b, out, args[10], args[11]), VF32.as_pointer())
            b.store(total, place, align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(q_NHD, i, i, k_PsGD, i, i, i, i, types.float32, scores_RT, i, i), build

    made: Callable[..., None] = score
    return made


def row_addresses(b: Any, k: Any, first: Any, count: Any) -> list[Any]:
    """Of LANES rows from indices `first`. With a `count` the last is repeated, not what lies behind it."""
    stride = cgutils.unpack_tuple(b, k.strides)[1]
    rows = [address(b, k, *first)]
    for i in range(1, LANES):
        following = b.add(rows[-1], stride)
        if count is not None:
            following = b.select(b.icmp_signed("<", ir.Constant(I64, i), count), following, rows[-1])
        rows.append(following)
    return rows


def _dot_each(b: Any, q_row: Any, rows: list[Any], size: Any, paired: bool) -> list[Any]:
    """q times each row over `size` bytes; a vector for each, whose lanes are still to be summed."""
    sums = [cgutils.alloca_once(b, VF32) for _ in rows]
    for place in sums:
        b.store(ir.Constant(VF32, None), place)
    with cgutils.for_range(b, b.udiv(size, ir.Constant(I64, STEP)), intp=I64) as loop:
        offset = b.mul(loop.index, ir.Constant(I64, STEP))
        q_part = load(b, b.add(q_row, offset), VI32)
        for row, place in zip(rows, sums, strict=True):
            k_part = load(b, b.add(row, offset), VI32)
            b.store(multiply_add(b, b.load(place), k_part, q_part, paired), place)
    return [b.load(place) for place in sums]


def address(b: Any, array: Any, *indices: Any) -> Any:
    """Of array[indices], as a number."""
    place = b.ptrtoint(array.data, I64)
    for index, stride in zip(indices, cgutils.unpack_tuple(b, array.strides), strict=False):
        place = b.add(place, b.mul(index, stride))
    return place


def load(b: Any, place: Any, kind: Any) -> Any:
    return b.load(b.inttoptr(place, kind.as_pointer()), align=2)


def store(b: Any, vector: Any, place: Any, stored: Any) -> None:
    """LANES float32 as they are stored in an array of type `stored`."""
    value = vector if stored == types.float32 else _narrowed(b, vector)
    b.store(value, b.inttoptr(place, value.type.as_pointer()), align=2)


def _narrowed(b: Any, vector: Any) -> Any:
    """LANES float32 as bfloat16's bits. The processor's own instruction takes numbers below 1e-38 as zero."""
    if not MULTIPLIES_BFLOAT16:
        return rounded_bfloat16(b, vector)
    kind = ir.FunctionType(ir.VectorType(VBF16.element, LANES), [VF32])
    convert = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
    return b.bitcast(b.call(convert, [vector]), _VI16)


def prefetch(b: Any, place: Any) -> None:
    """Ask for the line of memory at an address, which may be any."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
    fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    how = [ir.Constant(I32, n) for n in (0, 3, 1)]  # read, keep, data
    b.call(fetch, [b.inttoptr(place, ir.IntType(8).as_pointer()), *how])


def fetch(b: Any, start: Any, offsets: Iterable[int]) -> None:
    for offset in offsets:
        prefetch(b, b.add(start, ir.Constant(I64, offset)))


def splat(b: Any, value: Any) -> Any:
    """A float32 in every lane."""
    return b.bitcast(broadcast(b, b.bitcast(value, I32)), VF32)


def _sum_each(b: Any, vectors: list[Any]) -> Any:
    """One vector: the sum over the lanes of each of LANES vectors, by adding neighbours four times."""
    even = ir.Constant(VI32, list(range(0, 2 * LANES, 2)))
    odd = ir.Constant(VI32, list(range(1, 2 * LANES, 2)))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(b.shuffle_vector(x, y, even), b.shuffle_vector(x, y, odd)) for x, y in pairs]
    return vectors[0]


def widened(b: Any, place: Any, stored: Any) -> Any:
    """LANES stored numbers as float32."""
    if stored == types.float32:
        return load(b, place, VF32)
    bits = b.zext(load(b, place, _VI16), VI32)
    return b.bitcast(b.shl(bits, ir.Constant(VI32, [16] * LANES)), VF32)


_score_whole, _score_some = _score(clamped=False), _score(clamped=True)


@inlined_jit
def score_rows(
    q_NHD: Any,
    n: int,
    h: int,
    k_PsGD: Any,
    p: int,
    t: int,
    g: int,
    count: int,
    scale: Any,
    scores_RT: Any,
    at: int,
) -> None:
    """scores[r, at + i] = scale · (q[n, h + r] · k[p, t + i, g]) over `count` rows, for every r.

    What follows the last of them, up to a multiple of LANES, is written too, and means nothing; it is made
    of whatever rows come next. A row's size is a multiple of 64 bytes, and rows lie at even distances.
    """
    left = (k_PsGD.shape[0] - p) * k_PsGD.shape[1] - t
    for i in range(0, count, LANES):
        whole = i + LANES <= left
        for r in range(scores_RT.shape[0]):
            if whole:
                _score_whole(q_NHD, n, h + r, k_PsGD, p, t + i, g, LANES, scale, scores_RT, r, at + i)
            else:
                _score_some(q_NHD, n, h + r, k_PsGD, p, t + i, g, count - i, scale, scores_RT, r, at + i)


@intrinsic
def prefetch_rows(typing: Any, x_PsGD: Any, p: Any, g: Any) -> Any:
    """Ask for all of a block's rows of one head before they are needed."""

    def build(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x = context.make_array(signature.args[0])(context, b, args[0])
        shape, stride = cgutils.unpack_tuple(b, x.shape), cgutils.unpack_tuple(b, x.strides)[1]
        size = b.mul(shape[3], ir.Constant(I64, signature.args[0].dtype.bitwidth // 8))
        first = address(b, x, args[1], ir.Constant(I64, 0), args[2])
        with cgutils.for_range(b, shape[1], intp=I64) as row:
            start = b.add(first, b.mul(row.index, stride))
            with cgutils.for_range(b, b.udiv(size, ir.Constant(I64, STEP)), intp=I64) as line:
                prefetch(b, b.add(start, b.mul(line.index, ir.Constant(I64, STEP))))
        return context.get_dummy_value()

    return types.void(x_PsGD, types.int64, types.int64), build
