"""Decode steps as CUDA graphs: a step is one copy of integers and one launch, whatever the base's depth.

A step of decodes alone is always the same kernels on the same tensors; only the integers differ that say
which token, which blocks and which slots. Those lie in one tensor that stays, and a graph recorded once
reads them anew each time it runs. Rows beyond the batch's up to the graph's size have length 0 and write
to a block that nobody holds.

Shapes: B rows, M blocks of the longest sequence that may come, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.adaptation import AdapterBank
from models.kernels.batch_adaptation import TritonBatchAdaptation
from models.kernels.paged_attend import DecodeAttend
from models.kv_cache import Decode, KVCache, PromptCache, resolve_tokens
from models.llama import Llama

_COLUMNS = 4  # integers of a row, besides its blocks
_KINDS = 16  # of adapters, and of mixes of them, whose graphs are kept


@dataclass(frozen=True, slots=True)
class _Key:
    """What a graph is good for. Prompts lie elsewhere once the longest one is longer."""

    num_rows: int
    num_prompt_rows: int
    vectors: frozenset[str]  # what adapters of the batch change


class DecodeGraphs:
    """Where there is no GPU the same is computed without a graph, which shows that the rows are right."""

    def __init__(
        self,
        base: Llama,
        kv_cache: KVCache,
        prompts: PromptCache,
        bank: AdapterBank,
        *,
        max_rows: int,
        max_blocks: int,
        spare_block: int,
    ) -> None:
        """`max_blocks` a sequence may have; `spare_block` is the one that nobody holds."""
        self._base, self._kv_cache, self._prompts, self._bank = base, kv_cache, prompts, bank
        self.max_rows, self._max_blocks, self._spare_block = max_rows, max_blocks, spare_block
        sizes = max_rows * (_COLUMNS + max_blocks)
        on_gpu = base.device.type == "cuda"
        self._host = torch.zeros(sizes, dtype=torch.int32, pin_memory=on_gpu)
        self._ints = torch.zeros(sizes, dtype=torch.int32, device=base.device)
        self._last_B = torch.zeros(max_rows, dtype=torch.int64, device=base.device)
        self._logits_BV = torch.empty(max_rows, base.config.vocab_size, device=base.device)
        self._uploaded = torch.cuda.Event() if on_gpu else None
        # Of its own: graphs of one stream share a workspace of cuBLAS, which goes with the first that goes.
        self._stream = torch.cuda.Stream(base.device) if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._graphs: dict[_Key, torch.cuda.CUDAGraph] = {}

    def record_all(self, bank_slots: Sequence[int] = ()) -> None:
        """Those of the base and of what lies in these slots, so that no request waits for them.

        Only what is placed later and changes something else, or has longer prompts, is recorded as it comes.
        """
        kinds = {self._bank.keys_of([slot]): slot for slot in (*bank_slots, 0)}
        for rows in reversed(_sizes(self.max_rows)):  # the largest first: smaller ones fit into its memory
            for keys, slot in kinds.items():
                if not any(key.startswith("lora.") for key in keys):
                    self.run([Decode(0, 0, (self._spare_block,), slot, 0)] * rows)

    def run(self, decodes: Sequence[Decode], last_M: Tensor | None = None) -> Tensor:
        """Logits [B, V] in float32, which the next call overwrites. At most `max_rows`, and no low rank.

        `last_M`: the tokens of the step before, at most `max_rows`, which those below 0 stand for.
        """
        active = sorted({decode.bank_slot for decode in decodes})
        num_rows = next(size for size in _sizes(self.max_rows) if size >= len(decodes))
        key = _Key(num_rows, self._prompts.k_LSKGD.shape[2], self._bank.keys_of(active))
        self._upload(decodes, num_rows)
        if last_M is not None:
            self._last_B[: len(last_M)].copy_(last_M)
        self._replay(key, partial(self._compute, num_rows, active))
        return self._logits_BV[: len(decodes)]

    def _replay(self, key: _Key, compute: Callable[[], None]) -> None:
        if self._pool is None:
            compute()
            return
        graph = self._graphs.get(key)
        if graph is None:
            shorter = any(other.num_prompt_rows != key.num_prompt_rows for other in self._graphs)
            if shorter or len(self._graphs) >= _KINDS * len(_sizes(self.max_rows)):
                self._forget()  # those of shorter prompts read where these lay once
            compute()  # compiles kernels and sets up libraries, which no recording may do
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    compute()
            except BaseException:
                graph.reset()
                self._forget()
                raise
            self._graphs[key] = graph  # only now: one whose recording failed would be run for ever
        graph.replay()

    def _forget(self) -> None:
        """All graphs: with one goes what the others still write to. A pool without graphs is none."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _upload(self, decodes: Sequence[Decode], num_rows: int) -> None:
        if self._uploaded is not None:
            self._uploaded.synchronize()  # it followed the step before its own, whose tokens are read
        columns, blocks_BM = (part.numpy() for part in _parts(self._host, num_rows, self._max_blocks))
        columns[:, : len(decodes)] = np.array(
            [(d.token, d.length, d.bank_slot, d.prompt_slot) for d in decodes], np.int32
        ).T
        columns[:, len(decodes) :] = 0
        for row, decode in enumerate(decodes):
            blocks_BM[row, : len(decode.block_table)] = decode.block_table
        blocks_BM[len(decodes) :, 0] = self._spare_block
        used = num_rows * (_COLUMNS + self._max_blocks)
        self._ints[:used].copy_(self._host[:used], non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()

    def _compute(self, num_rows: int, active: Sequence[int]) -> None:
        columns, blocks_BM = _parts(self._ints, num_rows, self._max_blocks)
        tokens_B, lens_B, bank_slots_B, prompt_slots_B = columns
        tokens_B = resolve_tokens(tokens_B, self._last_B)
        positions_B = (lens_B - 1).clamp(min=0)
        page = self._kv_cache.block_size
        blocks_B = blocks_BM.gather(1, (positions_B // page).long()[:, None])[:, 0]
        places_B = blocks_B.long() * page + positions_B % page
        attend = DecodeAttend(self._kv_cache, self._prompts, places_B, lens_B, prompt_slots_B, blocks_BM)
        vectors = TritonBatchAdaptation(self._bank, bank_slots_B, active)
        adaptation = None if vectors.changes_nothing else vectors
        hidden_BC = self._base(tokens_B, positions_B, attend, adaptation)
        self._logits_BV[:num_rows].copy_(self._base.logits(hidden_BC, adaptation))


def _parts(ints: Tensor, num_rows: int, max_blocks: int) -> tuple[Tensor, Tensor]:
    """Columns [4, B] of tokens, lengths, bank slots and prompt slots, and blocks [B, M]; views."""
    split, end = num_rows * _COLUMNS, num_rows * (_COLUMNS + max_blocks)
    return ints[:split].view(_COLUMNS, num_rows), ints[split:end].view(num_rows, max_blocks)


def _sizes(max_rows: int) -> list[int]:
    """How many rows graphs have: few rows too many cost little, and each graph takes a while to record."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_rows + 32, 32)]
    return [size for size in sizes if size < max_rows] + [max_rows]
