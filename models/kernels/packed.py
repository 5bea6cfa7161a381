"""Gated attention of a training pass, in Triton: packed sequences of unequal length, with gradients.

out = softmax(q·kᵀ/√D + causal)·v + g · softmax(q·k_aᵀ/√D)·v_a. Nothing of length² is kept: a row's
log Σ exp of either softmax is, and the backward pass computes the probabilities from it anew. No sums
by atomics: a resumed training ends with the same bits.

Shapes: N tokens, B sequences, H query heads, G key/value heads, R = H / G, D head size, S slots, K
prompt rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from models.kernels.packed_backward import backward_keys, backward_prompts, backward_queries
from models.kernels.packed_forward import forward
from models.kernels.tiles import BLOCK_K, LOG2_E, assert_heads, block_dim


@dataclass(frozen=True)
class Packing:
    """How flat tokens fall into sequences, and each one's prompt slot; int32 on the device."""

    starts: Tensor  # [B + 1]
    slots_B: Tensor
    longest: int

    @classmethod
    def of(cls, lens_B: Sequence[int], slots_B: Tensor | None, device: torch.device) -> Packing:
        """`slots_B`: None where all see slot 0."""
        starts = torch.tensor([0, *lens_B], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if slots_B is None:
            slots_B = torch.zeros(len(lens_B), dtype=torch.int32)
        return cls(starts.to(device), slots_B.to(device, torch.int32), max(lens_B))


def packed_attention(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    prompt_k_SKGD: Tensor,
    prompt_v_SKGD: Tensor,
    prompt_lens_S: Tensor,
    gate_SH: Tensor,
    packing: Packing,
) -> Tensor:
    """[N, H, D] as q, with gradients of all but the lengths; rows from `prompt_lens_S` on get none."""
    (N, H, D), G = q_NHD.shape, k_NGD.shape[1]
    S, K = prompt_k_SKGD.shape[:2]
    assert k_NGD.shape == v_NGD.shape == (N, G, D)
    assert H % G == 0
    assert prompt_k_SKGD.shape == prompt_v_SKGD.shape == (S, K, G, D)
    assert gate_SH.shape == (S, H)
    assert prompt_lens_S.shape == (S,)
    assert prompt_lens_S.dtype == torch.int32
    assert len(packing.starts) == len(packing.slots_B) + 1
    out: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        q_NHD, k_NGD, v_NGD, prompt_k_SKGD, prompt_v_SKGD, prompt_lens_S, gate_SH, packing
    )
    return out


