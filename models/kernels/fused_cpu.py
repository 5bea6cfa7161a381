"""A step on the CPU by the compiled layers of `models.kernels.layers_cpu`, in place of `Llama.forward`.

Shapes: N tokens of a step, M rows of logits; others as in `layers_cpu`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.adaptation import BatchAdaptation
from models.kernels import layers_cpu
from models.kernels.layers_cpu import Batch, Cache, Rows, Vectors, Weights
from models.kernels.linear_cpu import packed_linear
from models.kernels.panel_bank import PanelBank
from models.kernels.scalars_cpu import array
from models.kernels.tile_cpu import PANEL
from models.kv_cache import KVCache, PromptCache, StepLayout
from models.llama import Layer, Llama


class FusedPass:
    """The packed base over the paged cache. Knows every adaptation that `is_elementwise`."""

    def __init__(self, base: Llama, cache: KVCache, prompts: PromptCache, bank: PanelBank) -> None:
        self._base = base
        self._bank = bank
        self._cache = cache
        self._prompts = prompts
        layers = [layer for layer in base.layers if isinstance(layer, Layer)]
        self._norms = {
            name: torch.stack([getattr(layer, name) for layer in layers])[:, None]
            for name in ("attention_norm", "feed_forward_norm")
        } | {"final_norm": base.norm[None, None]}
        self._eps = np.float32(base.config.rms_norm_eps)
        qkv, wo, gate_up, w2 = (array(base.packed[name]) for name in ("qkv", "wo", "gate_up", "w2"))
        self._weights = Weights(qkv, wo, gate_up, w2, self._eps)
        self._head_PKF = array(base.packed["lm_head"])
        self._stored = array(base.embed).dtype
        self._none_LSA = array(base.embed.new_empty(0, 0, 0))
        # Compiled now: the first adapter's prompts would else wait for it, and everybody with them.
        packed_linear(base.embed[:1], base.packed["qkv"][0, :1])

    def hidden(
        self, tokens_N: Tensor, positions_N: Any, layout: StepLayout, adaptation: BatchAdaptation | None
    ) -> Tensor:
        """Hidden states [N, C] in float32 before the final norm; keys and values go to the cache."""
        vectors = self._vectors(adaptation, len(tokens_N))
        batch, cache, rows = self._batch(positions_N, layout), self._views(), self._rows(tokens_N)
        layers_cpu.run_layers(self._weights, vectors, batch, cache, rows)
        return torch.from_numpy(rows.x_NC)

    def logits(self, x_MC: Tensor, adaptation: BatchAdaptation | None) -> Tensor:
        """[M, V] in float32 of M rows of the hidden states; `adaptation` must be that of those rows."""
        M, C = x_MC.shape
        slots_M = self._slots(adaptation, M)
        h_MC = np.empty((M, C), self._stored)
        layers_cpu.norm(x_MC.numpy(), self._norm("final_norm", adaptation)[0], slots_M, self._eps, h_MC)
        logits_MV = torch.empty(M, self._base.config.vocab_size)
        bias, scale = (self._panels(kind, "lm_head", adaptation) for kind in ("bias", "scale_out"))
        layers_cpu.head(h_MC, self._head_PKF, bias, scale, slots_M, logits_MV.numpy())
        return logits_MV

    def _vectors(self, adaptation: BatchAdaptation | None, N: int) -> Vectors:
        return Vectors(
            self._norm("attention_norm", adaptation),
            self._norm("feed_forward_norm", adaptation),
            tuple(self._panels("bias", weight, adaptation) for weight in _ORDER),
            tuple(self._panels("scale_out", weight, adaptation) for weight in _ORDER),
            self._slots(adaptation, N),
        )

    def _panels(self, kind: str, weight: str, adaptation: BatchAdaptation | None) -> Any:
        names = self._bank.linears[weight]
        if adaptation is None or not any(adaptation.has(f"{kind}.{name}") for name in names):
            return self._none_LSA
        return array(self._bank.panels[kind, weight])

    def _norm(self, name: str, adaptation: BatchAdaptation | None) -> Any:
        stack_LSC = None if adaptation is None else adaptation.stack(name)
        return array(self._norms[name] if stack_LSC is None else stack_LSC)

    @staticmethod
    def _slots(adaptation: BatchAdaptation | None, N: int) -> Any:
        return np.zeros(N, np.int64) if adaptation is None else adaptation.slots_N.numpy()

    def _batch(self, positions_N: Any, layout: StepLayout) -> Batch:
        angles_ND = positions_N.astype(np.float64)[:, None] * self._base.inverse_frequencies_D2.numpy()
        return Batch(
            np.cos(angles_ND).astype(np.float32),
            np.sin(angles_ND).astype(np.float32),
            layout.slots_N.numpy(),
            layout.sequences_N,
            layout.lens_N,
            layout.blocks_BM,
            layout.prompt_slots_B,
        )

    def _views(self) -> Cache:
        p = self._prompts
        return Cache(
            array(self._cache.k_LPsGD),
            array(self._cache.v_LPsGD),
            array(p.k_LSKGD),
            array(p.v_LSKGD),
            p.lens_LS,
            p.gate_LSH.numpy(),
        )

    def _rows(self, tokens_N: Tensor) -> Rows:
        config, stored = self._base.config, self._stored
        N, H, D = len(tokens_N), config.num_heads, config.head_dim
        return Rows(
            F.embedding(tokens_N, self._base.embed).float().numpy(),
            np.empty((N, config.hidden_size), stored),
            np.empty((N, self._weights.qkv_LPKF.shape[1] * PANEL), np.float32),
            np.empty((N, H, D), stored),
            np.empty((N, H, D), stored),
            np.empty((N, config.intermediate_size), stored),
        )


_ORDER = ("qkv", "wo", "gate_up", "w2")  # of `Vectors`
