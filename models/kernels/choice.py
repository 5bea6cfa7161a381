"""Where the Triton kernels can run, told without importing Triton, which not every machine has."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch

log = logging.getLogger(__name__)

Attention = Literal["auto", "torch", "triton"]

TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
TRITON_CAPABILITY = (8, 0)  # Ampere
TRITON_HEAD_DIM = 256  # at most: a block of keys and one of values must fit a multiprocessor's memory


def use_triton(setting: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention runs in the Triton kernels; `auto`: on a GPU, wherever they can.

    Raises ValueError, saying what to change, where `triton` is asked for and cannot be.
    """
    if setting == "torch" or (setting == "auto" and device.type != "cuda"):
        return False
    obstacle = _obstacle(device, dtype, head_dim)
    if obstacle is None:
        return True
    if setting == "triton":
        raise ValueError(f"attention 'triton' cannot be used: {obstacle}; or set it to 'auto'")
    log.warning("attention runs in plain torch, which is slow: %s", obstacle)
    return False


def _can_build() -> bool:
    """Whether there is what Triton builds its launcher with, where Triton looks for it."""
    compiler = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
    return compiler and Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists()


def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install llama-adapter-server[gpu]"
    if device.type == "cuda" and not _can_build():
        return "Triton lacks a C compiler or Python's headers, to launch kernels; install gcc and python3-dev"
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < TRITON_CAPABILITY:
            return "Triton wants compute capability {}.{}, and the GPU has {}.{}".format(
                *TRITON_CAPABILITY, *capability
            )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the device is {device.type!r}, no GPU; choose one, such as 'cuda:0'"
    if dtype not in TRITON_DTYPES:
        return f"the kernels know no {dtype}; choose bfloat16, float16 or float32"
    if head_dim > TRITON_HEAD_DIM:
        return f"the base's head size {head_dim} is over {TRITON_HEAD_DIM}; choose another base"
    return None
