"""What each command runs: one process each, its heavy imports only once it is really started."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop
from starlette.types import ASGIApp

from experts.contract import Expert
from server.precautions import openness, unknown_variables
from server.serving import Drain, StartupError, bind, drain_on_signals, serve_app
from server.settings import ExpertSettings, GatewaySettings, WorkerSettings
from server.shipped import with_folders, without_adapters
from server.supervisor import ServiceSettings, serve
from server.telemetry import RequestScope, configure_logging, outgoing_headers
from server.tracing import TELEMETRY, configure_tracing

log = logging.getLogger(__name__)

_EXPERT_DRAIN_SECONDS = 5.0

# A step of decoding is hundreds of short parallel regions, between which threads must not sleep. The step
# thread is not the process's first, and libgomp counts that one too: with as many threads as cores it
# believes that there are too many, and then spins 100 times, or 1000 where the policy is `active`. On two
# idle cores that halves a step of one request. Where another process wants a core more spins cost more:
# libgomp's own 300 000 five times the step.
_WORKER_SPINS = 1000

ANNOUNCED = "llama-adapter serves "  # and the address: what the service prints when it is ready
_MODELS_TOLD = 8

_READY = """
{announced}{url}

models: {models}

{page}  curl '{url}/v1/chat/completions' -H 'content-type: application/json' {key}\\
    -d '{{"model": "{model}", "max_tokens": 32, "messages": [{{"role": "user", "content": "Say hello."}}]}}'
