"""`llama-adapter serve`: the gateway in this process, each worker and the experts in a child of its own.

The children listen on Unix sockets in a folder that only this user can enter. The workers' list of
what was loaded at run time is there too, for those that are started again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic_settings import BaseSettings

from experts.contract import Expert
from experts.http import HttpExpert
from server.captioning import CAPTION_ADAPTER, caption_expert
from server.child import Child, ChildSpec
from server.gateway.app import create_app
from server.gateway.clients.pool import WorkerPool
from server.serving import Drain, bind, drain_on_signals, serve_app
from server.settings import ENV_PREFIX, ExpertSettings, GatewaySettings, WorkerSettings
from server.shipped import adapter_ids
from server.telemetry import outgoing_headers

_COMMAND = (sys.executable, "-m", "server.cli")
_READY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """All of one machine's service. `experts` are the names that the experts' process serves."""

    gateway: GatewaySettings
    worker: WorkerSettings
    expert: ExpertSettings
    experts: tuple[str, ...]
    workers: int = 1


def settings_environment(settings: BaseSettings) -> dict[str, str]:
    """The environment from which a child loads exactly `settings`, whatever ours says."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    given = settings.model_dump(mode="json", exclude_none=True)
    return inherited | {
        ENV_PREFIX + name.upper(): value if isinstance(value, str) else json.dumps(value)
        for name, value in given.items()
    }


def child_specs(settings: ServiceSettings, folder: Path) -> list[ChildSpec]:
    """What to start, with its sockets in `folder`: the workers first."""
    specs = [_worker_spec(settings, folder, i) for i in range(settings.workers)]
    if settings.experts:
        threads = settings.expert.num_threads or max(1, (os.cpu_count() or 1) // 4)
        expert = settings.expert.model_copy(update={"uds": folder / "experts.sock", "num_threads": threads})
        specs.append(
            ChildSpec(
                name="experts",
                command=(*_COMMAND, "expert", *settings.experts, "--supervised"),
                uds=folder / "experts.sock",
                env=settings_environment(expert),
                stop_seconds=5.0,
                silent_seconds=expert.liveness_seconds,
            )
        )
    return specs


def _worker_spec(settings: ServiceSettings, folder: Path, index: int) -> ChildSpec:
    """Several workers share the cores of the machine, unless they are told how many threads to have."""
    name = "worker" if settings.workers == 1 else f"worker-{index}"
    threads = settings.worker.num_threads
    if settings.workers > 1 and not threads:
        threads = max(1, (os.cpu_count() or 1) // settings.workers)
    state = settings.worker.adapter_state or folder / "adapters.json"
    own = {"uds": folder / f"{name}.sock", "num_threads": threads, "adapter_state": state}
    worker = settings.worker.model_copy(update=own)
    return ChildSpec(
        name=name,
        command=(*_COMMAND, "worker", "--supervised"),
        uds=folder / f"{name}.sock",
        env=settings_environment(worker),
        stop_seconds=worker.drain_seconds,
        silent_seconds=worker.liveness_seconds,
    )


async def serve(settings: ServiceSettings, announce: Callable[[str, Sequence[str]], None]) -> None:
    """Run everything until SIGTERM or SIGINT.

    `announce` gets the URL and the models' ids, the base's first, once a request can be answered. Raises
    `StartupError`, with a child's own words, if anything fails before that.
    """
    drain = Drain()
    drain_on_signals(drain)
    gateway = settings.gateway
    sock = bind(gateway.host, gateway.port)
    url = _url(gateway.host, sock.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="llama-adapter-") as name:  # made with mode 0700
        folder = Path(name)
        specs = child_specs(settings, folder)
        children = [Child(spec) for spec in specs]
        urls = tuple(f"unix:{spec.uds}" for spec in specs[: settings.workers])
        gateway = gateway.model_copy(update={"worker_urls": urls})
        pool = WorkerPool.of(gateway)
        app = create_app(gateway, _experts(settings, folder, pool), drain, pool=pool)
        serving = asyncio.create_task(serve_app(app, sock, drain, gateway.drain_seconds))
        announcing = asyncio.create_task(_announce_when_ready(children, pool, url, announce))
        try:
            await _run(serving, children, drain)
        finally:
            announcing.cancel()


def _experts(settings: ServiceSettings, folder: Path, pool: WorkerPool) -> dict[str, Expert]:
    """The experts of the child and elsewhere, and captions by the workers that have the adapter for them."""
    url = f"unix:{folder / 'experts.sock'}"
    names = settings.experts
    urls = dict.fromkeys(names, url) | settings.gateway.expert_urls
    experts: dict[str, Expert] = {
        name: HttpExpert(name, at, headers=outgoing_headers) for name, at in urls.items()
    }
    if CAPTION_ADAPTER in adapter_ids(settings.worker.adapters):
        experts.setdefault("caption", caption_expert(pool, settings.gateway.caption_min_confidence))
    return experts


async def _run(serving: asyncio.Task[None], children: Sequence[Child], drain: Drain) -> None:
    """Until the gateway ends, or a child cannot start; the gateway drains before its children."""
    keepers = [asyncio.create_task(child.keep()) for child in children]
    try:
        await asyncio.wait({serving, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        drain.ask()
        await serving
    finally:
        for child in children:
            child.stop()
        outcomes = await asyncio.gather(*keepers, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def _announce_when_ready(
    children: Sequence[Child], pool: WorkerPool, url: str, announce: Callable[[str, Sequence[str]], None]
) -> None:
    for child in children:
        await child.ready.wait()
    while not pool.all_ready:  # noqa: ASYNC110 - it polls them itself
        await asyncio.sleep(_READY_SECONDS)
    announce(url, [model.id for model in pool.models()])


def _url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{reachable}:{port}"
