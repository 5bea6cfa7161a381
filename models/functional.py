"""What lies between a layer's products. Gradients are written down: fewer passes over memory than autograd's.

Shapes: N tokens, C features, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x_NC: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · w, computed in x's precision, in the weight's dtype.

    `weight` is [C], or [N, C] where rows have their own.
    """
    if torch.is_grad_enabled() and (x_NC.requires_grad or weight.requires_grad):
        y_NC: Tensor = _RmsNorm.apply(x_NC, weight, eps)  # type: ignore[no-untyped-call]
        return y_NC
    return _scaled(x_NC, _inverse_rms(x_NC, eps), weight)


def _inverse_rms(x_NC: Tensor, eps: float) -> Tensor:
    """1 / √(mean(x²) + ε), [N, 1]."""
    norm_N1 = torch.linalg.vector_norm(x_NC, dim=-1, keepdim=True)  # one pass, and no squares to store
    r_N1: Tensor = (norm_N1.square() / x_NC.shape[-1] + eps).rsqrt()
    return r_N1


def _scaled(x_NC: Tensor, r_N1: Tensor, weight: Tensor) -> Tensor:
    """x · r ⊙ w in w's dtype. Products of mixed dtypes are slow on the CPU, so w is converted first."""
    return (x_NC * r_N1).mul_(weight.to(x_NC.dtype)).to(weight.dtype)


class _RmsNorm(torch.autograd.Function):
    """The same with its gradient: half the passes over memory that autograd would take.

    With r = 1/rms(x) and g = dy ⊙ w: dx = r·g − x·r³·mean(g ⊙ x), dw = Σ dy ⊙ x·r.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight: Tensor, eps: float) -> Tensor:
        r_N1 = _inverse_rms(x_NC, eps)
        ctx.save_for_backward(x_NC, weight, r_N1)
        return _scaled(x_NC, r_N1, weight)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NC, weight, r_N1 = ctx.saved_tensors
        dx_NC = dw = None
        if ctx.needs_input_grad[0]:
            dx_NC = grad_NC.to(x_NC.dtype, copy=True).mul_(weight.to(x_NC.dtype))
            mean_N1 = torch.linalg.vecdot(dx_NC, x_NC).unsqueeze(-1) / x_NC.shape[-1]
            dx_NC.mul_(r_N1).addcmul_(x_NC, mean_N1 * r_N1**3, value=-1)
        if ctx.needs_input_grad[1]:
            dw = (grad_NC * (x_NC * r_N1)).sum_to_size(weight.shape).to(weight.dtype)
        return dx_NC, dw, None


def rotate(x_NHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, half-rotated layout: pairs are (i, i + D/2)."""
    if torch.is_grad_enabled() and x_NHD.requires_grad:
        y_NHD: Tensor = _Rotation.apply(x_NHD, *rotary)  # type: ignore[no-untyped-call]
        return y_NHD
    cos, sin = rotary
    return _turned(x_NHD, cos, sin, 1)


def _turned(x_NHD: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """By the angles, or back by them; three passes over memory."""
    half = x_NHD.shape[-1] // 2
    y_NHD = x_NHD * cos
    y_NHD[..., :half].addcmul_(x_NHD[..., half:], sin[..., :half], value=-sign)
    y_NHD[..., half:].addcmul_(x_NHD[..., :half], sin[..., half:], value=sign)
    return y_NHD


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_NHD, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_NHD, cos, sin, -1), None, None
