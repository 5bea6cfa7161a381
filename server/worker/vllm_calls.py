"""All that this project asks of vLLM's asynchronous engine, in our words."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams as VllmParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.metrics.loggers import StatLoggerBase

from models.config import ModelConfig
from models.vllm_plugin.carriers import ROWS
from models.vllm_plugin.options import placeholders
from models.vllm_plugin.sharing import packed
from models.vllm_plugin.sight import seeing_prompt
from server.errors import InvalidRequest, ServerFailure, Unavailable
from server.worker.messages import EngineStats, FinishReason
from server.worker.request import Prepared
from server.worker.step_loop import NOT_FINITE
from server.worker.vllm_answer import Step
from server.worker.vllm_grammar import GrammarProcessor, grammar_args

log = logging.getLogger(__name__)

_OF_MINUS_ONE = 2**63 - 1  # a seed, where vLLM takes -1 for none
_LIFE_SECONDS = 0.5  # between looks whether the engine that is to answer lives
_LEADER_SECONDS = 5.0  # between a follower's looks for its leader, and for one of them
_LEADER_FAILURES = 3  # in a row, until it is gone


@dataclass(frozen=True, slots=True)
class Output:
    """What vLLM says of a request at one time. Placeholders are in none of it."""

    tokens: Sequence[int]
    steps: Sequence[Step] | None
    prompt_steps: Sequence[Step | None] | None
    finish_reason: FinishReason | None
    cached_tokens: int
    queued_seconds: float


class Vllm:
    """The engine, started. Made outside of an event loop, used on one."""

    def __init__(self, options: dict[str, Any], config: ModelConfig, eos_ids: Sequence[int]) -> None:
        self._config = config
        self._eos_ids = list(eos_ids)
        self._stats = _Stats()
        self._next_id = 1
        self._stopped = False
        self._shared = options.get("nnodes", 1) > 1
        self._llm = AsyncLLM.from_engine_args(_engine_args(options), stat_loggers=[self._stats.logger])

    @property
    def healthy(self) -> bool:
        return not self._stopped and not self._llm.errored

    def stop(self) -> None:
        self._stopped = True
        self._llm.shutdown()

    def stats(self) -> EngineStats:
        config = self._llm.vllm_config
        engines = config.parallel_config.data_parallel_size
        return self._stats.snapshot(config.cache_config.num_gpu_blocks or 0, engines)

    async def add_adapter(self, name: str, folder: Path) -> LoRARequest:
        """Raises `Unavailable` where the engine died, or dies meanwhile; so does `remove_adapter`."""
        lora = LoRARequest(name, self._next_id, str(folder))
        self._next_id += 1
        try:
            if self._shared:
                files = await asyncio.to_thread(packed, folder)
                await self._answer(self._llm.collective_rpc("hold_adapter", args=(str(folder), files)))
            await self._answer(self._llm.add_lora(lora))
        except Exception:
            if self.healthy:
                await self._drop(lora)
            raise
        return lora

    async def remove_adapter(self, lora: LoRARequest) -> None:
        await self._answer(self._llm.remove_lora(lora.lora_int_id))
        await self._drop(lora)

    async def _drop(self, lora: LoRARequest) -> None:
        """Other machines' copies of its folder."""
        if self._shared:
            await self._answer(self._llm.collective_rpc("drop_adapter", args=(lora.lora_path,)))

    async def _answer(self, call: Coroutine[Any, Any, Any]) -> None:
        """Wait for a call while the engine lives: vLLM never answers those pending when it dies."""
        task = asyncio.create_task(call)
        try:
            with _needs_life():
                while not (await asyncio.wait((task,), timeout=_LIFE_SECONDS))[0]:
                    if not self.healthy:
                        raise EngineDeadError
                task.result()
        finally:
            task.cancel()

    async def generate(
        self, prepared: Prepared, lora: LoRARequest | None, rows_RC: Tensor | None
    ) -> AsyncGenerator[Output, None]:
        """`rows_RC` are what the adapter sees. Closing it aborts the request.

        Raises `InvalidRequest` for what vLLM takes for no request, `Unavailable` where it died, and
        `ServerFailure` where what it computes is not finite.
        """
        prompt = await asyncio.to_thread(self._prompt, prepared, rows_RC)  # as large as all its embeddings
        id = f"{prepared.request_id}-{uuid.uuid4().hex}"
        try:
            with _needs_life():
                outputs = self._llm.generate(prompt, self._params(prepared), id, lora_request=lora)
                async with aclosing(outputs):
                    async for output in outputs:
                        yield _read(output)
        except VLLMValidationError as error:
            raise InvalidRequest(f"vLLM cannot do this: {error}") from error

    def _prompt(self, prepared: Prepared, rows_RC: Tensor | None) -> Any:
        scored, tokens = prepared.sampling.prompt_logprobs is not None, prepared.token_ids
        before = placeholders(self._config, tokens[0] if scored else None)
        if rows_RC is None:
            if not (scored and self._llm.model_config.enable_prompt_embeds):
                return {"type": "token", "prompt_token_ids": before + tokens}
            rows_RC = torch.zeros(ROWS, self._config.hidden_size)  # these placeholders have an embedding
        return seeing_prompt(before, tokens, rows_RC, self._llm.model_config.dtype)

    def _params(self, prepared: Prepared) -> VllmParams:
        ours = prepared.sampling
        params = VllmParams(
            temperature=ours.temperature,
            top_p=ours.top_p,
            top_k=ours.top_k,
            min_p=ours.min_p,
            seed=_OF_MINUS_ONE if ours.seed == -1 else ours.seed,
            presence_penalty=ours.presence_penalty,
            frequency_penalty=ours.frequency_penalty,
            repetition_penalty=ours.repetition_penalty,
            logit_bias=dict(ours.logit_bias) or None,
            logprobs=ours.logprobs,
            prompt_logprobs=ours.prompt_logprobs,
            max_tokens=max(prepared.max_tokens, 1),  # none: the first is thrown away
            min_tokens=min(ours.min_tokens, prepared.max_tokens),
            stop_token_ids=[] if ours.ignore_eos else self._eos_ids,
            ignore_eos=ours.ignore_eos,  # of what the base's own generation_config.json names
            detokenize=False,
            extra_args=grammar_args(ours.grammar),
            output_kind=RequestOutputKind.DELTA,
        )
        params.all_stop_token_ids.update(self._eos_ids)  # until `min_tokens`, also where they end nothing
        return params


