"""From settings to an engine on vLLM."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from models.checkpoints.base import open_base
from models.checkpoints.layout import BaseCheckpoint
from models.config import ModelConfig
from models.errors import CheckpointError
from models.fingerprint import fingerprint
from models.kv_cache import KVCache
from models.pull import resolve_base
from models.tokenizer import load_tokenizer
from models.vision.images import ImageLimits
from models.vllm_plugin import ENDS_WITH_PARENT
from models.vllm_plugin.carriers import EVERYTHING, ROWS, Room, check_carried
from models.vllm_plugin.options import engine_options
from server.serving import StartupError
from server.settings import MIB, WorkerSettings
from server.worker.adapter_loading import AdapterLoader
from server.worker.build import base_id, pick_dtype
from server.worker.frontend import Frontend, ServedModel
from server.worker.grammar import GrammarCompiler
from server.worker.vllm_engine import ContextRoom, VllmEngine

if TYPE_CHECKING:
    from server.worker.vllm_calls import Vllm

log = logging.getLogger(__name__)

# What vLLM and the plugin read when they are imported; what the environment says stays.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # it would report to its authors
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plugin was tested with the first
    "VLLM_CONFIGURE_LOGGING": "0",  # the log is ours
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the experts want cores too
    ENDS_WITH_PARENT: "1",
}


def build_vllm_engine(settings: WorkerSettings) -> VllmEngine:
    """Start vLLM, which takes its time, with all that it has to know.

    Raises `ModelError` for files that cannot be used and `StartupError` for settings that cannot hold.
    """
    began = time.monotonic()
    _refuse(settings)
    path = resolve_base(settings.base, settings.cache_dir)
    checkpoint = open_base(path)
    config, tokenizer = checkpoint.config, load_tokenizer(path)
    max_model_len = settings.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise StartupError(
            f"max_model_len {max_model_len} is more than the base's context of "
            f"{config.max_position_embeddings} tokens."
        )
    dtype = pick_dtype(settings.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    max_model_len = min(max_model_len, _room_in_cache(settings, config, dtype))
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            "they belong to different models"
        )
    loader = AdapterLoader(
        settings.base_id or base_id(settings.base),
        config,
        _fingerprint(checkpoint),
        device=torch.device("cpu"),
        max_model_len=max_model_len,
        adapter_root=settings.adapter_root,
    )
    models = [loader.base_model(path), *(loader.load(argument) for argument in settings.adapters)]
    room = _room_for(settings, models)
    for model in models:  # before the start, which takes its time
        if model.adapter:
            check_carried(model.adapter.adapter.config, model.info.id, room)
    options = engine_options(
        path,
        config,
        room=room,
        max_model_len=max_model_len,
        max_adapters=settings.max_hot_adapters,
    )
    vllm = _start(options | _limits(settings, dtype), config, sorted(tokenizer.eos_ids))
    log.info("vLLM serves %s after %.1f s", path, time.monotonic() - began)
    images = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    grammars = GrammarCompiler(
        tokenizer,
        config.vocab_size,
        max_bytes=settings.max_grammar_bytes,
        cache_entries=settings.grammar_cache_entries,
    )
    return VllmEngine(
        vllm,
        Frontend(tokenizer, ContextRoom(max_model_len), config.vocab_size, images, grammars),
        tokenizer,
        loader,
        models,
        room=room,
        max_requests=settings.max_num_seqs + settings.max_waiting,
    )


def _refuse(settings: WorkerSettings) -> None:
    """Say what of the settings vLLM cannot honour."""
    for given, sentence in (
        (settings.attention != "auto", "attention is vLLM's own; leave it at auto"),
        (settings.max_prefill_chunk is not None, "max_prefill_chunk is not known to it; leave it out"),
        (settings.max_num_batched_tokens < ROWS, f"max_num_batched_tokens must be {ROWS} at least"),
    ):
        if given:
            raise StartupError(f"with --engine vllm {sentence}.")


def _room_in_cache(settings: WorkerSettings, config: ModelConfig, dtype: torch.dtype) -> int:
    """Tokens of one request that the KV cache holds beside its placeholders; vLLM keeps a block to itself."""
    shard = replace(config, num_kv_heads=max(config.num_kv_heads // settings.tensor_parallel, 1))
    blocks = settings.kv_cache_mib * MIB // KVCache.bytes_per_block(shard, ROWS, dtype)
    if blocks < 3:
        raise StartupError(f"a KV cache of {settings.kv_cache_mib} MiB holds no request; raise kv_cache_mib.")
    return (blocks - 2) * ROWS


def _compiles(settings: WorkerSettings) -> bool:
    """For a processor torch compiles with a C++ compiler, which not every container has."""
    if not settings.vllm_compile or torch.cuda.is_available():
        return settings.vllm_compile
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        log.warning("vLLM does not compile the model: there is no C++ compiler (g++, or what CXX names)")
        return False
    return True


def _limits(settings: WorkerSettings, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "enforce_eager": not _compiles(settings),
        "tensor_parallel_size": settings.tensor_parallel,
        "data_parallel_size": settings.data_parallel,
        "kv_cache_memory_bytes": settings.kv_cache_mib * MIB,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_prefix_caching": settings.prefix_caching,
    }


def _room_for(settings: WorkerSettings, models: list[ServedModel]) -> Room:
    configs = [model.adapter.adapter.config for model in models if model.adapter]
    return {"auto": Room.needed(configs), "prompts": Room(), "all": EVERYTHING}[settings.vllm_adapters]


def _fingerprint(checkpoint: BaseCheckpoint) -> str:
    return next(fingerprint(tensor) for name, tensor in checkpoint.tensors() if name == "embed.weight")


def _start(options: dict[str, Any], config: ModelConfig, eos_ids: list[int]) -> Vllm:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from server.worker.vllm_calls import Vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise StartupError("vLLM is not installed; docs/vllm.md says how.") from error
    logging.getLogger("vllm").setLevel(logging.WARNING)
    return Vllm(options, config, eos_ids)
