"""Alerts and dashboard: they parse, and ask only for metrics and labels that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.gateway.auth import OPEN_PATHS
from server.gateway.metrics import GatewayMetrics
from server.gateway.routes import health
from server.metrics import PREFIX
from tests.deploy.deployment import CHART, ROOT, Object, run
from tests.server.gateway.scripted import STATS

RULES: list[Object] = [
    rule
    for group in yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: Any = json.loads((CHART / "files" / "dashboard.json").read_text())
PANELS: list[Object] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PROMETHEUS: Any = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus.yml").read_text())
JOBS = {"llama-adapter-gateway", "llama-adapter-worker", "llama-adapter-expert"}
OF_PROMETHEUS = {"job", "instance", "namespace", "le"}


def expressions() -> list[str]:
    """All that alerts and dashboard ask, with Grafana's variables filled in."""
    asked = [rule["expr"] for rule in RULES] + [t["expr"] for panel in PANELS for t in panel["targets"]]
    for variable, value in (("$__rate_interval", "5m"), ("$model", ".*"), ("$namespace", ".*")):
        asked = [expr.replace(variable, value) for expr in asked]
    return asked


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """Sample name → its labels, of a gateway that has seen one of each thing."""
    gateway = GatewayMetrics(lambda: [("w", "base", STATS)])
    gateway.http_requests.labels("/v1/models", "200").inc()
    gateway.experts.labels("base", "ocr", "ok").observe(1)
    gateway.open_circuits.labels("ocr").set(0)
    gateway.charge("key-1", "base", 5, 2)
    requests = gateway._requests
    for metric in (requests.prompt_tokens, requests.generation_tokens):
        metric.labels("base").inc()
    requests.successes.labels("base", "stop").inc()
    for histogram in (
        requests.queue_time,
        requests.first_token,
        requests.inter_token,
        requests.whole_request,
        requests.prompt_length,
        requests.answer_length,
    ):
        histogram.labels("base").observe(1)
    families = text_string_to_metric_families(gateway.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_every_metric_that_is_asked_for_exists(metrics: dict[str, set[str]]) -> None:
    asked = {name for expr in expressions() for name in re.findall(rf"{PREFIX}\w+", expr)}
    assert len(asked) > 15
    assert asked - set(metrics) == set()


def test_the_dashboard_shows_every_metric(metrics: dict[str, set[str]]) -> None:
    def family(name: str) -> str:
        return re.sub(r"_(bucket|count|sum|created)$", "", name).removesuffix("_total")

    text = json.dumps(DASHBOARD)
    shown = {family(name) for name in re.findall(rf"{PREFIX}\w+", text)}
    assert {family(name) for name in metrics if name.startswith(PREFIX)} - shown == set()


@pytest.mark.deploy
def test_every_expression_is_promql_and_asks_for_labels_that_exist(
    tools: Path, metrics: dict[str, set[str]]
) -> None:
    script = ROOT / "tests" / "deploy" / "promql.py"
    answers = json.loads(run(tools / "python", script, input=json.dumps(expressions())))
    assert len(answers) == len(expressions())
    for expr, asked in zip(expressions(), answers, strict=True):
        grouped = asked.pop("")
        known = [metrics.get(name, set()) | OF_PROMETHEUS for name in asked]
        assert known or "vector" in expr, expr
        for name, labels in asked.items():
            assert set(labels) <= metrics.get(name, set()) | OF_PROMETHEUS, (expr, name)
            assert name == "up" or name in metrics, expr
            assert "job" in labels, f"{expr}: gateway and worker tell {name}, each of its own"
        assert set(grouped) <= set().union(*known), expr


@pytest.mark.deploy
def test_probes_and_scrapes_are_no_requests(tools: Path) -> None:
    """They come every few seconds, and would hide that half of the requests fail."""
    script = ROOT / "tests" / "deploy" / "promql.py"
    asked = [expr for expr in expressions() if f"{PREFIX}http_requests_total" in expr]
    assert len(asked) == 5
    for labels in json.loads(run(tools / "python", script, input=json.dumps(asked))):
        of_requests = labels[f"{PREFIX}http_requests_total"]
        assert of_requests.count("route") == of_requests.count("job") > 0
    [pattern] = {pattern for expr in asked for pattern in re.findall(r'route!~"([^"]*)"', expr)}
    no_requests = {route.path for route in health.router.routes} - {"/openapi.json"}  # type: ignore[attr-defined]
    assert no_requests == {*OPEN_PATHS, "/metrics"}
    assert all(re.fullmatch(pattern, path) for path in no_requests)
    # A request that was refused before it had a route is told as `unknown`.
    assert not [path for path in ("unknown", "/v1/chat/completions") if re.fullmatch(pattern, path)]


def test_the_dashboard_shows_one_namespace() -> None:
    """Where there are some; the variable's `All` is `.*`, which nothing at all matches too."""
    for panel in PANELS:
        for target in panel["targets"]:
            assert target["expr"].count('namespace=~"$namespace"') == target["expr"].count('job="')
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["namespace"]["allValue"] == ".*"
    assert variables["namespace"]["current"]["value"] == "$__all"


def test_jobs_are_those_that_are_scraped() -> None:
    asked = {job for expr in expressions() for job in re.findall(r'job="([^"]*)"', expr)}
    assert asked <= JOBS
    assert {job["job_name"] for job in PROMETHEUS["scrape_configs"]} == JOBS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert(rule: Object) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"LlamaAdapter[A-Za-z]+", rule["alert"])
    assert re.fullmatch(r"\d+[mh]", rule["for"])
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert rule["annotations"].keys() >= {"summary"}
    said = " ".join(rule["annotations"].values())
    told = set(re.findall(r"\$labels\.(\w+)", said))
    by = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))
    assert told <= by | ({"instance"} if "by (" not in rule["expr"] else set())


def test_alerts_have_names_of_their_own() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) > 5


def test_dashboard_panels_are_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) > 15
    for panel in PANELS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def cells() -> Iterator[tuple[int, int]]:
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                yield x, y


def test_dashboard_panels_do_not_overlap() -> None:
    taken = list(cells())
    assert len(taken) == len(set(taken))


def test_grafana_finds_source_and_dashboard() -> None:
    provisioning = ROOT / "deploy" / "monitoring" / "grafana"
    sources = yaml.safe_load((provisioning / "datasources" / "datasources.yaml").read_text())["datasources"]
    assert {source["type"] for source in sources if source.get("isDefault")} == {"prometheus"}
    [provider] = yaml.safe_load((provisioning / "dashboards" / "dashboards.yaml").read_text())["providers"]
    assert f"{provider['options']['path']}/llama-adapter.json:ro" in (ROOT / "docker-compose.yml").read_text()
