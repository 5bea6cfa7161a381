"""Ten minutes of everything at once against a server of its own: `python bench/soak.py --minutes 10`.

Valid, invalid and aborted requests, images and adapters, mixed. Afterwards every KV block must be free, no
task left, memory flat, no file open but what was before and some idle connections, and no answer other
than its request deserved.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from prometheus_client.parser import text_string_to_metric_families
from soak_requests import KINDS, Kind, Target

MIB = 2**20
_REST_SECONDS = 20.0  # for the last aborted requests to be noticed
_IDLE_CONNECTIONS = 24  # that a process may keep open at rest, for whoever comes next
_FLAT_SHARE, _FLAT_MIB = 0.02, 8.0  # how much a process may grow in the second half


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One process at one moment."""

    at: float
    rss: int
    files: int


@dataclass
class Soak:
    """What is seen while it runs."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, outcome)
    surprises: list[str] = field(default_factory=list)
    memory: dict[str, list[Snapshot]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rest:
    """A server at rest: by process its id, tasks and open files; blocks and requests that workers hold."""

    pids: dict[str, int]
    tasks: dict[str, int]
    files: dict[str, int]
    blocks: int
    requests: int


class Server:
    """`llama-adapter serve` and its children."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.url = url
        self._main = psutil.Process(process.pid)

    def processes(self) -> dict[str, psutil.Process]:
        """By name: gateway, each worker by its socket, experts."""
        named = {"gateway": self._main}
        for child in self._main.children():
            named[Path(child.environ()["LLAMA_ADAPTER_UDS"]).stem] = child
        return named

    def snapshots(self) -> dict[str, Snapshot]:
        now = time.monotonic()
        return {
            name: Snapshot(now, process.memory_info().rss, process.num_fds())
            for name, process in self.processes().items()
        }

    def rest(self) -> Rest:
        processes = self.processes()
        tasks = {"gateway": _tasks(httpx.get(f"{self.url}/metrics").text)}
        blocks = requests = 0
        for name, process in processes.items():
            if not name.startswith("worker"):
                continue
            transport = httpx.HTTPTransport(uds=process.environ()["LLAMA_ADAPTER_UDS"])
            with httpx.Client(transport=transport, base_url="http://worker", timeout=30) as client:
                stats = client.get("/stats").json()
                tasks[name] = _tasks(client.get("/metrics").text)
            blocks += stats["kv_blocks_used"]
            requests += stats["running"] + stats["waiting"]
        pids = {name: process.pid for name, process in processes.items()}
        files = {name: process.num_fds() for name, process in processes.items()}
        return Rest(pids, tasks, files, blocks, requests)


def _tasks(metrics: str) -> int:
    families = {family.name: family for family in text_string_to_metric_families(metrics)}
    return int(families["llama_adapter:event_loop_tasks"].samples[0].value)


