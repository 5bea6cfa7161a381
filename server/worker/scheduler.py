"""Who computes what in the next step. Plain Python, no tensors; one thread calls it.

    batch = scheduler.schedule()               # what to run
    …                                          # the runner runs it and samples where `samples` is set
    scheduler.postprocess(batch, tokens)       # or discard(batch), where the step failed

Running sequences that lack one token decode first, one token each. What the token budget leaves goes
to prompts, in chunks: first those under way, then waiting ones. Waiting adapters take turns, one
admission each; within an adapter the first to arrive is the first to start. The request whose turn it
is holds the line until it fits: nobody overtakes it, so nobody starves.

A sequence is admitted when all its known tokens find blocks. When a decode finds none, the running
sequence that arrived last gives all of its own back and starts again from its known tokens, ahead of
whoever waits: the oldest always moves on.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

from server.worker.blocks import BlockManager
from server.worker.pace import Pace
from server.worker.sequence import Sequence, SequenceStatus


class SequenceRejected(ValueError):
    """A sequence that can never run."""


class SequenceTooLong(SequenceRejected):
    """More tokens than the context or the whole KV cache holds."""


def check_fits(num_prompt_tokens: int, max_tokens: int, max_sequence_len: int) -> None:
    """Raises `SequenceTooLong` for more than `max_sequence_len` tokens, `SequenceRejected` for none."""
    if num_prompt_tokens < 1 or max_tokens < 0:
        raise SequenceRejected(
            f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens}: "
            "a prompt needs at least one token, and max_tokens must not be negative"
        )
    if num_prompt_tokens + max_tokens > max_sequence_len:
        raise SequenceTooLong(
            f"{num_prompt_tokens} prompt tokens and {max_tokens} to generate are more than the "
            f"{max_sequence_len} that fit; shorten the prompt or lower max_tokens"
        )


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute positions `start` … `start + num_tokens - 1` of `seq`, whose block table has room for them."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # these are its last known tokens: the next one is to be sampled

    @classmethod
    def of(cls, seq: Sequence, num_tokens: int) -> ScheduledSequence:
        reaches_end = num_tokens == seq.num_uncomputed_tokens
        return cls(seq, seq.num_computed_tokens, num_tokens, reaches_end and seq.max_tokens > 0)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: `num_decodes` decodes of one token each, then chunks of prompts."""

    sequences: tuple[ScheduledSequence, ...] = ()
    num_decodes: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.sequences)


class WaitingQueue:
    """Adapters take turns, first come first served within each; `put_back` goes before all of them."""

    def __init__(self) -> None:
        self._resuming: deque[Sequence] = deque()
        self._turns: OrderedDict[Hashable, deque[Sequence]] = OrderedDict()  # the next adapter first

    def __len__(self) -> int:
        return len(self._resuming) + sum(len(queue) for queue in self._turns.values())

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._resuming
        for queue in self._turns.values():
            yield from queue

    def put(self, seq: Sequence) -> None:
        self._turns.setdefault(seq.adapter_id, deque()).append(seq)

    def put_back(self, seq: Sequence) -> None:
        self._resuming.appendleft(seq)

    def peek(self) -> Sequence | None:
        """Whose turn it is."""
        if self._resuming:
            return self._resuming[0]
        return next(iter(self._turns.values()))[0] if self._turns else None

    def pop(self) -> Sequence:
        """Take who `peek` shows; its adapter goes behind the others."""
        if self._resuming:
            return self._resuming.popleft()
        adapter_id, queue = self._turns.popitem(last=False)
        seq = queue.popleft()
        if queue:
            self._turns[adapter_id] = queue
        return seq

    def remove(self, seq: Sequence) -> None:
        if seq in self._resuming:
            self._resuming.remove(seq)
            return
        queue = self._turns[seq.adapter_id]
        queue.remove(seq)
        if not queue:
            del self._turns[seq.adapter_id]


