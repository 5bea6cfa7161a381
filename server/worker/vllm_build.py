"""From settings to an engine on vLLM."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError

from models.checkpoints.base import open_base
from models.checkpoints.layout import BaseCheckpoint
from models.config import ModelConfig
from models.errors import ModelError
from models.fingerprint import fingerprint
from models.kv_cache import KVCache
from models.pull import resolve_base
from models.vllm_plugin import ENDS_WITH_PARENT
from models.vllm_plugin.carriers import EVERYTHING, ROWS, Room, check_carried
from models.vllm_plugin.options import engine_options
from models.vllm_plugin.sharing import SHARED_ADAPTERS
from server.serving import StartupError
from server.settings import MIB, WorkerSettings
from server.worker.build import pick_dtype
from server.worker.frontend import ServedModel
from server.worker.surroundings import frontend_of, loader_of, tokenizer_of
from server.worker.vllm_engine import ContextRoom, VllmEngine

log = logging.getLogger(__name__)

# What vLLM and the plugin read when they are imported; what the environment says stays.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # it would report to its authors
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plugin was tested with the first
    "VLLM_CONFIGURE_LOGGING": "0",  # the log is ours
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the experts want cores too
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",  # else a request whose numbers overflow is answered with nonsense
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
    config = checkpoint.config
    tokenizer = tokenizer_of(path, config)
    _check_shares(settings.tensor_parallel, config)
    max_model_len = _context(settings, config)
    loader = loader_of(
        settings,
        path,
        config,
        _fingerprint(checkpoint),
        device=torch.device("cpu"),
        max_model_len=max_model_len,
    )
    models = [loader.base_model(path), *(loader.load(argument) for argument in settings.adapters)]
    room = _room_for(settings, models)
    for model in models:  # before the start, which takes its time
        if model.adapter:
            check_carried(model.adapter.adapter.config, model.info.id, room)
    calls = _import_vllm()
    options = _options(settings, path, config, room)
    with _starting():
        vllm = calls.Vllm(options, config, sorted(tokenizer.eos_ids))
    log.info("vLLM serves %s after %.1f s", path, time.monotonic() - began)
    return VllmEngine(
        vllm,
        frontend_of(settings, tokenizer, config, ContextRoom(max_model_len)),
        tokenizer,
        loader,
        models,
        room=room,
        max_requests=settings.max_num_seqs + settings.max_waiting,
    )


def follow(settings: WorkerSettings) -> None:
    """Compute this machine's share of a model that machine 0 serves, until told to end, or that one ends.

    Raises as `build_vllm_engine` does.
    """
    _refuse(settings)
    path = resolve_base(settings.base, settings.cache_dir)
    config = open_base(path).config
    _check_shares(settings.tensor_parallel, config)
    options = _options(settings, path, config, _room_for(settings, []))
    log.info("computes for %s:%d", settings.master_addr, settings.master_port)
    calls = _import_vllm()
    with _starting():
        calls.follow(options)
    raise StartupError("what computed here for machine 0 has ended; the lines above say why.")


def _refuse(settings: WorkerSettings) -> None:
    """Say what of the settings vLLM cannot honour."""
    several = settings.nnodes > 1
    for given, sentence in (
        (settings.tensor_parallel % settings.nnodes != 0, "nnodes must divide tensor_parallel"),
        (settings.node_rank >= settings.nnodes, "node_rank must be below nnodes"),
        (several and settings.data_parallel > 1, "nnodes over 1 takes no data_parallel"),
        (several and settings.master_addr is None, "nnodes over 1 needs master_addr"),
        (
            several and settings.vllm_adapters == "auto",
            "nnodes over 1 needs vllm_adapters prompts or all: each machine makes room by itself",
        ),
        (settings.attention != "auto", "attention is vLLM's own; leave it at auto"),
        (settings.quantization != "none", "quantization is for the native engine; leave it at none"),
        (settings.max_prefill_chunk is not None, "max_prefill_chunk is not known to it; leave it out"),
        (settings.max_num_batched_tokens < ROWS, f"max_num_batched_tokens must be {ROWS} at least"),
        (
            settings.max_num_batched_tokens < settings.max_num_seqs,
            "max_num_batched_tokens must be max_num_seqs at least: raise the one or lower the other",
        ),
    ):
        if given:
            raise StartupError(f"with --engine vllm {sentence}.")


def _check_shares(devices: int, config: ModelConfig) -> None:
    """Devices share heads and features equally; where more than key/value heads, these have copies."""

    def holds(devices: int) -> bool:
        heads = config.num_heads % devices == 0 and config.intermediate_size % devices == 0
        return heads and 0 in (config.num_kv_heads % devices, devices % config.num_kv_heads)

    if not holds(devices):
        possible = ", ".join(str(n) for n in range(1, config.num_heads + 1) if holds(n))
        raise StartupError(
            f"tensor_parallel {devices} cannot share the base's {config.num_heads} heads "
            f"({config.num_kv_heads} of keys and values) and {config.intermediate_size} features equally; "
            f"possible are {possible}."
        )


@contextmanager
def _starting() -> Iterator[None]:
    """What vLLM refuses, or fails in, is a StartupError in its own words; its processes have logged more."""
    try:
        yield
    except ModelError:
        raise
    except (ValueError, RuntimeError) as error:
        log.debug("vLLM did not start", exc_info=True)
        said = str(error)
        if isinstance(error, ValidationError):
            said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise StartupError(f"vLLM did not start: {' '.join(said.split())[:500]}") from error


def _dtype(settings: WorkerSettings) -> torch.dtype:
    """`auto` is float32 on a processor without an instruction for bfloat16: vLLM relies on it."""
    slow = not torch.cuda.is_available() and not torch.cpu._is_avx512_bf16_supported()
    return torch.float32 if settings.dtype == "auto" and slow else pick_dtype(settings.dtype)


def _room_in_cache(settings: WorkerSettings, config: ModelConfig) -> int:
    """Tokens of one request that the KV cache holds beside its placeholders; vLLM keeps a block to itself."""
    shard = replace(config, num_kv_heads=max(config.num_kv_heads // settings.tensor_parallel, 1))
    blocks = settings.kv_cache_mib * MIB // KVCache.bytes_per_block(shard, ROWS, _dtype(settings))
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


def _context(settings: WorkerSettings, config: ModelConfig) -> int:
    """Tokens of text in one request: the base's context, or less where that is asked for or all that fits."""
    asked, most = settings.max_model_len, config.max_position_embeddings
    if asked is not None and asked > most:
        raise StartupError(f"max_model_len {asked} is more than the base's context of {most} tokens.")
    return min(asked or most, _room_in_cache(settings, config))


def _options(settings: WorkerSettings, path: Path, config: ModelConfig, room: Room) -> dict[str, Any]:
    """The same on all machines that share a model, but for its rank."""
    options = engine_options(
        path,
        config,
        room=room,
        max_model_len=_context(settings, config),
        max_adapters=settings.max_hot_adapters,
    )
    if settings.nnodes > 1:
        options |= {
            "distributed_executor_backend": "mp",
            "nnodes": settings.nnodes,
            "node_rank": settings.node_rank,
            "master_addr": settings.master_addr,
            "master_port": settings.master_port,
            "worker_extension_cls": SHARED_ADAPTERS,
        }
    return options | {
        "dtype": str(_dtype(settings)).removeprefix("torch."),
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


def _import_vllm() -> ModuleType:
    """`server.worker.vllm_calls`, with vLLM set up as we need it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from server.worker import vllm_calls
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise StartupError("vLLM is not installed; docs/vllm.md says how.") from error
    logging.getLogger("vllm").setLevel(logging.WARNING)
    return vllm_calls
