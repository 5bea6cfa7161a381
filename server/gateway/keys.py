"""API keys by name: from the settings, and from a file that may change while the service runs.

Only SHA-256 digests are kept, so that no log, traceback or memory dump of a caller shows a key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError, model_validator

from server.errors import model_not_found
from server.gateway.rates import Quota, Rate
from server.gateway.tasks import cancelled
from server.serving import StartupError
from server.settings import RATE, GatewaySettings

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0  # between two looks at the keys file
_MAX_FILE_BYTES = 2**22
_ANYONE = "anonymous"  # who has no key


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a key stands for. Its name may be logged."""

    name: str
    quota: Quota
    admin: bool = False
    models: tuple[str, ...] | None = None  # patterns of the ids that it may ask; None: all
    metrics: bool = False  # may read everybody's, as an admin may

    def may_ask(self, model: str) -> bool:
        """Whether requests may name the id `model`."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)

    def check_model(self, model: str) -> None:
        """Raises `NotFound`, as for a model that is not served: whose key it is not for learns no more."""
        if not self.may_ask(model):
            raise model_not_found(model)


@dataclass(frozen=True, slots=True)
class Key:
    digest: bytes  # SHA-256 of the key
    caller: Caller


def digest(key: str) -> bytes:
    """SHA-256, all that is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


_OF_NOTHING = digest("").hex()


def _is_sendable(key: str) -> bool:
    return bool(key) and key == key.strip()


class _Entry(BaseModel):
    """One table of the keys file."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    key: SecretStr | None = Field(None, min_length=1)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    admin: bool = False
    models: list[Annotated[str, Field(min_length=1, max_length=512)]] | None = Field(
        None, min_length=1, max_length=1000
    )
    metrics: bool = False
    requests: str | None = Field(None, pattern=RATE)
    tokens: str | None = Field(None, pattern=RATE)
    concurrency: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        if self.sha256 == _OF_NOTHING:
            raise ValueError("sha256 is that of an empty key; was the variable set?")
        if self.key and not _is_sendable(self.key.get_secret_value()):
            raise ValueError("key must not begin or end with a space or a line's end, which headers lose")
        return self

    def digest(self) -> bytes:
        return digest(self.key.get_secret_value()) if self.key else bytes.fromhex(self.sha256 or "")


_ENTRIES: TypeAdapter[dict[str, _Entry]] = TypeAdapter(
    dict[Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")], _Entry]
)


class KeyRing:
    """Knows the keys of `settings`. Raises `StartupError` for ones that cannot be used."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._default = Quota.of(settings.key_requests, settings.key_tokens, settings.key_concurrency)
        self._given = [
            *_numbered("key", settings.api_keys, self._default, admin=False),
            *_numbered("admin", settings.admin_keys, self._default, admin=True),
        ]
        self._path = settings.keys_file
        self._version = _version(self._path)
        _refuse_doubles("api_keys and admin_keys", self._given)
        self._listed = self._read(self._path) if self._path else []
        self._watching: asyncio.Task[None] | None = None
        self.required = settings.asks_for_keys
        self.anyone = Caller(_ANYONE, self._default)

    async def start(self) -> None:
        """Begin to look after the keys file."""
        if self._path:
            self._watching = asyncio.create_task(self._watch(self._path))

    async def close(self) -> None:
        await cancelled([self._watching] if self._watching else [])

    @property
    def has_admin(self) -> bool:
        return any(key.caller.admin for key in (*self._given, *self._listed))

    def find(self, token: bytes) -> Caller | None:
        """Whose key `token` is. Compares with all of them, always, in time that tells nothing of them.

        Nobody's where it is empty, whatever a digest in a file says: who sends no key has none.
        """
        presented = hashlib.sha256(token).digest()
        keys = (*self._given, *self._listed)
        found = [key.caller for key in keys if hmac.compare_digest(presented, key.digest)]
        return found[0] if found and token else None

    def reload(self) -> None:
        """Read the keys file again if it has changed. A bad one is logged, and the keys stay."""
        version = _version(self._path)
        if self._path is None or version == self._version:
            return
        self._version = version
        try:
            self._listed = self._read(self._path)
        except StartupError as error:
            log.error("the keys file is not used; the keys before it stay", extra={"cause": str(error)})
        else:
            log.info("the keys file was read", extra={"keys": len(self._listed)})

    def _read(self, path: Path) -> list[Key]:
        listed = read_keys(path, self._default)
        _refuse_doubles(f"{path}, with api_keys and admin_keys", [*self._given, *listed])
        return listed

    async def _watch(self, path: Path) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await asyncio.to_thread(self.reload)
            except Exception:
                log.exception("the keys file was not looked at", extra={"file": str(path)})


def read_keys(path: Path, default: Quota) -> list[Key]:
    """The keys that the TOML file `path` lists, one table each; what a table leaves out is `default`'s.

    Raises `StartupError`, which names the file, the table and what to change, and never a key.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise StartupError(f"{path}: is over {_MAX_FILE_BYTES} bytes; is it the keys file?")
        entries = _ENTRIES.validate_python(tomllib.loads(text.decode()))
    except OSError as error:
        raise StartupError(f"{path}: cannot be read ({error.strerror}); mend keys_file") from None
    except UnicodeDecodeError:
        raise StartupError(f"{path}: is not UTF-8 text; write it as TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise StartupError(f"{path}: is not TOML: {error}") from None
    except ValidationError as error:
        raise StartupError(f"{path}: {_sentence(error)}") from None
    keys = [Key(entry.digest(), _caller(name, entry, default)) for name, entry in entries.items()]
    _refuse_doubles(str(path), keys)
    return keys


def _sentence(error: ValidationError) -> str:
    fault = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    return f"{place}: {fault['msg']}; see docs/operations.md for what a key's table may hold"


def _refuse_doubles(source: str, keys: Iterable[Key]) -> None:
    """One key would have the first one's rights and limits, and one name would share its counters."""
    names = {_ANYONE}
    owners: dict[bytes, str] = {}
    for key in keys:
        name = key.caller.name
        if name in names:
            raise StartupError(f"{source}: {name} is the name of another caller; call the table otherwise")
        names.add(name)
        other = owners.setdefault(key.digest, name)
        if other != name:
            raise StartupError(f"{source}: {other} and {name} have the same key; give each its own")


def _caller(name: str, entry: _Entry, default: Quota) -> Caller:
    quota = Quota(
        Rate.parse(entry.requests) if entry.requests else default.requests,
        Rate.parse(entry.tokens) if entry.tokens else default.tokens,
        entry.concurrency or default.concurrency,
    )
    models = None if entry.models is None else tuple(entry.models)
    return Caller(name, quota, entry.admin, models, entry.metrics)


def _numbered(kind: str, keys: Iterable[SecretStr], quota: Quota, admin: bool) -> list[Key]:
    for number, key in enumerate(keys, 1):
        if not _is_sendable(key.get_secret_value()):
            raise StartupError(
                f"{kind}-{number} is empty, or begins or ends with a space or a line's end, which headers "
                "lose; mend api_keys and admin_keys"
            )
    return [
        Key(digest(key.get_secret_value()), Caller(f"{kind}-{number}", quota, admin))
        for number, key in enumerate(keys, 1)
    ]


def _version(path: Path | None) -> tuple[int, ...] | None:
    """Changes whenever the file does, also where a link is turned to another one."""
    try:
        stat = path.stat() if path else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None