@contextmanager
def _needs_life() -> Iterator[None]:
    try:
        yield
    except EngineDeadError as error:
        raise Unavailable("The engine stopped; the worker is restarting.", retry_after=5) from error


def follow(options: dict[str, Any]) -> None:
    """Compute the share of a machine that is not the first; returns when the process that does so has ended.

    SIGTERM ends this process with 0. So does the end of machine 0, with 1. Raises `ValueError` and
    `RuntimeError` for what vLLM refuses or fails in when it starts.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = _engine_args(options).create_engine_config(UsageContext.ENGINE_CONTEXT, headless=True)
    try:
        executor = MultiprocExecutor(config, monitor_workers=False)
    except Exception as error:  # no narrower one is raised for what its processes have logged
        raise RuntimeError(str(error)) from error
    leader = (options["master_addr"], options["master_port"])
    threading.Thread(target=_end_with, args=leader, name="leader-watch", daemon=True).start()
    try:
        executor.start_worker_monitor(inline=True)
    finally:
        executor.shutdown()


def _end_with(address: str, port: int) -> None:
    """End this process when nobody listens there any more: it would wait for its leader for ever."""
    failures = 0
    while failures < _LEADER_FAILURES:
        time.sleep(_LEADER_SECONDS)
        try:
            socket.create_connection((address, port), timeout=_LEADER_SECONDS).close()
            failures = 0
        except OSError:
            failures += 1
    log.error("machine 0 cannot be reached any more; ending, to start anew with it")
    os._exit(1)


def _engine_args(options: dict[str, Any]) -> AsyncEngineArgs:
    return AsyncEngineArgs(**options, logits_processors=[GrammarProcessor], enable_log_requests=False)


def _read(output: Any) -> Output:
    (one,) = output.outputs
    if one.finish_reason not in (None, "stop", "length"):
        raise ServerFailure(f"vLLM ended the request: {one.finish_reason}.")
    times = output.metrics
    if times is not None and times.is_corrupted:
        raise ServerFailure(NOT_FINITE)
    return Output(
        tokens=list(one.token_ids),
        steps=one.logprobs,
        prompt_steps=output.prompt_logprobs[ROWS:] if output.prompt_logprobs else None,
        finish_reason=one.finish_reason,
        cached_tokens=max((output.num_cached_tokens or 0) - ROWS, 0),
        queued_seconds=max(times.scheduled_ts - times.queued_ts, 0.0) if times is not None else 0.0,
    )


class _Stats:
    """Sums up what vLLM tells a stat logger at each step."""

    def __init__(self) -> None:
        self._engines: dict[int, Any] = {}
        self._queries = self._hits = self._preemptions = self._steps = 0

    def logger(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        return _Logger(self, engine_index)

    def record(self, engine: int, scheduler: Any, iteration: Any) -> None:
        if scheduler is not None:
            self._engines[engine] = scheduler
            self._queries += scheduler.prefix_cache_stats.queries
            self._hits += scheduler.prefix_cache_stats.hits
            self._steps += 1
        if iteration is not None:
            self._preemptions += iteration.num_preempted_reqs

    def snapshot(self, blocks_of_an_engine: int, num_engines: int) -> EngineStats:
        engines = self._engines.values()
        hot: set[str] = set().union(*(engine.running_lora_adapters for engine in engines))
        return EngineStats(
            running=sum(engine.num_running_reqs for engine in engines),
            waiting=sum(engine.num_waiting_reqs + engine.num_skipped_waiting_reqs for engine in engines),
            kv_blocks_total=blocks_of_an_engine * num_engines,
            kv_blocks_used=sum(round(engine.kv_cache_usage * blocks_of_an_engine) for engine in engines),
            prefix_cache_queries=self._queries,
            prefix_cache_hits=self._hits,
            preemptions=self._preemptions,
            adapters_loaded=0,
            adapters_hot=len(hot),
            prompt_slots_used=0,
            steps=self._steps,
        )


class _Logger(StatLoggerBase):
    def __init__(self, stats: _Stats, engine_index: int) -> None:
        self._stats = stats
        self._engine = engine_index

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        self._stats.record(engine_idx, scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass
