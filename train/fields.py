"""Typed YAML files: found by path or by a shipped name, read, overridden; their faults as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from train.errors import RecipeError

_MAX_BYTES = 1 << 20


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def find_file(name: str, shipped: Path) -> Path:
    """The file of that path, or the one of that name in the folder `shipped`; perhaps there is neither."""
    file = Path(name).expanduser()
    if not file.is_file() and (shipped / f"{name}.yaml").is_file():
        return shipped / f"{name}.yaml"
    return file


def read_fields(file: Path, kind: str, shipped: Path) -> dict[str, Any]:
    """The mapping in a file that is to be a `kind`. Raises RecipeError naming the file."""
    names = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{file}: larger than {_MAX_BYTES} bytes, which no {kind} is")
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{file}: cannot be read ({error.strerror}); give a file or one of: {names}"
        ) from error
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise RecipeError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{file}: holds a {type(fields).__name__}; a {kind} is a mapping")
    return fields


def set_field(fields: dict[str, Any], override: str) -> None:
    """Apply one `key.key=value`, the value being YAML. Raises RecipeError."""
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise RecipeError(f"{override!r}: overrides read key=value, such as optimizer.lr=0.001")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{override!r}: the value is not YAML; quote it") from error
    for parent in parents:
        inner = fields.get(parent)
        if inner is None:
            fields[parent] = inner = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r}: {parent} is no section of the recipe")
        fields = inner
    fields[last] = value


def sentences(error: ValidationError) -> str:
    return "; ".join(_sentence(dict(fault)) for fault in error.errors())


def _sentence(fault: Mapping[str, Any]) -> str:
    where = ".".join(
        str(part) for part in fault["loc"] if not str(part).startswith(("str", "tuple[", "literal["))
    )
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "there is no such key; correct or remove it"
    return f"{where}: {message}" if where else message
