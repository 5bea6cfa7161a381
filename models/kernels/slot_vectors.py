"""What adapters change element by element, in Triton: norms, scales and biases, each token by its slot.

Plain torch gathers a row for each token and then reads it again; here each element is read once.

Shapes: N tokens, S slots, C features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # features of a token that one program scales


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _rms_norm(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    y_ptr: tl.tensor,
    eps: tl.tensor,
    x_stride: tl.tensor,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    slot = tl.load(slots_ptr + n).to(tl.int64)
    x_C = tl.load(x_ptr + n * x_stride + c, mask=c < C, other=0.0).to(tl.float32)
    weight_C = tl.load(weight_ptr + slot * C + c, mask=c < C, other=0.0).to(tl.float32)
    y_C = x_C * tl.rsqrt(tl.sum(x_C * x_C, 0) / C + eps) * weight_C
    tl.store(y_ptr + n * C + c, y_C, mask=c < C)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _scale_bias(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_stride: tl.tensor,
    C: tl.tensor,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.load(slots_ptr + n).to(tl.int64)
    y_C = tl.load(x_ptr + n * x_stride + c, mask=c < C, other=0.0).to(tl.float32)
    if BIASED:
        y_C += tl.load(bias_ptr + slot * C + c, mask=c < C, other=0.0).to(tl.float32)
    if SCALED:
        y_C *= tl.load(scale_ptr + slot * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * C + c, y_C, mask=c < C)


def slot_rms_norm(x_NC: Tensor, weight_SC: Tensor, slots_N: Tensor, eps: float) -> Tensor:
    """x / rms(x) ⊙ w[slot] in float32, given in the weight's dtype; [N, C]."""
    N, C = x_NC.shape
    _assert_fit(x_NC, slots_N, weight_SC)
    y_NC = torch.empty(N, C, dtype=weight_SC.dtype, device=x_NC.device)
    block = triton.next_power_of_2(C)
    warps = min(16, max(1, block // 512))  # a token's features stay in one program's registers
    _rms_norm[(N,)](x_NC, weight_SC, slots_N, y_NC, eps, x_NC.stride(0), C=C, BLOCK_C=block, num_warps=warps)
    return y_NC


def slot_scale_bias(x_NC: Tensor, scale_SC: Tensor | None, bias_SC: Tensor | None, slots_N: Tensor) -> Tensor:
    """(x + b[slot]) ⊙ s[slot] in float32, given in x's dtype; [N, C]. At least one of the two is there."""
    N, C = x_NC.shape
    assert scale_SC is not None or bias_SC is not None
    _assert_fit(x_NC, slots_N, *(v for v in (scale_SC, bias_SC) if v is not None))
    y_NC = torch.empty(N, C, dtype=x_NC.dtype, device=x_NC.device)
    _scale_bias[(N, triton.cdiv(C, _BLOCK))](
        x_NC,
        x_NC if scale_SC is None else scale_SC,  # not read then
        x_NC if bias_SC is None else bias_SC,
        slots_N,
        y_NC,
        x_NC.stride(0),
        C,
        SCALED=scale_SC is not None,
        BIASED=bias_SC is not None,
        BLOCK_C=_BLOCK,
        num_warps=4,
    )
    return y_NC


def _assert_fit(x_NC: Tensor, slots_N: Tensor, *vectors: Tensor) -> None:
    N, C = x_NC.shape
    assert x_NC.stride(1) == 1 or C == 1, f"rows of stride {x_NC.stride(1)}"
    assert slots_N.shape == (N,)
    assert not slots_N.is_floating_point()
    for vector_SC in vectors:
        assert vector_SC.shape[1:] == (C,), f"{list(vector_SC.shape)} for {C} features"
        assert vector_SC.is_contiguous()
