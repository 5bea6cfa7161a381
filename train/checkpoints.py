"""Checkpoints: an adapter that can be served, and beside it what it takes to go on training.

A checkpoint is written to a folder of another name and renamed when complete, so that there is never
half of one; older ones are removed only after that.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from models.adapter import Adapter
from models.checkpoints.native import save_adapter
from train.errors import TrainError
from train.output import put_in_place

_STATE = "trainer.pt"
_PARTIAL = ".partial"


class Checkpoints:
    """`step-0000500` and so on below one folder; the last `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def last(self) -> Path | None:
        """The newest complete one."""
        found = sorted(path for path in self._folder.glob("step-*") if (path / _STATE).is_file())
        return found[-1] if found else None

    def save(self, step: int, adapter: Adapter, state: dict[str, Any]) -> Path:
        """Raises TrainError where it cannot be written, or where weights are no numbers any more.

        Those from before are still there then.
        """
        for name, tensor in adapter.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise TrainError(
                    f"step {step}: {name} holds NaN or infinite values; {self.remedy('lower optimizer.lr')}"
                )
        target, partial = self._folder / f"step-{step:07d}", self._folder / _PARTIAL
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_adapter(adapter, partial)
            with (partial / _STATE).open("wb") as stream:
                torch.save(state, stream)
            if target.exists():
                shutil.rmtree(target)
            put_in_place(partial, target)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap OSErrors
            shutil.rmtree(partial, ignore_errors=True)
            raise TrainError(
                f"{target}: cannot be written ({_reason(error)}); {self.remedy('make room')}"
            ) from error
        for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def remedy(self, deed: str) -> str:
        """What to do after a stop, and from where it will go on."""
        last = self.last()
        if last is None:
            return f"nothing was saved before; {deed} and begin again"
        return f"the last good checkpoint is {last}; {deed} and go on with resume=true"


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Raises TrainError for a file that is damaged."""
    file = checkpoint / _STATE
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
        raise TrainError(
            f"{file}: is damaged ({_reason(error)}); remove its folder to go on from an older one"
        ) from error
    return state


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
