"""Attention of a training pass: flat tokens without padding, prompts with gradients.

The same formula as `models.attention`, through PyTorch's fused kernels for both softmaxes. Linears see
no padding; only here sequences of unequal length are padded, and only for the causal part.

Shapes: N tokens, B sequences, T positions of the longest, H query heads, G key/value heads, D head size,
K prompt rows, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import Prompts


class PackedAttend:
    """B sequences one after another. `slots_B`: which slot of the prompts each sees; None: the only one."""

    def __init__(
        self,
        lens_B: Sequence[int],
        prompts: Prompts | None,
        slots_B: Tensor | None,
        device: torch.device,
    ) -> None:
        T = max(lens_B)
        self._shape = (len(lens_B), T)
        self._places_N: Tensor | None = None  # of each token in [B · T]; None: nothing is padded
        if min(lens_B) < T:
            valid_BT = torch.arange(T) < torch.tensor(lens_B)[:, None]
            self._places_N = valid_BT.flatten().nonzero()[:, 0].to(device)
        self._slots_B = slots_B
        if prompts is None:
            self._lens_L: list[int] = []
            return
        # Read once and cut once: a read waits for the device, and each cut costs a gradient's memory.
        self._lens_L = prompts.len_SL.amax(0).tolist()
        self._k_L = prompts.k_SLKGD.unbind(1)
        self._v_L = prompts.v_SLKGD.unbind(1)
        self._gate_L = prompts.gate_SLH.unbind(1)

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        q_BHTD, k_BGTD, v_BGTD = (self._pad(x) for x in (q_NHD, k_NGD, v_NGD))
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)
        K = self._lens_L[layer] if self._lens_L else 0
        if K and self._slots_B is not None:
            prompted_BHTD = self._prompted(layer, K, q_BHTD, self._slots_B)
            return self._unpad(out_BHTD + prompted_BHTD)
        out_NHD = self._unpad(out_BHTD)
        if K:
            out_NHD = out_NHD + self._prompted(layer, K, q_NHD.transpose(0, 1)[None], None)[0].transpose(0, 1)
        return out_NHD

    def _prompted(self, layer: int, K: int, q_BHTD: Tensor, slots_B: Tensor | None) -> Tensor:
        """g · softmax(q·k_aᵀ/√D)·v_a, [B, H, T, D]; every token sees every row."""
        groups = q_BHTD.shape[1] // self._k_L[layer].shape[2]
        k_SHKD, v_SHKD = (
            x[layer][:, :K].transpose(1, 2).repeat_interleave(groups, 1) for x in (self._k_L, self._v_L)
        )
        gate_SH = self._gate_L[layer]
        if slots_B is not None:
            k_SHKD, v_SHKD, gate_SH = (x.index_select(0, slots_B) for x in (k_SHKD, v_SHKD, gate_SH))
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_SHKD, v_SHKD)
        return (out_BHTD * gate_SH[..., None, None]).to(q_BHTD.dtype)

    def _pad(self, x_NHD: Tensor) -> Tensor:
        """[N, H, D] → [B, H, T, D]."""
        B, T = self._shape
        if self._places_N is not None:
            padded = x_NHD.new_zeros(B * T, *x_NHD.shape[1:])
            x_NHD = padded.index_copy(0, self._places_N, x_NHD)
        x_BTHD: Tensor = x_NHD.unflatten(0, (B, T))
        return x_BTHD.transpose(1, 2)

    def _unpad(self, x_BHTD: Tensor) -> Tensor:
        """[B, H, T, D] → [N, H, D]."""
        x_NHD = x_BHTD.transpose(1, 2).flatten(0, 1)
        return x_NHD if self._places_N is None else x_NHD.index_select(0, self._places_N)
