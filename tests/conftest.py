"""Fixtures that every test tree uses."""

from importlib.util import find_spec

import pytest
import torch
from support import CONFIGS, random_base

from models.config import ModelConfig
from models.llama import Llama

if find_spec("torchvision") and torch.version.cuda is None:
    # PyPI's torchvision is built for CUDA torch. Beside the CPU build it imports (which open_clip and
    # transformers need, and no more) once the operators that its import looks for are declared.
    _TORCHVISION = torch.library.Library("torchvision", "DEF")
    _TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(params=sorted(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def base(config: ModelConfig) -> Llama:
    return random_base(config)
