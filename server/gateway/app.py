"""The gateway's app: OpenAI's API in front of workers and experts. Starts without torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from experts.contract import Expert
from server.gateway import middleware
from server.gateway.auth import Authentication, Keys
from server.gateway.clients.pool import WorkerPool
from server.gateway.clients.workers import WorkerClient
from server.gateway.context import ExpertPanel
from server.gateway.fetching import ImageFetcher
from server.gateway.images import ImageLoader
from server.gateway.metrics import GatewayMetrics
from server.gateway.pipeline import Pipeline
from server.gateway.routes import adapters, chat, completions, health, models, tokens
from server.gateway.state import Gateway
from server.serving import Drain
from server.settings import GatewaySettings


def create_app(
    settings: GatewaySettings,
    experts: Mapping[str, Expert],
    drain: Drain | None = None,
    fetcher: ImageFetcher | None = None,
) -> FastAPI:
    """The whole front.

    experts  by the name that requests call them by, in the order that "auto" asks them
    drain    once it is asked, new work is refused and readiness is 503; once expired, work is ended
    fetcher  of images behind http(s) URLs; a test may bring its own resolver
    """
    gateway = _assemble(settings, experts, drain or Drain(), fetcher or ImageFetcher(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.close()

    app = FastAPI(
        title="LLaMA-Adapter server",
        lifespan=lifespan,
        middleware=_middleware(gateway),
        exception_handlers={HTTPException: middleware.refuse_route},
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = gateway
    for route in (chat, completions, models, adapters, tokens, health):
        app.include_router(route.router)
    return app


def _assemble(
    settings: GatewaySettings, experts: Mapping[str, Expert], drain: Drain, fetcher: ImageFetcher
) -> Gateway:
    workers = [
        WorkerClient(url, settings.worker_connect_seconds, settings.worker_read_seconds)
        for url in settings.worker_urls
    ]
    pool = WorkerPool(workers, settings.worker_poll_seconds)
    metrics = GatewayMetrics(pool.stats)
    panel = ExpertPanel(experts, settings.expert_seconds, settings.expert_cache_entries, metrics)
    pipeline = Pipeline(settings, pool, ImageLoader(settings, fetcher), panel, metrics)
    keys = Keys(settings.api_keys, settings.admin_keys)
    return Gateway(settings, pool, panel, fetcher, pipeline, metrics, keys, drain)


def _middleware(gateway: Gateway) -> list[Middleware]:
    settings = gateway.settings
    cors = Middleware(
        middleware.Cors,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )
    return [
        Middleware(middleware.RequestContext, metrics=gateway.metrics),
        *([cors] if settings.cors_origins else []),
        Middleware(middleware.Errors),
        Middleware(Authentication, keys=gateway.keys),
        Middleware(middleware.Admission, limit=settings.max_concurrent_requests, drain=gateway.drain),
        Middleware(middleware.Lifetime, seconds=settings.request_seconds, drain=gateway.drain),
    ]
