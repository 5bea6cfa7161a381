"""When to leave somebody who fails alone: a circuit breaker. Pure policy; the caller brings the clock.

closed ──`threshold` failures in a row──▶ open ──`pause` seconds──▶ one probe is let through
  ▲                                         ▲                            │ it fails
  └─────────────── it succeeds ─────────────┴────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto


class Permit(Enum):
    """What a call was let through as; it is handed back when the call has ended."""

    CALL = auto()
    PROBE = auto()


@dataclass(slots=True)
class CircuitBreaker:
    """Each `enter` that gives a permit is followed by one `leave` with it."""

    threshold: int
    pause: float  # seconds
    _failures: int = field(default=0, init=False)
    _open_until: float | None = field(default=None, init=False)
    _probing: bool = field(default=False, init=False)

    @property
    def open(self) -> bool:
        """Whether calls are spared, but for the probes."""
        return self._open_until is not None

    def enter(self, now: float) -> Permit | None:
        """None: do not call. `now` is of a clock that never runs backwards."""
        if self._open_until is None:
            return Permit.CALL
        if self._probing or now < self._open_until:
            return None
        self._probing = True
        return Permit.PROBE

    def leave(self, permit: Permit, succeeded: bool | None, now: float) -> None:
        """`succeeded` None: the call told nothing, such as when whoever asked had left."""
        if permit is Permit.PROBE:
            self._probing = False
        if succeeded:
            self._failures = 0
            self._open_until = None
        elif succeeded is False:
            self._failures += 1
            # Calls from before it opened say nothing new: only a probe prolongs the pause.
            if permit is Permit.PROBE or (self._failures >= self.threshold and not self.open):
                self._open_until = now + self.pause
