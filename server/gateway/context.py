"""What the experts have to say of a request's images."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from experts.contract import Expert, ExpertError, Reading
from server.errors import InvalidRequest
from server.gateway.clients.breaker import CircuitBreaker
from server.gateway.clients.experts import GuardedExpert, Skipped
from server.gateway.images import Image
from server.gateway.metrics import GatewayMetrics
from server.gateway.tasks import all_or_none
from server.settings import GatewaySettings
from server.tracing import span
from server.worker.messages import ContextItem

log = logging.getLogger(__name__)


Outcome = Literal["ok", "empty", "failed", "timeout", "skipped"]


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """How one expert fared with one image; the answer's `experts` field holds these."""

    name: str
    outcome: Outcome
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
    """Asks experts side by side and remembers `expert_cache_entries` readings."""

    def __init__(
        self, experts: Mapping[str, Expert], settings: GatewaySettings, metrics: GatewayMetrics
    ) -> None:
        self._experts = {name: _guarded(expert, settings) for name, expert in experts.items()}
        self._metrics = metrics
        self._cache = _LruCache(settings.expert_cache_entries)
        for name, expert in self._experts.items():
            open_now = partial(getattr, expert, "circuit_open")
            metrics.open_circuits.labels(name).set_function(open_now)

    async def start(self) -> None:
        """Begin to load every expert."""
        for expert in self._experts.values():
            expert.start()

    async def close(self) -> None:
        await asyncio.gather(*(expert.close() for expert in self._experts.values()), return_exceptions=True)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._experts)

    def choose(self, asked: str | list[str] | None, model: str) -> tuple[str, ...]:
        """The names meant by the `experts` of a request to `model`: absent and "auto" mean all, [] none.

        A model does not hear itself: the expert `caption` is the adapter `caption`.
        """
        if asked is None or isinstance(asked, str):
            return tuple(name for name in self._experts if not name == model == "caption")
        for i, name in enumerate(asked):
            if name not in self._experts:
                known = ", ".join(self._experts) or "none"
                raise InvalidRequest(
                    f"There is no expert {name[:100]!r}; this server has: {known}.",
                    param=f"experts[{i}]",
                    code="expert_not_found",
                )
        return tuple(dict.fromkeys(asked))

    async def read(
        self, model: str, names: Sequence[str], images: Sequence[Image]
    ) -> tuple[ExpertReport, ...]:
        """Every expert on every image, all at once, for a request to `model`. Equal images are read once.

        Never fails: reports say what went wrong.
        """
        first = {image.sha256: index for index, image in reversed([*enumerate(images)])}
        asked = [(name, index) for index in sorted(first.values()) for name in names]
        reports = await all_or_none(self._report(name, index, images[index]) for name, index in asked)
        for report in reports:
            self._metrics.experts.labels(model, report.name, report.outcome).observe(report.seconds)
        told = dict(zip(asked, reports, strict=True))
        return tuple(
            replace(told[name, first[image.sha256]], image=index)
            for index, image in enumerate(images)
            for name in names
        )

    async def _report(self, name: str, index: int, image: Image) -> ExpertReport:
        begun = time.monotonic()
        with span("expert", expert=name, image=index) as current:
            outcome, text = await self._read(name, image)
            current.set_attribute("outcome", outcome)
        return ExpertReport(name, outcome, text, time.monotonic() - begun, index)

    async def _read(self, name: str, image: Image) -> tuple[Outcome, str]:
        expert = self._experts[name]
        expert.keep_current()
        try:
            key = (name, expert.version, image.sha256)
            reading = self._cache.get(key)
            if reading is None:
                reading = await expert.read(image.data)
                if expert.version == key[1]:  # else nobody knows which of the two has read
                    self._cache.put(key, reading)
        except Skipped:
            return "skipped", ""
        except TimeoutError:
            log.warning("an expert took too long", extra={"expert": name})
            return "timeout", ""
        except ExpertError as error:
            log.warning("an expert failed", extra={"expert": name, "cause": str(error)})
            return "failed", ""
        except Exception:
            log.exception("an expert broke its contract", extra={"expert": name})
            return "failed", ""
        text = reading.text.strip()
        return ("ok" if text else "empty"), text


def _guarded(expert: Expert, settings: GatewaySettings) -> GuardedExpert:
    breaker = CircuitBreaker(settings.expert_failures, settings.expert_pause_seconds)
    return GuardedExpert(expert, settings.expert_seconds, settings.expert_concurrency, breaker)


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
