"""The native format: a folder with `adapter.json` and `adapter.safetensors` (docs/design.md)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.adapter import Adapter, check_fits
from models.adapter_config import AdapterConfig
from models.checkpoints.manifest import MANIFEST, manifest_text, read_manifest
from models.config import ModelConfig
from models.errors import CheckpointError, ModelError

WEIGHTS = "adapter.safetensors"


def is_native(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write both files, each beside its place and then renamed over it, so that none is ever half there."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    text = manifest_text(adapter.config)
    _replace(folder / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _replace(folder / MANIFEST, lambda file: file.write_text(text, encoding="utf-8"))


def load_adapter(
    folder: Path,
    base: ModelConfig,
    fingerprint: str | None = None,
    config: AdapterConfig | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Adapter:
    """A native adapter for this base, on the CPU in float32; `config` stands in for the manifest's.

    Raises AdapterMismatch where it was made for another base, CheckpointError for anything wrong with
    its files. Nothing is allocated before both are known to fit. `pause` is called between parts of the work.
    """
    config = config or read_manifest(folder)
    check_fits(config.base, base, fingerprint, str(folder))
    return load_unchecked(folder, config, pause)


def load_unchecked(folder: Path, config: AdapterConfig, pause: Callable[[], None] = lambda: None) -> Adapter:
    """The adapter of a folder and its manifest, whatever its base. Raises CheckpointError."""
    adapter = unallocated(config)
    pause()
    tensors = read_tensors(folder / WEIGHTS, _shapes(adapter))
    pause()
    return adapter.to_empty(device="cpu").load(tensors, str(folder / WEIGHTS), pause)


def unallocated(config: AdapterConfig) -> Adapter:
    """Names and shapes alone, on the meta device: to be given memory once the file is known to fit.

    Raises CheckpointError for sizes that no adapter can have.
    """
    try:
        with torch.device("meta"):
            return Adapter(config, device="meta")
    except (RuntimeError, ModelError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{MANIFEST}: no adapter can have these sizes ({reason}); correct it"
        ) from error


def native_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of such an adapter, without allocating one. Raises as `unallocated`."""
    return _shapes(unallocated(config))


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}


def read_tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped, which must be exactly those of `shapes`.

    Raises CheckpointError, naming file, key and remedy. Values are checked by `Adapter.load`.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{file}: is no regular file; put a copy of the adapter's in its place")
        with safe_open(file, framework="pt") as opened:
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            _check(file, found, shapes)
            return {name: opened.get_tensor(name) for name in found}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: missing, damaged or truncated ({error}); restore the file") from error


def _check(file: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    for verdict, keys in (
        ("missing", wanted.keys() - found.keys()),
        ("unexpected", found.keys() - wanted.keys()),
    ):
        if keys:
            raise CheckpointError(
                f"{file}: {verdict} {', '.join(sorted(keys)[:3])}; use the {MANIFEST} that was saved with it"
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(found[name])}, {MANIFEST} asks for {list(shape)}; "
                f"use the {MANIFEST} that was saved with it"
            )


def _replace(place: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}-")
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        beside.chmod(0o644)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)
