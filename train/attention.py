"""Attention of a training pass: flat tokens without padding, prompts with gradients.

The same formula as `models.attention`, with gradients. Linears see no padding; only here sequences of
unequal length are padded.

Shapes: N tokens, B sequences, T positions of the longest, H query heads, G key/value heads, R = H / G,
D head size, K prompt rows, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import Prompts

# On the CPU, PyTorch's fused kernel has a slow backward pass: for 64 captions in bfloat16 it took 28 ms
# where the formula itself takes 4. The formula keeps its probabilities, T² of them, so it has an end.
_LONGEST = 512
_BLOCK = 64  # causal queries that are multiplied at once; what lies beyond their block is never computed


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
        # Cut once: each cut costs a gradient's memory.
        self._lens_L = prompts.len_SL.amax(0).tolist()
        self._k_L = prompts.k_SLKGD.unbind(1)
        self._v_L = prompts.v_SLKGD.unbind(1)
        self._gate_L = prompts.gate_SLH.unbind(1)

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        q_BHTD, k_BGTD, v_BGTD = (self._pad(x) for x in (q_NHD, k_NGD, v_NGD))
        if self._fused:
            out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)
        else:
            out_BHTD = causal_attention(q_BHTD, k_BGTD, v_BGTD)
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
        return prompt_attention(q_BHTD, k_SGKD, v_SGKD, gate_SH)

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


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v where query t sees keys 0 to t, [B, H, T, D].

    Scores and softmax are float32 at least, whatever the inputs are. Heads that share keys are rows of one
    product, so that keys and values are never repeated.
    """
    out: Tensor = _CausalAttention.apply(q_BHTD, k_BGTD, v_BGTD)  # type: ignore[no-untyped-call]
    return out


def prompt_attention(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, gate_BH: Tensor) -> Tensor:
    """g · softmax(q·k_aᵀ/√D)·v_a, [B, H, T, D]; every query sees every row. Precision as above."""
    gate_BGR = gate_BH.unflatten(1, (k_BGKD.shape[1], -1))
    gate_BG1M = gate_BGR.repeat_interleave(q_BHTD.shape[2], 2)[:, :, None]
    out: Tensor = _PromptAttention.apply(q_BHTD, k_BGKD, v_BGKD, gate_BG1M)  # type: ignore[no-untyped-call]
    return out


