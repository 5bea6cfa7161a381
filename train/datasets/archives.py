"""Files out of packages, read into memory by name. Nothing is written under a name that an archive tells."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from train.errors import TrainError

_MAX_MEMBER = 32 << 20  # bytes of one file
_MAX_UNPACKED = 4 << 30  # of all that has to be unpacked on the way
_AR_MAGIC = b"!<arch>\n"
_DAMAGE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError)

Mode = Literal["r|gz", "r|xz"]


def read_deb(file: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """The files `names` of a Debian package, in the package's order, each with its bytes.

    Raises TrainError for a package that is damaged, over the limits, or without one of them.
    """
    with _opened(file) as stream:
        _seek_data(stream, file)
        yield from _read_tar(stream, "r|xz", file, names)


def read_tgz(file: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """The same of a `.tgz`, as npm's packages are."""
    with _opened(file) as stream:
        yield from _read_tar(stream, "r|gz", file, names)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        with file.open("rb") as stream:
            yield stream
    except TrainError:
        raise
    except _DAMAGE as error:
        raise TrainError(f"{file}: cannot be read ({error}); is it complete?") from error


def _seek_data(stream: IO[bytes], file: Path) -> None:
    """To the beginning of `data.tar.xz`; a .deb is an ar archive (deb(5))."""
    if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise TrainError(f"{file}: is no Debian package; give the .deb file")
    while len(header := stream.read(60)) == 60:
        name, size = header[:16].rstrip(b" /"), int(header[48:58])
        if name == b"data.tar.xz":
            return
        if name.startswith(b"data.tar"):
            raise TrainError(f"{file}: holds {name.decode()}, only data.tar.xz is read; repack it")
        stream.seek(size + size % 2, os.SEEK_CUR)  # parts begin at even places
    raise TrainError(f"{file}: holds no data.tar.xz; give a whole .deb file")


def _read_tar(
    stream: IO[bytes], mode: Mode, file: Path, names: Collection[str]
) -> Iterator[tuple[str, bytes]]:
    wanted, unpacked = set(names), 0
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        while wanted and (member := archive.next()) is not None:
            unpacked += member.size
            if unpacked > _MAX_UNPACKED:
                raise TrainError(
                    f"{file}: unpacks to more than {_MAX_UNPACKED} bytes; it is not what it says"
                )
            name = member.name.removeprefix("./")
            if name not in wanted or not member.isfile():
                continue
            if member.size > _MAX_MEMBER:
                raise TrainError(f"{file}: {name} has {member.size} bytes, more than {_MAX_MEMBER}")
            opened = archive.extractfile(member)
            assert opened is not None  # for it is a file
            wanted.remove(name)
            yield name, opened.read()
    if wanted:
        raise TrainError(f"{file}: lacks {min(wanted)} and {len(wanted) - 1} more; it is another version")
