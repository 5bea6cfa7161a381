"""One real service on a tiny base, and a picture, for every client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from service import ON_VLLM, Service, serving
from tiny_base import write_adapter, write_tiny_base


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, a base, and two adapters on it: `poet` for text alone, `sight`, which reads images."""
    folder = tmp_path_factory.mktemp("clients")
    heads = {"head_dim": 32} if ON_VLLM else {}  # its CPU build knows no smaller ones
    # Its tokens are short, and what tells of tools is long.
    write_tiny_base(folder / "tiny", positions=2048, **heads)
    write_adapter(folder / "adapters" / "poet", "v1", **heads)
    write_adapter(folder / "adapters" / "sight", "sight", **heads)
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
