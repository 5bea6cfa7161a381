"""A step on the CPU by the compiled `models.kernels.layers_cpu`, in place of `Llama.forward`.

Shapes: N tokens of a step, M rows of logits; others as in `layers_cpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.kernels import layers_cpu
from models.kernels.layers_cpu import Batch, Cache, Rows, Vectors, Weights
from models.kernels.linear_cpu import packed_linear
from models.kernels.panel_bank import PanelBank
from models.kernels.scalars_cpu import array
from models.kernels.tile_cpu import MULTIPLIES_BFLOAT16, PANEL
from models.kv_cache import KVCache, PromptCache, StepLayout
from models.llama import Layer, Llama

Int64 = NDArray[np.int64]

_ORDER = ("qkv", "wo", "gate_up", "w2", "lm_head")  # of `Vectors`


class FusedPass:
    """The packed base over the paged cache. Knows every adapter whose keys are all `is_elementwise`.

    Weights read in a step drive all else out of the processor's caches, so that each call around the compiled
    one waits for memory: what does not change from step to step is made once.
    """

    def __init__(self, base: Llama, cache: KVCache, prompts: PromptCache, bank: PanelBank) -> None:
        self._config = base.config
        self._bank = bank
        self._prompts = prompts
        layers = [layer for layer in base.layers if isinstance(layer, Layer)]
        self._norms = {
            name: torch.stack([getattr(layer, name) for layer in layers])[:, None]
            for name in ("attention_norm", "feed_forward_norm")
        } | {"final_norm": base.norm[None, None]}
        qkv, wo, gate_up, w2, head = (array(base.packed[name]) for name in _ORDER)
        self._weights = Weights(
            array(base.embed),
            qkv,
            wo,
            gate_up,
            w2,
            head,
            base.inverse_frequencies_D2.numpy(),
            np.float32(base.config.rms_norm_eps),
        )
        self._keys, self._values = array(cache.k_LPsGD), array(cache.v_LPsGD)
        self._grown_from: Tensor | None = None
        self._none_LSA = array(base.embed.new_empty(0, 0, 0))
        self._vectors = lru_cache(maxsize=64)(self._make_vectors)
        self._kept = self._make_rows(1)
        # Compiled now: the first adapter's prompts would else wait for it, and everybody with them.
        packed_linear(base.embed[:1], base.packed["qkv"][0, :1])

    def run(
        self,
        tokens_N: Int64,
        layout: StepLayout,
        bank_slots_B: Sequence[int],
        keys: frozenset[str],
        rows_M: Int64,
    ) -> Tensor:
        """Logits [M, V] in float32 of some rows; the step's keys and values go to the cache.

        `keys`: what the adapters in these slots of the bank have.
        """
        batch = Batch(
            tokens_N,
            np.array(layout.starts, np.int64),
            layout.lens_B,
            layout.blocks_BM,
            layout.prompt_slots_B,
            np.array(bank_slots_B, np.int64),
            rows_M,
            numba.get_num_threads(),
        )
        logits_MV = np.empty((len(rows_M), self._config.vocab_size), np.float32)
        cache, rows = self._cache(), self._rows(len(tokens_N))
        layers_cpu.run(self._weights, self._vectors(keys), batch, cache, rows, logits_MV)
        return torch.from_numpy(logits_MV)

    def _make_vectors(self, keys: frozenset[str]) -> Vectors:
        attention_norm, feed_forward_norm, final_norm = (self._norm(name, keys) for name in self._norms)
        bias, scale = (
            tuple(self._panels(kind, weight, keys) for weight in _ORDER) for kind in ("bias", "scale_out")
        )
        return Vectors(attention_norm, feed_forward_norm, final_norm[0], bias, scale)

    def _norm(self, name: str, keys: frozenset[str]) -> Any:
        return array(self._bank.stacks[name] if name in keys else self._norms[name])

    def _panels(self, kind: str, weight: str, keys: frozenset[str]) -> Any:
        if not any(f"{kind}.{name}" in keys for name in self._bank.linears[weight]):
            return self._none_LSA
        return array(self._bank.panels[kind, weight])

    def _cache(self) -> Cache:
        """The prompts' part moves where a longer one comes."""
        p = self._prompts
        if self._grown_from is not p.k_LSKGD:
            self._grown_from = p.k_LSKGD
            prompts = array(p.k_LSKGD), array(p.v_LSKGD), p.lens_LS, p.gate_LSH.numpy()
            self._views = Cache(self._keys, self._values, *prompts)
        return self._views

    def _rows(self, N: int) -> Rows:
        """Kept for the longest step that came: fresh memory may cost a fault a page."""
        if N > len(self._kept.x_NC):
            self._kept = self._make_rows(N)
        return Rows(*(array_N[:N] for array_N in self._kept))

    def _make_rows(self, N: int) -> Rows:
        config, stored = self._config, self._keys.dtype
        inputs = stored if MULTIPLIES_BFLOAT16 else np.float32  # of the products
        H, D = config.num_heads, config.head_dim
        at_N, tokens_N, sequences_N, lens_N, places_N, slots_N = np.empty((6, N), np.int64)
        cos_ND, sin_ND = np.empty((2, N, D // 2), np.float32)
        return Rows(
            at_N,
            tokens_N,
            sequences_N,
            lens_N,
            places_N,
            slots_N,
            cos_ND,
            sin_ND,
            np.empty((N, config.hidden_size), np.float32),
            np.empty((N, config.hidden_size), inputs),
            np.empty((N, self._weights.qkv_LPKF.shape[1] * PANEL), np.float32),
            np.empty((N, H, D), stored),
            np.empty((N, H, D), inputs),
            np.empty((N, config.intermediate_size), inputs),
        )
