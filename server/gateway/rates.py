"""How much one key may ask for, and when there is room again. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `amount` in any `seconds`."""

    amount: int
    seconds: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`60/minute`, as `server.settings.RATE` has it."""
        amount, _, unit = text.partition("/")
        return cls(int(amount), _SECONDS[unit])


@dataclass(frozen=True, slots=True)
class Quota:
    """None: no limit."""

    requests: Rate | None = None
    tokens: Rate | None = None
    concurrency: int | None = None

    @classmethod
    def of(cls, requests: str | None, tokens: str | None, concurrency: int | None) -> Self:
        return cls(
            Rate.parse(requests) if requests else None, Rate.parse(tokens) if tokens else None, concurrency
        )


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding-window counter: what was counted in the current window, and in the one before it.

    The previous count fades linearly, by the share of its window that still lies within `seconds`.
    """

    previous: int
    previous_left: float  # seconds until nothing of it counts
    current: int
    current_left: float  # seconds until the current window is the previous one
    seconds: int

    @property
    def used(self) -> float:
        return self.previous * self.previous_left / self.seconds + self.current

    def wait(self, limit: int, cost: int) -> float:
        """Seconds until `cost` fits under `limit`, if nothing else is counted meanwhile.

        `cost` is at most `limit`: an empty window has room for it.
        """
        room = limit - cost
        if self.used <= room:
            return 0.0
        if self.current <= room and self.previous:
            return max(0.0, self.previous_left - (room - self.current) * self.seconds / self.previous)
        return self.current_left + self.seconds * (1 - room / self.current)
