"""How far outputs may be off because whole numbers stand for inputs: half a unit of each group's 32767."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32


def input_rounding(x_MK: Tensor, weight_OK: Tensor) -> Tensor:
    """At most, [M, O] in float64; zero where the processor multiplies bfloat16."""
    from models.kernels.tile_cpu import MULTIPLIES_BFLOAT16

    if MULTIPLIES_BFLOAT16:
        return torch.zeros(len(x_MK), len(weight_OK), dtype=torch.float64)
    half_MK = x_MK.double().abs().unflatten(1, (-1, GROUP)).amax(2).repeat_interleave(GROUP, 1) / 65534
    return 1.001 * half_MK @ weight_OK.double().abs().T