@contextlib.contextmanager
def serving(arguments: list[str], log: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if ready := re.search(r"serves (http://\S+)", line):
                    yield Server(process, ready[1])
                    break
            else:
                raise SystemExit(f"the server did not start; {log} says why")
        finally:
            process.terminate()
            process.communicate(timeout=60)


def main(
    minutes: Annotated[float, typer.Option(min=0.05, help="of load")] = 10.0,
    at_once: Annotated[int, typer.Option(min=1, help="clients, each with one request at a time")] = 12,
    serve: Annotated[
        str, typer.Option(help="further options of `llama-adapter serve`")
    ] = "--experts classifier",
    seed: Annotated[int, typer.Option(help="of the mix")] = 0,
    log: Annotated[Path, typer.Option(help="where the server's log goes")] = Path("bench/out/soak.log"),
    results: Annotated[Path, typer.Option(help="where the figures are added")] = Path("bench/RESULTS.md"),
) -> None:
    """Soak a server and add the figures to RESULTS; exit code 1 if anything is not as it should be."""
    with serving(shlex.split(serve), log) as server:
        report, faults = asyncio.run(_soak(server, 60 * minutes, at_once, random.Random(seed)))
    text = _heading(minutes, at_once, serve, seed) + report + _verdict(faults)
    print(text)
    with results.open("a") as file:
        file.write(text)
    if faults:
        raise SystemExit(1)


async def _soak(server: Server, seconds: float, at_once: int, rng: random.Random) -> tuple[str, list[str]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as http:
        target = await _target(http)
        await _warm_up(target, rng)
        before = await _rested(server)
        soak = Soak()
        end = time.monotonic() + seconds
        watching = asyncio.create_task(_watch(server, soak, every=max(0.5, seconds / 200)))
        seeds = [rng.random() for _ in range(at_once)]
        async with asyncio.TaskGroup() as clients:
            for own_seed in seeds:
                clients.create_task(_client(target, soak, end, random.Random(own_seed)))
        watching.cancel()
    after = await _rested(server, like=before)
    faults = [*soak.surprises[:20], *_leaks(before, after), *_growth(soak)]
    return _outcome_table(soak, seconds) + _rest_table(before, after) + _memory_table(soak), faults


async def _target(http: httpx.AsyncClient) -> Target:
    models = (await http.get("/v1/models")).raise_for_status().json()["data"]
    base, *adapters = (model["id"] for model in models)
    experts = "expert_circuit_open" in (await http.get("/metrics")).text
    return Target(http, base, tuple(adapters), experts or any(model["reads_images"] for model in models))


async def _warm_up(target: Target, rng: random.Random) -> None:
    """Each kind a few times, so that what is made once is made before it is measured."""
    for kind in KINDS:
        for _ in range(3):
            await kind.send(target, rng)


async def _client(target: Target, soak: Soak, end: float, rng: random.Random) -> None:
    while time.monotonic() < end:
        [kind] = rng.choices(KINDS, [kind.weight for kind in KINDS])
        outcome = await _outcome(kind, target, rng)
        soak.outcomes[kind.name, outcome] += 1
        if outcome not in kind.expected | {"429"}:
            soak.surprises.append(f"{kind.name}: {outcome}")
        if outcome == "429":
            await asyncio.sleep(0.2)


async def _outcome(kind: Kind, target: Target, rng: random.Random) -> str:
    try:
        return await kind.send(target, rng)
    except (httpx.HTTPError, OSError) as error:
        return f"{type(error).__name__}: {error}"


async def _watch(server: Server, soak: Soak, every: float) -> None:
    while True:
        with contextlib.suppress(psutil.Error):  # a process that ended just now
            for name, snapshot in (await asyncio.to_thread(server.snapshots)).items():
                soak.memory.setdefault(name, []).append(snapshot)
        await asyncio.sleep(every)


async def _rested(server: Server, like: Rest | None = None) -> Rest:
    """The server once it holds no request (and no task more than `like`), or as it is after a while."""
    deadline = time.monotonic() + _REST_SECONDS
    while True:
        late = time.monotonic() > deadline
        try:
            rest = await asyncio.to_thread(server.rest)
        except (httpx.HTTPError, psutil.Error):  # one of its processes is being started again
            if late:
                raise
        else:
            if late or not (rest.requests or rest.blocks or (like and _more_tasks(like, rest))):
                return rest
        await asyncio.sleep(0.5)


def _more_tasks(before: Rest, after: Rest) -> list[str]:
    return [name for name, count in after.tasks.items() if count > before.tasks.get(name, count)]


def _leaks(before: Rest, after: Rest) -> list[str]:
    faults = [
        f"{name}: {after.tasks[name]} tasks, {before.tasks[name]} before"
        for name in _more_tasks(before, after)
    ]
    faults += [
        f"{name}: {after.files[name]} files open, {count} before"
        for name, count in before.files.items()
        if after.files.get(name, 0) > count + _IDLE_CONNECTIONS
    ]
    faults += [
        f"{name} was started again" for name, pid in before.pids.items() if after.pids.get(name) != pid
    ]
    if after.blocks or after.requests:
        faults.append(f"{after.blocks} blocks and {after.requests} requests are held at rest")
    return faults


def _second_half(snapshots: list[Snapshot]) -> list[Snapshot]:
    """The first half is for caches to fill."""
    return snapshots[len(snapshots) // 2 :]


def _slope(snapshots: list[Snapshot]) -> float:
    """MiB a minute, by least squares."""
    if len(snapshots) < 2:
        return 0.0
    fit = statistics.linear_regression([s.at / 60 for s in snapshots], [s.rss / MIB for s in snapshots])
    return fit.slope


def _growth(soak: Soak) -> list[str]:
    faults = []
    for name, snapshots in soak.memory.items():
        half = _second_half(snapshots)
        grown = _slope(half) * (half[-1].at - half[0].at) / 60
        allowed = max(_FLAT_MIB, _FLAT_SHARE * half[0].rss / MIB)
        if grown > allowed:
            faults.append(f"{name}: memory grew by {grown:.1f} MiB in the second half")
    return faults


def _outcome_table(soak: Soak, seconds: float) -> str:
    total = sum(soak.outcomes.values())
    lines = [
        f"{total} requests, {total / seconds:.1f} a second.\n",
        "| requests | outcome | number |",
        "|---|---|---:|",
    ]
    order = {kind.name: i for i, kind in enumerate(KINDS)}
    for (kind, outcome), count in sorted(
        soak.outcomes.items(), key=lambda item: (order[item[0][0]], item[0][1])
    ):
        lines.append(f"| {kind} | {outcome} | {count} |")
    return "\n".join(lines) + "\n\n"


def _rest_table(before: Rest, after: Rest) -> str:
    lines = ["| at rest | before | after |", "|---|---:|---:|"]
    lines.append(f"| KV blocks held | {before.blocks} | {after.blocks} |")
    lines.append(f"| requests held | {before.requests} | {after.requests} |")
    lines += [
        f"| {what} of {name} | {count} | {then.get(name, '')} |"
        for what, now, then in (("tasks", before.tasks, after.tasks), ("files", before.files, after.files))
        for name, count in now.items()
    ]
    return "\n".join(lines) + "\n\n"


def _memory_table(soak: Soak) -> str:
    lines = [
        "| process | RSS first, MiB | middle | last | slope of second half, MiB/min | files first | last |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, all_of in soak.memory.items():
        first, middle, last = all_of[0], all_of[len(all_of) // 2], all_of[-1]
        sizes = " | ".join(f"{snapshot.rss / MIB:.1f}" for snapshot in (first, middle, last))
        slope = _slope(_second_half(all_of))
        lines.append(f"| {name} | {sizes} | {slope:+.2f} | {first.files} | {last.files} |")
    return "\n".join(lines) + "\n\n"


def _heading(minutes: float, at_once: int, serve: str, seed: int) -> str:
    command = (
        f"python bench/soak.py --minutes {minutes:g} --at-once {at_once} --seed {seed} --serve {serve!r}"
    )
    cores = psutil.cpu_count()
    when = time.strftime("%Y-%m-%d")
    return (
        f"\n## Soak of {minutes:g} minutes\n\n`{command}`, {when}, {platform.machine()}, {cores} cores.\n\n"
    )


def _verdict(faults: list[str]) -> str:
    if not faults:
        return "Every block free, no task left, memory flat, no answer but the deserved ones.\n"
    return "Not as it should be:\n\n" + "\n".join(f"- {fault}" for fault in faults) + "\n"


if __name__ == "__main__":
    typer.run(main)
