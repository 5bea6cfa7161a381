"""Zero-init gated attention, the one definition (V1 eq. 5 to 8):

    out = softmax(q·kᵀ/√D + causal)·v + g · softmax(q·k_aᵀ/√D)·v_a

Two independent softmaxes in float32. q is rotated, the prompts' keys are not; every token sees every
prompt row. Query head h reads key/value head h // (H / G), its gate is its own.

Shapes: S slots, L layers, N tokens, B sequences, T positions, H query heads, G key/value heads,
D head size, K prompt rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.uploads import upload


@dataclass(frozen=True)
class Prompts:
    """Prompt keys and values of S slots, ready for attention; rows past `len_SL` are padding.

    `len_SL` lies on the host: it steers loops, and to read it from a GPU is to wait for all that it has.
    Prompts take no positions, so the keys are not rotated. `gate_SLH` is what multiplies the prompts'
    part of the attention: activation and `new_gate` applied, 0 where a layer holds no prompts.
    """

    k_SLKGD: Tensor
    v_SLKGD: Tensor
    len_SL: Tensor
    gate_SLH: Tensor


def stack_layers(parts: Sequence[Prompts]) -> Prompts:
    """One after another, the prompts of some layers each."""
    return Prompts(
        torch.cat([part.k_SLKGD for part in parts], 1),
        torch.cat([part.v_SLKGD for part in parts], 1),
        torch.cat([part.len_SL for part in parts], 1),
        torch.cat([part.gate_SLH for part in parts], 1),
    )


def causal_attention(q_THD: Tensor, k_UGD: Tensor, v_UGD: Tensor) -> Tensor:
    """One sequence's last T queries over its U keys, aligned at the end; [T, H, D]."""
    T, U = q_THD.shape[0], k_UGD.shape[0]
    mask = None
    if 1 < T < U:
        mask = torch.ones(T, U, dtype=torch.bool, device=q_THD.device).tril(U - T)
    out_1HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_UGD.transpose(0, 1)[None],
        v_UGD.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=T == U,
        enable_gqa=True,
    )
    return out_1HTD[0].transpose(0, 1)


def prompt_attention(
    q_BTHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, len_B: Tensor | None, gate_BH: Tensor
) -> Tensor:
    """g · softmax(q·k_aᵀ/√D)·v_a for B sequences (or 1, for all alike); [B, T, H, D].

    Rows from `len_B` on are padding; None: there is none. A sequence without prompts gets exactly zero.
    """
    *_, H, D = q_BTHD.shape
    K, G = k_BKGD.shape[1:3]
    exact = torch.promote_types(q_BTHD.dtype, torch.float32)
    q_BTGRD = q_BTHD.to(exact).unflatten(2, (G, H // G))
    scores_BTGRK = torch.einsum("btgrd,bkgd->btgrk", q_BTGRD, k_BKGD.to(exact)) * D**-0.5
    gate_BH = gate_BH.to(exact)
    if len_B is not None:
        padding_BK = torch.arange(K, device=len_B.device) >= len_B[:, None]
        scores_BTGRK = scores_BTGRK.masked_fill(padding_BK[:, None, None, None], torch.finfo(exact).min)
        gate_BH = gate_BH * (len_B > 0)[:, None]
    out_BTGRD = torch.einsum("btgrk,bkgd->btgrd", scores_BTGRK.softmax(-1), v_BKGD.to(exact))
    return (out_BTGRD.flatten(2, 3) * gate_BH[:, None, :, None]).to(q_BTHD.dtype)


class DenseAttend:
    """B sequences of T positions each, no cache: training, scoring, and the tests' plain path.

    `prompts` has one slot for all sequences or one for each; gradients flow into it. Padding belongs
    behind a sequence's end, where causality keeps it out of sight.
    """

    def __init__(self, num_sequences: int, prompts: Prompts | None = None) -> None:
        self._num_sequences = num_sequences
        self._prompts = prompts
        self._len_SL = None if prompts is None else upload(prompts.len_SL, prompts.k_SLKGD.device)
        self._gated = set() if prompts is None else set(prompts.len_SL.amax(0).nonzero().flatten().tolist())

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        B = self._num_sequences
        q_BTHD, k_BTGD, v_BTGD = (x.unflatten(0, (B, -1)) for x in (q_NHD, k_NGD, v_NGD))
        out_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BTGD.transpose(1, 2),
            v_BTGD.transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        )
        out_BTHD = out_BHTD.transpose(1, 2)
        if layer in self._gated:
            p = self._prompts
            assert p is not None
            assert self._len_SL is not None
            out_BTHD = out_BTHD + prompt_attention(
                q_BTHD,
                p.k_SLKGD[:, layer],
                p.v_SLKGD[:, layer],
                self._len_SL[:, layer],
                p.gate_SLH[:, layer],
            )
        return out_BTHD.flatten(0, 1)
