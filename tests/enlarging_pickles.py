"""Pickles of a hundred bytes that `torch.load` makes megabytes of, `weights_only` or not."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Call:
    """Unpickles as what a function gives for these arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def _doubled(times: int) -> object:
    value: object = b"x"
    for _ in range(times):
        value = Call(codecs.encode, value, "hex")
    return value


ENLARGING = {"bytearray": Call(bytearray, 9_000_000), "encode": _doubled(23)}
