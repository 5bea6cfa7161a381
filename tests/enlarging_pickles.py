"""Pickles of a hundred bytes that `torch.load` makes megabytes of, `weights_only` or not."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch


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


COUNT = 9_000_000
ENLARGING = {
    "bytearray": Call(bytearray, COUNT),
    "encode": _doubled(23),
    "FloatTensor": Call(torch.FloatTensor, COUNT),  # of memory as others have left it
    "_rebuild_device_tensor_from_cpu_tensor": Call(
        torch._utils._rebuild_device_tensor_from_cpu_tensor,
        torch.zeros(1).expand(COUNT),
        torch.float64,
        "cpu",
        False,
    ),
}


def nested(times: int, kind: type[list[object]] | type[tuple[object, ...]] = list) -> object:
    """One zero; twice as many each time, of a few bytes."""
    value: object = 0
    for _ in range(times):
        value = kind((value, value))
    return value


# A list of twice the last one, and so on (`q` keeps, `h` fetches), which is then called.
_CALLED = b"]q\0" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(20)) + b")R."
SHARING = {
    "printed": (_CALLED, "refers to the same values so often"),
    # The lists are empty when they are put into each other, and filled from the outermost in.
    "filled later": (b"]q\0]q\1(h\0h\0eh\0(K\1K\2e0.", "adds to values that it has referred to"),
    "in itself": (b"]q\0h\0a.", "adds to values that it has referred to"),
    "hashed": (
        b"}K\1" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(20)) + b"K\2s.",
        "refers to the same values so often",
    ),
    "hashed deep": (b"}K\1" + b"\x85" * 100 + b"K\2s.", "nests values more than 64 deep"),
}


def write_pickle(path: Path, stream: bytes) -> Path:
    """As torch.save puts a pickle into a file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", b"\x80\2" + stream), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    return path
