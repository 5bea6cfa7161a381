"""Weights in 8 or 4 bits, packed for the tiles of `models.kernels.quantized_tile_cpu`.

int8: w = s·q, s in float32 of each output, q in -127 … 127. A panel holds the pairs of inputs as bytes, then
its scales: int8 [P, K / 2 + 2, 2 · PANEL].
int4: w = d·q + m, of each output and GROUP inputs, d and m in float16, q in 0 … 15; as GGUF's q4_1, whose
weights are found again exactly. A group holds its numbers, four steps of two inputs in each 16 bits, then d,
then m: uint8 [P, K / GROUP, GROUP_BYTES].

Shapes: O outputs, K inputs, P panels, g groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.quantized_tile_cpu import GROUP, GROUP_BYTES, SCALES
from models.kernels.tile_cpu import PANEL

Bits = Literal["int8", "int4"]

_SHARED = 4  # as in the tiles


def quantize(weight_OK: Tensor, bits: Bits) -> Tensor:
    """A weight, packed. Raises ValueError where it has numbers that the scales cannot hold."""
    weight_OK = F.pad(weight_OK.detach().float(), (0, 0, 0, -weight_OK.shape[0] % PANEL))
    return _pack_int8(weight_OK) if bits == "int8" else _pack_int4(weight_OK)


def dequantize(w_PKF: Tensor, out_features: int) -> Tensor:
    """The weight that a packed one stands for, float32 [out, in]."""
    weight_OK = _unpack_int8(w_PKF) if w_PKF.dtype == torch.int8 else _unpack_int4(w_PKF)
    return weight_OK[:out_features]


def quantized_shape(out_features: Sequence[int], in_features: int, bits: Bits) -> tuple[int, int, int]:
    """Of weights on one input, packed one after another."""
    P = sum(-(-count // PANEL) for count in out_features)
    if bits == "int8":
        return P, in_features // 2 + SCALES, 2 * PANEL
    return P, in_features // GROUP, GROUP_BYTES


def _pack_int8(weight_OK: Tensor) -> Tensor:
    scale_O1 = weight_OK.abs().amax(1, keepdim=True) / 127
    _check(scale_O1)
    q_OK = (weight_OK / scale_O1.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    pairs = q_OK.view(-1, PANEL, q_OK.shape[1] // 2, 2).transpose(1, 2).flatten(2)
    scales = scale_O1.view(-1, PANEL).view(torch.int8).view(len(pairs), SCALES, 2 * PANEL)
    return torch.cat((pairs, scales), 1)


def _unpack_int8(w_PKF: Tensor) -> Tensor:
    pairs, scales = w_PKF[:, :-SCALES], w_PKF[:, -SCALES:]
    scale_O = scales.contiguous().view(len(w_PKF), -1).view(torch.float32).flatten()
    q_OK = pairs.unflatten(2, (PANEL, 2)).transpose(1, 2).flatten(2).flatten(0, 1)
    weight_OK: Tensor = q_OK * scale_O[:, None]
    return weight_OK


def _pack_int4(weight_OK: Tensor) -> Tensor:
    groups = weight_OK.unflatten(1, (-1, GROUP))
    least, most = groups.aminmax(dim=2)
    scale = ((most - least) / 15).half()
    least = least.half()
    _check(scale)
    _check(least)
    step = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    q = ((groups - least.float()[..., None]) / step).round().clamp(0, 15).to(torch.int16)
    # [P, F, g, step, shared, 2] to [P, g, step, F, 2, shared], of which `shared` goes into one word.
    q = q.view(-1, PANEL, q.shape[1], GROUP // 2 // _SHARED, _SHARED, 2).permute(0, 2, 3, 1, 5, 4)
    words = (q << torch.arange(0, 4 * _SHARED, 4, dtype=torch.int16)).sum(-1, dtype=torch.int32)
    parts = [words.to(torch.int16).flatten(2)]
    parts += [part.view(-1, PANEL, part.shape[1]).mT.view(torch.int16) for part in (scale, least)]
    return torch.cat(parts, 2).view(torch.uint8)


def _unpack_int4(w_PKF: Tensor) -> Tensor:
    words = w_PKF.view(torch.int16)
    numbers, scale, least = words.split((GROUP * PANEL // _SHARED, PANEL, PANEL), 2)
    words = numbers.unflatten(2, (GROUP // 2 // _SHARED, PANEL, 2, 1))
    q = (words.int() >> torch.arange(0, 4 * _SHARED, 4)) & 15  # [P, g, step, F, 2, shared]
    q_PFgk = q.permute(0, 3, 1, 2, 5, 4).flatten(3)
    of_group = [part.contiguous().view(torch.float16).mT[..., None].float() for part in (scale, least)]
    weight: Tensor = q_PFgk * of_group[0] + of_group[1]
    return weight.flatten(2).flatten(0, 1)


def _check(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise ValueError("a weight is not finite, or too large for its scale; leave `quantization` out")
