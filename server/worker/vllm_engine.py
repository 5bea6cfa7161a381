"""vLLM's asynchronous engine, with this project's plugin, behind the `Engine` contract.

Templates, tokens, grammars and the text of answers are ours, as with the native engine; vLLM schedules,
computes and samples, in processes of its own. Each version of an adapter is a LoRA of vLLM's with a name
of its own, so that cached blocks of another version are never met.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import AsyncGenerator, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.tokenizer import Tokenizer
from models.vllm_plugin.carriers import Room, check_carried
from models.vllm_plugin.export import export_adapter
from models.vllm_plugin.sight import visual_rows
from server.errors import ServerFailure
from server.worker.adapter_loading import AdapterLoader
from server.worker.engine_base import EngineBase
from server.worker.frontend import Frontend, ServedModel
from server.worker.messages import EngineStats, Event, Scheduled
from server.worker.request import Prepared
from server.worker.scheduler import check_fits
from server.worker.vllm_answer import Answer

if TYPE_CHECKING:
    from server.worker.vllm_calls import Vllm

_SEEN = 256  # images whose rows are kept: 32 rows each, 512 KB of a 7B base's


@dataclass(frozen=True, slots=True)
class ContextRoom:
    """The text that fits besides the placeholders."""

    max_sequence_len: int

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raises what the scheduler's `check_fits` raises."""
        check_fits(num_prompt_tokens, max_tokens, self.max_sequence_len)


class VllmEngine(EngineBase):
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
        """`room` is what vLLM was started with."""
        super().__init__(frontend, loader, models, max_requests=max_requests)
        self._vllm = vllm
        self._tokenizer = tokenizer
        self._room = room
        self._exports = TemporaryDirectory(prefix="llama-adapter-vllm-")
        self._loras: dict[tuple[str, int], Any] = {}  # by adapter version
        self._seen: OrderedDict[Hashable, Tensor] = OrderedDict()  # visual rows, the latest last
        self._seen_lock = Lock()
        # One, and not those that others' texts wait for. It computes each image once.
        self._seeing = ThreadPoolExecutor(1, thread_name_prefix="images")

    @property
    def healthy(self) -> bool:
        return self._vllm.healthy

    async def start(self) -> None:
        for model in self._models.values():
            await self._take(model)

    async def stop(self) -> None:
        self._close()
        self._seeing.shutdown(wait=False)
        await asyncio.to_thread(self._vllm.stop)
        self._exports.cleanup()

    def stats(self) -> EngineStats:
        return replace(
            self._vllm.stats(), adapters_loaded=len(self._models) - 1, max_requests=self._max_requests
        )

    async def _take(self, model: ServedModel) -> None:
        """Write the adapter as vLLM reads it, and let it be read. Raises `ModelError`."""
        if model.adapter is None:
            return
        adapter, (id, version) = model.adapter.adapter, model.key
        check_carried(adapter.config, id, self._room)
        folder = self._folder(model.key)
        await asyncio.to_thread(export_adapter, adapter, folder, self._room)
        try:
            self._loras[model.key] = await self._vllm.add_adapter(f"{id}@{version}", folder)
        except BaseException:  # nobody will ask for this version; the next attempt has another
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _folder(self, key: tuple[str, int]) -> Path:
        """Where one version of an adapter lies for vLLM, which may read it again after it was evicted."""
        id, version = key
        return Path(self._exports.name) / f"{version}-{id}"

    async def _forget(self, key: tuple[str, int]) -> None:
        lora = self._loras.pop(key, None)
        if lora is not None and self.healthy:
            await self._vllm.remove_adapter(lora)
            await asyncio.to_thread(shutil.rmtree, self._folder(key), ignore_errors=True)

    async def _see(self, prepared: Prepared) -> Tensor | None:
        """What the adapter sees of the request's image, [R, C]; of the latest ones it is kept."""
        loaded, image = prepared.adapter, prepared.image
        if loaded is None or image is None or loaded.encoder is None:
            return None
        key, encoder = (loaded.key, image.key), loaded.encoder

        def see() -> Tensor:
            rows_RC = self._known(key)  # another request may have had it computed meanwhile
            if rows_RC is None:
                rows_RC = visual_rows(loaded.adapter, encoder, image.pixels)
                with self._seen_lock:
                    self._seen[key] = rows_RC
                    if len(self._seen) > _SEEN:
                        self._seen.popitem(last=False)
            return rows_RC

        rows_RC = self._known(key)
        return await self._on(self._seeing, see) if rows_RC is None else rows_RC

    def _known(self, key: Hashable) -> Tensor | None:
        with self._seen_lock:
            if key in self._seen:
                self._seen.move_to_end(key)
            return self._seen.get(key)

    async def _events(self, prepared: Prepared, deadline: float | None) -> AsyncGenerator[Event, None]:
        lora = self._loras[prepared.adapter.key] if prepared.adapter else None
        async with asyncio.timeout_at(deadline):
            rows_RC = await self._see(prepared)
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
