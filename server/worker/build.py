"""From settings to an engine: the base, its tokenizer, its adapters, and memory for its cache."""

from __future__ import annotations

import logging
import time

import torch

from models.checkpoints.base import load_base
from models.config import ModelConfig
from models.kernels.choice import use_triton
from models.kernels.quantized_cpu import Bits
from models.kernels.quantized_tile_cpu import GROUP
from models.kv_cache import KVCache
from models.llama import Llama
from models.pull import resolve_base
from server.serving import StartupError
from server.settings import MIB, WorkerSettings
from server.worker.blocks import BlockManager
from server.worker.device import use_device
from server.worker.engine import NativeEngine
from server.worker.engine_api import Engine
from server.worker.messages import Event, Failed, Finished, SamplingParams
from server.worker.pace import Pace
from server.worker.request import Prepared
from server.worker.runner import Kernels, Runner
from server.worker.scheduler import Scheduler
from server.worker.step_loop import StepLoop
from server.worker.surroundings import frontend_of, loader_of, tokenizer_of

log = logging.getLogger(__name__)


def build(settings: WorkerSettings) -> Engine:
    """The engine that the settings name. Raises `ModelError` and `StartupError`."""
    if settings.engine == "native":
        for name in ("tensor_parallel", "data_parallel", "nnodes"):
            if getattr(settings, name) > 1:
                raise StartupError(f"the native engine has one device; use --engine vllm for {name}.")
        try:
            return build_engine(settings)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(" Including")[0]  # what follows is advice for whoever allocates
            raise StartupError(
                f"device {settings.device!r} has too little memory for the base and a KV cache of "
                f"{settings.kv_cache_mib} MiB; lower kv_cache_mib, or choose a smaller base. {reason}"
            ) from error
    from server.worker.vllm_build import build_vllm_engine

    return build_vllm_engine(settings)


def follow(settings: WorkerSettings) -> None:
    """Compute for an engine of another machine, until told to end. Raises as `build` does."""
    if settings.engine == "native":
        raise StartupError("the native engine has one machine; use --engine vllm for node_rank.")
    from server.worker.vllm_build import follow as follow_vllm

    follow_vllm(settings)


def build_engine(settings: WorkerSettings) -> NativeEngine:
    """Load everything and run one step, so that the first request waits for nothing.

    Raises `ModelError` for files that cannot be used and `StartupError` for settings that cannot hold.
    """
    began = time.monotonic()
    path = resolve_base(settings.base, settings.cache_dir)
    device = _device(settings)
    dtype = torch.bfloat16 if settings.quantization != "none" else pick_dtype(settings.dtype)
    bits = _bits(settings, device)
    # Quantised from the checkpoint's own numbers, not from numbers that were rounded before.
    base, embedding_fingerprint = load_base(path, dtype if bits is None else torch.float32, device)
    tokenizer = tokenizer_of(path, base.config)
    _pack(base, bits)
    scheduler = _scheduler(settings, base.config, dtype)
    runner = Runner(
        base,
        num_blocks=scheduler.blocks.num_blocks,
        block_size=settings.block_size,
        max_hot_adapters=settings.max_hot_adapters,
        prompt_slots=settings.prompt_slots,
        prompt_cache_bytes=settings.prompt_cache_mib * MIB,
        low_rank_bytes=settings.low_rank_mib * MIB,
        image_cache_bytes=settings.image_cache_mib * MIB,
        kernels=_kernels(settings, base),
        max_decodes=settings.max_num_seqs,
        max_model_len=scheduler.max_sequence_len,
    )
    loader = loader_of(
        settings,
        path,
        base.config,
        embedding_fingerprint,
        device=device,
        max_model_len=scheduler.max_sequence_len,
    )
    models = [loader.base_model(path), *(loader.load(argument) for argument in settings.adapters)]
    step_loop = StepLoop(runner, scheduler, tokenizer, overlap=device.type == "cuda")
    log.info("warming up; a first start compiles kernels, which takes minutes, and keeps them for the next")
    runner.warm([model.adapter for model in models if model.adapter])
    if device.type == "cuda":
        _try_longest(step_loop, scheduler)
    _warm_up(step_loop, 3)
    log.info("loaded %s in %s in %.1f s", path, bits or dtype, time.monotonic() - began)
    return NativeEngine(
        step_loop,
        frontend_of(settings, tokenizer, base.config, scheduler),
        loader,
        models,
        max_requests=settings.max_num_seqs + settings.max_waiting,
    )


