"""The adapters that come with the project, and any folder that is laid out like theirs."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from server.serving import StartupError
from server.settings import WorkerSettings

SHIPPED_DIR = Path(__file__).resolve().parent.parent / "adapters"


def with_adapter_dir(settings: WorkerSettings) -> WorkerSettings:
    """`settings` whose `adapters` name also what `adapter_dir` holds.

    A subfolder with an `adapter.json` is an adapter, under its own name. An adapter given by itself
    comes before one of the same name in the folder. Raises `StartupError` for a missing folder.
    """
    folder = settings.adapter_dir or _shipped_for(settings)
    if folder is None:
        return settings
    if not folder.is_dir():
        raise StartupError(f"--adapter-dir {folder} is no folder; give one that holds adapters.")
    found = sorted(path.parent for path in folder.glob("*/adapter.json"))
    given = set(adapter_ids(settings))
    extra = tuple(f"{path.name}={path}" for path in found if path.name not in given)
    return settings.model_copy(update={"adapters": settings.adapters + extra})


def without_adapters(settings: WorkerSettings, ids: Container[str]) -> WorkerSettings:
    """`settings` without the adapters of these ids."""
    kept = tuple(adapter for adapter in settings.adapters if adapter.partition("=")[0] not in ids)
    return settings.model_copy(update={"adapters": kept})


def adapter_ids(settings: WorkerSettings) -> list[str]:
    """The ids in `adapters`, which are `id=path[,option=value …]` each."""
    return [adapter.partition("=")[0] for adapter in settings.adapters]


def _shipped_for(settings: WorkerSettings) -> Path | None:
    """Shipped adapters were made for the default base and fit no other."""
    default = WorkerSettings.model_fields["base"].default
    return SHIPPED_DIR if settings.base == default and SHIPPED_DIR.is_dir() else None