class _CausalAttention(torch.autograd.Function):
    """M = R · T', the rows that share keys, of a block of T' queries; U: the keys that a block sees.

    P = softmax(S), S = q·kᵀ/√D, O = P·v. Backward, with dP = dO·vᵀ: dS = P ⊙ (dP − Σ P ⊙ dP),
    dq = dS·k/√D, dk = dSᵀ·q/√D, dv = Pᵀ·dO.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        q_BGRTD = q_BHTD.unflatten(1, (k_BGTD.shape[1], -1))
        R, T, D = q_BGRTD.shape[2:]
        k_BGTD, v_BGTD = k_BGTD.contiguous(), v_BGTD.contiguous()  # products would copy each cut of them
        outs, queries, probs = [], [], []
        for start in range(0, T, _BLOCK):
            q_BGMD = q_BGRTD[..., start : start + _BLOCK, :].flatten(2, 3)
            end = start + q_BGMD.shape[2] // R
            scores_BGMU = _scores(q_BGMD, k_BGTD[:, :, :end], D**-0.5)
            _hide_future(scores_BGMU, start)
            p_BGMU = scores_BGMU.softmax(-1).to(v_BGTD.dtype)
            outs.append((p_BGMU @ v_BGTD[:, :, :end]).unflatten(2, (R, -1)))
            queries.append(q_BGMD)
            probs.append(p_BGMU)
        ctx.save_for_backward(k_BGTD, v_BGTD, *queries, *probs)
        return torch.cat(outs, dim=3).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_BGTD, v_BGTD, *blocks = ctx.saved_tensors
        queries, probs = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        grad_BGRTD = grad_BHTD.unflatten(1, (k_BGTD.shape[1], -1))
        R, D = grad_BGRTD.shape[2], grad_BGRTD.shape[-1]
        wide = torch.promote_types(k_BGTD.dtype, torch.float32)
        dk_BGTD, dv_BGTD = torch.zeros_like(k_BGTD, dtype=wide), torch.zeros_like(v_BGTD, dtype=wide)
        dqs = []
        for index, (q_BGMD, p_BGMU) in enumerate(zip(queries, probs, strict=True)):
            block = slice(index * _BLOCK, (index + 1) * _BLOCK)
            grad_BGMD = grad_BGRTD[..., block, :].flatten(2, 3)
            end = p_BGMU.shape[-1]
            dp_BGMU = grad_BGMD @ v_BGTD[:, :, :end].mT
            ds_BGMU = torch._softmax_backward_data(dp_BGMU, p_BGMU, -1, p_BGMU.dtype)
            dqs.append((ds_BGMU @ k_BGTD[:, :, :end]).mul_(D**-0.5).unflatten(2, (R, -1)))
            dk_BGTD[:, :, :end].add_(ds_BGMU.mT @ q_BGMD, alpha=D**-0.5)
            dv_BGTD[:, :, :end] += p_BGMU.mT @ grad_BGMD
        dq_BHTD = torch.cat(dqs, dim=3).flatten(1, 2)
        return dq_BHTD, dk_BGTD.to(k_BGTD.dtype), dv_BGTD.to(v_BGTD.dtype)


class _PromptAttention(torch.autograd.Function):
    """M = R · T, the rows that share a prompt's keys.

    Sᵀ = k·qᵀ/√D, P = softmax(S), O = g P·v. Backward, with dP = dO·vᵀ: dg = Σ P ⊙ dP,
    dS = g P ⊙ (dP − Σ P ⊙ dP), dq = dS·k/√D, dk = dSᵀ·q/√D, dv = g Pᵀ·dO. All transposed: with a prompt's
    few rows innermost a softmax takes eight times as long on the CPU.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, gate_BG1M: Tensor) -> Tensor:
        q_BGMD = q_BHTD.unflatten(1, (k_BGKD.shape[1], -1)).flatten(2, 3)
        p_BGKM = _scores(k_BGKD, q_BGMD, q_BGMD.shape[-1] ** -0.5).softmax(-2)
        out_BGMD = (p_BGKM * gate_BG1M).to(v_BGKD.dtype).mT @ v_BGKD
        ctx.save_for_backward(q_BGMD, k_BGKD, v_BGKD, gate_BG1M, p_BGKM.to(v_BGKD.dtype))
        return out_BGMD.reshape(q_BHTD.shape)

    @staticmethod
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q_BGMD, k_BGKD, v_BGKD, gate_BG1M, p_BGKM = ctx.saved_tensors
        grad_BGMD = grad_BHTD.reshape(q_BGMD.shape)
        wide = torch.promote_types(q_BGMD.dtype, torch.float32)
        dp_BGKM = v_BGKD @ grad_BGMD.mT
        dgate_BG1M = (dp_BGKM.to(wide) * p_BGKM).sum(-2, keepdim=True).to(gate_BG1M.dtype)
        gate_BG1M = gate_BG1M.to(dp_BGKM.dtype)
        ds_BGKM = torch._softmax_backward_data(dp_BGKM * gate_BG1M, p_BGKM, -2, p_BGKM.dtype)
        ds_BGKM.mul_(q_BGMD.shape[-1] ** -0.5)
        dq_BHTD = (ds_BGKM.mT @ k_BGKD).reshape(grad_BHTD.shape)
        return dq_BHTD, ds_BGKM @ q_BGMD, (p_BGKM * gate_BG1M) @ grad_BGMD, dgate_BG1M


def _scores(a_BGXD: Tensor, b_BGYD: Tensor, scale: float) -> Tensor:
    """scale · a·bᵀ, [B, G, X, Y] in float32 at least."""
    wide = torch.promote_types(a_BGXD.dtype, torch.float32)
    a_NXD, b_NYD = (x.to(wide).flatten(0, 1) for x in (a_BGXD, b_BGYD))
    nothing = a_NXD.new_empty(()).expand(len(a_NXD), a_NXD.shape[1], b_NYD.shape[1])
    with _rounded_inputs(a_BGXD.dtype == torch.bfloat16):
        scores_NXY: Tensor = torch.baddbmm(nothing, a_NXD, b_NYD.mT, beta=0, alpha=scale)
    scores_BGXY: Tensor = scores_NXY.unflatten(0, a_BGXD.shape[:2])
    return scores_BGXY


@contextmanager
def _rounded_inputs(to_bfloat16: bool) -> Iterator[None]:
    """Products of float32 on the CPU with inputs rounded to bfloat16, sums in float32.

    Of inputs that were bfloat16 the rounding takes nothing, and it is twice as fast. Such a product of
    bfloat16 tensors themselves would round its result, too.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if to_bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _hide_future(scores_BGMU: Tensor, start: int) -> None:
    """Minus infinity where a query of a block, from position `start` on, would see a later key."""
    length = scores_BGMU.shape[-1] - start
    future = scores_BGMU.new_full((length, length), float("-inf")).triu_(1)
    scores_BGMU.unflatten(2, (-1, length))[..., start:].add_(future)  # a tenth of the time of masked_fill_
