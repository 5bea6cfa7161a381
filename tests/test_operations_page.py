"""docs/operations.md says every setting, with its flag, default and meaning, and every metric."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from server.cli import serve
from server.gateway.keys import _Entry
from server.gateway.limiter import RATE_HEADERS
from server.gateway.metrics import GatewayMetrics
from server.gateway.schemas import ChatRequest
from server.metrics import PREFIX
from server.options import flag
from server.settings import ExpertSettings, GatewaySettings, WorkerSettings
from server.worker.metrics import WorkerMetrics
from tests.server.gateway.scripted import STATS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "operations.md").read_text()


def section(title: str) -> str:
    """What stands below the heading `title`, to the next one."""
    _, found, rest = PAGE.partition(f"## {title}\n")
    assert found, title
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `")]


def default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, SecretStr):
        return f"`{value.get_secret_value()}`"
    return f"`{str(value).replace(str(Path.home()), '~')}`"


@pytest.mark.parametrize(
    ("title", "settings"),
    [
        ("Gateway settings", GatewaySettings),
        ("Worker settings", WorkerSettings),
        ("Expert settings", ExpertSettings),
    ],
)
def test_every_setting(title: str, settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    expected = [
        f"| `{name}` | `{flag(name)}` | {default(field)} | {field.description} |"
        for name, field in settings.model_fields.items()
    ]
    wanted = f'docs/operations.md, "{title}" should have these rows:\n' + "\n".join(expected)
    assert rows(section(title)) == expected, wanted


def test_every_setting_of_serve_alone() -> None:
    models = (GatewaySettings, WorkerSettings, ExpertSettings)
    shared = {name for model in models for name in model.model_fields}
    expected = [
        f"| `{name}` | `{flag(name)}` | `{parameter.default}` | {parameter.annotation.__metadata__[0].help} |"
        for name, parameter in inspect.signature(serve).parameters.items()
        if name not in shared and name != "supervised"  # not for people: how `serve` starts its own parts
    ]
    assert len(expected) == 2
    assert rows(section("Settings of serve alone")) == expected


def names_of(rendered: bytes) -> set[str]:
    """Families as Prometheus has them, without the time each was created."""
    families = [
        f for f in text_string_to_metric_families(rendered.decode()) if not f.name.endswith("_created")
    ]
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


@pytest.mark.parametrize("process", ["gateway", "worker"])
def test_every_metric(process: str) -> None:
    if process == "gateway":
        names = names_of(GatewayMetrics(lambda: [("w", "base", STATS)]).render())
    else:
        names = names_of(WorkerMetrics("base", lambda: STATS).render())
    assert len(names) > 10
    told = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows(section("Metrics")))))
    assert {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)} - told == set()


def test_no_metric_that_is_not_there() -> None:
    names = names_of(GatewayMetrics(lambda: [("w", "base", STATS)]).render())
    names |= names_of(WorkerMetrics("base", lambda: STATS).render())
    told = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows(section("Metrics")))))
    assert {PREFIX + name for name in told} - names == set()


def test_every_field_of_the_keys_file() -> None:
    told = {re.findall(r"`(\w+)`", row)[0] for row in rows(section("Keys"))}
    assert told == set(_Entry.model_fields)


def test_limits_name_their_headers_and_settings() -> None:
    text = section("Limits")
    for header in RATE_HEADERS:
        assert header.rpartition("-")[0] in text, header
    for name in re.findall(r"`(\w+)`", text):
        if "_" in name:
            assert any(
                name in model.model_fields for model in (GatewaySettings, WorkerSettings, ChatRequest)
            ), name
    limits = {"max_body_bytes", "max_concurrent_requests", "request_seconds", "body_seconds", "max_waiting"}
    assert limits <= set(re.findall(r"`(\w+)`", text))


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", PAGE, re.M)
    }
    anchors = re.findall(r"operations\.md#([a-z-]+)", (DOCS / "api.md").read_text())
    assert set(anchors) <= headings
    assert "](docs/operations.md)" in (DOCS.parent / "README.md").read_text()
