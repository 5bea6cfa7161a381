"""What the worker's HTTP routes ask of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from server.worker.messages import (
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    Event,
    GenerateRequest,
    ModelInfo,
    Tokenized,
    TokenizeRequest,
)


class Engine(Protocol):
    """Owns the accelerator. Every method refuses a caller's mistake with a `server.errors.ApiError`."""

    @property
    def healthy(self) -> bool:
        """False once the engine can never answer again, such as when its thread died."""

    async def start(self) -> None:
        """Begin stepping; called once, on the event loop that calls everything else."""

    async def stop(self) -> None:
        """End what still runs with `Unavailable`, then give everything back."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """`Started`, then text, then `Finished`.

        Raises `ApiError` before its first event where the request is refused, later where it cannot
        be finished. Closing the generator aborts the request.
        """

    async def tokenize(self, request: TokenizeRequest) -> Tokenized: ...

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized: ...

    def models(self) -> list[ModelInfo]:
        """The base first, then its adapters."""

    async def load_adapter(
        self, id: str, path: str, options: Mapping[str, str] | None = None, version: int = 1
    ) -> ModelInfo:
        """Load, or load again under the same id as a new version; running requests keep theirs.

        The version is `version`, or the next one that this engine never had if that is higher.
        """

    async def unload_adapter(self, id: str) -> asyncio.Task[None]:
        """From now on requests find it no more; the task ends when no running one uses it."""

    def stats(self) -> EngineStats: ...
