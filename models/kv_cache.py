"""Where keys and values live: the paged cache of tokens, and the cache of adapters' prompts.

Shapes: L layers, P blocks of s positions, S prompt slots, K prompt rows, G key/value heads, D head
size, H query heads, M blocks of the longest sequence, N tokens of a step, B sequences of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attention import Prompts, causal_attention, prompt_attention
from models.config import ModelConfig
from models.kernels import paged_cpu
from models.pieces import spread
from models.uploads import upload

Int32 = NDArray[np.int32]


class KVCache:
    """Keys and values of every layer, `[L, P, s, G, D]` each; blocks are handed out elsewhere."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.k_LPsGD = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LPsGD = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize

    def write(self, layer: int, slots_N: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> None:
        """Store the step's keys and values at their flat positions block · s + offset."""
        self.k_LPsGD[layer].flatten(0, 1).index_copy_(0, slots_N, k_NGD)
        self.v_LPsGD[layer].flatten(0, 1).index_copy_(0, slots_N, v_NGD)

    def read(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A sequence's first `length` keys and values [length, G, D], gathered. For prompts' chunks."""
        k, v = (cache[layer][blocks].flatten(0, 1)[:length] for cache in (self.k_LPsGD, self.v_LPsGD))
        return k, v


class PromptCache:
    """Prompt keys, values and effective gates by slot; slot 0 is empty, for requests without prompts.

    Grows in K when an adapter with longer prompts comes. `lens_LS` is numpy's, for it steers loops;
    `device_lens_LS` is the same where the kernels of a GPU read it.
    """

    def __init__(self, config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """`num_slots` counts the prompts; the empty slot comes on top."""
        L, S, G, D = config.num_layers, num_slots + 1, config.num_kv_heads, config.head_dim
        self.k_LSKGD = torch.zeros(L, S, 0, G, D, dtype=dtype, device=device)
        self.v_LSKGD = torch.zeros_like(self.k_LSKGD)
        self.gate_LSH = torch.zeros(L, S, config.num_heads, dtype=torch.float32, device=device)
        self.lens_LS: Int32 = np.zeros((L, S), np.int32)
        self.device_lens_LS = torch.zeros(L, S, dtype=torch.int32, device=device)

    def bytes_of(self, K: int) -> int:
        """What keys and values of K rows take in all slots, the empty one included."""
        L, S, _, G, D = self.k_LSKGD.shape
        return 2 * L * S * K * G * D * self.k_LSKGD.element_size()

    @torch.no_grad()
    def room_for(self, K: int, pause: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """Memory for K rows of every slot, as `AdapterBank.room_for`."""
        if K <= self.k_LSKGD.shape[2]:
            return lambda: None
        L, S, _, G, D = self.k_LSKGD.shape
        row_LF = self.k_LSKGD.new_zeros(1, 1).expand(L, K * G * D)
        room = [spread(row_LF, S, pause).unflatten(-1, (K, G, D)) for _ in range(2)]

        def use() -> None:
            have = self.k_LSKGD.shape[2]
            if K > have:
                for new, old in zip(room, (self.k_LSKGD, self.v_LSKGD), strict=True):
                    new[:, :, :have] = old
                self.k_LSKGD, self.v_LSKGD = room

        return use

    @torch.no_grad()
    def place(self, slot: int, prompts: Prompts, row: int) -> None:
        """Put slot `row` of `prompts` into `slot`, in place of whatever was there."""
        assert slot > 0
        K, len_L = prompts.k_SLKGD.shape[2], prompts.len_SL[row]
        assert len_L.max() <= K, "kernels read as many rows as `lens_LS` says"
        self.room_for(K)()
        self.k_LSKGD[:, slot, :K] = prompts.k_SLKGD[row]
        self.v_LSKGD[:, slot, :K] = prompts.v_SLKGD[row]
        self.gate_LSH[:, slot] = prompts.gate_SLH[row]
        self.lens_LS[:, slot] = len_L.numpy()
        self.device_lens_LS[:, slot] = upload(len_L, self.device_lens_LS.device)


@dataclass(frozen=True)
class StepLayout:
    """How a step's flat tokens fall into sequences: first those of one token, then longer chunks.

    Sequence b has the tokens `starts[b]:starts[b + 1]`, which are the last of its `lens_B[b]` positions.
    """

    num_single: int  # sequences of one token, the first ones
    starts: list[int]
    lens_B: Int32
    blocks_BM: Int32
    prompt_slots_B: Int32
    block_size: int

    @property
    def sequences_N(self) -> NDArray[np.int64]:
        """Whose each token is."""
        return np.repeat(np.arange(len(self.lens_B)), np.diff(self.starts))

    @property
    def lens_N(self) -> NDArray[np.int64]:
        """How many positions each token sees, its own included."""
        ends_B = np.asarray(self.starts[1:])
        seen_N: NDArray[np.int64] = np.arange(self.starts[-1]) + (self.lens_B + 1 - ends_B)[self.sequences_N]
        return seen_N

    @property
    def slots_N(self) -> NDArray[np.int64]:
        """The tokens' flat cache positions."""
        positions_N = self.lens_N - 1
        blocks_N = self.blocks_BM[self.sequences_N, positions_N // self.block_size].astype(np.int64)
        slots_N: NDArray[np.int64] = blocks_N * self.block_size + positions_N % self.block_size
        return slots_N


@dataclass(frozen=True, slots=True)
class Decode:
    """One sequence's next step: its last token, which is the `length`-th. Of a token below 0 `resolve_tokens`
    says which it is."""

    token: int
    length: int
    block_table: Sequence[int]
    bank_slot: int
    prompt_slot: int


def resolve_tokens(tokens_N: Tensor, last_M: Tensor) -> Tensor:
    """A token below 0 stands for one of the step before, by its row there: -1 - m for `last_M[m]`."""
    rows_N = (-1 - tokens_N).clamp(min=0)
    return torch.where(tokens_N < 0, last_M[rows_N], tokens_N)


class PagedAttend:
    """One step's attention over the paged cache: writes the new keys and values, then reads.

    `fused`: by the CPU's own kernel, where the cache's numbers are such that it knows.
    """

    def __init__(self, cache: KVCache, prompts: PromptCache, layout: StepLayout, fused: bool = True) -> None:
        self._cache = cache
        self._prompts = prompts
        self._layout = layout
        device = cache.k_LPsGD.device
        self._slots_N = torch.from_numpy(layout.slots_N).to(device)
        self._blocks = [
            torch.from_numpy(blocks[: -(-length // cache.block_size)]).to(device)
            for blocks, length in zip(layout.blocks_BM, layout.lens_B, strict=True)
        ]
        self._fused = fused and device.type == "cpu" and cache.k_LPsGD.dtype in paged_cpu.SUPPORTED_DTYPES

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        layout = self._layout
        self._cache.write(layer, self._slots_N, k_NGD, v_NGD)
        if self._fused:
            return self._by_kernel(layer, q_NHD)
        out_NHD = torch.empty_like(q_NHD)
        for b in range(len(layout.lens_B)):
            tokens = slice(layout.starts[b], layout.starts[b + 1])
            out_NHD[tokens] = self._chunk(layer, b, q_NHD[tokens], k_NGD[tokens], v_NGD[tokens])
        return out_NHD

    def _by_kernel(self, layer: int, q_NHD: Tensor) -> Tensor:
        layout, prompts = self._layout, self._prompts
        return paged_cpu.paged_attend(
            q_NHD,
            self._cache.k_LPsGD[layer],
            self._cache.v_LPsGD[layer],
            layout.blocks_BM,
            layout.sequences_N,
            layout.lens_N,
            prompts.k_LSKGD[layer],
            prompts.v_LSKGD[layer],
            layout.prompt_slots_B,
            prompts.lens_LS[layer],
            prompts.gate_LSH[layer].numpy(),
        )

    def _chunk(self, layer: int, b: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """One sequence's chunk. What it attends to besides itself is gathered, once for the chunk."""
        length = int(self._layout.lens_B[b])
        if length > q_THD.shape[0]:
            k_TGD, v_TGD = self._cache.read(layer, self._blocks[b], length)
        out_THD = causal_attention(q_THD, k_TGD, v_TGD)
        slot = int(self._layout.prompt_slots_B[b])
        prompts = self._prompts
        K = int(prompts.lens_LS[layer, slot])
        if K:
            k_1KGD, v_1KGD = prompts.k_LSKGD[layer, slot, None, :K], prompts.v_LSKGD[layer, slot, None, :K]
            gate_1H = prompts.gate_LSH[layer, slot, None]
            out_THD = out_THD + prompt_attention(q_THD[None], k_1KGD, v_1KGD, None, gate_1H)[0]
        return out_THD
