"""docker-compose.yml, as Docker Compose itself reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic_settings import BaseSettings

from server.serving import _CLOSING_SECONDS
from server.settings import ExpertSettings, GatewaySettings, WorkerSettings
from tests.deploy.deployment import ROOT, Object, memory_held

pytestmark = pytest.mark.deploy

Compose = Callable[..., Object]
# Profile → its worker.
WORKERS = {"cpu": "worker", "gpu": "worker-gpu", "vllm": "worker-vllm", "vllm-cpu": "worker-vllm-cpu"}
ALL = (*WORKERS, "train", "monitoring")


@pytest.mark.parametrize(
    ("profiles", "services"),
    [
        ((), {"gateway", "worker", "expert"}),
        (("gpu",), {"gateway", "worker-gpu", "expert"}),
        (("vllm",), {"gateway", "worker-vllm", "expert"}),
        (("vllm-cpu",), {"gateway", "worker-vllm-cpu", "expert"}),
        (("cpu", "train"), {"gateway", "worker", "expert", "train"}),
        (("cpu", "monitoring"), {"gateway", "worker", "expert", "prometheus", "grafana", "jaeger"}),
    ],
)
def test_profiles(compose: Compose, profiles: tuple[str, ...], services: set[str]) -> None:
    assert set(compose(*profiles)["services"]) == services


def test_down_with_every_profile_ends_all_that_may_run(compose: Compose) -> None:
    assert set(compose("*")["services"]) == set(compose(*ALL)["services"])
    for page in ("docker-compose.yml", "docs/deploy.md"):
        assert "docker compose --profile '*' down" in (ROOT / page).read_text()


def test_every_service_is_confined(compose: Compose) -> None:
    for name, service in compose(*ALL)["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service), name
        assert service["deploy"]["resources"]["limits"].keys() >= {"memory", "pids"}, name
        assert {port["host_ip"] for port in service.get("ports", ())} <= {"127.0.0.1"}, name
        tag = service["image"].rpartition(":")[2]
        assert "build" in service or (tag[-1].isdigit() and "." in tag), name


def test_only_the_gateway_is_outside(compose: Compose) -> None:
    config = compose(*WORKERS, "train")
    assert config["networks"]["back"]["internal"]
    networks = {name: set(service.get("networks", ())) for name, service in config["services"].items()}
    assert networks.pop("gateway") == {"front", "back"}
    assert set().union(*networks.values()) == {"back"}


def settings_of(service: Object, settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch) -> Any:
    prefix = "LLAMA_ADAPTER_"
    given = {name: value for name, value in service["environment"].items() if name.startswith(prefix)}
    assert {name.removeprefix(prefix).lower() for name in given} <= set(settings.model_fields)
    with monkeypatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        return settings()


def test_settings_load_and_fit_together(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    services = compose(*ALL)["services"]
    gateway = settings_of(services["gateway"], GatewaySettings, monkeypatch)
    expert = settings_of(services["expert"], ExpertSettings, monkeypatch)
    for name in WORKERS.values():
        worker = settings_of(services[name], WorkerSettings, monkeypatch)
        assert "worker" in services[name]["networks"]["back"]["aliases"]
        assert gateway.worker_urls == (f"http://worker:{worker.port}",)
    assert set(gateway.expert_urls.values()) == {f"http://expert:{expert.port}"}
    for name in ("worker", "worker-vllm-cpu"):
        assert services[name]["deploy"]["resources"]["limits"]["cpus"] == 2
        assert services[name]["environment"]["LLAMA_ADAPTER_NUM_THREADS"] == "2"
    assert memory_held(gateway) <= int(services["gateway"]["deploy"]["resources"]["limits"]["memory"])
    assert gateway.api_keys == gateway.admin_keys == ()
    assert gateway.captions


def test_the_grace_period_leaves_time_to_drain(compose: Compose) -> None:
    services = compose(*ALL)["services"]
    for name in ("gateway", *WORKERS.values(), "expert"):
        grace = float(services[name]["stop_grace_period"].removesuffix("s"))
        assert grace >= GatewaySettings.model_fields["drain_seconds"].default + _CLOSING_SECONDS, name


def test_the_gateway_waits_for_what_it_asks(compose: Compose) -> None:
    for profile, worker in WORKERS.items():
        waited = compose(profile)["services"]["gateway"]["depends_on"]
        assert {waited[name]["condition"] for name in (worker, "expert")} == {"service_healthy"}


def test_variables_reach_their_places(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(PORT="9000", BASE="/models/mine", MODELS="./models", THREADS="4", API_KEYS='["k"]')
    gateway, worker = config["services"]["gateway"], config["services"]["worker"]
    assert gateway["ports"][0]["published"] == "9000"
    [key] = settings_of(gateway, GatewaySettings, monkeypatch).api_keys
    assert key.get_secret_value() == "k"
    loaded = settings_of(worker, WorkerSettings, monkeypatch)
    assert (loaded.base, loaded.num_threads) == ("/models/mine", 4)
    mounted = {volume["target"]: volume for volume in worker["volumes"]}
    assert mounted["/models"]["source"] == str(ROOT / "models")
    assert {target for target, volume in mounted.items() if not volume.get("read_only")} == {"/state"}
    assert loaded.adapter_state.parent == Path("/state")


def test_what_is_compiled_at_run_time_can_be_executed(compose: Compose) -> None:
    """Docker mounts a tmpfs so that it cannot, where nothing else is said."""
    services = compose(*ALL)["services"]
    executable = {name for name, service in services.items() if "exec" in str(service["tmpfs"])}
    assert executable == {"worker-gpu", "worker-vllm", "worker-vllm-cpu"}


def test_devices_are_asked_for_by_what_computes_on_them(compose: Compose) -> None:
    services = compose(*ALL)["services"]
    reserving = {name for name, one in services.items() if "reservations" in one["deploy"]["resources"]}
    assert reserving == {"worker-gpu", "worker-vllm"}
    builds = {name: services[name]["build"] for name in ("worker-vllm", "worker-vllm-cpu")}
    assert {build["target"] for build in builds.values()} == {"worker-vllm"}
    assert {name: build["args"].get("VLLM") for name, build in builds.items()} == {
        "worker-vllm": None,  # the Dockerfile's default, with CUDA
        "worker-vllm-cpu": "cpu",
    }
    assert services["worker-vllm"]["image"] != services["worker-vllm-cpu"]["image"]


def test_files_that_are_mounted_exist(compose: Compose) -> None:
    binds = [
        volume["source"]
        for service in compose(*ALL)["services"].values()
        for volume in service.get("volumes", ())
        if volume["type"] == "bind"
    ]
    assert len(binds) == 5
    assert [path for path in binds if not (ROOT / path).exists()] == []
