"""Opening an adapter, whatever its format, and writing one in any format that can say what it is."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from models.adapter import Adapter, base_spec
from models.adapter_config import ENCODER, AdapterConfig, BaseSpec
from models.checkpoints.adapter_table import AdapterFormat, AdapterOptions, check_base
from models.checkpoints.chat65b import CHAT_65B
from models.checkpoints.fields import accessing, first_fault
from models.checkpoints.litgpt import LITGPT
from models.checkpoints.manifest import read_manifest
from models.checkpoints.native import is_native, load_adapter, save_adapter, unallocated
from models.checkpoints.peft import PEFT
from models.checkpoints.reference_7b import REFERENCE_7B
from models.checkpoints.reference_v1 import REFERENCE_V1, REFERENCE_V1_CAPTION
from models.checkpoints.tensor_file import TensorFile, read_tensor_file
from models.config import ModelConfig
from models.errors import CheckpointError, ModelError
from models.registry import check_id

__all__ = [
    "AdapterOptions",
    "detect",
    "export_adapter",
    "open_adapter",
    "parse_adapter_argument",
    "parse_options",
]

FORMATS: tuple[AdapterFormat, ...] = (
    REFERENCE_V1,
    REFERENCE_V1_CAPTION,
    REFERENCE_7B,
    CHAT_65B,
    PEFT,
    LITGPT,
)
NATIVE = "native"
_OPTIONS = tuple(field.name for field in fields(AdapterOptions))
_CHOICES = {"gate": ("tanh", "raw"), "color": ("rgb", "bgr")}


def open_adapter(
    path: Path,
    base: ModelConfig,
    options: AdapterOptions | None = None,
    fingerprint: str | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Adapter:
    """An adapter of any known format for this base, on the CPU in float32.

    The format is told by content. Raises AdapterMismatch where the adapter was made for another base,
    and CheckpointError, naming file, key and remedy, for anything wrong with the file or the options.
    `pause` is called between parts of the work.
    """
    options = options or AdapterOptions()
    with accessing(path):
        if is_native(path):
            _check_options(path, NATIVE, frozenset(), options)
            config = _with_options(read_manifest(path), options)
            pause()
            return load_adapter(path, base, fingerprint, config, pause)
        file = read_tensor_file(path)
    pause()
    config, tensors = read_adapter(file, detect(file), base_spec(base), options)
    pause()
    adapter = unallocated(config)
    pause()
    return adapter.to_empty(device="cpu").load(tensors, str(file.path), pause)


def read_adapter(
    file: TensorFile, form: AdapterFormat, base: BaseSpec, options: AdapterOptions
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and native tensors of a foreign file. Raises as `open_adapter`."""
    check_base(file.path, form.dimensions(file), base)
    config = read_adapter_config(file, form, base, options)
    return config, form.table(config).to_native(form.unpack(file, config))


def read_adapter_config(
    file: TensorFile, form: AdapterFormat, base: BaseSpec, options: AdapterOptions
) -> AdapterConfig:
    """What a foreign file means with these options. Raises CheckpointError."""
    _check_options(file.path, form.name, form.options, options)
    try:
        return _with_options(form.config(file, base, options), options)
    except ValidationError as error:
        raise CheckpointError(f"{file.path}: {first_fault(error)}; fetch the file again") from error


