"""What vLLM's own configuration says of a start with the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_base import tiny_config, write_tiny_base
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport
from vllm_support import LIMITS, Deployment

from models.vllm_plugin.attention import prompt_backend
from models.vllm_plugin.carriers import EVERYTHING, Room
from models.vllm_plugin.limits import UnsupportedByPlugin
from models.vllm_plugin.model import LlamaAdapterForCausalLM
from models.vllm_plugin.options import engine_options

pytestmark = pytest.mark.vllm


def configuration(deployment: Deployment, room: Room = EVERYTHING, **changes: Any) -> VllmConfig:
    limits = {"max_model_len": 256, "max_adapters": 6}
    options = engine_options(deployment.path, deployment.base.config, room=room, **limits)
    return EngineArgs(**options | LIMITS | changes).create_engine_config()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism would lose the prompts"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "a draft model knows nothing of prompts; start without speculative decoding",
        ),
        ({"block_size": 64}, "start with a block size that divides 32, not 64"),
        ({"enable_lora": False}, "start with LoRA enabled"),
        ({"lora_target_modules": ["qkv_proj"]}, "of LoRA's modules only adapter_prompt"),
        ({"hf_overrides": {}}, "lacks `llama_adapter`"),
    ],
)
def test_what_the_plugin_cannot_do_is_refused_in_one_sentence(
    deployment: Deployment, changes: dict[str, Any], sentence: str
) -> None:
    config = configuration(deployment, **changes)
    with pytest.raises(UnsupportedByPlugin, match=sentence) as refused:
        LlamaAdapterForCausalLM(vllm_config=config)
    assert len(str(refused.value).splitlines()) == 1


def test_heads_that_vllm_s_attention_lacks_are_refused(tmp_path: Path) -> None:
    write_tiny_base(tmp_path, head_dim=8)
    options = engine_options(
        tmp_path, tiny_config(head_dim=8), room=EVERYTHING, max_model_len=256, max_adapters=6
    )
    with pytest.raises(UnsupportedByPlugin, match="knows no heads of size 8, only 32, 64"):
        LlamaAdapterForCausalLM(vllm_config=EngineArgs(**options | LIMITS).create_engine_config())


@pytest.mark.parametrize(
    ("name", "support"),
    [("FLASH_ATTN", AttentionCGSupport.ALWAYS), ("FLASHINFER", AttentionCGSupport.NEVER)],
)
def test_prompts_are_attended_to_in_cuda_graphs_only_where_these_see_them(
    deployment: Deployment, name: str, support: AttentionCGSupport
) -> None:
    """FlashInfer plans what is not causal at each step, for itself."""

    class Builder:
        @classmethod
        def get_cudagraph_support(cls, *_: Any) -> AttentionCGSupport:
            return AttentionCGSupport.ALWAYS

    class Platform:
        @staticmethod
        def get_name() -> str:
            return name

        @staticmethod
        def get_builder_cls() -> type:
            return Builder

    backend: Any = prompt_backend(Platform)  # type: ignore[arg-type]
    assert backend.get_builder_cls().get_cudagraph_support(None, None) == support
    assert configuration(deployment).attention_config.use_non_causal  # which keeps vLLM from it where it can


def test_what_was_compiled_for_another_room_is_not_met(deployment: Deployment) -> None:
    """vLLM keeps compiled models on disk, by a hash of the configuration."""
    rooms = (Room(), Room(images=True), Room(vectors=True), Room(vectors=True, input_scales=True), EVERYTHING)
    assert len({configuration(deployment, room).compute_hash() for room in rooms}) == len(rooms)
