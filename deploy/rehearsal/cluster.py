"""Breaks a cluster of one machine in every way, under load, and counts what its clients see.

    make rehearse-cluster

Two gateways behind a balancer, two workers, two experts and Redis run as real processes on hosts that are
network namespaces (`hosts.py`); clients ask without a pause (`traffic.py`). In every case no request may be
lost without a word, no answer may be another than from a whole cluster, and nobody may be refused or cut off
whom the fault need not have touched. Needs Linux, iproute2, and root or user namespaces.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer

from deploy.rehearsal.hosts import NoNamespaces, enter_namespaces, make_switch
from deploy.rehearsal.stack import ADMIN_KEY, DISK_BYTES, SPARE, Cluster
from deploy.rehearsal.traffic import PATIENCE_SECONDS, Answer, Load, Outcome, expected_answers, questions

ROLLED = "math-2"  # an adapter that the new version of workers brings


class Unmet(Exception):
    """Something is not as a scenario expects it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`act` breaks something and mends it. `spared` are outcomes that nobody may have had."""

    title: str
    act: Callable[[Cluster], Awaitable[None]]
    spared: frozenset[Outcome] = frozenset({Outcome.REFUSED, Outcome.CUT})


@dataclass(frozen=True, slots=True)
class Finding:
    scenario: Scenario
    answers: list[Answer]
    broken: float  # monotonic
    mended: float
    whole: float
    unmet: str = ""  # what the scenario itself found wrong

    @property
    def counts(self) -> Counter[Outcome]:
        return Counter(answer.outcome for answer in self.answers)

    @property
    def trouble_seconds(self) -> float:
        """From the fault to the last answer that was none."""
        hurt = [answer.ended for answer in self.answers if answer.outcome is not Outcome.OK]
        return max(hurt, default=self.broken) - self.broken

    def faults(self) -> list[str]:
        never = {Outcome.LOST, Outcome.WRONG} | self.scenario.spared
        told = [f"{a.outcome}: {a.told or a.text!r}" for a in self.answers if a.outcome in never]
        return [f"{self.scenario.title}: {what}" for what in (*told, *filter(None, [self.unmet]))]


async def nothing(cluster: Cluster) -> None:
    await asyncio.sleep(10)


async def kill_worker(cluster: Cluster) -> None:
    cluster.kill("worker-0")
    await asyncio.sleep(3)
    cluster.launch("worker-0")


async def cut_link(cluster: Cluster) -> None:
    cluster.hosts["worker-1"].cut()
    await asyncio.sleep(5)
    cluster.hosts["worker-1"].mend()


async def lose_worker(cluster: Cluster) -> None:
    cluster.hosts["worker-1"].cut()
    await asyncio.sleep(40)
    cluster.hosts["worker-1"].mend()


async def delay_link(cluster: Cluster) -> None:
    wire = cluster.hosts["worker-1"].wire
    assert wire is not None
    wire.delay = 0.2
    async with httpx.AsyncClient(timeout=10, trust_env=False) as http:
        begun = time.monotonic()
        await http.get(f"http://{cluster.hosts['worker-1'].address}:8001/health/live")
        if time.monotonic() - begun < 0.8:  # there and back, to connect and to ask
            raise Unmet("the link is not delayed")
    await asyncio.sleep(15)
    wire.delay = 0.0


async def kill_expert(cluster: Cluster) -> None:
    cluster.kill("ocr")
    await asyncio.sleep(5)
    cluster.launch("ocr")


async def fill_disk(cluster: Cluster) -> None:
    """Adapters come and go while a worker's disk is full, and it is remembered once there is room."""
    filler = cluster.disk("worker-0") / "filler"
    before = set(cluster.disk("worker-0").iterdir())
    try:
        filler.write_bytes(bytes(2 * DISK_BYTES))
    except OSError:
        pass
    else:
        raise Unmet("a disk that should be full is not")
    async with cluster.client(PATIENCE_SECONDS, ADMIN_KEY) as http:
        for id in ("full", "room"):
            body = {"id": id, "path": "math"}
            (await http.post("/v1/adapters", json=body)).raise_for_status()
            if id == "full":
                await asyncio.sleep(5)
                filler.unlink()
        state = cluster.disk("worker-0") / "adapters.json"
        if '"room"' not in state.read_text():
            raise Unmet("what was loaded once there was room is not remembered")
        left = set(cluster.disk("worker-0").iterdir()) - before - {state, state.with_suffix(".json.lock")}
        if left:
            raise Unmet(f"a full disk has left {sorted(path.name for path in left)}")
        for id in ("full", "room"):
            (await http.delete(f"/v1/adapters/{id}")).raise_for_status()


async def restart_redis(cluster: Cluster) -> None:
    cluster.kill("redis")
    await asyncio.sleep(8)
    cluster.launch("redis")


async def cut_redis(cluster: Cluster) -> None:
    cluster.hosts["redis"].cut()
    await asyncio.sleep(8)
    cluster.hosts["redis"].mend()


