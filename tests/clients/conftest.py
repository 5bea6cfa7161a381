"""One real service on a tiny base, and a picture, for every client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from service import Service, serving
from tiny_base import write_adapter, write_tiny_base


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, a base, and two adapters on it: `poet` for text alone, `sight`, which reads images."""
    folder = tmp_path_factory.mktemp("clients")
    # Its tokens are short, and what tells of tools is long; vLLM's CPU build knows no smaller heads.
    write_tiny_base(folder / "tiny", positions=2048, head_dim=32)
    write_adapter(folder / "adapters" / "poet", "v1", head_dim=32)
    write_adapter(folder / "adapters" / "sight", "sight", head_dim=32)
    return folder


@pytest.fixture(scope="session")
def service(models: Path) -> Iterator[Service]:
    arguments = ("--base", str(models / "tiny"), "--adapter-dir", str(models / "adapters"))
    with serving(*arguments, "--experts", "", "--dtype", "float32") as service:
        yield service


@pytest.fixture(scope="session")
def clients() -> Path:
    """Where the programs are of the environment that holds the other clients."""
    here = Path(__file__).resolve().parent
    installed = here.parents[1] / ".venv-clients"
    if not (installed / ".python").exists() or not (here / "node" / "node_modules").exists():
        pytest.skip("`make clients` installs these clients")
    return installed / "bin"


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill="red")
    path = tmp_path_factory.mktemp("pictures") / "ball.png"
    image.save(path)
    return path
