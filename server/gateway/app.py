"""The gateway's app: OpenAI's API in front of workers and experts. Starts without torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Set
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from experts.contract import Expert
from server.gateway import middleware
from server.gateway.auth import OPEN_PATHS, Authentication
from server.gateway.clients.pool import WorkerPool
from server.gateway.context import ExpertPanel
from server.gateway.fetching import ImageFetcher
from server.gateway.images import ImageLoader
from server.gateway.keys import KeyRing
from server.gateway.limiter import RATE_HEADERS, Limiter
from server.gateway.metrics import GatewayMetrics
from server.gateway.openapi import describe
from server.gateway.pipeline import Pipeline
from server.gateway.routes import adapters, chat, completions, health, models, responses, tokens
from server.gateway.routes.page import page_router, read_page
from server.gateway.state import Gateway
from server.serving import Drain
from server.settings import GatewaySettings
from server.tracing import TELEMETRY


def create_app(
    settings: GatewaySettings,
    experts: Mapping[str, Expert],
    drain: Drain | None = None,
    fetcher: ImageFetcher | None = None,
    pool: WorkerPool | None = None,
) -> FastAPI:
    """The whole front.

    experts  by the name that requests call them by, in the order that "auto" asks them
    drain    once it is asked, new work is refused and readiness is 503; once expired, work is ended
    fetcher  of images behind http(s) URLs; a test may bring its own resolver
    pool     of the workers at `worker_urls`, which the app starts and closes; experts may ask it too
    """
    pool = pool or WorkerPool.of(settings)
    gateway = _assemble(settings, experts, drain or Drain(), fetcher or ImageFetcher(settings), pool)
    page = read_page() if settings.page else {}

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
        middleware=_middleware(gateway, OPEN_PATHS | page.keys()),
        exception_handlers={HTTPException: middleware.refuse_route},
        openapi_url=None,  # /openapi.json is a route of ours
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=TELEMETRY,
    )
    app.state.gateway = gateway
    for route in (chat, responses, completions, models, adapters, tokens, health):
        app.include_router(route.router)
    app.include_router(page_router(page))
    app.state.openapi = describe(app, gateway.keys.required)
    return app


def _assemble(
    settings: GatewaySettings,
    experts: Mapping[str, Expert],
    drain: Drain,
    fetcher: ImageFetcher,
    pool: WorkerPool,
) -> Gateway:
    metrics = GatewayMetrics(pool.stats)
    panel = ExpertPanel(experts, settings, metrics)
    limiter = Limiter(settings.limits_store.get_secret_value())
    pipeline = Pipeline(settings, pool, ImageLoader(settings, fetcher), panel, limiter, metrics)
    return Gateway(settings, pool, panel, fetcher, pipeline, metrics, KeyRing(settings), limiter, drain)


def _middleware(gateway: Gateway, open_paths: Set[str]) -> list[Middleware]:
    settings = gateway.settings
    cors = Middleware(
        middleware.Cors,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "x-should-retry", *RATE_HEADERS),
    )
    return [
        Middleware(middleware.RequestContext, metrics=gateway.metrics),
        Middleware(middleware.AnswerHeaders, drain=gateway.drain),
        *([cors] if settings.cors_origins else []),
        Middleware(middleware.Errors),
        Middleware(Authentication, keys=gateway.keys, open_paths=open_paths),
        Middleware(middleware.Admission, limit=settings.max_concurrent_requests, drain=gateway.drain),
        Middleware(middleware.Limits, limiter=gateway.limiter),
        Middleware(middleware.Lifetime, seconds=settings.request_seconds, drain=gateway.drain),
    ]
