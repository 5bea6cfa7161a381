"""vLLM's asynchronous engine, with this project's plugin, behind the `Engine` contract.

Templates, tokens, grammars and the text of answers are ours, as with the native engine; vLLM schedules,
computes and samples, in processes of its own. Each version of an adapter is a LoRA of vLLM's with a name
of its own, so that cached blocks of another version are never met.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from models.errors import ModelError
from models.tokenizer import Tokenizer
from models.vllm_plugin.carriers import Room, check_carried
from models.vllm_plugin.export import export_adapter
from models.vllm_plugin.sight import visual_rows
from server.errors import InvalidRequest, NotFound, RateLimited, ServerFailure, Timeout, Unavailable
from server.worker.adapter_loading import AdapterLoader
from server.worker.frontend import Frontend, ServedModel
from server.worker.gates import gates_of
from server.worker.messages import (
    AdapterGates,
    Detokenized,
    DetokenizeRequest,
    EngineStats,
    Event,
    GenerateRequest,
    ModelInfo,
    Scheduled,
    Started,
    Tokenized,
    TokenizeRequest,
)
from server.worker.scheduler import check_fits
from server.worker.step_loop import Prepared
from server.worker.vllm_answer import Answer

if TYPE_CHECKING:
    from server.worker.vllm_calls import Vllm

T = TypeVar("T")

_SEEN = 256  # images whose rows are kept: 32 rows each, 512 KB of a 7B base's


@dataclass(frozen=True, slots=True)
class ContextRoom:
    """The text that fits besides the placeholders."""

    max_sequence_len: int

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raises what the scheduler's `check_fits` raises."""
        check_fits(num_prompt_tokens, max_tokens, self.max_sequence_len)


