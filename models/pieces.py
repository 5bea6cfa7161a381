"""Work on much memory in pieces, beside others who wait for their steps.

Torch gives a part of a larger piece to other threads, which serve meanwhile; `pause` is called where whoever
works so may let them go on.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_PIECE = 32_000  # numbers that torch leaves to the thread that asks
_ENOUGH = 8 * _PIECE  # between two pauses


def copy_finite(place: Tensor, tensor: Tensor, pause: Callable[[], None]) -> bool:
    """Whether what was copied is finite, as it will be used: a float64 may overflow."""
    pieces = zip(place.flatten().split(_PIECE), tensor.flatten().split(_PIECE), strict=True)
    done = 0
    for to, piece in pieces:
        if not to.copy_(piece).isfinite().all():
            return False
        done = _count(done, to, pause)
    if tensor.numel() > _PIECE:
        pause()
    return True


def spread(row_LF: Tensor, count: int, pause: Callable[[], None]) -> Tensor:
    """The row of each layer, `count` times, [L, count, F], in memory of its own."""
    if row_LF.device.type != "cpu":
        return row_LF[:, None].repeat(1, count, 1)  # one launch, for which nobody waits
    L, F = row_LF.shape
    all_LSF = row_LF.new_empty(L, count, F)
    slots = max(1, _PIECE // max(1, F))
    pieces = (
        (to_sf, row_f)
        for to_SF, row_F in zip(all_LSF, row_LF, strict=True)
        for to_sF in to_SF.split(slots)
        for to_sf, row_f in zip(to_sF.split(_PIECE, -1), row_F.split(_PIECE), strict=True)
    )
    done = 0
    for to_sf, row_f in pieces:
        to_sf.copy_(row_f)
        done = _count(done, to_sf, pause)
    return all_LSF


def _count(done: int, piece: Tensor, pause: Callable[[], None]) -> int:
    """Numbers done since the last pause, which is made where they are enough."""
    done += piece.numel()
    if done < _ENOUGH:
        return done
    pause()
    return 0
