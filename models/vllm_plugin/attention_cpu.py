"""On a CPU the step's text alone goes through the model, and is attended to as by bare vLLM.

Placeholders are taken out of the step before the model and put back after it (`model`): their keys and
values are of the prompts' rows alone, which are projected and written by themselves. What the text sees of
prompts a kernel of our own adds to what vLLM's has computed; it reads the prompts' rows in their blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from models.kernels.prompt_block_cpu import add_prompts
from models.kernels.scalars_cpu import SUPPORTED_DTYPES, array
from models.vllm_plugin.attention import facts, lens_buffer, named_backend, token_slots
from models.vllm_plugin.carriers import GATES, LENGTH, ROWS


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the text's tokens see of prompts: the block and the adapter slot of each, below zero for none."""

    blocks_N: Any
    slots_N: Any


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Of a step with placeholders, P of them to be computed: where tokens lie in the step, their adapter
    slots, and where their keys and values go. N counts the text's tokens alone."""

    text_N: Tensor
    text_slots_N: Tensor
    text_cache_N: Tensor
    tokens_P: Tensor
    rows_P: Tensor
    slots_P: Tensor
    cache_P: Tensor


@dataclass(frozen=True, slots=True)
class StepAttention:
    """A step's metadata. `text` is the platform's own, None where all are placeholders."""

    text: Any
    prompts: Prompts | None
    placeholders: Placeholders | None


def reads_blocks(platform: type[AttentionBackend], vllm_config: Any, head_size: int) -> bool:
    """Whether this is the CPU's attention, with blocks as `add_prompts` reads them."""
    if platform.get_name() != "CPU_ATTN":
        return False
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    cache, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
    stored = kv_cache_dtype_str_to_dtype(cache.cache_dtype, vllm_config.model_config)
    kind = _get_attn_isa(dtype, cache.block_size, head_size, cache.cache_dtype)
    return stored == dtype and dtype in SUPPORTED_DTYPES and kind == "vec"


@functools.cache
def text_alone_backend(platform: type[AttentionBackend]) -> type[AttentionBackend]:
    """For a model that is given a step's text alone."""
    builder, impl = platform.get_builder_cls(), platform.get_impl_cls()
    return named_backend("TextAlone", platform, _text_builder(builder), _text_impl(impl))


def _text_builder(builder: Any) -> Any:
    """Of each step's `StepAttention`."""

    class TextBuilder(builder):
        supports_update_block_table = False  # that would put the unshifted table back

        def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(spec, layer_names, vllm_config, device)
            self._lens = lens_buffer(vllm_config, device)
            self._carrier = vllm_config.compilation_config.static_forward_context[layer_names[0]].carrier
            _compile(vllm_config.model_config.dtype, self.num_heads)

        def build(
            self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
        ) -> StepAttention:
            B = common.num_reqs
            starts, lens_B = common.query_start_loc.numpy()[: B + 1], common.seq_lens.numpy()[:B]
            slots_B = token_slots(self._carrier()).numpy()[starts[:-1]]
            counts_B = starts[1:] - starts[:-1]
            if (lens_B - counts_B).min() < ROWS:
                return self._apart(common, lens_B, counts_B, slots_B)
            text = _copy(common)
            text.seq_lens = self._lens[:B]
            np.subtract(lens_B, ROWS, out=text.seq_lens.numpy())
            text.max_seq_len = common.max_seq_len - ROWS
            text.block_table_tensor = common.block_table_tensor[:, 1:]
            prompts = None
            if slots_B.max() >= 0:
                blocks_B = common.block_table_tensor.numpy()[:B, 0]
                prompts = Prompts(np.repeat(blocks_B, counts_B), np.repeat(slots_B, counts_B))
            return StepAttention(super().build(0, text, fast_build), prompts, None)

        def _apart(
            self, common: CommonAttentionMetadata, lens_B: Any, counts_B: Any, slots_B: Any
        ) -> StepAttention:
            """Of a step with placeholders."""
            assert common.positions is not None
            B, positions_N = common.num_reqs, common.positions.numpy()[: common.num_actual_tokens]
            request_N, table_BM = np.repeat(np.arange(B), counts_B), common.block_table_tensor.numpy()[:B]
            slots_N, is_text_N = slots_B[request_N], positions_N >= ROWS
            lengths_S = facts(self._carrier())[:, LENGTH].float().numpy()
            computed_N = ~is_text_N & (slots_N >= 0) & (positions_N < lengths_S[slots_N])
            (text_N,), (tokens_P,) = is_text_N.nonzero(), computed_N.nonzero()
            placeholders = Placeholders(
                torch.from_numpy(text_N),
                torch.from_numpy(slots_N[text_N]),
                common.slot_mapping[text_N],
                torch.from_numpy(tokens_P),
                torch.from_numpy(positions_N[tokens_P]),
                torch.from_numpy(slots_N[tokens_P]),
                common.slot_mapping[tokens_P],
            )
            if not len(text_N):
                return StepAttention(None, None, placeholders)
            counts_B = np.bincount(request_N[text_N], minlength=B)
            (kept_b,) = counts_B.nonzero()
            text = _copy(common)
            text.num_reqs, text.num_actual_tokens = len(kept_b), len(text_N)
            starts = np.concatenate([[0], counts_B[kept_b].cumsum()], dtype=np.int32)
            text.query_start_loc = torch.from_numpy(starts)
            text.seq_lens = torch.from_numpy(lens_B[kept_b] - ROWS)
            text.max_query_len = int(counts_B.max())
            text.max_seq_len = int(text.seq_lens.max())
            text.block_table_tensor = torch.from_numpy(table_BM[kept_b, 1:])
            text.slot_mapping = placeholders.text_cache_N
            prompts = Prompts(table_BM[request_N[text_N], 0], slots_N[text_N])
            return StepAttention(super().build(0, text), prompts, placeholders)

    return TextBuilder


