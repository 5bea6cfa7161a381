"""How the C library gives memory back."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's mallopt(3)
_NEVER, _LARGE = (1 << 31) - 1, 1 << 30


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for the next step to take; False without glibc.

    A step takes and frees the same gigabyte as the one before it. By default large tensors go back to the
    kernel at once, and each of their pages has to be asked for and zeroed again: 2 % of a step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, _NEVER))
