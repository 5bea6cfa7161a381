"""Fixtures that every test tree uses."""

import pytest
import torchvision_cpu  # noqa: F401 - before anything that imports torchvision
from hypothesis import settings
from support import CONFIGS, random_base

from models.config import ModelConfig
from models.llama import Llama

# A busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(params=sorted(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def base(config: ModelConfig) -> Llama:
    return random_base(config)
