"""The adapters that come with the project, and any folder that is laid out like theirs."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path

import models
from server.serving import StartupError
from server.settings import WorkerSettings

SHIPPED_DIR = Path(models.__file__).parent / "shipped"
_MANIFESTS = ("adapter.json", "adapter_config.json")  # this project's, PEFT's


def with_folders(settings: WorkerSettings) -> WorkerSettings:
    """`settings` whose `adapters` name those of `adapter_dir` and of the project too, and which add no more.

    A subfolder with an `adapter.json`, or PEFT's file, is an adapter, under its own name. Of several of one
    name the one given by itself is served, then the folder's. Raises `StartupError` for a missing folder.
    """
    folder = settings.adapter_dir
    if folder is not None and not folder.is_dir():
        raise StartupError(f"--adapter-dir {folder} is no folder; give one that holds adapters.")
    default = WorkerSettings.model_fields["base"].default
    shipped = SHIPPED_DIR if settings.shipped_adapters and settings.base == default else None
    adapters = list(settings.adapters)
    for place in filter(None, (folder, shipped)):
        given = set(adapter_ids(adapters))
        found = sorted({path.parent for name in _MANIFESTS for path in place.glob(f"*/{name}")})
        adapters += [f"{path.name}={path}" for path in found if path.name not in given]
    resolved = {"adapters": tuple(adapters), "adapter_dir": None, "shipped_adapters": False}
    return settings.model_copy(update=resolved)


def without_adapters(settings: WorkerSettings, ids: Container[str]) -> WorkerSettings:
    """`settings` without the adapters of these ids."""
    kept = tuple(adapter for adapter in settings.adapters if adapter.partition("=")[0] not in ids)
    return settings.model_copy(update={"adapters": kept})


def adapter_ids(adapters: Iterable[str]) -> list[str]:
    """The ids of `id=path[,option=value …]` each."""
    return [adapter.partition("=")[0] for adapter in adapters]