class VllmEngine:
    def __init__(
        self,
        vllm: Vllm,
        frontend: Frontend,
        tokenizer: Tokenizer,
        loader: AdapterLoader,
        models: list[ServedModel],
        *,
        room: Room,
        max_requests: int,
    ) -> None:
        """`models`: the base first. `room` is what vLLM was started with."""
        self._vllm = vllm
        self._frontend = frontend
        self._tokenizer = tokenizer
        self._loader = loader
        self._models = {model.info.id: model for model in models}
        self._room = room
        self._max_requests = max_requests
        self._requests = 0
        self._users: Counter[tuple[str, int]] = Counter()  # requests by adapter version
        self._released = asyncio.Condition()
        self._retiring: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._exports = TemporaryDirectory(prefix="llama-adapter-vllm-")
        self._loras: dict[tuple[str, int], Any] = {}  # by adapter version
        self._seen: OrderedDict[Hashable, Tensor] = OrderedDict()  # visual rows, the latest last
        self._seeing = Lock()

    @property
    def healthy(self) -> bool:
        return self._vllm.healthy

    async def start(self) -> None:
        for model in self._models.values():
            await self._hand_over(model)

    async def stop(self) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.to_thread(self._vllm.stop)
        self._preparing.shutdown(wait=False)
        self._exports.cleanup()

    def models(self) -> list[ModelInfo]:
        return [model.info for model in self._models.values()]

    def stats(self) -> EngineStats:
        return replace(self._vllm.stats(), adapters_loaded=len(self._models) - 1)

    async def tokenize(self, request: TokenizeRequest) -> Tokenized:
        model = self._frontend.find(self._models, request.model)
        ids = await self._prepare(lambda: self._frontend.tokenize(model, request.prompt))
        return Tokenized(tuple(ids), model.info.max_model_len)

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        self._frontend.find(self._models, request.model)
        return Detokenized(await self._prepare(lambda: self._frontend.detokenize(request.token_ids)))

    async def gates(self, id: str) -> AdapterGates:
        loaded = self._frontend.find(self._models, id).adapter
        if loaded is None:
            raise NotFound(f"{id!r} is the base model, which has no gates.", param="id")
        return await self._prepare(lambda: gates_of(loaded.adapter))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if not self.healthy:
            raise Unavailable("The engine stopped; the worker is restarting.", retry_after=5)
        if self._requests >= self._max_requests:
            raise RateLimited(
                f"{self._requests} requests are running or waiting, as many as this worker takes."
            )
        model = self._frontend.find(self._models, request.model)
        timeout = request.timeout_seconds
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._requests += 1
        self._users[model.key] += 1
        try:
            prepared = await self._prepare(lambda: self._frontend.prepare(model, request))
            rows_RC = await self._prepare(lambda: self._see(prepared))
            yield Started(len(prepared.token_ids))
            lora = self._loras.get(model.key)
            async with aclosing(self._events(prepared, lora, rows_RC, deadline)) as events:
                async for event in events:
                    yield event
        except TimeoutError:
            raise Timeout(f"The request took longer than its {timeout:g} seconds.") from None
        finally:
            self._requests -= 1
            self._users[model.key] -= 1
            if not self._users[model.key]:
                del self._users[model.key]
                await asyncio.shield(self._notify_released())

    async def load_adapter(
        self, id: str, path: str, options: Mapping[str, str] | None = None, version: int = 1
    ) -> ModelInfo:
        async with self._loading:
            load = self._loader.load_at_run_time
            model = await asyncio.to_thread(load, id, path, options or {}, version)
            try:
                await self._hand_over(model)
            except ModelError as error:
                raise InvalidRequest(str(error), param="path", code="invalid_adapter") from error
            replaced = self._models.get(id)
            self._models[id] = model
            if replaced is not None:
                self._retire(replaced)
            return model.info

    async def unload_adapter(self, id: str) -> asyncio.Task[None]:
        async with self._loading:
            model = self._models.get(id)
            if model is None or model.adapter is None:
                raise NotFound(f"No adapter {id!r} is loaded.", param="id", code="model_not_found")
            del self._models[id]
        return self._retire(model)

    async def _hand_over(self, model: ServedModel) -> None:
        """Write the adapter as vLLM reads it, and let it be read. Raises `ModelError`."""
        if model.adapter is None:
            return
        adapter, (id, version) = model.adapter.adapter, model.key
        check_carried(adapter.config, id, self._room)
        folder = self._folder(model.key)
        await asyncio.to_thread(export_adapter, adapter, folder, self._room)
        self._loras[model.key] = await self._vllm.add_adapter(f"{id}@{version}", folder)

    def _folder(self, key: tuple[str, int]) -> Path:
        """Where one version of an adapter lies for vLLM, which may read it again after it was evicted."""
        id, version = key
        return Path(self._exports.name) / f"{version}-{id}"

    def _retire(self, model: ServedModel) -> asyncio.Task[None]:
        """Let running requests finish with their version, then have vLLM drop it."""

        async def retire() -> None:
            async with self._released:
                await self._released.wait_for(lambda: model.key not in self._users)
            lora = self._loras.pop(model.key, None)
            if lora is not None and self.healthy:
                await self._vllm.remove_adapter(lora)
                await asyncio.to_thread(shutil.rmtree, self._folder(model.key), ignore_errors=True)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _notify_released(self) -> None:
        async with self._released:
            self._released.notify_all()

    async def _prepare(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def _see(self, prepared: Prepared) -> Tensor | None:
        """What the adapter sees of the request's image, [R, C]; of the latest ones it is kept."""
        loaded, image = prepared.adapter, prepared.image
        if loaded is None or image is None or loaded.encoder is None:
            return None
        key = (loaded.key, image.key)
        with self._seeing:
            rows_RC = self._seen.pop(key, None)
        if rows_RC is None:
            rows_RC = visual_rows(loaded.adapter, loaded.encoder, image.pixels)
        with self._seeing:
            self._seen[key] = rows_RC
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
        return rows_RC

    async def _events(
        self, prepared: Prepared, lora: Any, rows_RC: Tensor | None, deadline: float | None
    ) -> AsyncGenerator[Event, None]:
        """One request's events. Raises TimeoutError at the deadline; closing it aborts the request."""
        answer = Answer(prepared, self._tokenizer)
        scheduled = False
        async with aclosing(self._vllm.generate(prepared, lora, rows_RC)) as outputs:
            while not answer.ended:
                try:
                    async with asyncio.timeout_at(deadline):
                        output = await anext(outputs)
                except StopAsyncIteration:
                    raise ServerFailure("vLLM ended a request without saying why.") from None
                if not scheduled:
                    scheduled = True
                    yield Scheduled(output.queued_seconds)
                if output.prompt_steps is not None:
                    for event in answer.score_prompt(output.prompt_steps):
                        yield event
                for event in answer.push(output.tokens, output.steps, output.cached_tokens):
                    yield event
                if output.finish_reason is not None:
                    for event in answer.finish(output.finish_reason, output.cached_tokens):
                        yield event