class Scheduler:
    """Plans steps of at most `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences.

    `max_prefill_chunk` bounds the prompt tokens of a step that also decodes, and with them the time
    between two tokens of a stream; without it `pace` does, by the clock. `max_adapters` bounds the
    different adapters that run at once, for a bank with fewer places than `max_num_seqs`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_prefill_chunk: int | None = None,
        max_adapters: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        limits = [max_num_seqs, max_model_len, max_prefill_chunk, max_adapters]
        if any(limit is not None and limit < 1 for limit in limits):
            raise ValueError(
                "max_num_seqs, max_model_len, max_prefill_chunk and max_adapters must be at least 1"
            )
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {max_num_batched_tokens} is less than max_num_seqs {max_num_seqs}: "
                "not every sequence could decode in each step; raise the one or lower the other"
            )
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_chunk = max_prefill_chunk
        self.max_adapters = max_adapters
        self.pace = pace
        # Positions that one sequence may have: the context, or all of the KV cache where that is less.
        self.max_sequence_len = min(max_model_len, blocks.num_blocks * blocks.block_size)
        self.running: list[Sequence] = []  # by arrival
        self.waiting = WaitingQueue()
        self.num_preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._in_flight = Batch()

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. Raises `SequenceRejected` if it can never run."""
        self.check_fits(seq.num_prompt_tokens, seq.max_tokens)
        if seq.request_id in self._sequences:
            raise SequenceRejected(f"a request {seq.request_id!r} is running already; choose another id")
        seq.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[seq.request_id] = seq
        self.waiting.put(seq)

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raises what `check_fits` raises."""
        check_fits(num_prompt_tokens, max_tokens, self.max_sequence_len)

    def finish(self, request_id: str) -> None:
        """End a sequence that generated all it should. Raises KeyError if it is not there."""
        self._retire(self._sequences[request_id])

    def abort(self, request_id: str) -> bool:
        """End a sequence wherever it is; False if it is not there, for it may have finished just now."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._retire(seq)
        return seq is not None

    def forget(self, matches: Callable[[Hashable], bool]) -> None:
        """Drop cached blocks by cache key; sequences with such keys run on without the cache."""
        self.blocks.forget(matches)
        for seq in self._sequences.values():
            if seq.cache_key is not None and matches(seq.cache_key):
                seq.cache_key = None

    @property
    def num_sequences(self) -> int:
        """Running and waiting."""
        return len(self._sequences)

    @property
    def num_decoding(self) -> int:
        """Running sequences that lack one token."""
        return sum(seq.lacks_one for seq in self.running)

    def schedule(self, spent: float = 0.0) -> Batch:
        """Plan the next step; empty only where nothing can be done before tokens are read. The step before
        must be postprocessed.

        `spent` seconds of it are gone already, which leaves less for prompts beside decodes.
        """
        assert not self._in_flight.sequences, "the last batch was neither postprocessed nor discarded"
        ended = [seq for seq in self.running if seq.is_complete and not seq.waits_to_be_read]
        assert not ended, "a complete sequence was not finished"
        decodes = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(decodes)
        if decodes and self.max_prefill_chunk is not None:
            budget = min(budget, self.max_prefill_chunk)
        elif decodes and self.pace is not None:
            budget = min(budget, self.pace.prompt_tokens(len(decodes), spent))
        prefills = self._continue_prefills(budget)
        prefills += self._admit(budget - sum(item.num_tokens for item in prefills))
        self._in_flight = Batch((*decodes, *prefills), num_decodes=len(decodes))
        return self._in_flight

    def postprocess(self, batch: Batch, sampled: Mapping[str, int]) -> None:
        """The step is done, or given to the device.

        `sampled` has a token for each request that `samples` and still runs. It may be `UNKNOWN`, to be put
        in its place before the next call: meanwhile the next step can be scheduled.
        """
        self.discard(batch)
        for item in batch.sequences:
            if item.seq.status is SequenceStatus.RUNNING:
                self.blocks.commit(item.seq, item.start + item.num_tokens)
                if item.samples:
                    item.seq.token_ids.append(sampled[item.seq.request_id])

    def discard(self, batch: Batch) -> None:
        """The step came to nothing: what still runs is scheduled again, what ended gives its blocks back."""
        assert batch is self._in_flight, "not the batch that was scheduled last"
        self._in_flight = Batch()
        for item in batch.sequences:
            if item.seq.status is SequenceStatus.FINISHED:
                self.blocks.free(item.seq)

    def _schedule_decodes(self) -> list[ScheduledSequence]:
        decodes = []
        for seq in [seq for seq in self.running if seq.lacks_one]:
            if seq.status is SequenceStatus.RUNNING and self._make_room(seq):
                self.blocks.append(seq)
                decodes.append(ScheduledSequence.of(seq, 1))
        return decodes

    def _make_room(self, seq: Sequence) -> bool:
        """Preempt later arrivals until `seq` can grow; False if it was itself the last to arrive.

        Decodes are scheduled by arrival, so whoever is preempted is not in this step's batch yet.
        """
        while not self.blocks.can_append(seq):
            victim = self.running.pop()
            self.blocks.free(victim)
            victim.status = SequenceStatus.WAITING
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self.waiting.put_back(victim)
            if victim is seq:
                return False
        return True

    def _continue_prefills(self, budget: int) -> list[ScheduledSequence]:
        prefills = []
        for seq in self.running:
            if budget and seq.num_uncomputed_tokens > 1:
                prefills.append(ScheduledSequence.of(seq, min(budget, seq.num_uncomputed_tokens)))
                budget -= prefills[-1].num_tokens
        return prefills

    def _admit(self, budget: int) -> list[ScheduledSequence]:
        admitted = []
        while budget and (seq := self.waiting.peek()) is not None and self._can_admit(seq):
            self.waiting.pop()
            self.blocks.allocate(seq)
            if not seq.num_preemptions:
                seq.num_cached_tokens = seq.num_computed_tokens
            seq.status = SequenceStatus.RUNNING
            insort(self.running, seq, key=lambda other: other.arrival)
            admitted.append(ScheduledSequence.of(seq, min(budget, seq.num_uncomputed_tokens)))
            budget -= admitted[-1].num_tokens
        return admitted

    def _can_admit(self, seq: Sequence) -> bool:
        """A place in the step and in the bank, and blocks: with one to grow left for each that runs.

        Without those the newcomer would be preempted as soon as the others grow.
        """
        if len(self.running) >= self.max_num_seqs or seq.waits_to_be_read:
            return False
        adapters = {other.adapter_id for other in (*self.running, seq)} - {None}
        if self.max_adapters is not None and len(adapters) > self.max_adapters:
            return False
        return self.blocks.can_allocate(seq, spare=len(self.running))

    def _retire(self, seq: Sequence) -> None:
        """Blocks of the step that is running now are still written to: `discard` frees those."""
        del self._sequences[seq.request_id]
        if seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            if all(item.seq is not seq for item in self._in_flight.sequences):
                self.blocks.free(seq)
        seq.status = SequenceStatus.FINISHED

    def check_integrity(self) -> None:
        """Assert that every sequence is in one place and every block accounted for. Also checks `blocks`."""
        waiting = list(self.waiting)
        ended = [item.seq for item in self._in_flight.sequences if item.seq.status is SequenceStatus.FINISHED]
        assert all(seq.status is SequenceStatus.RUNNING for seq in self.running), "running, but not by status"
        assert all(seq.status is SequenceStatus.WAITING for seq in waiting), "waiting, but not by status"
        assert not any(seq.block_table or seq.num_computed_tokens for seq in waiting), "waiting with blocks"
        known = {seq.request_id: seq for seq in (*self.running, *waiting)}
        assert known == self._sequences, "a sequence is lost"
        assert len(known) == len(self.running) + len(waiting), "a sequence is in two places"
        arrivals = [seq.arrival for seq in self.running]
        assert arrivals == sorted(arrivals), "running out of order"
        resuming = [seq.arrival for seq in waiting if seq.num_preemptions]
        assert resuming == sorted(resuming), "resuming out of order"
        assert len(self.running) <= self.max_num_seqs, "too many sequences run"
        self.blocks.check_integrity((*self.running, *ended))
