"""What a start says of settings that are seldom meant: misspelt variables, a service open to all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from server.precautions import openness, unknown_variables
from server.settings import GatewaySettings


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("LLAMA_ADAPTER_API_KEY", "LLAMA_ADAPTER_API_KEYS"),
        ("LLAMA_ADAPTER_WORKER", "LLAMA_ADAPTER_WORKER_URLS"),
        ("LLAMA_ADAPTER_ADAPTER", "LLAMA_ADAPTER_ADAPTERS"),
        ("LLAMA_ADAPTER_KV_CACHE_MB", "LLAMA_ADAPTER_KV_CACHE_MIB"),
    ],
)
def test_a_variable_that_names_no_setting_is_told_with_the_one_meant(variable: str, meant: str) -> None:
    [sentence] = unknown_variables({variable: "sk-secret", "PATH": "/bin"})
    assert sentence == f"{variable} names no setting and is ignored; did you mean {meant}?"


def test_of_one_that_resembles_none_no_guess_is_made() -> None:
    assert list(unknown_variables({"LLAMA_ADAPTER_SERVICE_HOST": "10.0.0.1"})) == [
        "LLAMA_ADAPTER_SERVICE_HOST names no setting and is ignored"
    ]


def test_what_names_a_setting_of_any_process_is_not_told() -> None:
    known = ("KV_CACHE_MIB", "API_KEYS", "OCR_ENGINE", "EXPERTS", "WORKERS", "EXPERT_URLS__OCR")
    assert list(unknown_variables({f"LLAMA_ADAPTER_{name}": "1" for name in known})) == []


@pytest.mark.parametrize(
    ("settings", "is_open"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "gateway.example.org"}, True),
        ({"host": "0.0.0.0", "admin_keys": ("root",)}, True),
        ({"host": "0.0.0.0", "api_keys": ("one",)}, False),
        ({"host": "0.0.0.0", "keys_file": "keys.toml"}, False),
    ],
)
def test_a_service_that_others_reach_without_a_key_is_told(settings: dict[str, Any], is_open: bool) -> None:
    assert (openness(GatewaySettings(**settings)) is not None) == is_open


def test_a_start_tells_both_and_no_value() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ADAPTER_")}
    command = [sys.executable, "-m", "server.cli", "gateway", "--host", "0.0.0.0", "--limits-store", "bad://"]
    done = subprocess.run(
        command,
        env=clean | {"LLAMA_ADAPTER_API_KEY": "sk-secret"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "did you mean LLAMA_ADAPTER_API_KEYS?" in done.stderr
    assert "no keys are set: whoever reaches 0.0.0.0 may call" in done.stderr
    assert "sk-secret" not in done.stderr
    assert "Traceback" not in done.stderr
