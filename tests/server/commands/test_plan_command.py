"""`llama-adapter plan` as its user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_base import tiny_config, write_adapter, write_tiny_base
from typer.testing import CliRunner

from models.sizing import base_parameters
from server.cli import app
from server.serving import StartupError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_every_base_on_every_device_has_a_line() -> None:
    lines = run().splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        [base, device] for base in ("7b", "13b", "65b") for device in ("a100", "h100", "h200")
    ]


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_a_folder_with_an_adapter_of_its_own(tmp_path: Path, engine: str) -> None:
    write_tiny_base(tmp_path / "tiny")
    write_adapter(tmp_path / "poet", "v1")
    given = (str(tmp_path / "tiny"), "--adapter", str(tmp_path / "poet"), "--device", "h100")
    [found] = json.loads(run(*given, "--engine", engine, "--json"))
    assert found["weights"] == 2 * base_parameters(tiny_config())
    assert found["devices"] == 1
    assert found["adapter"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("8b",), "neither 7b, 13b, 65b nor a folder"),
        (("7b", "--device", "tpu"), "known: a100, h100, h200"),
    ],
)
def test_what_is_unknown_is_named(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        run(*arguments)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "poet", "v1")
    with pytest.raises(StartupError, match="made for another base"):
        run("7b", "--adapter", str(tmp_path / "poet"))
