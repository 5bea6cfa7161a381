"""The tools of `make check-deploy`, and what they make of compose file and chart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deploy.deployment import ROOT, Object, Render, run


@pytest.fixture(scope="session")
def tools() -> Path:
    """Where the programs are of the environment that holds the tools."""
    installed = ROOT / ".venv-deploy"
    if not (installed / ".ready").exists():
        pytest.skip("`make check-deploy` installs these tools")
    return installed / "bin"


@pytest.fixture(scope="session")
def compose(tools: Path) -> Callable[..., Object]:
    """The compose file as Docker Compose itself reads it, with some profiles."""

    def read(*profiles: str, **variables: str) -> Object:
        options = [word for profile in profiles for word in ("--profile", profile)]
        clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = (tools / "docker-compose", *options, "config", "--format", "json")
        config: Object = json.loads(run(*command, env=clean | variables))
        return config

    return read


@pytest.fixture(scope="session")
def render(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """The objects that the chart makes of `values`, once it has passed `helm lint --strict`."""
    rendered: dict[str, str] = {}

    def objects(values: Object | Path) -> list[Object]:
        text = values.read_text() if isinstance(values, Path) else yaml.safe_dump(values)
        if text not in rendered:
            file = tmp_path_factory.mktemp("values") / "values.yaml"
            file.write_text(text)
            rendered[text] = run(tools / "python", "deploy/render.py", file)
        return [document for document in yaml.safe_load_all(rendered[text]) if document]

    return objects
