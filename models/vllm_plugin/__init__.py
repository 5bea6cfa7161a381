"""LLaMA-Adapter for vLLM: a plugin that it finds by itself, nothing of vLLM is patched.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). The package imports
without vLLM; `attention`, `model` and `sight` alone need it. How it works is told in docs/vllm.md.
"""

from __future__ import annotations

TEXT_ARCHITECTURE = "LlamaAdapterForCausalLM"


def register() -> None:
    """Tell vLLM of the model classes. They are imported when a model is made, not before."""
    from vllm import ModelRegistry

    if TEXT_ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(TEXT_ARCHITECTURE, f"models.vllm_plugin.model:{TEXT_ARCHITECTURE}")
