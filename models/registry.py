"""Which adapters there are: id → path, configuration, version and hash. Holds no tensors.

An id is what a request's `model` names. Paths given at run time must lie in the configured root, with
symbolic links resolved.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.adapter_config import AdapterConfig
from models.checkpoints.manifest import MANIFEST, read_manifest
from models.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9._:-]{1,96}")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter. `version` counts loads under the same id, `created` is in Unix seconds."""

    id: str
    path: Path
    config: AdapterConfig
    hash: str
    version: int
    created: int


class AdapterRegistry:
    """The adapters that are served, in the order in which their ids were first added."""

    def __init__(self, root: Path | None = None) -> None:
        """`root` is the folder that run-time paths must lie in; None lets none pass."""
        self._root = root.resolve() if root else None
        self._entries: dict[str, AdapterEntry] = {}
        self._versions: dict[str, int] = {}  # outlives removal: a version never comes twice

    def add(self, id: str, path: Path, config: AdapterConfig, version: int = 1) -> AdapterEntry:
        """Record an adapter, as `version` or the next one of this id if that is higher.

        Raises CheckpointError for a bad id.
        """
        check_id(id)
        version = max(version, self._versions.get(id, 0) + 1)
        entry = AdapterEntry(id, path, config, content_hash(path), version, int(time.time()))
        self._versions[id] = version
        self._entries[id] = entry
        return entry

    def remove(self, id: str) -> AdapterEntry | None:
        return self._entries.pop(id, None)

    def find(self, id: str) -> AdapterEntry | None:
        return self._entries.get(id)

    def __iter__(self) -> Iterator[AdapterEntry]:
        return iter(tuple(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

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
        except (OSError, ValueError, RuntimeError) as error:  # NUL bytes, endless links, too long
            raise CheckpointError(f"{path!r} is not a path; name a file or folder of the root") from error
        if not inside:
            raise CheckpointError(f"{path!r} lies outside the adapter root; name a file or folder in it")
        if not exists:
            raise CheckpointError(f"{path!r} is not in the adapter root; copy the adapter there first")
        return resolved


def scan(folder: Path) -> dict[str, Path]:
    """Id → folder of each native adapter directly below `folder`; the id is the folder's name.

    Raises CheckpointError for a folder that cannot be read, a bad id or a bad manifest.
    """
    try:
        folders = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); check path and permissions") from error
    for path in folders:
        check_id(path.name)
        read_manifest(path)
    return {path.name: path for path in folders}


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
