"""Both views in one call of the CPU's kernel: each query comes twice, over the text and over the prompt.

To the kernel the prompts are requests of their own behind those of the text, which may say for themselves
whether they are causal. One call a layer is what bare vLLM makes; each costs as much as the prompts' keys.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from models.vllm_plugin.attention import lens_buffer, named_backend, prompt_lengths, text_view, token_slots
from models.vllm_plugin.carriers import ROWS


def takes_both(platform: type[AttentionBackend]) -> bool:
    """Whether `joint_backend` is for this platform's attention."""
    name: str = platform.get_name()
    return name == "CPU_ATTN"


@functools.cache
def joint_backend(platform: type[AttentionBackend]) -> type[AttentionBackend]:
    """For an output of 2·N rows, the text's and then the prompts'. Where no request has an adapter these are
    not written."""
    builder, impl = platform.get_builder_cls(), platform.get_impl_cls()

    class JointBuilder(builder):  # type: ignore[misc, valid-type]
        supports_update_block_table = False  # that would put the unshifted table back

        def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(spec, layer_names, vllm_config, device)
            self._prompt_blocks = ROWS // spec.block_size
            self._lens = lens_buffer(vllm_config, device)
            layers = vllm_config.compilation_config.static_forward_context
            self._carrier = layers[layer_names[0]].carrier

        def build(
            self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            text = text_view(common, self._prompt_blocks, self._lens)
            slots_B = token_slots(self._carrier())[common.query_start_loc[: common.num_reqs]]
            if (slots_B < 0).all():
                return super().build(0, text, fast_build)
            return super().build(0, _both(common, text, prompt_lengths(self._carrier(), slots_B)), fast_build)

    class JointImpl(impl):  # type: ignore[misc, valid-type]
        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Any,
            value: Any,
            cache: Tensor,
            metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            if metadata is not None and metadata.num_actual_tokens > len(query):
                query = torch.cat([query, query])
            out: Tensor = super().forward(layer, query, key, value, cache, metadata, *args, **kwargs)
            return out

    return named_backend("Joint", platform, JointBuilder, JointImpl)


def _both(
    common: CommonAttentionMetadata, text: CommonAttentionMetadata, lengths_B: Tensor
) -> CommonAttentionMetadata:
    N, B = common.num_actual_tokens, common.num_reqs
    width = text.block_table_tensor.shape[1]
    starts = torch.cat([text.query_start_loc[: text.num_reqs], common.query_start_loc[: B + 1] + N])
    causal: bool | Tensor = True
    if common.max_query_len > 1:  # else there is nothing after a query, and no need to ask for each
        causal = torch.ones(text.num_reqs + B, dtype=torch.int32)
        causal[text.num_reqs :] = 0
    both: CommonAttentionMetadata = text.replace(
        num_reqs=text.num_reqs + B,
        num_actual_tokens=2 * N,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.cat([text.seq_lens[: text.num_reqs], lengths_B]),
        seq_lens_cpu_upper_bound=None,
        max_seq_len=max(text.max_seq_len, ROWS),
        block_table_tensor=torch.cat([text.block_table_tensor, common.block_table_tensor[:B, :width]]),
        causal=causal,
    )
    return both
