"""docs/deploy.md says what is there: targets, build arguments, variables, profiles, values, sizes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import yaml

from models.config import ModelConfig
from models.kv_cache import KVCache
from server.settings import GatewaySettings
from tests.deploy.deployment import CHART, ROOT
from tests.deploy.test_containers import DOCKERFILE, TARGETS

PAGE = (ROOT / "docs" / "deploy.md").read_text()
SIZES = (ROOT / "docs" / "size.md").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()


def shape(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int) -> ModelConfig:
    """What decides the size of a KV cache; the rest is anything."""
    rest: dict[str, Any] = {"vocab_size": 1, "intermediate_size": 1, "max_position_embeddings": 1}
    head_dim = hidden_size // num_heads
    return ModelConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        **rest,
    )


BASES = {
    "SmolLM2-135M": shape(576, 30, 9, 3),
    "LLaMA-7B, LLaMA-2-7B": shape(4096, 32, 32, 32),
    "LLaMA-3-8B": shape(4096, 32, 32, 8),
}
LLAMA_7B = BASES["LLaMA-7B, LLaMA-2-7B"]


def section(title: str) -> str:
    _, found, rest = PAGE.partition(f"## {title}\n")
    assert found, title
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text: str) -> set[str]:
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}


def test_every_target_and_build_argument() -> None:
    arguments = re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert first_cells(section("Images")) == {*TARGETS, *arguments} - {"SETUPTOOLS", "PIP_LICENSES"}


def test_the_images_that_are_built_unasked() -> None:
    [targets] = re.findall(r"^TARGETS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    [unasked] = re.findall(r"^`make image` builds .*?\.", section("Images"), re.MULTILINE)
    others = re.findall(r'`make image TARGETS="(.*?)"`', section("Images"))
    built = set(targets.split())
    assert set(re.findall(r"`([\w-]+)`", unasked)) == built
    assert {name for line in others for name in line.split()} == set(TARGETS) - built


def test_every_variable_and_profile_of_compose() -> None:
    variables = set(re.findall(r"\$\{(\w+)", COMPOSE))
    profiles = set(re.findall(r"profiles: \[([\w-]+)\]", COMPOSE))
    named_elsewhere = {"OTEL_EXPORTER_OTLP_ENDPOINT", "PROMETHEUS_PORT", "GRAFANA_PORT", "JAEGER_PORT"}
    assert first_cells(section("Compose")) == (variables - named_elsewhere) | profiles


def test_values_that_are_named_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    told = set(
        re.findall(
            r"`((?:gateway|worker|adapters|train|networkPolicy|monitoring)\.[\w.]+)", section("Kubernetes")
        )
    )
    assert len(told) > 8
    for path in told:
        place = values
        for name in path.split("."):
            assert name in place, path
            place = place[name]


@pytest.mark.parametrize("base", BASES)
def test_sizes(base: str) -> None:
    rows = [[c.strip() for c in line.split("|")[1:5]] for line in SIZES.splitlines() if f"| {base} |" in line]
    assert rows
    for _, dtype, per_token, per_gib in rows:
        size = KVCache.bytes_per_block(BASES[base], 1, getattr(torch, dtype))
        assert per_token == f"{size / 1024:g} KiB"
        assert per_gib == f"{2**30 // size:,}"


def test_the_sums_for_llama_7b() -> None:
    per_token = KVCache.bytes_per_block(LLAMA_7B, 1, torch.bfloat16)
    assert 10 * per_token == 5 * 2**20  # a prompt of 10 rows
    values = yaml.safe_load((CHART / "values-a100.yaml").read_text())
    cache = values["worker"]["settings"]["kv_cache_mib"] * 2**20
    assert cache == 48 * 2**30
    assert f"{cache // per_token:,} tokens" in SIZES
    assert f"{cache // per_token:,} tokens" in (CHART / "values-a100.yaml").read_text()


def test_the_sum_for_a_gateway() -> None:
    def told(name: str) -> Any:
        return yaml.safe_load((CHART / name).read_text())["gateway"]

    given, laptop = told("values.yaml"), told("values-laptop.yaml")
    most = given["settings"]["max_body_bytes"] // 2**20
    amounts = [one["resources"]["limits"]["memory"] for one in (given, laptop)]
    memory = [a.removesuffix("Gi") if "Gi" in a else f"{int(a.removesuffix('Mi')) / 1024:g}" for a in amounts]
    requests = [one["settings"]["max_concurrent_requests"] for one in (given, laptop)]
    assert f"allow {requests[0]} of {most} MiB in {memory[0]} GiB" in SIZES
    assert f"`values-laptop.yaml` {requests[1]} in {memory[1]} GiB" in SIZES
    bare = GatewaySettings()
    of_defaults = bare.max_concurrent_requests * bare.max_body_bytes * 11 // 4
    assert f"come to {of_defaults // 2**30} GiB" in SIZES


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
    assert "](docs/deploy.md)" in (ROOT / "README.md").read_text()
