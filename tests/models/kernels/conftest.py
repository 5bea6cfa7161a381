"""Where there is no GPU, Triton's interpreter runs the kernels: numpy, block by block."""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton reads it when it is imported, for its own functions, and when a kernel is defined.
    assert "triton" not in sys.modules, "something imported Triton before it was told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    """What the kernels run on."""
    return DEVICE
