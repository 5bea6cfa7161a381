"""Whether the model is compiled on a CPU, where vLLM's platform decides against it."""

from __future__ import annotations

from typing import Any

from vllm.config import CompilationMode

from models.vllm_plugin.carriers import Room


def settle_compilation(vllm_config: Any) -> None:
    """Before the model is made: compile it on a CPU too, where `enforce_eager` does not forbid it.

    The platform compiles nothing where there are LoRAs: their products are Python on a CPU, a loop over a
    step's adapters. Carriers are only read, so this holds for low-rank terms alone; for these, operators are
    vLLM's own, of which it had chosen PyTorch's for a compiler to fuse.
    """
    config, model_config = vllm_config.compilation_config, vllm_config.model_config
    if vllm_config.device_config.device_type != "cpu" or model_config.enforce_eager:
        return
    if Room(**model_config.hf_config.llama_adapter).low_rank:
        config.custom_ops = ["all"]
    else:
        config.mode = CompilationMode.DYNAMO_TRACE_ONCE
