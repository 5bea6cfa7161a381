"""The command line: help that shows every setting, values and their errors, light imports."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import pytest
from pydantic_settings import BaseSettings
from typer.testing import CliRunner

from server import cli, processes
from server.options import flag, load
from server.serving import StartupError
from server.settings import ExpertSettings, GatewaySettings, WorkerSettings
from server.shipped import adapter_ids, with_folders
from server.supervisor import ServiceSettings


def help_of(command: str) -> str:
    result = CliRunner().invoke(cli.app, [command, "--help"], prog_name="llama-adapter")
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize(
    ("command", "settings", "hidden"),
    [
        ("serve", GatewaySettings, {"worker_urls", "captions"}),
        ("serve", WorkerSettings, {"uds"}),
        ("serve", ExpertSettings, {"uds"}),
        ("gateway", GatewaySettings, set()),
        ("worker", WorkerSettings, set()),
        ("expert", ExpertSettings, set()),
    ],
)
def test_help_has_every_setting_with_its_default(
    command: str, settings: type[BaseSettings], hidden: set[str]
) -> None:
    text = " ".join(help_of(command).split())
    for name, field in settings.model_fields.items():
        assert field.description, f"{settings.__name__}.{name} has no description"
        assert (f"{flag(name)} " in text) == (name not in hidden), name
    for name, field in settings.model_fields.items():
        if name not in hidden and get_origin(field.annotation) in (tuple, dict):
            assert f"JSON in LLAMA_ADAPTER_{name.upper()})" in text, "the option is called otherwise"
    assert "Example" in text
    assert "--supervised" not in text


def test_defaults_are_shown_per_command() -> None:
    assert "[8000]" in help_of("serve")
    assert "[8001]" in help_of("worker")
    assert "[8002]" in help_of("expert")


def test_serve_hands_the_options_to_their_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[ServiceSettings] = []
    monkeypatch.setattr(processes, "run_service", seen.append)
    monkeypatch.setenv("LLAMA_ADAPTER_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("LLAMA_ADAPTER_PORT", "1")
    options = ["--port", "9", "--adapter", "a=x", "--adapter", "b=y,gate=raw", "--dtype", "float32"]
    options += ["--no-prefix-caching", "--max-image-bytes", "77", "--num-threads", "2", "--experts", "ocr, "]
    result = CliRunner().invoke(cli.app, ["serve", *options])
    assert result.exit_code == 0, result.output
    (service,) = seen
    assert service.gateway.port == 9
    assert service.worker.adapters == ("a=x", "b=y,gate=raw")
    assert (service.worker.dtype, service.worker.prefix_caching) == ("float32", False)
    assert service.worker.max_num_seqs == 3
    assert service.gateway.max_image_bytes == service.expert.max_image_bytes == 77
    assert (service.worker.num_threads, service.expert.num_threads) == (2, 0)
    assert service.experts == ("ocr",)


def test_threads_of_the_worker_are_not_those_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServiceSettings] = []
    monkeypatch.setattr(processes, "run_service", seen.append)
    monkeypatch.setenv("LLAMA_ADAPTER_NUM_THREADS", "16")
    assert CliRunner().invoke(cli.app, ["serve"]).exit_code == 0
    assert (seen[0].worker.num_threads, seen[0].expert.num_threads) == (16, 0)


@pytest.mark.parametrize("keys", [{"api_keys": ("sk-one",)}, {"keys_file": Path("keys.toml")}, {}])
def test_the_first_words_tell_models_and_a_request_with_the_key_it_needs(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(settings: ServiceSettings, announce: Callable[[str, list[str]], None]) -> None:
        announce("http://127.0.0.1:8000", ["tiny", *(f"adapter-{number}" for number in range(10))])

    monkeypatch.setattr(processes, "serve", serve)
    monkeypatch.setattr(processes, "_begin", lambda name, settings: None)
    monkeypatch.setattr(processes, "_fetch_base", lambda settings: None)
    processes.run_service(
        ServiceSettings(GatewaySettings(**keys), WorkerSettings(), ExpertSettings(), ("ocr",))
    )
    told = capsys.readouterr().out
    assert "llama-adapter serves http://127.0.0.1:8000\n" in told
    assert "models: tiny, adapter-0, " in told
    assert "adapter-6 and 3 more" in told
    assert ('"model": "tiny"' in told, "Bearer YOUR_KEY" in told) == (True, bool(keys))
    assert "sk-one" not in told


def test_a_home_in_a_path_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ADAPTER_ADAPTER_DIR", "~/adapters")
    settings = load(WorkerSettings, {"cache_dir": Path("~/cache")})
    assert (settings.cache_dir, settings.adapter_dir) == (Path.home() / "cache", Path.home() / "adapters")
    with pytest.raises(StartupError, match=r"--adapter-root.*home"):
        load(WorkerSettings, {"adapter_root": Path("~nobody-of-this-name/x")})


def test_bases_lie_in_the_users_folder_for_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_ADAPTER_CACHE_DIR", raising=False)
    for users, folder in (("/caches", Path("/caches")), ("", Path.home() / ".cache"), ("a/b", None)):
        monkeypatch.setenv("XDG_CACHE_HOME", users)  # one that is relative counts for nothing
        expected = (folder or Path.home() / ".cache") / "llama-adapter"
        assert load(WorkerSettings, {}).cache_dir == expected


def test_who_has_no_home_can_name_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a container's user of any number."""
    for name in ("LLAMA_ADAPTER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert "--cache-dir" in help_of("worker")
    with pytest.raises(StartupError, match=r"--cache-dir.*home"):
        load(WorkerSettings, {})
    assert load(WorkerSettings, {"cache_dir": tmp_path}).cache_dir == tmp_path


def test_tables_are_given_as_pairs() -> None:
    settings = load(GatewaySettings, {"expert_urls": ["ocr=http://a:1", "caption=unix:/x=y"], "port": None})
    assert settings.expert_urls == {"ocr": "http://a:1", "caption": "unix:/x=y"}
    assert settings.port == 8000
    with pytest.raises(StartupError, match="'ocr' should be NAME=VALUE"):
        load(GatewaySettings, {"expert_urls": ["ocr"]})


def test_bad_values_name_option_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError) as error:
        load(WorkerSettings, {"kv_cache_mib": 0, "port": 99999})
    for said in ("--kv-cache-mib", "LLAMA_ADAPTER_KV_CACHE_MIB", "greater than 0", "--port", "99999"):
        assert said in str(error.value)
    monkeypatch.setenv("LLAMA_ADAPTER_ADAPTERS", "a=x")
    with pytest.raises(StartupError, match="JSON"):
        load(WorkerSettings, {})


