"""`adapter.json`, the manifest of a native adapter folder. Free of torch."""

from __future__ import annotations

from pathlib import Path

from models.adapter_config import AdapterConfig
from models.checkpoints.fields import parse, read_json
from models.errors import CheckpointError

MANIFEST = "adapter.json"
_MAX_BYTES = 1 << 20


def read_manifest(folder: Path) -> AdapterConfig:
    """The configuration of a native adapter. Raises CheckpointError naming file, field and remedy."""
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; an adapter folder holds {MANIFEST} and adapter.safetensors")
    if file.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{file}: larger than {_MAX_BYTES} bytes, which no manifest is; restore it")
    return parse(AdapterConfig, read_json(file), file)


def manifest_text(config: AdapterConfig) -> str:
    """JSON of a configuration, as `read_manifest` reads it."""
    return config.model_dump_json(indent=2, exclude_none=True) + "\n"