async def roll(cluster: Cluster) -> None:
    """Worker by worker: drain the old one, start the new one, wait until it is ready."""
    cluster.renew("--adapter", f"{ROLLED}={cluster.shipped / 'math'}")
    for name in cluster.workers:
        code = await cluster.drain(name)
        if code:
            raise Unmet(f"{name} was drained and ended with {code}")
        cluster.launch(name)
        await cluster.until_whole()
    async with cluster.client(PATIENCE_SECONDS) as http:
        known = {model["id"] for model in (await http.get("/v1/models")).json()["data"]}
    if ROLLED not in known:
        raise Unmet("the new version of workers is not the one that serves")


async def roll_gateways(cluster: Cluster) -> None:
    """Gateway by gateway: start a new one, and only then end an old one."""
    cluster.renew_gateways("--no-page")
    old, other = cluster.gateways
    for name, successor in ((old, SPARE), (other, old)):
        if code := await cluster.replace_gateway(name, successor):
            raise Unmet(f"{name} was drained and ended with {code}")
    async with cluster.client(PATIENCE_SECONDS) as http:
        if (await http.get("/")).status_code != 404:
            raise Unmet("the new version of gateways is not the one that serves")


SCENARIOS = (
    Scenario("nothing, for comparison", nothing),
    Scenario("a worker is killed, and started again after 3 s", kill_worker, frozenset()),
    Scenario("a worker's link is cut for 5 s", cut_link),
    Scenario("a worker's link is cut for 40 s", lose_worker, frozenset()),
    Scenario("a worker's link delays by 0.2 s each way, for 15 s", delay_link),
    Scenario("an expert is killed, and started again after 5 s", kill_expert),
    Scenario("a worker's disk is full for 5 s, adapters are loaded", fill_disk),
    Scenario("Redis is killed, and started again after 8 s", restart_redis),
    Scenario("Redis' link is cut for 8 s", cut_redis),
    Scenario("a new version of both workers is rolled out", roll),
    Scenario("a new version of both gateways is rolled out", roll_gateways, frozenset({Outcome.CUT})),
)


async def _rehearse(scenario: Scenario, cluster: Cluster, load: Load, clients: int) -> Finding:
    load.answers, unmet = [], ""
    async with load.from_clients(clients):
        await asyncio.sleep(3)
        broken = time.monotonic()
        try:
            await scenario.act(cluster)
        except Unmet as error:
            unmet = str(error)
        mended = time.monotonic()
        await cluster.until_whole()
        whole = time.monotonic()
        await asyncio.sleep(3)
    return Finding(scenario, load.answers, broken, mended, whole, unmet)


async def _all(cluster: Cluster, clients: int, only: str) -> list[Finding]:
    await cluster.start()
    async with cluster.client(PATIENCE_SECONDS) as http:
        models = [m["id"] for m in (await http.get("/v1/models")).raise_for_status().json()["data"]]
        asked = questions(models, cluster.experts)
        load = Load(http, asked, await expected_answers(http, asked, cluster.experts))
        findings = []
        for scenario in SCENARIOS:
            if only in scenario.title:
                findings.append(await _rehearse(scenario, cluster, load, clients))
                print(_row(findings[-1]), *findings[-1].faults(), sep="\n", file=sys.stderr)
    return findings


_HEAD = (
    "| what happened | ok | of these without an expert | refused | cut | lost | wrong "
    "| last refused or cut, s after it | whole again, s after it was mended | slowest answer, s |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
)


def _row(finding: Finding) -> str:
    counts = finding.counts
    slowest = max(answer.ended - answer.begun for answer in finding.answers)
    cells = [
        finding.scenario.title,
        counts[Outcome.OK],
        sum(answer.lacking for answer in finding.answers),
        *(counts[outcome] for outcome in (Outcome.REFUSED, Outcome.CUT, Outcome.LOST, Outcome.WRONG)),
        f"{finding.trouble_seconds:.1f}",
        f"{finding.whole - finding.mended:.1f}",
        f"{slowest:.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _report(findings: list[Finding], clients: int) -> str:
    rows = "\n".join(map(_row, findings))
    where = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores"
    faults = [fault for finding in findings for fault in finding.faults()]
    verdict = (
        "Not as it should be:\n\n" + "\n".join(f"- {fault}" for fault in faults[:20])
        if faults
        else "No request was lost without a word, no answer was wrong."
    )
    heading = f"\n## Rehearsal of a cluster\n\n`make rehearse-cluster`, {where}, {clients} clients.\n\n"
    return f"{heading}{_HEAD}{rows}\n\n{verdict}\n"


def main(
    clients: Annotated[int, typer.Option(min=1, help="each with one request at a time")] = 6,
    base: Annotated[str, typer.Option(help="of the workers")] = "smollm2-135m",
    only: Annotated[str, typer.Option(help="scenarios whose title has this in it")] = "",
    results: Annotated[Path | None, typer.Option(help="where the table is added, too")] = None,
) -> None:
    """Exit code 1 if anything is not as it should be."""
    try:
        enter_namespaces("deploy.rehearsal.cluster")
        make_switch()
    except NoNamespaces as error:
        sys.exit(f"error: {error}. Run it as root, or where user namespaces are allowed.")
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    findings = asyncio.run(_all(Cluster(folder, base), clients, only))
    report = _report(findings, clients)
    print(report)
    if results:
        with results.open("a") as file:
            file.write(report)
    if any(finding.faults() for finding in findings):
        sys.exit(f"The logs are in {folder}")


if __name__ == "__main__":
    typer.run(main)