def detect(file: TensorFile) -> AdapterFormat:
    """The one format whose keys these are. Raises CheckpointError where there is none, or more."""
    found = [form for form in FORMATS if form.matches(file)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(form.name for form in found or FORMATS)
    if found:
        raise CheckpointError(f"{file.path}: holds adapters of several kinds ({names}); save each by itself")
    keys = ", ".join(list(file.tensors)[:3]) or "none"
    raise CheckpointError(
        f"{file.path}: no adapter of a known format ({names}); its keys begin with {keys}. Low-rank-only "
        "(LoRA) files and base models are not adapters of this kind"
    )


def export_adapter(adapter: Adapter, name: str, path: Path) -> None:
    """Write an adapter in the format called `name`: a folder for `native` and `peft`, else a file.

    What was written is read again and compared before it takes its place. Raises CheckpointError where
    the format cannot say all that the adapter is; what no file of the format can say (template, gates,
    colours) has to be said again when it is opened.
    """
    if name == NATIVE:
        with accessing(path, "written"):
            save_adapter(adapter, path)
        return
    form = next((form for form in FORMATS if form.name == name), None)
    if form is None:
        known = ", ".join([NATIVE, *(form.name for form in FORMATS)])
        raise CheckpointError(f"{name!r} is no adapter format; use one of {known}")
    if path.is_dir():
        raise CheckpointError(f"{path}: already exists; name a new path")
    config, tensors = adapter.config, dict(adapter.state_dict())
    with accessing(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            beside = Path(folder) / path.name
            try:
                form.write(beside, config, form.table(config).to_file(tensors))
                again, copies = read_adapter(read_tensor_file(beside), form, config.base, _said(form, config))
                again = again.model_copy(update={"description": config.description})
                _check_same(config, tensors, again, copies)
            except ModelError as error:
                raise CheckpointError(
                    f"{path}: a {name} file cannot express this adapter ({error}); export it as {NATIVE}"
                ) from error
            beside.replace(path)


def _said(form: AdapterFormat, config: AdapterConfig) -> AdapterOptions:
    """The options with which a file of this adapter has to be opened."""
    regrouped = config.prompt is not None and config.prompt.projection == "regrouped"
    said: dict[str, Any] = {
        "gate": config.gate.activation,
        "color": config.vision.color if config.vision else None,
        "litgpt": "0.5.13" if regrouped else "0.5.4",
        "length": config.prompt.length if config.prompt else None,
        "encoder": config.vision.encoder if config.vision else None,
    }
    return AdapterOptions(template=config.template, **{key: said[key] for key in form.options})


def _check_same(
    config: AdapterConfig, tensors: dict[str, Tensor], again: AdapterConfig, copies: dict[str, Tensor]
) -> None:
    ours, theirs = config.model_dump(), again.model_dump()
    changed = [key for key in ours if ours[key] != theirs[key]]
    changed += [key for key in tensors if not torch.equal(tensors[key], copies[key])]
    if changed:
        raise CheckpointError(f"{', '.join(changed[:3])} would be read as something else")


def parse_adapter_argument(text: str) -> tuple[str, Path, AdapterOptions]:
    """`id=PATH[,option=value …]`; the options are those of `AdapterOptions`.

    Raises CheckpointError that says which part is wrong.
    """
    id, equals, rest = text.partition("=")
    path, *pieces = rest.split(",")
    if not equals or not path:
        raise CheckpointError(f"adapter {text!r}: write it as id=PATH, with options such as ,gate=raw")
    check_id(id)
    values: dict[str, str] = {}
    for piece in pieces:
        key, _, value = piece.partition("=")
        if key not in _OPTIONS:
            raise CheckpointError(
                f"adapter {id}: {piece!r} is no option; there are {', '.join(_OPTIONS)}. "
                "A path must not contain commas"
            )
        if key in values:
            raise CheckpointError(f"adapter {id}: {key} is given twice; give it once")
        values[key] = value
    return id, Path(path), parse_options(id, values)


def parse_options(id: str, values: Mapping[str, str]) -> AdapterOptions:
    """The options of the adapter `id` from their texts. Raises CheckpointError that names the wrong one."""
    for key in values:
        if key not in _OPTIONS:
            raise CheckpointError(f"adapter {id}: {key[:40]!r} is no option; there are {', '.join(_OPTIONS)}")
    read = {key: _value(id, key, value) for key, value in values.items()}
    return AdapterOptions(**read)  # type: ignore[arg-type]


def _value(id: str, key: str, value: str) -> str | int:
    if key in _CHOICES and value not in _CHOICES[key]:
        raise CheckpointError(f"adapter {id}: {key}={value[:100]}; use {' or '.join(_CHOICES[key])}")
    if key == "length":
        if not re.fullmatch(r"[1-9][0-9]{0,2}|10[01][0-9]|102[0-4]", value):
            raise CheckpointError(f"adapter {id}: length={value[:100]}; use a number from 1 to 1024")
        return int(value)
    if key == "encoder":
        if not re.fullmatch(ENCODER, value):
            raise CheckpointError(
                f"adapter {id}: encoder={value[:100]!r}; use efficientnet-lite0 or "
                "open_clip:MODEL:PRETRAINED, where PRETRAINED is a tag or a file's path"
            )
        return value
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise CheckpointError(
            f"adapter {id}: {key}={value[:100]!r}; use 1 to 64 letters, digits, '.', '_' or '-'"
        )
    return value


def _check_options(path: Path, name: str, known: frozenset[str], options: AdapterOptions) -> None:
    """`template` suits every adapter; what else a format leaves open it lists itself."""
    for option in _OPTIONS:
        if getattr(options, option) is not None and option not in known | {"template"}:
            where = "is in its adapter.json" if name == NATIVE else "has no meaning there"
            raise CheckpointError(
                f"{path}: {option}= does not apply to {name} adapters, it {where}; leave it out"
            )


def _with_options(config: AdapterConfig, options: AdapterOptions) -> AdapterConfig:
    return config.model_copy(update={"template": options.template}) if options.template else config
