"""Command-line options made from the settings, so that no setting lacks a flag and none is told twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsError

from server.serving import StartupError
from server.settings import ENV_PREFIX

_FLAGS = {
    "adapters": "--adapter",
    "worker_urls": "--worker",
    "expert_urls": "--expert",
    "api_keys": "--api-key",
    "admin_keys": "--admin-key",
    "cors_origins": "--cors-origin",
    "image_allowed_hosts": "--image-allowed-host",
}


class UsageError(StartupError):
    """An option, or a variable of the environment, has a value that it cannot have."""


Settings = TypeVar("Settings", bound=BaseSettings)
Command = Callable[..., None]


def settings_options(
    *groups: type[BaseSettings], without: Iterable[str] = (), first: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """Decorates a command that takes `**given`: every field of `groups` becomes an option.

    The `first` ones come first, those `without` not at all. A field that several groups share is one
    option. What is not given on the command line is None.
    """
    fields = {name: field for group in reversed(groups) for name, field in group.model_fields.items()}
    rest = (name for group in groups for name in group.model_fields)
    names = [name for name in dict.fromkeys([*first, *rest]) if name not in without]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *(_parameter(name, fields[name]) for name in names)]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def flag(name: str) -> str:
    """The option of a setting's name."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def load(settings: type[Settings], given: Mapping[str, Any]) -> Settings:
    """`settings` from what is given, the environment and the defaults. Raises `UsageError`."""
    known = {
        name: _value(settings.model_fields[name], value)
        for name, value in given.items()
        if name in settings.model_fields and value is not None
    }
    try:
        return settings(**known)
    except ValidationError as error:
        faults = (_sentence(settings.model_fields, dict(fault)) for fault in error.errors())
        raise UsageError(" ".join(faults)) from None
    except SettingsError as error:
        raise UsageError(
            f'{error}; lists and tables in the environment are JSON, such as ["a", "b"].'
        ) from None


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    word = flag(name)
    option = typer.Option(
        f"{word}/--no-{word.removeprefix('--')}" if field.annotation is bool else word,
        help=f"{field.description} {_default(name, field)}".strip(),
        show_default=False,
        metavar="<str>" if _plain_type(field) == list[str] else None,
    )
    annotation = Annotated[_plain_type(field) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_type(field: FieldInfo) -> Any:
    """The type as the command line has it: repeated options for tuples and `name=value` for tables."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if kind is SecretStr:
        return str
    return list[str] if get_origin(kind) in (tuple, dict) else kind


def _value(field: FieldInfo, value: Any) -> Any:
    if get_origin(field.annotation) is not dict:
        return value
    pairs = [item.partition("=") for item in value]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise UsageError(f"{wrong[0]!r} should be NAME=VALUE.")
    return {name: rest for name, _, rest in pairs}


def _default(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is None or default in ((), {}):
        variable = ENV_PREFIX + name.upper()  # seldom the option's name: --api-key is of `api_keys`
        return f"(may be repeated; JSON in {variable})" if _plain_type(field) == list[str] else ""
    if isinstance(default, SecretStr):
        return f"[{default.get_secret_value()}]"  # a default is no secret
    return f"[{'on' if default else 'off'}]" if isinstance(default, bool) else f"[{default}]"


def _sentence(fields: Mapping[str, FieldInfo], fault: dict[str, Any]) -> str:
    place = [str(part) for part in fault["loc"]] or ["settings"]
    names = f"{flag(place[0])} (or {ENV_PREFIX}{place[0].upper()})"
    given = "" if _is_secret(fields.get(place[0])) else f", not {fault['input']!r}"
    return f"{names}: {fault['msg']}{given}."


def _is_secret(field: FieldInfo | None) -> bool:
    return field is not None and "SecretStr" in str(field.annotation)
