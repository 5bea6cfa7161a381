"""Attention of a training pass: flat tokens without padding, prompts with gradients.

The same formula as `models.attention`, with gradients. Linears see no padding; only here sequences of
unequal length are padded.

Shapes: N tokens, B sequences, T positions of the longest, H query heads, G key/value heads, R = H / G,
D head size, K prompt rows, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import Prompts

# On the CPU, PyTorch's fused kernel has a slow backward pass: for 64 captions in bfloat16 it took 28 ms
# where the formula itself takes 4. The formula keeps its probabilities, T² of them, so it has an end.
_LONGEST = 512
_BLOCK = 128  # causal queries that are multiplied at once; what lies beyond their block is never computed


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
        self._fused = T > _LONGEST or device.type != "cpu"
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
        if self._fused:
            out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)
        else:
            out_BHTD = attention(q_BHTD, k_BGTD, v_BGTD)
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
        k_SGKD, v_SGKD = (x[layer][:, :K].transpose(1, 2) for x in (self._k_L, self._v_L))
        gate_SH = self._gate_L[layer]
        if slots_B is not None:
            k_SGKD, v_SGKD, gate_SH = (x.index_select(0, slots_B) for x in (k_SGKD, v_SGKD, gate_SH))
        return attention(q_BHTD, k_SGKD, v_SGKD, gate_SH)

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


def attention(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, gate_BH: Tensor | None = None) -> Tensor:
    """g · softmax(q·kᵀ/√D)·v, [B, H, T, D]; without a gate causal: query t sees keys 0 to t, and g is 1.

    Scores and softmax are float32 at least, whatever the inputs are. Heads that share keys are rows of one
    product, so that keys and values are never repeated.
    """
    gate_BGM1 = None
    if gate_BH is not None:
        gate_BGR = gate_BH.unflatten(1, (k_BGKD.shape[1], -1))
        gate_BGM1 = gate_BGR.repeat_interleave(q_BHTD.shape[2], 2)[..., None]
    out: Tensor = _Attention.apply(q_BHTD, k_BGKD, v_BGKD, gate_BGM1)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """M = R · T, the rows that share keys, of a block of T if causal; K also counts a block's visible keys.

    P = softmax(S), S = q·kᵀ/√D, O = g P·v. Backward, with dP = dO·vᵀ: dg = Σ P ⊙ dP,
    dS = g P ⊙ (dP − Σ P ⊙ dP), dq = dS·k/√D, dk = dSᵀ·q/√D, dv = g Pᵀ·dO.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, gate_BGM1: Tensor | None) -> Tensor:
        q_BGRTD = q_BHTD.unflatten(1, (k_BGKD.shape[1], -1))
        T, D = q_BGRTD.shape[-2:]
        causal = gate_BGM1 is None
        wide = torch.promote_types(q_BHTD.dtype, torch.float32)
        k_BGDK = k_BGKD.to(wide).mT * D**-0.5
        ctx.size = _BLOCK if causal else T
        outs, probs = [], []
        for start in range(0, T, ctx.size):
            q_BGMD = q_BGRTD[..., start : start + ctx.size, :].flatten(2, 3)
            end = start + ctx.size if causal else k_BGDK.shape[-1]
            scores_BGMK = q_BGMD.to(wide) @ k_BGDK[..., :end]
            if causal:
                _mask_future(scores_BGMK, start, min(ctx.size, T - start))
            p_BGMK = scores_BGMK.softmax(-1)
            gated_BGMK = p_BGMK if gate_BGM1 is None else p_BGMK * gate_BGM1
            out_BGMD = gated_BGMK.to(v_BGKD.dtype) @ v_BGKD[:, :, :end]
            outs.append(out_BGMD.unflatten(2, (q_BGRTD.shape[2], -1)))
            probs.append(p_BGMK.to(v_BGKD.dtype))
        ctx.save_for_backward(q_BGRTD, k_BGKD, v_BGKD, gate_BGM1, *probs)
        return torch.cat(outs, dim=3).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q_BGRTD, k_BGKD, v_BGKD, gate_BGM1, *probs = ctx.saved_tensors
        grad_BGRTD = grad_BHTD.unflatten(1, q_BGRTD.shape[1:3])
        R, D = q_BGRTD.shape[2], q_BGRTD.shape[-1]
        wide = torch.promote_types(q_BGRTD.dtype, torch.float32)
        dk_BGKD, dv_BGKD = torch.zeros_like(k_BGKD, dtype=wide), torch.zeros_like(v_BGKD, dtype=wide)
        dgate_BGM1 = None
        dqs = []
        for index, p_BGMK in enumerate(probs):
            block = slice(index * ctx.size, (index + 1) * ctx.size)
            q_BGMD, grad_BGMD = (x[..., block, :].flatten(2, 3) for x in (q_BGRTD, grad_BGRTD))
            end = p_BGMK.shape[-1]
            dp_BGMK = grad_BGMD @ v_BGKD[:, :, :end].mT
            if gate_BGM1 is not None:
                dgate_BGM1 = (dp_BGMK.to(wide) * p_BGMK).sum(-1, keepdim=True).to(gate_BGM1.dtype)
                dp_BGMK = dp_BGMK * gate_BGM1.to(dp_BGMK.dtype)
                grad_BGMD = grad_BGMD * gate_BGM1.to(grad_BGMD.dtype)
            ds_BGMK = torch._softmax_backward_data(dp_BGMK, p_BGMK, -1, p_BGMK.dtype).mul_(D**-0.5)
            dqs.append((ds_BGMK @ k_BGKD[:, :, :end]).unflatten(2, (R, -1)))
            dk_BGKD[:, :, :end] += ds_BGMK.mT @ q_BGMD
            dv_BGKD[:, :, :end] += p_BGMK.mT @ grad_BGMD
        dq_BHTD = torch.cat(dqs, dim=3).flatten(1, 2)
        return dq_BHTD, dk_BGKD.to(k_BGKD.dtype), dv_BGKD.to(v_BGKD.dtype), dgate_BGM1


def _mask_future(scores_BGMK: Tensor, start: int, length: int) -> None:
    """Minus infinity where a query of a block, from position `start` on, would see a later key."""
    future = torch.ones(length, length, dtype=torch.bool, device=scores_BGMK.device).triu(1)
    scores_BGRTK = scores_BGMK.unflatten(2, (-1, length))
    scores_BGRTK[..., start:].masked_fill_(future, float("-inf"))
