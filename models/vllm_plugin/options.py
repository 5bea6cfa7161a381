"""How vLLM must be started for the plugin: options of `vllm.LLM` and of `AsyncEngineArgs` alike."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.errors import CheckpointError
from models.vllm_plugin import TEXT_ARCHITECTURE
from models.vllm_plugin.carriers import FINAL, LINEAR_MODULES, PROMPT, ROWS, VECTORS, Room


def engine_options(
    base: Path, config: ModelConfig, *, room: Room, max_model_len: int, max_adapters: int
) -> dict[str, Any]:
    """Options for a base in a Hugging Face folder.

    `max_model_len` counts text alone; `max_adapters` are those that one step may mix. Raises
    CheckpointError for a base in another format.
    """
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{base}: vLLM reads Hugging Face folders only; convert the base, or use --engine native"
        )
    return {
        "model": str(base),
        "skip_tokenizer_init": True,  # tokens and templates are ours
        "generation_config": "vllm",  # and so are all parameters
        "hf_overrides": {
            "architectures": [TEXT_ARCHITECTURE],
            "max_position_embeddings": config.max_position_embeddings + ROWS,
            "llama_adapter": asdict(room),
        },
        "enable_prompt_embeds": room.images,
        "max_model_len": max_model_len + ROWS,
        "block_size": ROWS,
        # A prompt is seen whole. On some GPUs vLLM would else take FlashInfer, which has problems with that,
        # as vLLM's own source says.
        "attention_config": {"use_non_causal": True},
        "async_scheduling": False,  # its token lists run ahead of what was sampled, which grammars follow
        "enable_lora": True,
        "max_loras": max_adapters,
        "max_cpu_loras": max_adapters,
        "max_lora_rank": ROWS,
        "lora_target_modules": [
            PROMPT,
            *((VECTORS, FINAL) if room.vectors else ()),
            *(LINEAR_MODULES if room.low_rank else ()),
        ],
    }


def placeholders(config: ModelConfig, scored: int | None = None) -> list[int]:
    """What each prompt begins with. vLLM's penalties take an id past the vocabulary for padding.

    `scored`: a token of a prompt whose tokens' log-probabilities are asked for. vLLM looks these up by id,
    placeholders' too; and what is in the prompt anyway changes no penalty.
    """
    return [config.vocab_size if scored is None else scored] * ROWS
