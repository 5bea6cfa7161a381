"""What the plugin cannot do, said when the engine starts."""

from __future__ import annotations

from typing import Any

from models.errors import ModelError
from models.vllm_plugin.carriers import FINAL, PROMPT, ROWS, VECTORS


class UnsupportedByPlugin(ModelError):
    """vLLM was started in a way that the plugin cannot serve."""


def check_config(vllm_config: Any) -> None:
    """Raise UnsupportedByPlugin, with what to change, where vLLM would compute nonsense."""
    parallel, lora, cache = vllm_config.parallel_config, vllm_config.lora_config, vllm_config.cache_config
    for refused, sentence in (
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism would lose the prompts between its stages; use tensor or data parallelism",
        ),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism would cut the prompts apart; use tensor or data parallelism",
        ),
        (
            vllm_config.speculative_config is not None,
            "a draft model knows nothing of prompts; start without speculative decoding",
        ),
        (
            lora is None or lora.max_lora_rank != ROWS,
            f"adapters travel as LoRA; start with LoRA enabled and a rank of {ROWS}",
        ),
        (
            lora is not None and not set(lora.target_modules or ()) & {PROMPT},
            f"of LoRA's modules only {PROMPT}, {VECTORS} and {FINAL} may be targets",
        ),
        (
            ROWS % cache.block_size != 0,
            f"prompts fill whole blocks; start with a block size that divides {ROWS}, not {cache.block_size}",
        ),
        (
            not hasattr(vllm_config.model_config.hf_config, "llama_adapter"),
            "the model's configuration lacks `llama_adapter`; start it through `models.vllm_plugin.options`",
        ),
    ):
        if refused:
            raise UnsupportedByPlugin(f"LLaMA-Adapter in vLLM: {sentence}")


def check_heads(head_size: int) -> None:
    """Raise UnsupportedByPlugin for heads that vLLM's attention on a CPU else misses at the first request."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in sizes:
        raise UnsupportedByPlugin(
            f"LLaMA-Adapter in vLLM: vLLM's attention on a CPU knows no heads of size {head_size}, only "
            f"{str(sizes)[1:-1]}; take another base, or the native engine"
        )