def _pack(base: Llama, bits: Bits | None) -> None:
    """For the compiled layers, where they know the base; in `bits` they must."""
    if base.can_pack(bits):
        try:
            base.pack(bits)
        except ValueError as error:
            raise StartupError(f"quantization {bits!r} cannot be used: {error}.") from error
    elif bits is not None:
        raise StartupError(
            f"quantization {bits!r} cannot be used: it takes linears of a multiple of {GROUP} inputs, and "
            "this base has others; leave it at none."
        )


def _scheduler(settings: WorkerSettings, config: ModelConfig, dtype: torch.dtype) -> Scheduler:
    per_block = KVCache.bytes_per_block(config, settings.block_size, dtype)
    num_blocks = settings.kv_cache_mib * MIB // per_block
    if settings.prompt_slots < settings.max_num_seqs:
        raise StartupError(
            f"prompt_slots {settings.prompt_slots} is less than max_num_seqs {settings.max_num_seqs}: "
            "each running sequence may need a slot of its own; raise the one or lower the other."
        )
    max_model_len = settings.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise StartupError(
            f"max_model_len {max_model_len} is more than the base's context of "
            f"{config.max_position_embeddings} tokens."
        )
    try:
        return Scheduler(
            BlockManager(num_blocks, settings.block_size, settings.prefix_caching),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=max_model_len,
            max_prefill_chunk=settings.max_prefill_chunk,
            max_adapters=settings.max_hot_adapters,
            pace=Pace(),
        )
    except ValueError as error:
        raise StartupError(f"{error}.") from error


def _try_longest(step_loop: StepLoop, scheduler: Scheduler) -> None:
    """The longest step there may be, which a KV cache that takes all of a GPU's memory has no room for.

    Raises as `_warm_up` does. Nothing is remembered of it: neither its prompt nor how long it took.
    """
    num_tokens = max(1, min(scheduler.max_num_batched_tokens, scheduler.max_sequence_len - 3))
    _warm_up(step_loop, num_tokens, scored=True)
    scheduler.blocks.reset()
    scheduler.pace = Pace()


def _warm_up(step_loop: StepLoop, num_tokens: int, *, scored: bool = False) -> None:
    """One prompt and two decodes through every kernel: compiling them takes seconds the first time.

    `scored`: with the logits of all its tokens.

    Raises `StartupError` where they fail, for so would every request.
    """
    prepared = Prepared(
        request_id="warm-up",
        token_ids=[0] * num_tokens,
        sampling=SamplingParams(temperature=0, ignore_eos=True, prompt_logprobs=1 if scored else None),
        max_tokens=3,
        stop=(),
    )
    events: list[Event] = []
    step_loop.add(prepared, events.append)
    while step_loop.has_work:
        step_loop.step()
    last = events[-1]
    assert isinstance(last, Finished | Failed)
    if isinstance(last, Failed):
        raise StartupError(f"the warm-up failed, as every request would: {last.message} The log says more.")


def _device(settings: WorkerSettings) -> torch.device:
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
        use_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StartupError(f"device {settings.device!r} cannot be used: {reason}") from error
    return device


def _kernels(settings: WorkerSettings, base: Llama) -> Kernels:
    try:
        if use_triton(settings.attention, base.device, base.dtype, base.config.head_dim):
            return "triton"
    except ValueError as error:
        raise StartupError(f"{error}.") from error
    return "none" if settings.attention == "torch" else "cpu"


def _bits(settings: WorkerSettings, device: torch.device) -> Bits | None:
    if settings.quantization == "none":
        return None
    obstacles = (
        (device.type != "cpu", f"the device is {settings.device!r}; choose cpu"),
        (settings.attention == "torch", "attention 'torch' goes without the compiled layers; set it to auto"),
        (
            settings.dtype not in ("auto", "bfloat16"),
            f"it computes in bfloat16, not in {settings.dtype}; set dtype to auto",
        ),
    )
    for is_there, obstacle in obstacles:
        if is_there:
            raise StartupError(f"quantization {settings.quantization!r} cannot be used: {obstacle}.")
    return settings.quantization


def pick_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16, which the engine's own kernels multiply quickly on any processor."""
    dtype: torch.dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
    return dtype
