"""Two views of one paged KV cache: the text without the prompt's blocks, and these blocks alone.

A request's first ROWS tokens are placeholders, whose keys and values are the adapter's prompt. Both
views are vLLM's own attention of the platform, given other metadata: of the text, all block tables
shifted past the prompt; of the prompt, its blocks and as many keys as the request's adapter has rows.
Each view is an attention of its own, as on GPUs; on a CPU `attention_cpu` mostly does without.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata

from models.vllm_plugin.carriers import LENGTH, ROWS

_IN_GRAPHS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")  # all that they read lies where it lay before


@functools.cache
def text_backend(platform: type[AttentionBackend]) -> type[AttentionBackend]:
    """The platform's attention over what comes after the placeholders."""
    builder = platform.get_builder_cls()

    class TextBuilder(builder):  # type: ignore[misc, valid-type]
        supports_update_block_table = False  # that would put the unshifted table back

        def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(spec, layer_names, vllm_config, device)
            self._prompt_blocks = ROWS // spec.block_size
            # Lengths lie where they lay before: a CUDA graph reads them by address.
            self._lens = lens_buffer(vllm_config, device)

        def build(
            self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            """Without a common prefix, whose cascade would read the unshifted table."""
            return super().build(0, text_view(common, self._prompt_blocks, self._lens), fast_build)

    return named_backend("Text", platform, TextBuilder)


@functools.cache
def prompt_backend(platform: type[AttentionBackend]) -> type[AttentionBackend]:
    """The platform's attention over the adapter's prompt alone; every token sees every row."""
    builder = platform.get_builder_cls()

    class PromptBuilder(builder):  # type: ignore[misc, valid-type]
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
            """None where what is not causal is planned anew at each step, which a graph would not see."""
            if platform.get_name() not in _IN_GRAPHS:
                return AttentionCGSupport.NEVER
            support: AttentionCGSupport = super().get_cudagraph_support(*args)
            return support

        def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(spec, layer_names, vllm_config, device)
            self._prompt_blocks = ROWS // spec.block_size
            self._lens = lens_buffer(vllm_config, device)
            layers = vllm_config.compilation_config.static_forward_context
            self._carrier = layers[layer_names[0]].carrier

        def build(
            self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            """None where no request has an adapter and that may be asked: the layer computes nothing then."""
            B = common.num_reqs
            slots_B = token_slots(self._carrier())[common.query_start_loc[:B].long()]
            if slots_B.device.type == "cpu" and not (slots_B >= 0).any():
                return None
            self._lens[:B] = prompt_lengths(self._carrier(), slots_B)
            prompts: CommonAttentionMetadata = common.replace(
                seq_lens=self._lens[:B],
                seq_lens_cpu_upper_bound=None,
                max_seq_len=ROWS,
                causal=False,
                block_table_tensor=common.block_table_tensor[:, : self._prompt_blocks],
            )
            return super().build(0, prompts, fast_build)

    return named_backend("Prompt", platform, PromptBuilder)


def text_view(common: CommonAttentionMetadata, prompt_blocks: int, lens: Tensor) -> CommonAttentionMetadata:
    """Tables shifted past the prompt; `lens`, longer than the batch, receives the lengths."""
    B = common.num_reqs
    lens_B = torch.sub(common.seq_lens[:B], ROWS, out=lens[:B]).clamp_(min=0)
    bound = common.seq_lens_cpu_upper_bound
    shifted: CommonAttentionMetadata = common.replace(
        seq_lens=lens_B,
        seq_lens_cpu_upper_bound=None if bound is None else (bound - ROWS).clamp(min=0),
        max_seq_len=max(common.max_seq_len - ROWS, 1),
        block_table_tensor=common.block_table_tensor[:, prompt_blocks:],
    )
    on_cpu = common.query_start_loc.device.type == "cpu"
    return _apart(common, shifted) if on_cpu else shifted


def prompt_lengths(carrier: Any, slots_B: Tensor) -> Tensor:
    """Rows [B] of the requests' adapters. At least one: a softmax of nothing has no value, and what a request
    without prompts finds is never used."""
    lengths_B = facts(carrier)[slots_B.clamp(min=0), LENGTH]
    return torch.where(slots_B < 0, 1, lengths_B).clamp(min=1).to(torch.int32)


def facts(carrier: Any) -> Tensor:
    """All slots' facts and gates, [S, F]; a view."""
    facts_SF: Tensor = carrier.lora_b_stacked[0].flatten(1)
    return facts_SF


def token_slots(carrier: Any) -> Tensor:
    """The adapter slot of each token of the step, -1 for none; longer than the step."""
    slots: Tensor = carrier.punica_wrapper._token_lora_indices
    return slots


def lens_buffer(vllm_config: Any, device: torch.device) -> Tensor:
    return torch.zeros(vllm_config.scheduler_config.max_num_seqs + 1, dtype=torch.int32, device=device)


def named_backend(
    name: str, platform: type[AttentionBackend], builder: type, impl: type | None = None
) -> type[AttentionBackend]:
    changed = {"get_builder_cls": staticmethod(lambda: builder)}
    if impl is not None:
        changed["get_impl_cls"] = staticmethod(lambda: impl)
    return type(f"{name}{platform.__name__}", (platform,), changed)


def _apart(common: CommonAttentionMetadata, shifted: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """Placeholders as requests of their own, over the prompt's blocks.

    In the shifted view they are queries without keys before them, for which the CPU's kernel writes
    nonsense into its neighbours' rows too. What they attend to is never used.
    """
    counts_B = common.query_start_loc[: common.num_reqs + 1].diff()
    lens_B = common.seq_lens[: common.num_reqs]
    if (lens_B - counts_B >= ROWS).all():
        return shifted
    new_starts, new_lens, tables = [0], [], []
    width = shifted.block_table_tensor.shape[1]
    for b, (length, count) in enumerate(zip(lens_B.tolist(), counts_B.tolist(), strict=True)):
        computed = length - count
        placeholders = min(max(ROWS - computed, 0), count)
        if placeholders:
            new_starts.append(new_starts[-1] + placeholders)
            new_lens.append(computed + placeholders)
            tables.append(common.block_table_tensor[b, :width])
        if count > placeholders:
            new_starts.append(new_starts[-1] + count - placeholders)
            new_lens.append(length - ROWS)
            tables.append(shifted.block_table_tensor[b])
    query_start_loc = torch.tensor(new_starts, dtype=common.query_start_loc.dtype)
    apart: CommonAttentionMetadata = shifted.replace(
        num_reqs=len(new_lens),
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=torch.tensor(new_lens, dtype=torch.int32),
        seq_lens_cpu_upper_bound=None,
        max_seq_len=max(new_lens),
        block_table_tensor=torch.stack(tables),
    )
    return apart
