"""Memory that mapped files take."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path


def drop_pages(files: Iterable[Path]) -> None:
    """Give back the pages that this process has read of its mappings of `files`.

    Whoever looks at them again reads them again; what was written to a private mapping is lost. Libraries
    own these mappings and none of them offers this, hence the way through the system. It spares memory
    and nothing depends on it: elsewhere than on Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    places = {str(file.resolve()) for file in files}
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, *_, place = line.split(maxsplit=5)
        if place in places:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(start, end - start, mmap.MADV_DONTNEED)
