"""Adapters by id: versions, paths that may be loaded, and what tells files apart. Holds no tensors.

An id is what a request's `model` names. Paths given at run time must lie in the configured root, with
symbolic links resolved.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from models.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9._:-]{1,96}")
_CHUNK = 1 << 20


class AdapterRegistry:
    """Which versions of each id there were, and where adapters that come at run time may lie."""

    def __init__(self, root: Path | None = None) -> None:
        """`root` is the folder that run-time paths must lie in; None lets none pass."""
        self._root = root.resolve() if root else None
        self._versions: dict[str, int] = {}  # the last one of each id: a version never comes twice

    def next_version(self, id: str, at_least: int = 1) -> int:
        """Of what is loaded under this id now. Raises CheckpointError for a bad id."""
        check_id(id)
        version = max(at_least, self._versions.get(id, 0) + 1)
        self._versions[id] = version
        return version

    def resolve(self, path: str) -> Path:
        """A path given at run time, absolute or relative to the root.

        Raises CheckpointError where there is no root, where the path leaves it, or where nothing is there.
        """
        if self._root is None:
            raise CheckpointError(
                "adapters cannot be loaded at run time: no adapter root is configured; set adapter_root"
            )
        try:
            resolved = (self._root / path).resolve()
            inside = resolved.is_relative_to(self._root) and resolved != self._root
            exists = inside and resolved.exists()
            files = list(resolved.iterdir()) if exists and resolved.is_dir() else []
            out = next((file for file in files if not file.resolve().is_relative_to(self._root)), None)
        except PermissionError as error:
            raise CheckpointError(f"{path!r} may not be read ({error}); check its permissions") from error
        except (OSError, ValueError, RuntimeError) as error:  # NUL bytes, endless links, too long
            raise CheckpointError(f"{path!r} is not a path; name a file or folder of the root") from error
        if not inside:
            raise CheckpointError(f"{path!r} lies outside the adapter root; name a file or folder in it")
        if not exists:
            raise CheckpointError(f"{path!r} is not in the adapter root; copy the adapter there first")
        if out is not None:
            raise CheckpointError(
                f"{path!r}: {out.name} is a link that leaves the adapter root; put a copy in its place"
            )
        return resolved


def check_id(id: str) -> str:
    """The id itself. Raises CheckpointError unless it has 1 to 96 letters, digits or `.`, `_`, `:`, `-`."""
    if not _ID.fullmatch(id):
        raise CheckpointError(
            f"adapter id {id[:100]!r} is not valid; use 1 to 96 letters, digits, dots, underscores, colons "
            "or hyphens"
        )
    return id


def content_hash(path: Path) -> str:
    """SHA-256, in hex, of a file, or of the names and contents of a folder's files.

    Raises CheckpointError where something cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        for file in files:
            if path.is_dir():
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check path and permissions") from error
    return digest.hexdigest()
