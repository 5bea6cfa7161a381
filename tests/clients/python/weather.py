"""What the clients ask for: little enough for random weights to end it, whatever they choose."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Weather(BaseModel):
    """Get the weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=7)


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "Weather",
            "description": Weather.__doc__,
            "parameters": Weather.model_json_schema(),
        },
    }
]
