"""Fixtures of the tests that need the embedded base."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M; pulled if it is not in the cache."""
    from models.pull import pull

    default = Path.home() / ".cache" / "llama-adapter"
    return pull("smollm2-135m", Path(os.environ.get("LLAMA_ADAPTER_CACHE_DIR", default)))
