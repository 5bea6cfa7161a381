"""What every request's body has in common."""

from __future__ import annotations

from typing import Any, ClassVar, LiteralString

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

INCONSISTENT = "inconsistent"


def inconsistent(field: str, message: LiteralString) -> PydanticCustomError:
    """A check of several fields failed, and `field` is the one to mend."""
    return PydanticCustomError(INCONSISTENT, message, {"field": field})


def type_tag(thing: Any, otherwise: str | None = None) -> str | None:
    """For a discriminator: the `type` of a dictionary or an instance; `otherwise` if it has none.

    In brackets, lest it is taken for a field's name where an error says its place.
    """
    kind = thing.get("type") if isinstance(thing, dict) else getattr(thing, "type", None)
    kind = otherwise if kind is None and isinstance(thing, dict | Body) else kind
    return f"<{kind}>" if isinstance(kind, str) else None


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    # field → the values that ask for nothing; anything else is a 400
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # where one of these has another name here, that
    INSTEAD: ClassVar[dict[str, str]] = {}
