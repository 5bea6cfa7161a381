"""What a process says at its start of settings that are allowed, and seldom meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address

from server.options import flag
from server.settings import ENV_PREFIX, ExpertSettings, GatewaySettings, WorkerSettings

_OF_SERVE_ALONE = ("experts", "workers")
_NAMES = {*GatewaySettings.model_fields, *WorkerSettings.model_fields, *ExpertSettings.model_fields}
_BARE = sorted(name.upper() for name in (*_NAMES, *_OF_SERVE_ALONE))
_VARIABLES = {ENV_PREFIX + name for name in _BARE}
# Whoever knows an option's name may take its variable to be called so, too: --api-key is of `api_keys`.
_BY_FLAG = {ENV_PREFIX + flag(name)[2:].replace("-", "_").upper(): name for name in _NAMES}


def unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """A sentence on each variable that looks like one of a setting's, and is none. No values are told."""
    for name in sorted(environment):
        if not name.startswith(ENV_PREFIX) or name.partition("__")[0] in _VARIABLES:
            continue
        if name in _BY_FLAG:
            meant = [ENV_PREFIX + _BY_FLAG[name].upper()]
        else:
            names = difflib.get_close_matches(name.removeprefix(ENV_PREFIX), _BARE, n=1, cutoff=0.8)
            meant = [ENV_PREFIX + close for close in names]
        hint = f"; did you mean {meant[0]}?" if meant else ""
        yield f"{name} names no setting and is ignored{hint}"


def openness(settings: GatewaySettings) -> str | None:
    """A sentence where everybody who reaches the gateway from elsewhere may call it."""
    if settings.asks_for_keys or _is_this_machine(settings.host):
        return None
    return f"no keys are set: whoever reaches {settings.host} may call; set api_keys or keys_file"


def _is_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
