"""What every request's body has in common."""

from __future__ import annotations

from typing import Any, ClassVar, LiteralString

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

INCONSISTENT = "inconsistent"


def inconsistent(field: str, message: LiteralString) -> PydanticCustomError:
    """A check of several fields failed, and `field` is the one to mend."""
    return PydanticCustomError(INCONSISTENT, message, {"field": field})


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    # field → the values that ask for nothing; anything else is a 400
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}
