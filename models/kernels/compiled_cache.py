"""Where numba keeps what it has compiled, and when that is out of date.

By itself numba looks at the file that a function stands in. Ours are compiled together with what they call
and with constants of other files, so a version whose other files differ would go on with the kernels of the
one before, and compute wrongly: here all kernels' sources count.

Nor are numba's files made for several processes that compile at once. Each takes the next free number for its
kernel, so that two may take the same one, and names it in the index before it is written: another process
would load a kernel for other types, or of an older version. Here one at a time reads or writes them.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import (
    IndexDataCacheFile,
    InTreeCacheLocator,
    UserProvidedCacheLocator,
    UserWideCacheLocator,
)


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _OfAllSources:
    """Numba's stamp of the function's own file, and ours of all kernels."""

    def get_source_stamp(self) -> tuple[Any, str]:
        own: Any = super().get_source_stamp()  # type: ignore[misc]
        return own, _sources()


class Provided(_OfAllSources, UserProvidedCacheLocator):
    """Below `NUMBA_CACHE_DIR`, where it is set."""


class InTree(_OfAllSources, InTreeCacheLocator):
    """Beside the code, where that can be written."""


class UserWide(_OfAllSources, UserWideCacheLocator):
    """In the user's own cache."""


class OneAtATime(IndexDataCacheFile):
    """Numba's index and files of one function, for one process at a time."""

    def save(self, key: Any, data: Any) -> None:
        with self._locked():
            super().save(key, data)  # type: ignore[no-untyped-call]

    def load(self, key: Any) -> Any:
        with self._locked():
            return super().load(key)  # type: ignore[no-untyped-call]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as held:
            with suppress(OSError):  # where nobody can write, or has yet, there is nothing to wait for
                lock = held.enter_context(Path(f"{self._index_path}.lock").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, whatever ends the process
            yield


_CONFIG: Any = numba.config  # whose names are made at run time
_LOCATORS = ",".join(f"{__name__}.{locator.__name__}" for locator in (Provided, InTree, UserWide))


def cached_jit(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit` with `options`; what it compiles is kept until a kernel's source changes."""
    compile = numba.njit(cache=True, **options)

    def decorate(function: Any) -> Any:
        before = _CONFIG.CACHE_LOCATOR_CLASSES
        _CONFIG.CACHE_LOCATOR_CLASSES = _LOCATORS  # read as it decorates
        try:
            dispatcher = compile(function)
        finally:
            _CONFIG.CACHE_LOCATOR_CLASSES = before
        dispatcher._cache._cache_file.__class__ = OneAtATime  # numba has no way to name another
        return dispatcher

    return decorate
