"""The experts' contract: the bytes of one image in; text, confidence, version and timing out.

An expert turns an image into words before generation, so that a frozen language model can use what
it cannot see (LLaMA-Adapter V2, section 4.4). In-process experts and HTTP clients of expert services
are the same `Expert` to whoever asks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Reading:
    """What an expert has to say of one image. An empty text means: nothing worth saying."""

    text: str
    confidence: float | None = None  # 0..1, where the expert knows it


@dataclass(frozen=True, slots=True)
class ExpertResult:
    """A reading with its provenance, as an expert service answers it."""

    name: str
    version: str
    text: str
    confidence: float | None
    seconds: float


class ExpertError(Exception):
    """The expert could not read this image, or could not be reached. Never fails a request."""


class BadImage(ExpertError):
    """The bytes are not an image that the expert can decode."""


class Busy(ExpertError):
    """The expert has too much to do, or is not ready yet. It is well: later it may read the same image."""


@runtime_checkable
class Expert(Protocol):
    """`name` is what a request calls it by; `version` changes whenever its readings may."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    async def load(self) -> None:
        """Load weights or open connections; called once, before the first reading."""

    async def refresh(self) -> None:
        """Ask for `version` anew where another process knows it; else nothing. Raises `ExpertError`."""

    async def read(self, image: bytes) -> Reading:
        """Read one encoded image file. Never blocks the event loop. Raises `ExpertError`."""

    async def close(self) -> None:
        """Give back what `load` took."""
