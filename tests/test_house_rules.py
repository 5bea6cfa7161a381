"""What this project promises of itself: import directions, sizes, pinned versions, a README that holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from server import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "models", "experts", "train")
MAX_LINES = 400


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_imports_keep_their_directions() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_the_gateway_and_the_supervisor_start_without_torch() -> None:
    code = (
        "import sys, server.gateway.app, server.supervisor, server.processes; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "False\n"


def test_files_stay_short() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources(*PACKAGES)}
    assert lengths
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_nothing_is_left_undone_and_no_machine_is_named() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|(?<![\w.])/(work|root|home)/")
    texts = [*sources(*PACKAGES, "bench", "tests"), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unfinished.search(line)
    ]
    assert found == []


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in sources("tests") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs), lines
    return {canonicalize_name(name): version for name, version in pairs}


def required() -> list[Requirement]:
    table = project()["project"]
    extras = table["optional-dependencies"]
    named = [*table["dependencies"], *extras["worker"], *extras["experts"], *extras["eval"], *extras["dev"]]
    return [Requirement(line) for line in named]


@pytest.mark.parametrize("requirement", {r.name: r for r in required()}.values(), ids=lambda r: r.name)
def test_constraints_pin_what_the_project_requires(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)
    assert "+" not in version, "a local build's tag is found on one machine only"


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def test_fast_tests_leave_out_every_marker() -> None:
    markers = {line.partition(":")[0] for line in project()["tool"]["pytest"]["ini_options"]["markers"]}
    named = re.findall(r"^(?:FAST|BARE) := (.*)$", makefile(), re.MULTILINE)
    assert set(re.findall(r"not (\w+)", " ".join(named))) == markers


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_readme_names_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", makefile(), re.MULTILINE))
    told = set(re.findall(r"\bmake ([a-z-]+)", readme()))
    assert told >= {"serve", "test", "lint", "bench", "image"}
    assert told <= targets
    group = typer.main.get_command(cli.app)
    commands = set(group.list_commands(typer.Context(group)))  # type: ignore[attr-defined]
    assert set(re.findall(r"`?llama-adapter ([a-z]+)", readme())) <= commands


def test_readme_names_options_that_exist() -> None:
    lines = readme().replace('make serve ARGS="', "llama-adapter serve ").splitlines()
    told = {
        (match[1], option)
        for match in (re.search(r"llama-adapter ([a-z]+) (.*)", line) for line in lines)
        if match
        for option in re.findall(r"--[a-z-]+", match[2])
    }
    assert {command for command, _ in told} >= {"serve", "worker", "gateway", "expert"}
    assert {(command, option) for command, option in told if option not in options_of(command)} == set()


@cache
def options_of(command: str) -> set[str]:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    return set(re.findall(r"--[a-z-]+", result.output))


def test_readme_maps_every_folder() -> None:
    mapped = set(re.findall(r"^\| `([a-z.]+)/` \|", readme(), re.MULTILINE))
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    folders = {line.partition("/")[0] for line in tracked.stdout.splitlines() if "/" in line}
    assert {folder for folder in folders if not folder.startswith(".")} <= mapped
