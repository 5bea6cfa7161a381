"""The whole service under what schemathesis makes of its own OpenAPI description: nothing is a 5xx."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from service import Service, until
from service import serving as service_of
from tiny_base import write_adapter, write_tiny_base

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

SECONDS = 60
# uvloop's word for a connection to a worker that was given up while it was being made.
UVLOOP = "handle: <Handle Future.set_result>"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "unsupported_method,ignored_auth"
)
KEY = "of-the-fuzzer"
# By route with a body: the status of what is done. Without so many of them the fuzzer has tried only how
# inputs are refused.
ACCEPTED = {
    "/v1/chat/completions": "200",
    "/v1/responses": "200",
    "/v1/completions": "200",
    "/tokenize": "200",
    "/detokenize": "200",
    "/v1/adapters": "201",
}
LEAST = 3


def test_no_input_makes_a_server_error(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "tiny")
    write_adapter(tmp_path / "root" / "poet", "v1")
    with service_of(
        f"--base={tmp_path / 'tiny'}",
        f"--adapter=poet={tmp_path / 'root' / 'poet'}",
        f"--adapter-root={tmp_path / 'root'}",
        f"--cache-dir={tmp_path / 'cache'}",
        "--experts=",
        f"--api-key={KEY}",
        f"--admin-key={KEY}-admin",
    ) as service:
        schemathesis = Path(sys.executable).with_name("schemathesis")
        command = [
            schemathesis, "run", f"{service.url}/openapi.json", "--checks", CHECKS, "--phases",
            "coverage,fuzzing", "--max-time", str(SECONDS), "--no-shrink", "--generation-database", "none",
            "--seed", os.environ.get("FUZZ_SEED", "1"),
            "--suppress-health-check", "all", "--no-color", "--warnings", "off", "--request-timeout", "30",
            "--continue-on-failure", "-H", f"Authorization: Bearer {KEY}-admin",
        ]  # fmt: skip
        tests = Path(__file__).parents[1]
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(tests)}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + told(service)
        statuses = answers(service.url)
        for route, accepted in ACCEPTED.items():
            counts = statuses[route]
            assert counts.get(accepted, 0) >= LEAST, f"{route} took hardly any input: {counts}"
            assert counts.get("400", 0) >= LEAST, f"{route} refused hardly any input: {counts}"
        assert scrape(service.url)["llama_adapter:request_success_total"] >= LEAST
        until(lambda: scrape(service.url)["llama_adapter:kv_cache_usage_perc"] == 0)
        lines = [line for line in service.printed if '"exception"' in line and UVLOOP not in line]
        assert not lines


def told(service: Service) -> str:
    """What it logged but for the requests themselves."""
    return "".join(line for line in service.printed if '"info"' not in line)


def samples(url: str) -> Iterator[Sample]:
    text = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    for family in text_string_to_metric_families(text):
        yield from family.samples


def scrape(url: str) -> dict[str, float]:
    """Each metric's sum over its labels."""
    sums: dict[str, float] = {}
    for sample in samples(url):
        sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def answers(url: str) -> dict[str, dict[str, float]]:
    """How many by status, by route."""
    counts: dict[str, dict[str, float]] = {}
    for sample in samples(url):
        if sample.name == "llama_adapter:http_requests_total":
            counts.setdefault(sample.labels["route"], {})[sample.labels["status"]] = sample.value
    return counts
