"""What a command says where a package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server.serving import StartupError

_OURS = ("server", "models", "experts", "train")


@contextmanager
def installed(extras: str) -> Iterator[None]:
    """Around imports of what `extras` bring, such as `worker,train`. Raises `StartupError` naming them."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        raise StartupError(
            f"{error.name} is not installed; install llama-adapter-server[{extras}]."
        ) from error
