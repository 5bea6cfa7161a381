"""Adapters on machines that share a model: the leader alone has their folders, and hands them round."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from models.vllm_plugin import remove_at_end
from models.vllm_plugin.export import whole_folder

SHARED_ADAPTERS = f"{__name__}.SharedAdapters"


def packed(folder: Path) -> dict[str, bytes]:
    """What is in a folder of files, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class SharedAdapters:
    """Methods that vLLM adds to those of its workers, to be called on all of them."""

    def hold_adapter(self, folder: str, files: dict[str, bytes]) -> None:
        """Have `folder` on this machine, too, which may be the leader's own. It is whole, or not there.

        What it lies in goes when the process ends that made it, with all that was not dropped.
        """
        place = Path(folder)
        with suppress(FileExistsError):  # the leader's own, or made for an adapter before
            place.parent.mkdir(mode=0o700, parents=True)
            remove_at_end(place.parent)

        def fill(empty: Path) -> None:
            for name, content in files.items():
                (empty / name).write_bytes(content)

        whole_folder(place, fill)

    def drop_adapter(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
