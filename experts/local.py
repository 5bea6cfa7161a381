"""What experts that read in their own process have in common: limits, a thread, and typed errors."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PIL import Image

from experts.contract import BadImage, ExpertError, Reading
from models.vision.images import DEFAULT_LIMITS, ImageError, ImageLimits, decode_image

T = TypeVar("T")


class LocalExpert(ABC):
    """An `Expert` with one thread of its own, on which it loads and reads one image after another.

    One is enough: the libraries behind it spread a single image over their own threads. A reading that
    nobody waits for any more is dropped if it has not begun.
    """

    def __init__(self, name: str, version: str, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        self.name = name
        self.version = version
        self._limits = limits
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"expert-{name}")

    async def load(self) -> None:
        await self._run(self._load)

    async def refresh(self) -> None:  # noqa: B027 - few have to override it
        """Nothing to ask: its version holds as long as its process."""

    async def read(self, image: bytes) -> Reading:
        return await self._run(lambda: self._read(image))

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    @abstractmethod
    def _load(self) -> None:
        """Load the weights. Raises `ExpertError` with the remedy."""

    @abstractmethod
    def _describe(self, image: Image.Image) -> Reading:
        """Read an upright RGB image."""

    def _read(self, data: bytes) -> Reading:
        try:
            image = decode_image(data, self._limits)
        except ImageError as error:
            raise BadImage(str(error)) from error
        try:
            return self._describe(image)
        except ExpertError:
            raise
        except Exception as error:  # of whichever library the expert stands on
            raise ExpertError(f"the expert {self.name!r} failed on this image: {error}") from error

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
