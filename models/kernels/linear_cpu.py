"""Products with weights that were packed once, on the CPU.

A packed weight holds panels of PANEL output features, the last one filled up with zeros. Within a panel
the features of one input lie together, in bfloat16 those of two inputs, as a processor multiplies them that
has an instruction for it. In fewer bits they lie as `models.kernels.quantized_cpu` says. Without that
instruction inputs are float32, and weights are widened on their way; those of fewer bits stay whole numbers,
and so become the inputs (`models.kernels.inputs_cpu`).

Shapes: M rows, K inputs (of a packed weight: steps of one or two), P panels, F numbers of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.epilogue_cpu import put_outputs
from models.kernels.inputs_cpu import inputs
from models.kernels.product_cpu import outputs, tile_product
from models.kernels.quantized_cpu import Bits, quantize, quantized_shape
from models.kernels.quantized_tile_cpu import GROUP
from models.kernels.scalars_cpu import SUPPORTED_DTYPES, array, parallel_jit
from models.kernels.tile_cpu import MULTIPLIES_BFLOAT16, PANEL, ROWS


def can_pack(weight_OK: Tensor, bits: Bits | None = None) -> bool:
    """Whether `pack` knows weights of this kind, to be kept as they are or in fewer bits."""
    multiple = 4 // weight_OK.element_size() if bits is None else GROUP
    cpu = weight_OK.device.type == "cpu"
    return cpu and weight_OK.dtype in SUPPORTED_DTYPES and weight_OK.shape[1] % multiple == 0


def pack(weights_OK: Sequence[Tensor], bits: Bits | None = None) -> Tensor:
    """Weights [out, in] on one input, each in panels of its own, one after another; [P, K, F].

    With `bits` quantised; raises ValueError as `quantize` does.
    """
    return torch.cat([_panels(w_OK) if bits is None else quantize(w_OK, bits) for w_OK in weights_OK])


def packed_shape(weights_OK: Sequence[Tensor], bits: Bits | None = None) -> tuple[int, int, int]:
    """Of what `pack` gives."""
    if bits is not None:
        return quantized_shape([len(weight_OK) for weight_OK in weights_OK], weights_OK[0].shape[1], bits)
    per_step = 4 // weights_OK[0].element_size()
    P = sum(num_panels(weight_OK.shape[0]) for weight_OK in weights_OK)
    return P, weights_OK[0].shape[1] // per_step, PANEL * per_step


def _panels(weight_OK: Tensor) -> Tensor:
    per_step = 4 // weight_OK.element_size()
    padded_OK = F.pad(weight_OK.detach(), (0, 0, 0, -weight_OK.shape[0] % PANEL))
    blocks = padded_OK.unflatten(0, (-1, PANEL)).unflatten(2, (-1, per_step))  # [P, PANEL, K, 1 or 2]
    panels: Tensor = blocks.transpose(1, 2).contiguous().flatten(2)
    return panels


def num_panels(out_features: int) -> int:
    return -(-out_features // PANEL)


def packed_linear(x: Tensor, w_PKF: Tensor) -> Tensor:
    """x [..., in] → [..., P · PANEL] in float32; what fills up the last panel of a weight is zero."""
    return packed_linears(x[None], w_PKF, [0], w_PKF.shape[0])[0]


def packed_linears(x: Tensor, w_PKF: Tensor, firsts_B: Sequence[int], count: int) -> Tensor:
    """x [B, ..., in] → [B, ..., count · PANEL] in float32, x[b] by `count` panels from `firsts_B[b]` on."""
    # What tiles read there must be of the type that they take it for.
    wide = not MULTIPLIES_BFLOAT16 or w_PKF.dtype == torch.float32
    x_MK = x.flatten(0, -2).to(torch.float32 if wide else torch.bfloat16).contiguous()
    y_MO = torch.empty(x_MK.shape[0], count * PANEL)
    _multiply(array(x_MK), array(w_PKF), np.array(firsts_B, np.int64), count, y_MO.numpy())
    y: Tensor = y_MO.unflatten(0, x.shape[:-1])
    return y


@parallel_jit
def _multiply(x_MK: Any, w_PKF: Any, firsts_B: Any, count: int, y_MO: Any) -> None:
    M = x_MK.shape[0] // len(firsts_B)  # rows of each
    x_MK, groups = inputs(x_MK, w_PKF)
    for task in numba.prange(len(firsts_B) * count):
        b, p = np.int64(task) // count, np.int64(task) % count
        panel = firsts_B[b] + p
        y_RF = outputs(w_PKF, panel, M)
        for first in range(b * M, (b + 1) * M, ROWS):
            last = min(first + ROWS, (b + 1) * M)
            tile_product(x_MK, groups, first, last, w_PKF, panel, y_RF)
            put_outputs(y_RF, first, last, p, y_MO)