def _text_impl(impl: Any) -> Any:
    """vLLM's attention over the text, and then the prompts."""
    attend: Any = impl.forward  # called as it is: `super()` takes time in every layer

    class TextImpl(impl):
        _cache: Tensor | None = None

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            cache: Tensor,
            metadata: StepAttention | None,
            output: Tensor,
            *scales: Any,
            **more_scales: Any,
        ) -> Tensor:
            text = None if metadata is None else metadata.text
            attend(self, layer, query, key, value, cache, text, output, *scales, **more_scales)
            if metadata is not None and metadata.prompts is not None:
                self._add_prompts(layer, query, cache, metadata.prompts, output)
            return output

        def _add_prompts(
            self, layer: Any, query: Tensor, cache: Tensor, prompts: Prompts, output: Tensor
        ) -> None:
            if cache is not self._cache:
                self._cache, self._views = cache, (*blocks(cache), array(facts(layer.carrier())))
            k_PGDs, v_PsGD, facts_SF = self._views
            add_prompts(
                query.data_ptr(),
                query.stride(0) // self.head_size,
                output.data_ptr(),
                self.num_heads,
                self.scale,
                k_PGDs,
                v_PsGD,
                prompts.blocks_N,
                prompts.slots_N,
                facts_SF,
                LENGTH,
                layer.first_gate,
            )

    return TextImpl


def blocks(cache: Tensor) -> tuple[Any, Any]:
    """Keys [P, G, D, s] and values [P, s, G, D] of a layer's cache; views."""
    P, G, s, D_2 = cache.shape
    both = cache.view(P, G, 2, s * D_2 // 2)
    k_PGDs = both[:, :, 0].unflatten(-1, (D_2 // 2, s))
    v_PsGD = both[:, :, 1].unflatten(-1, (s, D_2 // 2)).transpose(1, 2)
    return array(k_PGDs), array(v_PsGD)


def _copy(common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """Of each step, so not field by field, as `replace` does it."""
    copied = object.__new__(type(common))
    vars(copied).update(vars(common))
    return copied


def _compile(dtype: torch.dtype, heads: int) -> None:
    """Now: the first request with an adapter would else wait for it, and everybody with it."""
    views, nothing = blocks(torch.zeros(2, 1, ROWS, 2 * ROWS, dtype=dtype)), np.zeros(0, np.int32)
    facts_SF = array(torch.zeros(1, GATES + heads, dtype=dtype))
    add_prompts(0, 0, 0, heads, 1.0, *views, nothing, nothing.astype(np.int64), facts_SF, LENGTH, GATES)


def step_placeholders() -> Placeholders | None:
    """Of the step that runs; None where it has none, or nothing attends, as before the first request."""
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return None
    found: StepAttention = next(iter(metadata.values()))
    return found.placeholders


@contextmanager
def step_of(punica: Any, slots_N: Tensor) -> Iterator[None]:
    """Within, LoRA and all else that asks for a token's slot finds those of these tokens alone."""
    whole_N = punica.token_lora_indices.clone()

    def tell(slots_N: Tensor) -> None:
        punica._token_lora_indices[: len(slots_N)] = slots_N
        punica._update_prefill_metadata(slots_N)

    tell(slots_N)
    try:
        yield
    finally:
        tell(whole_N)