"""


def run_service(settings: ServiceSettings) -> None:
    """Gateway, worker and experts on this machine; see `server.supervisor`. Raises `StartupError`."""
    _refuse_several_machines(settings)
    _begin("gateway", settings.gateway)
    settings = dataclasses.replace(settings, worker=with_folders(settings.worker))
    _fetch_base(settings.worker)

    def announce(url: str, models: Sequence[str]) -> None:
        key = "-H 'authorization: Bearer YOUR_KEY' " if settings.gateway.asks_for_keys else ""
        page = "  (open it in a browser to try it)\n\n" if settings.gateway.page else ""
        told = {"url": url, "page": page, "models": _told(models), "model": models[0], "key": key}
        print(_READY.format(announced=ANNOUNCED, **told), flush=True)

    _run(serve(settings, announce))


def run_gateway(settings: GatewaySettings) -> None:
    """The API over workers and expert services that run elsewhere."""
    from experts.http import HttpExpert
    from server.captioning import caption_expert
    from server.gateway.app import create_app
    from server.gateway.clients.pool import WorkerPool

    _begin("gateway", settings)
    urls = settings.expert_urls
    experts: dict[str, Expert] = {
        name: HttpExpert(name, url, headers=outgoing_headers) for name, url in urls.items()
    }
    pool = WorkerPool.of(settings)
    if settings.captions:
        experts.setdefault("caption", caption_expert(pool, settings.caption_min_confidence))
    drain = Drain()
    app = create_app(settings, experts, drain, pool=pool)
    _run(_serve(app, settings.host, settings.port, None, drain, settings.drain_seconds))


def run_worker(settings: WorkerSettings) -> None:
    """One engine behind the routes of `server.worker.app`. Raises what `build` raises.

    Where the engine dies the process ends with 1. Where machine 0 of several has the engine, this one
    computes for it, and has no routes.
    """
    _begin("worker", settings)
    prepare_torch(settings.num_threads)
    if settings.node_rank:
        from server.worker.build import follow

        return follow(settings)
    from server.worker.adapter_state import AdapterState
    from server.worker.app import create_app
    from server.worker.build import build

    changed = AdapterState(settings.adapter_state).read()  # the last word on these, not the settings'
    engine = build(without_adapters(with_folders(settings), changed))
    drain = Drain()
    app = RequestScope(create_app(engine, settings, drain))
    _run(_serve(app, settings.host, settings.port, settings.uds, drain, settings.drain_seconds))
    if drain.failed:
        raise SystemExit(1)


def run_experts(names: tuple[str, ...], settings: ExpertSettings) -> None:
    """The named experts behind the routes of `experts.app`. Raises `StartupError`."""
    _begin("experts", settings)
    prepare_torch(settings.num_threads, spins=0)
    from experts.app import create_app
    from experts.contract import ExpertError
    from experts.factory import ExpertOptions, build_expert
    from models.vision.images import ImageLimits

    options = ExpertOptions(
        limits=ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
        num_threads=settings.num_threads,
        ocr_engine=settings.ocr_engine,
        ocr_min_confidence=settings.ocr_min_confidence,
        paddle_models=settings.paddle_models,
        classifier_min_confidence=settings.classifier_min_confidence,
        blip_model=settings.blip_model,
    )
    try:
        experts = [build_expert(name, options) for name in names]
    except ExpertError as error:
        raise StartupError(str(error)) from error
    app = create_app(experts, max_image_bytes=settings.max_image_bytes, telemetry=TELEMETRY)
    _run(
        _serve(RequestScope(app), settings.host, settings.port, settings.uds, Drain(), _EXPERT_DRAIN_SECONDS)
    )


def pull_base(name: str, cache_dir: Path) -> Path:
    """Fetch the base `name` with a progress bar. Raises `models.pull.PullError`."""
    from rich.console import Console
    from rich.progress import Progress

    from models.pull import pull

    with Progress(console=Console(stderr=True)) as progress:
        return pull(name, cache_dir, progress)


def _told(models: Sequence[str]) -> str:
    more = len(models) - _MODELS_TOLD
    return ", ".join(models[:_MODELS_TOLD]) + (f" and {more} more" if more > 0 else "")


def _begin(name: str, settings: GatewaySettings | WorkerSettings | ExpertSettings) -> None:
    """Logs, traces, and what is to be said of the settings. Raises `StartupError`."""
    configure_logging(settings.log_level)
    configure_tracing(f"llama-adapter-{name}")
    for sentence in unknown_variables(os.environ):
        log.warning(sentence)
    if isinstance(settings, GatewaySettings) and (open_to_all := openness(settings)):
        log.warning(open_to_all)


def _refuse_several_machines(settings: ServiceSettings) -> None:
    """Where they cannot be. Raises `StartupError`."""
    if settings.worker.node_rank:
        raise StartupError(
            "a machine with a node_rank follows machine 0, and has no API: run `llama-adapter worker` on it."
        )
    if settings.worker.nnodes > 1 and settings.workers > 1:
        raise StartupError("workers over 1 and nnodes over 1 exclude each other: both would be machine 0.")


def _fetch_base(worker: WorkerSettings) -> None:
    """In a process of its own, since converting needs torch, which this one is better without."""
    is_path = os.sep in worker.base or Path(worker.base).exists()
    if is_path or (worker.cache_dir / worker.base).is_dir():
        return
    command = [sys.executable, "-m", "server.cli", "pull", worker.base, f"--cache-dir={worker.cache_dir}"]
    command.append("--supervised")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as pulling:  # noqa: S603
        if pulling.wait() != 0:
            raise SystemExit(1)  # it has said why


def prepare_torch(count: int, spins: int = _WORKER_SPINS) -> None:
    """Say how many threads torch and numba have (0: one per core) and how long an idle one spins.

    Both use one OpenMP, which reads this once, when torch is first imported. So does torch that its memory
    is to lie on large pages, where the kernel has some for who asks. What the user's environment says stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", str(spins))
    if spins:
        os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: it needs no pool
    if count:
        os.environ.setdefault("OMP_NUM_THREADS", str(count))
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


def _run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def _serve(
    app: ASGIApp, host: str, port: int, uds: Path | None, drain: Drain, drain_seconds: float
) -> None:
    drain_on_signals(drain)
    await serve_app(app, bind(host, port, uds), drain, drain_seconds)