class _PackedAttention(torch.autograd.Function):
    """With P = softmax(S), dP = dO·vᵀ and δ = Σ P ⊙ dP of either softmax: dS = g P ⊙ (dP − δ), dg = δ of
    the prompts'. The sum of both δ, each with its gate, is dO·O, so that only the prompts' is computed."""

    @staticmethod
    def forward(
        ctx: Any,
        q_NHD: Tensor,
        k_NGD: Tensor,
        v_NGD: Tensor,
        prompt_k_SKGD: Tensor,
        prompt_v_SKGD: Tensor,
        prompt_lens_S: Tensor,
        gate_SH: Tensor,
        packing: Packing,
    ) -> Tensor:
        prompt_k, prompt_v = prompt_k_SKGD.contiguous(), prompt_v_SKGD.contiguous()
        gate = gate_SH.float().contiguous()
        lens_S = prompt_lens_S.contiguous()
        assert_heads(q_NHD, k_NGD, v_NGD)
        (N, H, D), G = q_NHD.shape, k_NGD.shape[1]
        out_NHD = q_NHD.new_empty(N, H, D)
        log_sum_NH, prompt_log_sum_NH = torch.empty(2, N, H, device=q_NHD.device).unbind()
        sizes = _sizes(q_NHD, G, prompt_k)
        tiles = triton.cdiv(packing.longest * (H // G), sizes["ROWS"])
        forward[(G, tiles, len(packing.slots_B))](
            q_NHD,
            k_NGD,
            v_NGD,
            prompt_k,
            prompt_v,
            packing.starts,
            packing.slots_B,
            lens_S,
            gate,
            out_NHD,
            log_sum_NH,
            prompt_log_sum_NH,
            D**-0.5 * LOG2_E,
            q_NHD.stride(0),
            k_NGD.stride(0),
            v_NGD.stride(0),
            prompt_k.stride(0),
            **sizes,
        )
        ctx.packing = packing
        ctx.gate_dtype = gate_SH.dtype
        ctx.save_for_backward(
            q_NHD, k_NGD, v_NGD, prompt_k, prompt_v, lens_S, gate, out_NHD, log_sum_NH, prompt_log_sum_NH
        )
        return out_NHD

    @staticmethod
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, prompt_k, prompt_v, lens_S, gate, out_NHD, log_sum, prompt_log_sum = (
            ctx.saved_tensors
        )
        packing: Packing = ctx.packing
        (N, H, D), G, (S, K) = q_NHD.shape, k_NGD.shape[1], prompt_k.shape[:2]
        B, R = len(packing.slots_B), H // G
        grad_NHD = grad_NHD.contiguous()
        dq, dk, dv = q_NHD.new_empty(N, H, D), k_NGD.new_empty(N, G, D), v_NGD.new_empty(N, G, D)
        delta_NH, prompt_delta_NH = torch.empty(2, N, H, device=q_NHD.device).unbind()
        sizes = _sizes(q_NHD, G, prompt_k)
        scales = (D**-0.5 * LOG2_E, D**-0.5)
        strides = (q_NHD.stride(0), k_NGD.stride(0), v_NGD.stride(0))
        backward_queries[(G, triton.cdiv(packing.longest * R, sizes["ROWS"]), B)](
            q_NHD,
            k_NGD,
            v_NGD,
            prompt_k,
            prompt_v,
            packing.starts,
            packing.slots_B,
            lens_S,
            gate,
            out_NHD,
            grad_NHD,
            log_sum,
            prompt_log_sum,
            dq,
            delta_NH,
            prompt_delta_NH,
            *scales,
            *strides,
            prompt_k.stride(0),
            **sizes,
        )
        if any(ctx.needs_input_grad[1:3]):  # not in the lowest layer that has prompts
            keys = {name: value for name, value in sizes.items() if name != "BLOCK_K"}
            backward_keys[(G, triton.cdiv(packing.longest, sizes["BLOCK_T"]), B)](
                q_NHD,
                k_NGD,
                v_NGD,
                packing.starts,
                grad_NHD,
                log_sum,
                delta_NH,
                dk,
                dv,
                *scales,
                *strides,
                **keys,
            )
        # One sequence's part each; then a product by slots, since adding by index has no fixed order.
        dprompt_k, dprompt_v = torch.zeros(2, B, K, H, D, device=q_NHD.device).unbind()
        dgate_BH = torch.zeros(B, H, device=q_NHD.device)
        if K:
            prompts = {name: value for name, value in sizes.items() if name != "BLOCK_T"}
            backward_prompts[(H, B, triton.cdiv(K, BLOCK_K))](
                q_NHD,
                prompt_k,
                prompt_v,
                packing.starts,
                packing.slots_B,
                lens_S,
                gate,
                grad_NHD,
                prompt_log_sum,
                prompt_delta_NH,
                dprompt_k,
                dprompt_v,
                dgate_BH,
                *scales,
                q_NHD.stride(0),
                prompt_k.stride(0),
                K,
                **prompts,
            )
        own_SB = (packing.slots_B == torch.arange(S, device=q_NHD.device)[:, None]).float()
        dprompt_k, dprompt_v = (
            (own_SB @ x.flatten(1)).view(S, K, G, R, D).sum(3).to(prompt_k.dtype)
            for x in (dprompt_k, dprompt_v)
        )
        dgate = (own_SB @ dgate_BH).to(ctx.gate_dtype)
        return dq, dk, dv, dprompt_k, dprompt_v, None, dgate, None


def _sizes(q_NHD: Tensor, G: int, prompt_k_SKGD: Tensor) -> dict[str, int]:
    """Shapes, tiles and warps. Sixteen-bit tiles of 64 fit what a backward pass holds: six of them."""
    H, D = q_NHD.shape[1:]
    block_d = block_dim(D)
    small = q_NHD.element_size() == 4 or block_d > 128  # no tensor cores for float32, and twice the bytes
    return {
        "G": G,
        "R": H // G,
        "D": D,
        "ROWS": 32 if small else 64,
        "BLOCK_T": 32 if small else 64,
        "BLOCK_K": BLOCK_K,
        "BLOCK_D": block_d,
        "num_warps": 4,
        "num_stages": 2,
    }
