"""One step's attention over the paged cache on a GPU, for `models.llama`: like `PagedAttend`, in Triton.

Shapes: N tokens, B sequences, H query heads, G key/value heads, D head size, M blocks of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.kernels.paged_decode import paged_decode
from models.kernels.paged_prefill import paged_prefill
from models.kv_cache import Int32, KVCache, PromptCache, StepLayout
from models.uploads import upload


class TritonPagedAttend:
    """Writes the new keys and values, then reads: sequences of one token in one launch, chunks in another."""

    def __init__(self, cache: KVCache, prompts: PromptCache, layout: StepLayout) -> None:
        self._cache = cache
        self._prompts = prompts
        self._slots_N = upload(layout.slots_N, cache.k_LPsGD.device)
        self._num_single = layout.num_single
        self._longest = int(np.diff(layout.starts).max())
        arrays = (layout.lens_B, layout.prompt_slots_B, np.array(layout.starts, np.int32), layout.blocks_BM)
        self._lens_B, self._prompt_slots_B, self._starts, self._blocks_BM = _upload_all(
            arrays, cache.k_LPsGD.device
        )

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        self._cache.write(layer, self._slots_N, k_NGD, v_NGD)
        single, lens_B = self._num_single, self._lens_B
        if single:
            out_BHD = paged_decode(
                q_NHD[:single],
                *_pages(self._cache, layer),
                self._blocks_BM[:single],
                lens_B[:single],
                *_prompts(self._prompts, layer, self._prompt_slots_B[:single]),
            )
            if single == len(lens_B):
                return out_BHD
        out_NHD = paged_prefill(
            q_NHD,
            *_pages(self._cache, layer),
            self._blocks_BM[single:],
            self._starts[single:],
            lens_B[single:],
            self._longest,
            *_prompts(self._prompts, layer, self._prompt_slots_B[single:]),
        )
        if single:
            out_NHD[:single] = out_BHD
        return out_NHD


@dataclass(frozen=True, slots=True)
class DecodeAttend:
    """Of sequences of one token each, whose places are on the device already, as int32.

    `slots_B` are flat cache positions of the tokens, int64. Length 0 is a row that is none.
    """

    cache: KVCache
    prompts: PromptCache
    slots_B: Tensor
    lens_B: Tensor
    prompt_slots_B: Tensor
    blocks_BM: Tensor

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        self.cache.write(layer, self.slots_B, k_NGD, v_NGD)
        prompts = _prompts(self.prompts, layer, self.prompt_slots_B)
        return paged_decode(q_NHD, *_pages(self.cache, layer), self.blocks_BM, self.lens_B, *prompts)


def _pages(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    return cache.k_LPsGD[layer], cache.v_LPsGD[layer]


def _prompts(
    prompts: PromptCache, layer: int, slots_B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the kernels take them."""
    return (
        prompts.k_LSKGD[layer],
        prompts.v_LSKGD[layer],
        slots_B,
        prompts.device_lens_LS[layer],
        prompts.gate_LSH[layer],
    )


@torch.inference_mode()
def compile_kernels(cache: KVCache, prompts: PromptCache, num_heads: int) -> None:
    """Every variant that a step may need: compiling one takes seconds, which no request should wait for."""
    k_PsGD, v_PsGD = _pages(cache, 0)
    one, zero = k_PsGD.new_ones(1, dtype=torch.int32), k_PsGD.new_zeros(1, dtype=torch.int32)
    starts = torch.cat([zero, one])
    prompt = _prompts(prompts, 0, zero)
    q_NHD = k_PsGD.new_zeros(1024, num_heads, k_PsGD.shape[-1])
    for num_splits in (1, 2):
        paged_decode(q_NHD[:1], k_PsGD, v_PsGD, zero[None], one, *prompt, num_splits)
    for longest in (1, len(q_NHD)):
        paged_prefill(q_NHD, k_PsGD, v_PsGD, zero[None], starts, one, longest, *prompt)


def _upload_all(arrays: Sequence[Int32], device: torch.device) -> list[Tensor]:
    """To the device in one copy."""
    flat = upload(np.concatenate([array.reshape(-1) for array in arrays]), device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