@pytest.mark.parametrize(
    "url", ["10.0.0.5:8001", "ftp://a", "http://", "http://a:port", "http://a:0", "unix:x", ""]
)
def test_an_address_without_its_scheme_stops_the_start(url: str) -> None:
    for given in ({"worker_urls": ["http://a:1", url]}, {"expert_urls": [f"ocr={url}"]}):
        with pytest.raises(StartupError, match="should be http://host:port or unix:/path, not '") as error:
            load(GatewaySettings, given)
        assert repr(url) in str(error.value)


@pytest.mark.parametrize("origin", ["https://a.example/", "https://A.example", "a.example", "https://", ""])
def test_an_origin_that_no_browser_sends_stops_the_start(origin: str) -> None:
    good = ["https://a.example", "http://localhost:3000", "app://obsidian.md", "null", "*"]
    assert load(GatewaySettings, {"cors_origins": good}).cors_origins == tuple(good)
    with pytest.raises(StartupError, match=r"--cors-origin.*should be like https://app.example") as error:
        load(GatewaySettings, {"cors_origins": [*good, origin]})
    assert repr(origin) in str(error.value)


def write_manifests(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter.json").write_text("{}")


def test_adapter_dir_adds_what_it_holds(tmp_path: Path) -> None:
    write_manifests(tmp_path, "poet", "caption")
    (tmp_path / "notes").mkdir()
    (tmp_path / "from-peft").mkdir()
    (tmp_path / "from-peft" / "adapter_config.json").write_text("{}")
    settings = WorkerSettings(adapters=("poet=mine",), adapter_dir=tmp_path, shipped_adapters=False)
    found = with_folders(settings)
    assert found.adapters == (
        "poet=mine",
        f"caption={tmp_path / 'caption'}",
        f"from-peft={tmp_path / 'from-peft'}",
    )
    assert with_folders(found) == found
    with pytest.raises(StartupError, match="--adapter-dir"):
        with_folders(WorkerSettings(adapter_dir=tmp_path / "none"))


def test_shipped_adapters_come_with_the_default_base_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifests(tmp_path / "shipped", "caption", "poet")
    write_manifests(tmp_path / "own", "poet")
    (tmp_path / "shipped" / "planned").mkdir()  # a card without its adapter
    monkeypatch.setattr("server.shipped.SHIPPED_DIR", tmp_path / "shipped")

    def served(**changes: Any) -> list[str]:
        return adapter_ids(with_folders(WorkerSettings(**changes)).adapters)

    assert served() == ["caption", "poet"]
    assert served(base="./other") == []
    assert served(shipped_adapters=False) == []
    assert served(adapters=("caption=mine",)) == ["caption", "poet"]
    found = with_folders(WorkerSettings(adapters=("caption=mine",), adapter_dir=tmp_path / "own"))
    assert found.adapters == ("caption=mine", f"poet={tmp_path / 'own' / 'poet'}")
    monkeypatch.setattr("server.shipped.SHIPPED_DIR", tmp_path / "own")
    assert with_folders(found) == found, "a child must not add to what it is given"


def llama_adapter(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_exit_codes() -> None:
    assert llama_adapter("version").stdout.startswith("llama-adapter-server ")
    assert llama_adapter("worker", "--dtype", "float8").returncode == 2
    failed = llama_adapter("gateway", "--port", "70000")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert re.fullmatch(r"error: --port .*not 70000\.\n", failed.stderr)

    told = llama_adapter("--version")
    assert (told.returncode, told.stdout) == (0, llama_adapter("version").stdout)


def test_pull_names_what_it_knows() -> None:
    failed = llama_adapter("pull", "llama-9")
    assert failed.returncode == 1
    assert "smollm2-135m" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_experts_get_the_folder_of_their_model(tmp_path: Path) -> None:
    failed = llama_adapter("expert", "caption", "--blip-model", str(tmp_path))
    assert failed.returncode == 1
    assert "holds no BLIP weights" in failed.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from server import cli; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "print(*sorted({'torch', 'numpy', 'fastapi', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--nnodes", "2", "--node-rank", "1"), "run `llama-adapter worker` on it"),
        (("--nnodes", "2", "--workers", "2"), "exclude each other"),
    ],
)
def test_one_worker_of_one_machine_leads_several(arguments: tuple[str, ...], sentence: str) -> None:
    result = CliRunner().invoke(cli.app, ["serve", "--engine", "vllm", *arguments])
    assert isinstance(result.exception, StartupError)
    assert sentence in str(result.exception)
