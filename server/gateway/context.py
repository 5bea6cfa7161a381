"""What the experts have to say of a request's images."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experts.contract import Expert, ExpertError, Reading
from server.errors import InvalidRequest
from server.gateway.images import Image
from server.gateway.metrics import GatewayMetrics
from server.gateway.tasks import all_or_none, cancelled
from server.worker.messages import ContextItem

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """How one expert fared with one image; the answer's `experts` field holds these."""

    name: str
    outcome: Literal["ok", "empty", "failed", "timeout"]
    text: str
    seconds: float
    image: int  # which of the request's, from 0

    def wire(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "outcome": self.outcome,
            "text": self.text,
            "seconds": round(self.seconds, 4),
            "image": self.image,
        }


class ExpertPanel:
    """Asks experts side by side, each for at most `seconds`; remembers `cache_entries` readings."""

    def __init__(
        self, experts: Mapping[str, Expert], seconds: float, cache_entries: int, metrics: GatewayMetrics
    ) -> None:
        self._experts = dict(experts)
        self._seconds = seconds
        self._metrics = metrics
        self._cache = _LruCache(cache_entries)
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Begin to load every expert. Readings wait for it; the gateway, and the other experts, do not."""
        self._loads = {name: asyncio.create_task(expert.load()) for name, expert in self._experts.items()}

    async def close(self) -> None:
        await cancelled(list(self._loads.values()))
        await asyncio.gather(*(expert.close() for expert in self._experts.values()), return_exceptions=True)

    def choose(self, asked: str | list[str] | None) -> tuple[str, ...]:
        """The names meant by the request's `experts`: absent and "auto" mean all, [] none."""
        if asked is None or isinstance(asked, str):
            return tuple(self._experts)
        for i, name in enumerate(asked):
            if name not in self._experts:
                known = ", ".join(self._experts) or "none"
                raise InvalidRequest(
                    f"There is no expert {name[:100]!r}; this server has: {known}.",
                    param=f"experts[{i}]",
                    code="expert_not_found",
                )
        return tuple(dict.fromkeys(asked))

    async def read(self, names: Sequence[str], images: Sequence[Image]) -> tuple[ExpertReport, ...]:
        """Every expert on every image, all at once. Never fails: reports say what went wrong."""
        asked = [(name, index) for index in range(len(images)) for name in names]
        return tuple(await all_or_none(self._read(name, index, images[index]) for name, index in asked))

    async def _read(self, name: str, index: int, image: Image) -> ExpertReport:
        expert = self._experts[name]
        begun = time.monotonic()
        outcome: Literal["ok", "empty", "failed", "timeout"] = "failed"
        text = ""
        key = (name, expert.version, image.sha256)
        reading = self._cache.get(key)
        try:
            if reading is None:
                async with asyncio.timeout(self._seconds):
                    await asyncio.shield(self._loads[name])
                    reading = await expert.read(image.data)
                # Its version may be known only now, with the first answer of a service.
                self._cache.put((name, expert.version, image.sha256), reading)
            text = reading.text.strip()
            outcome = "ok" if text else "empty"
        except TimeoutError:
            outcome = "timeout"
        except ExpertError as error:
            log.warning("an expert failed", extra={"expert": name, "cause": str(error)})
        except Exception:
            log.exception("an expert broke its contract", extra={"expert": name})
        seconds = time.monotonic() - begun
        self._metrics.experts.labels(name, outcome).observe(seconds)
        return ExpertReport(name, outcome, text, seconds, index)


def context_items(reports: Sequence[ExpertReport]) -> tuple[ContextItem, ...]:
    """What goes into the prompt."""
    return tuple(ContextItem(report.name, report.text) for report in reports if report.outcome == "ok")


class _LruCache:
    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._readings: OrderedDict[tuple[str, str, str], Reading] = OrderedDict()

    def get(self, key: tuple[str, str, str]) -> Reading | None:
        if key in self._readings:
            self._readings.move_to_end(key)
        return self._readings.get(key)

    def put(self, key: tuple[str, str, str], reading: Reading) -> None:
        self._readings[key] = reading
        self._readings.move_to_end(key)
        while len(self._readings) > self._entries:
            self._readings.popitem(last=False)
