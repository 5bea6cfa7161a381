"""From the host to the device, without anybody waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device) -> Tensor:
    """A tensor, an array or a list, on the device. A GPU copies from memory that the system may not move,
    after what it was given before; from other memory the host would wait for all of that."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
