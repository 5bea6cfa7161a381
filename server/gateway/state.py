"""The gateway's parts, and how routes get at them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from server.gateway.auth import check_admin
from server.gateway.clients.pool import WorkerPool
from server.gateway.context import ExpertPanel
from server.gateway.fetching import ImageFetcher
from server.gateway.keys import Caller, KeyRing
from server.gateway.limiter import Limiter
from server.gateway.metrics import GatewayMetrics
from server.gateway.parsing import IgnoredFields
from server.gateway.pipeline import Pipeline
from server.serving import Drain
from server.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class Gateway:
    settings: GatewaySettings
    pool: WorkerPool
    experts: ExpertPanel
    fetcher: ImageFetcher
    pipeline: Pipeline
    metrics: GatewayMetrics
    keys: KeyRing
    limiter: Limiter
    drain: Drain
    ignored_fields: IgnoredFields = field(default_factory=IgnoredFields)

    async def start(self) -> None:
        await self.keys.start()
        await self.experts.start()
        await self.pool.start()

    async def close(self) -> None:
        await self.pool.close()
        await self.experts.close()
        await self.fetcher.close()
        await self.limiter.close()
        await self.keys.close()


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["caller"]
    return caller


def _require_admin(request: Request) -> None:
    check_admin(_gateway(request).keys, _caller(request), request.headers)


GatewayDep = Annotated[Gateway, Depends(_gateway)]
CallerDep = Annotated[Caller, Depends(_caller)]
AdminOnly = Depends(_require_admin)
