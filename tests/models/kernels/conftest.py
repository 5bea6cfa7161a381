"""Where there is no GPU, Triton's interpreter runs the kernels: numpy, block by block."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported and when a kernel is defined


@pytest.fixture
def device() -> str:
    """What the kernels run on."""
    return DEVICE
