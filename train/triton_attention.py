"""Attention of a training pass on a GPU: what `train.attention` does, in Triton and without padding.

Shapes: N tokens, B sequences, H query heads, G key/value heads, D head size, K prompt rows, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention import Prompts
from models.kernels.packed import Packing, packed_attention
from models.uploads import upload


class TritonPackedAttend:
    """B sequences one after another. `slots_B`: which slot of the prompts each sees; None: the only one."""

    def __init__(
        self, lens_B: Sequence[int], prompts: Prompts | None, slots_B: Tensor | None, device: torch.device
    ) -> None:
        self._packing = Packing.of(lens_B, slots_B, device)
        self._prompts_L: list[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        if prompts is None:
            return
        # Cut once: each cut costs a gradient's memory.
        rows_L = prompts.len_SL.amax(0).tolist()
        k_L, v_L, gate_L = prompts.k_SLKGD.unbind(1), prompts.v_SLKGD.unbind(1), prompts.gate_SLH.unbind(1)
        lens_L = upload(prompts.len_SL.to(torch.int32).T.contiguous(), device).unbind()
        self._prompts_L = [
            (k_SKGD[:, :K], v_SKGD[:, :K], lens_S, gate_SH)
            for k_SKGD, v_SKGD, lens_S, gate_SH, K in zip(k_L, v_L, lens_L, gate_L, rows_L, strict=True)
        ]

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        if self._prompts_L is None:
            none = k_NGD.new_empty(1, 0, *k_NGD.shape[1:])
            lens_1, gate_1H = self._packing.starts[:1], q_NHD.new_zeros(1, q_NHD.shape[1])  # 0 rows
            return packed_attention(q_NHD, k_NGD, v_NGD, none, none, lens_1, gate_1H, self._packing)
        prompt_k, prompt_v, lens_S, gate_SH = self._prompts_L[layer]
        return packed_attention(q_NHD, k_NGD, v_NGD, prompt_k, prompt_v, lens_S, gate_SH, self._packing)
