"""One step on the accelerator: from a scheduled batch to the rows of logits it asks for.

The runner owns what lies in device memory: the base, the KV cache, the adapter bank, the prompt
cache. It decides nothing about who runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from models.adaptation import AdapterBank, BatchAdaptation, is_elementwise
from models.attention import Prompts, stack_layers
from models.errors import ModelError
from models.kernels.fused_cpu import FusedPass
from models.kernels.panel_bank import PanelBank
from models.kv_cache import Decode, KVCache, PagedAttend, PromptCache, StepLayout, resolve_tokens
from models.llama import Attend, Llama
from models.uploads import upload
from server.settings import MIB
from server.worker.adapter_slots import SlotTable
from server.worker.sight import ImageInput, LoadedAdapter, Sight

if TYPE_CHECKING:
    from models.kernels.decode_graph import DecodeGraphs

_PARTS = 3  # of an adapter's prompts; with more, what each costs beside its products outweighs them

Kernels = Literal["cpu", "triton", "none"]


@dataclass(frozen=True, slots=True)
class StepItem:
    """One sequence's part of a step: its positions `start` … `start + len(tokens) - 1`."""

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    adapter: LoadedAdapter | None
    image: ImageInput | None
    wants_logits: slice  # of the chunk's tokens


class Runner:
    """`kernels` compute attention and adapters' vectors: the processor's, a GPU's, or none, plain torch."""

    def __init__(
        self,
        base: Llama,
        *,
        num_blocks: int,
        block_size: int,
        max_hot_adapters: int,
        prompt_slots: int,
        prompt_cache_bytes: int | None = None,
        low_rank_bytes: int | None = None,
        image_cache_bytes: int = 256 * MIB,
        kernels: Kernels = "cpu",
        max_decodes: int = 0,
        max_model_len: int = 0,
    ) -> None:
        """Up to `max_decodes` sequences of up to `max_model_len` tokens decode as a graph, with Triton.

        An adapter is refused whose prompts would make the prompt cache larger than `prompt_cache_bytes`, or
        whose low-rank terms would make those of all adapters larger than `low_rank_bytes`.
        """
        config = base.config
        self.base = base
        self.block_size = block_size
        has_graphs = kernels == "triton" and max_decodes > 0
        # The spare block is what rows beyond a batch's write to.
        self.kv_cache = KVCache(config, num_blocks + has_graphs, block_size, base.dtype, base.device)
        fused = kernels == "cpu" and bool(base.packed)
        self.bank = PanelBank(base, max_hot_adapters) if fused else AdapterBank(base, max_hot_adapters)
        self.adapter_slots = SlotTable(max_hot_adapters)
        self.prompt_cache = PromptCache(config, prompt_slots, base.dtype, base.device)
        self._prompt_cache_bytes = prompt_cache_bytes
        self._low_rank_bytes = low_rank_bytes
        self.prompt_slots = SlotTable(prompt_slots)
        self.sight = Sight(base.device, image_cache_bytes)
        self._attend: Callable[[KVCache, PromptCache, StepLayout], Attend]
        self._attend = partial(PagedAttend, fused=kernels == "cpu")
        self._batch_adaptation = BatchAdaptation
        if kernels == "triton":
            # Only here: not every machine has Triton.
            from models.kernels.batch_adaptation import TritonBatchAdaptation
            from models.kernels.paged_attend import TritonPagedAttend, compile_kernels

            self._attend, self._batch_adaptation = TritonPagedAttend, TritonBatchAdaptation
            compile_kernels(self.kv_cache, self.prompt_cache, config.num_heads)
        self._graphs: DecodeGraphs | None = None
        if has_graphs:
            from models.kernels.decode_graph import DecodeGraphs

            self._graphs = DecodeGraphs(
                base,
                self.kv_cache,
                self.prompt_cache,
                self.bank,
                max_rows=max_decodes,
                max_blocks=-(-max_model_len // block_size),
                spare_block=num_blocks,
            )
        self._fused = None
        if isinstance(self.bank, PanelBank):
            self._fused = FusedPass(base, self.kv_cache, self.prompt_cache, self.bank)

    @torch.inference_mode()
    def run(self, items: Sequence[StepItem], last_M: Tensor | None = None) -> Tensor:
        """Compute the step; logits [M, V] in float32 of the rows wanted, item after item.

        Items of one token must come first: those are the decodes. A token may be one of `last_M`, the tokens
        of the step before, that only the device knows (`resolve_tokens`).
        """
        adapter_slots, prompt_slots = self._place(items)
        if self._graphs is not None and self._is_graph(items, adapter_slots):
            return self._graphs.run(list(map(_decode, items, adapter_slots, prompt_slots)), last_M)
        layout, device = self._layout(items, prompt_slots), self.base.device
        told_N = np.array([token for item in items for token in item.tokens], np.int64)
        if last_M is not None and device.type == "cpu":
            told_N, last_M = resolve_tokens(torch.from_numpy(told_N), last_M).numpy(), None
        wanted = [range(len(item.tokens))[item.wants_logits] for item in items]
        rows = [start + i for start, chunk in zip(layout.starts, wanted, strict=False) for i in chunk]
        rows_M = np.array(rows, np.int64)
        keys = self.bank.keys_of(adapter_slots)
        if self._fused is not None and is_elementwise(keys):
            return self._fused.run(told_N, layout, adapter_slots, keys, rows_M)
        adaptation = self._adaptation(adapter_slots, [len(item.tokens) for item in items])
        of_rows = self._adaptation(adapter_slots, [len(chunk) for chunk in wanted])
        attend = self._attend(self.kv_cache, self.prompt_cache, layout)
        tokens_N = upload(told_N, device)
        if last_M is not None:
            tokens_N = resolve_tokens(tokens_N, last_M)
        hidden_NC = self.base(tokens_N, upload(layout.lens_N - 1, device), attend, adaptation)
        return self.base.logits(hidden_NC[upload(rows_M, device)], of_rows).float()

    def room_for(self, loaded: LoadedAdapter, pause: Callable[[], None]) -> Callable[[], None]:
        """Memory for an adapter's vectors and prompts, as `AdapterBank.room_for`. Raises `ModelError`."""
        adapter = loaded.adapter
        self._check_room(loaded)
        bank = self.bank.room_for(adapter, pause)
        prompts = self.prompt_cache.room_for(adapter.config.max_prompt_len, pause)

        def use() -> None:
            bank()
            prompts()

        return use

    @torch.inference_mode()
    def filling(self, loaded: LoadedAdapter, use_room: Callable[[], None]) -> Generator[None]:
        """Give an adapter its slots if some are free, before anybody asks for it: the prompts of some layers
        at a time, yielding between them, so that others' steps go on. `use_room` is from `room_for`."""
        use_room()
        if not self._has_slots_for(loaded):
            return
        L, parts = self.base.config.num_layers, []
        for i in range(_PARTS if loaded.adapter.config.gated_layers else 0):
            layers = range(i * L // _PARTS, (i + 1) * L // _PARTS)
            if i:
                yield
            parts.append(loaded.adapter.prompts(self.base, layers=layers))
        if self._has_slots_for(loaded):
            self._place([_of_no_tokens(loaded)], stack_layers(parts) if parts else None)

    def _has_slots_for(self, loaded: LoadedAdapter) -> bool:
        """Without taking another one's."""
        prompts = self.prompt_slots.has_room or not loaded.adapter.config.gated_layers
        return self.adapter_slots.has_room and prompts

    @torch.inference_mode()
    def warm(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Give slots to the first of these, before anybody waits: the first fill of each shape makes room for
        all of its kind, which takes as long as many steps. Raises `ModelError` if one is too long."""
        for loaded in adapters:
            self._check_room(loaded)
        most = min(self.adapter_slots.capacity, self.prompt_slots.capacity)
        bank_slots, _ = self._place(list(map(_of_no_tokens, adapters[:most])))
        if self._graphs is not None:  # now that prompts lie where they will stay
            self._graphs.record_all(bank_slots)

    def _check_room(self, loaded: LoadedAdapter) -> None:
        """Raises `ModelError` for prompts too long for the cache, which a small file may ask for, and for
        low-rank terms too large for the bank, in which each slot has room for the largest.

        No step may be the first to find out: others share it.
        """
        K = loaded.adapter.config.max_prompt_len
        needed, limit = self.prompt_cache.bytes_of(K), self._prompt_cache_bytes
        if limit is not None and needed > limit:
            raise ModelError(
                f"{loaded.key[0]}: prompts of {K} rows take {needed / MIB / 1024:.3g} GiB, for each of "
                f"{self.prompt_slots.capacity} slots has room for the longest; that is more than "
                f"prompt_cache_mib {limit // MIB}: raise it, or lower prompt_slots"
            )
        lora, limit = loaded.adapter.config.lora, self._low_rank_bytes
        needed = self.bank.low_rank_bytes(loaded.adapter)
        if lora is not None and limit is not None and needed > limit:
            raise ModelError(
                f"{loaded.key[0]}: with low-rank terms of rank {lora.rank} those of all adapters take "
                f"{needed / MIB / 1024:.3g} GiB, as each of {self.adapter_slots.capacity} slots has room for "
                f"the largest; that is more than low_rank_mib {limit // MIB}: raise it, or lower "
                "max_hot_adapters"
            )
        self.bank.expect(loaded.adapter)

    def _is_graph(self, items: Sequence[StepItem], adapter_slots: Sequence[int]) -> bool:
        """Whether all are decodes that want their row, of adapters without low-rank terms."""
        assert self._graphs is not None
        return (
            len(items) <= self._graphs.max_rows
            and all(len(item.tokens) == 1 and len(range(1)[item.wants_logits]) == 1 for item in items)
            and not any(key.startswith("lora.") for key in self.bank.keys_of(adapter_slots))
        )

    def has_seen(self, loaded: LoadedAdapter, image: ImageInput) -> bool:
        """Whether a step with this image need not encode it."""
        return self.sight.knows(loaded, image) or (loaded.key, image.key) in self.prompt_slots

    def forget(self, key: tuple[str, int]) -> None:
        """Give back the slots of one version of an adapter."""
        self.adapter_slots.forget(lambda held: held == key)
        self.prompt_slots.forget(lambda held: isinstance(held, tuple) and held[0] == key)

    def _place(
        self, items: Sequence[StepItem], prompts: Prompts | None = None
    ) -> tuple[list[int], list[int]]:
        """Bank and prompt slot of each item, after filling those that are new. `prompts`: the only item's."""
        adapters = {item.adapter.key: item.adapter for item in items if item.adapter}
        slots, missing = self.adapter_slots.assign(adapters)
        prompt_keys = [_prompt_key(item) for item in items]
        prompt_slots, missing_prompts = self.prompt_slots.assign(prompt_keys)
        try:
            for key in missing:
                self.bank.place(slots[key], adapters[key].adapter)  # type: ignore[index]
            by_key = dict(zip(prompt_keys, items, strict=True))
            self._fill_prompts({prompt_slots[key]: by_key[key] for key in missing_prompts}, prompts)
        except BaseException:
            # What was not filled must not be taken for filled by the next step.
            self.adapter_slots.forget(lambda key: key in missing)
            self.prompt_slots.forget(lambda key: key in missing_prompts)
            raise
        bank_slots = [slots[item.adapter.key if item.adapter else None] for item in items]
        return bank_slots, [prompt_slots[key] for key in prompt_keys]

    def _fill_prompts(self, by_slot: dict[int, StepItem], ready: Prompts | None) -> None:
        """Compute prompt keys and values where they are not, the images of one adapter together."""
        groups: dict[tuple[LoadedAdapter, bool], list[int]] = {}
        for slot, item in by_slot.items():
            assert item.adapter is not None
            groups.setdefault((item.adapter, item.image is not None), []).append(slot)
        for (loaded, sees), slots in groups.items():
            images = [image for slot in slots if (image := by_slot[slot].image)]
            prompts = ready or self._prompts(loaded, images if sees else [])
            for row, slot in enumerate(slots):
                self.prompt_cache.place(slot, prompts, row)

    def _prompts(self, loaded: LoadedAdapter, images: Sequence[ImageInput]) -> Prompts:
        if not images:
            return loaded.adapter.prompts(self.base)
        visual_SnC = loaded.adapter.see(self.sight.see(loaded, images))
        return loaded.adapter.prompts(self.base, visual_SnC)

    def _adaptation(self, slots: Sequence[int], counts: Sequence[int]) -> BatchAdaptation | None:
        """Of `counts[b]` tokens for each item; None where no adapter changes norms or linears."""
        active = sorted({slot for slot, count in zip(slots, counts, strict=True) if count})
        if not self.bank.keys_of(active):
            return None
        slots_N = upload(np.repeat(np.array(slots, np.int32), counts), self.base.device)
        return self._batch_adaptation(self.bank, slots_N, active)

    def _layout(self, items: Sequence[StepItem], prompt_slots: Sequence[int]) -> StepLayout:
        singles = [len(item.tokens) == 1 for item in items]
        assert singles == sorted(singles, reverse=True), "items of one token come first"
        counts = [len(item.tokens) for item in items]
        starts = [0, *accumulate(counts)]
        lens_B = np.array([item.start + len(item.tokens) for item in items], np.int32)
        blocks_BM = np.zeros((len(items), max(len(item.block_table) for item in items)), np.int32)
        for b, item in enumerate(items):
            blocks_BM[b, : len(item.block_table)] = item.block_table
        return StepLayout(
            num_single=sum(singles),
            starts=starts,
            lens_B=lens_B,
            blocks_BM=blocks_BM,
            prompt_slots_B=np.array(prompt_slots, np.int32),
            block_size=self.block_size,
        )


def _of_no_tokens(loaded: LoadedAdapter) -> StepItem:
    """What gives an adapter its slots and nothing else."""
    return StepItem((), 0, (), loaded, None, slice(0))


def _decode(item: StepItem, bank_slot: int, prompt_slot: int) -> Decode:
    return Decode(item.tokens[0], item.start + 1, item.block_table, bank_slot, prompt_slot)


def _prompt_key(item: StepItem) -> Hashable:
    """Prompts depend on adapter, version and image; None for requests without any."""
    if item.adapter is None or not item.adapter.adapter.config.gated_layers:
        return None
    return item.adapter.key, item.image.key if item.image else None
