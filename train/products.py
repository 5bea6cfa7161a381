"""Products with the frozen weights on the CPU, which oneDNN laid out once, for both directions.

Otherwise it lays out every weight anew in each step, forward and backward. That took 9 % of a step in
bfloat16; in float32 the products then are another library's, at half the speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.llama import Llama

_TYPICAL_ROWS = 1024  # what the layout is chosen for; it serves any number


def pack_products(base: Llama) -> bool:
    """Give the base such products, where this machine has them; False where it has not.

    Its linears then take twice their memory, and their weights cannot be read any more.
    """
    if not _can_pack(base):
        return False
    base.replace_products(FrozenProduct)
    return True


def multiplies_bfloat16() -> bool:
    """Whether this processor's products in bfloat16 are not slower than in float32 by far."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # PyTorch promises nothing for it
        return True


def _can_pack(base: Llama) -> bool:
    if base.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # What AVX processors take from it was measured; others may lack it.
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return base.dtype in (torch.float32, torch.bfloat16) and _works(base.dtype)


def _works(dtype: torch.dtype) -> bool:
    """PyTorch promises nothing for these operators, so a small product is tried."""
    weight, x = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
    try:
        if dtype == torch.bfloat16 and not multiplies_bfloat16():
            return False
        return torch.equal(FrozenProduct(weight)(x), x)
    except (AttributeError, RuntimeError, TypeError):  # gone, not built in, other arguments
        return False


class FrozenProduct:
    """x [..., in] → W·x [..., out], with a gradient for x alone. The weight [out, in] itself is not kept."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = _laid_out(weight)
        self._transposed = _laid_out(weight.t())

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _FrozenProduct.apply(x, self._weight, self._transposed)  # type: ignore[no-untyped-call]
        return y


class _FrozenProduct(torch.autograd.Function):
    """dx = Wᵀ·dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(grad, ctx.transposed), None, None


def _laid_out(weight: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _TYPICAL_ROWS)
    return laid_out


def _multiply(x: Tensor, laid_out: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")
    return y
