"""What an adapter file is, whether it is sound, and the same adapter in another format."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from models.adapter import Adapter
from models.adapter_config import AdapterConfig, BaseSpec
from models.checkpoints.adapter_table import AdapterFormat, AdapterOptions, NameTable
from models.checkpoints.adapters import NATIVE, detect, export_adapter, open_adapter, read_adapter_config
from models.checkpoints.base import open_base
from models.checkpoints.chat65b import CHAT_65B
from models.checkpoints.fields import accessing, parse
from models.checkpoints.manifest import read_manifest
from models.checkpoints.native import WEIGHTS, is_native, load_unchecked, native_shapes, read_tensors
from models.checkpoints.reference_7b import REFERENCE_7B
from models.checkpoints.reference_v1 import REFERENCE_V1, REFERENCE_V1_CAPTION
from models.checkpoints.tensor_file import TensorFile, read_tensor_file
from models.config import ModelConfig
from models.errors import CheckpointError
from models.fingerprint import fingerprint, likeness
from models.registry import content_hash


@dataclass(frozen=True)
class Base:
    """What of a base an adapter is checked against."""

    config: ModelConfig
    fingerprint: str


def read_base(path: Path) -> Base:
    """Shape and fingerprint of a base, of any format. Raises CheckpointError."""
    checkpoint = open_base(path)
    embed = next(tensor for name, tensor in checkpoint.tensors() if name == "embed.weight")
    return Base(checkpoint.config, fingerprint(embed))


def describe(path: Path, options: AdapterOptions | None = None) -> dict[str, Any]:
    """What a file or folder holds, without its base and without reading values.

    `base` has only those sizes that the file tells; `options` are those that the format leaves open,
    with what was assumed of them. Raises CheckpointError.
    """
    options = options or AdapterOptions()
    with accessing(path):
        if is_native(path):
            config = read_manifest(path)
            shapes = native_shapes(config)
            read_tensors(path / WEIGHTS, shapes)
            base = config.base.model_dump(exclude_none=True)
            return _description(path, NATIVE, config, base, shapes, {})
        file = read_tensor_file(path)
    form = detect(file)
    sizes = form.dimensions(file)
    config = read_adapter_config(file, form, _likely_base(file.path, sizes), options)
    shapes = _own_shapes(file, form.table(config))
    return _description(path, form.name, config, sizes, shapes, _open_options(form, config))


def verify(path: Path, base: Base | None = None, options: AdapterOptions | None = None) -> dict[str, Any]:
    """`describe`, after every value was read and checked, against a base where one is given.

    A released 7B file's name begins with its SHA-256, which has to be right. Only native folders can be
    verified without their base, as other formats do not tell all its sizes.
    Raises CheckpointError or AdapterMismatch at the first thing that is wrong.
    """
    adapter = _open(path, base, options or AdapterOptions())
    told = describe(path, options)
    promised = re.match(r"([0-9a-f]{64})_", path.name)
    if promised and promised[1] != told["sha256"]:
        raise CheckpointError(
            f"{path}: is not what its name promises, its SHA-256 is {told['sha256']}; fetch it again"
        )
    return told | {
        "variant": adapter.config.variant,
        "verified": _verified(adapter.config.base.fingerprint, base),
    }


def _verified(fingerprint: str | None, base: Base | None) -> str:
    """How far: a base of one's own shape may still be another one where nothing tells it by its values."""
    if base is None:
        return "values"
    if fingerprint is None:
        return "values and base's shape"
    near = likeness(fingerprint, base.fingerprint) == "near"
    return "values and base (a near copy of its own)" if near else "values and base"


def convert(
    source: Path,
    target: Path,
    name: str = NATIVE,
    base: Base | None = None,
    options: AdapterOptions | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter of `source` to `target` in the format called `name`, its values as `dtype`.

    `reference` is whichever format of the reference code's files has a place for such an adapter.
    A native target remembers the base's fingerprint where the base is given. Raises CheckpointError, also
    for values beyond `dtype`, or AdapterMismatch.
    """
    adapter = _open(source, base, options or AdapterOptions()).to(dtype)
    for key, tensor in adapter.state_dict().items():
        if not torch.isfinite(tensor).all():
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{source}: {key} has values that {short} cannot hold; use bfloat16")
    if base is not None:
        spec = adapter.config.base.model_copy(update={"fingerprint": base.fingerprint})
        adapter.config = adapter.config.model_copy(update={"base": spec})
    export_adapter(adapter, _reference_format(adapter.config) if name == "reference" else name, target)


def _reference_format(config: AdapterConfig) -> str:
    if config.vision is not None:
        return REFERENCE_7B.name
    if config.prompt is None:
        return CHAT_65B.name
    caption = config.template == REFERENCE_V1_CAPTION.template
    return (REFERENCE_V1_CAPTION if caption else REFERENCE_V1).name


def _open(path: Path, base: Base | None, options: AdapterOptions) -> Adapter:
    if base is not None:
        return open_adapter(path, base.config, options, base.fingerprint)
    if not is_native(path):
        raise CheckpointError(f"{path}: only a native adapter folder tells its base; give the base as well")
    return load_unchecked(path, read_manifest(path))


def _likely_base(path: Path, sizes: dict[str, int]) -> BaseSpec:
    """A base with the sizes that the file tells; the others, which a description never shows, are 1."""
    heads = sizes.get("num_heads", 1)
    unknown = {"num_heads": heads, "num_kv_heads": heads, "head_dim": 1, "intermediate_size": 1}
    return parse(BaseSpec, unknown | {"vocab_size": 1} | sizes, path)


def _own_shapes(file: TensorFile, table: NameTable) -> dict[str, tuple[int, ...]]:
    """Shapes of the file's tensors that are the adapter's: neither the base's nor unused."""
    unused = {unused.key for unused in table.unused}
    return {
        key: tuple(tensor.shape)
        for key, tensor in file.tensors.items()
        if key not in unused and not (table.ignored and table.ignored.fullmatch(key))
    }


def _open_options(form: AdapterFormat, config: AdapterConfig) -> dict[str, Any]:
    regrouped = config.prompt is not None and config.prompt.projection == "regrouped"
    assumed = {
        "gate": config.gate.activation,
        "template": config.template,
        "color": config.vision.color if config.vision else None,
        "litgpt": "0.5.5 to 0.5.13" if regrouped else "up to 0.5.4",
        "length": config.prompt.length if config.prompt else None,
        "encoder": config.vision.encoder if config.vision else None,
    }
    names = [field.name for field in fields(AdapterOptions)]
    return {name: assumed[name] for name in names if name in form.options | {"template"}}


def _description(
    path: Path,
    name: str,
    config: AdapterConfig,
    base: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
    options: dict[str, Any],
) -> dict[str, Any]:
    parts = config.model_dump(mode="json", exclude_none=True, exclude={"base", "format", "format_version"})
    if not config.gated_layers:
        del parts["gate"]
    return {
        "path": str(path),
        "format": name,
        "variant": config.variant,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "sha256": content_hash(path),
        "base": base,
        **parts,
        "options": options,
        "tensors": {key: list(shape) for key, shape in shapes.items()},
    }
