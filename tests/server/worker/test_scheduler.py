"""Scheduling: units of the policy, then random traffic on a simulated model.

The simulated model keeps, per slot of the KV cache, what was written there: the cache key and all
tokens up to that position. A step first writes, then reads every position before and in the step, so
that any wrong block, stale prefix or double use shows as a difference. Like a device it may know tokens
that the scheduler has not been told yet.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from itertools import pairwise

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.worker.blocks import BlockManager
from server.worker.pace import Pace
from server.worker.scheduler import Batch, Scheduler, SequenceRejected, SequenceTooLong
from server.worker.sequence import UNKNOWN, Sequence, SequenceStatus

EOS = 0
VOCABULARY = 12


class SimulatedModel:
    """A deterministic language model whose keys and values are the context itself."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, tuple[Hashable, tuple[int, ...]]] = {}
        self.identity: dict[Sequence, Hashable] = {}  # what a sequence's keys and values depend on
        self.unread: dict[Sequence, int] = {}  # what stands in the place of an `UNKNOWN`

    def tokens(self, seq: Sequence) -> list[int]:
        return [*seq.token_ids[:-1], self.unread[seq]] if seq in self.unread else seq.token_ids

    def next_token(self, seq: Sequence) -> int:
        return zlib.crc32(repr((self.identity[seq], self.tokens(seq))).encode()) % VOCABULARY

    def run(self, batch: Batch) -> dict[str, int]:
        written: set[int] = set()
        for item in batch.sequences:
            for position in range(item.start, item.start + item.num_tokens):
                slot = self._slot(item.seq, position)
                assert slot not in written, "two tokens of a step share a slot"
                written.add(slot)
                self.slots[slot] = self._context(item.seq, position)
        for item in batch.sequences:
            for position in range(item.start + item.num_tokens):
                assert self.slots[self._slot(item.seq, position)] == self._context(item.seq, position)
        return {item.seq.request_id: self.next_token(item.seq) for item in batch.sequences if item.samples}

    def _slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _context(self, seq: Sequence, position: int) -> tuple[Hashable, tuple[int, ...]]:
        return self.identity[seq], tuple(self.tokens(seq)[: position + 1])


def scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    caching: bool = True,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 1000,
    max_prefill_chunk: int | None = None,
    max_adapters: int | None = None,
    pace: Pace | None = None,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size, caching),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_prefill_chunk=max_prefill_chunk,
        max_adapters=max_adapters,
        pace=pace,
    )


def sequence(name: str, num_tokens: int, max_tokens: int = 4, adapter: str | None = None) -> Sequence:
    tokens = [zlib.crc32(f"{name}{index}".encode()) for index in range(num_tokens)]
    return Sequence(name, tokens, max_tokens, adapter_id=adapter, cache_key=adapter or "base")


def plan(batch: Batch) -> list[tuple[str, int, int, bool]]:
    return [(item.seq.request_id, item.start, item.num_tokens, item.samples) for item in batch.sequences]


def step(sched: Scheduler, token: int = 1, spent: float = 0.0) -> list[tuple[str, int, int, bool]]:
    """One step that samples `token` everywhere; ends what is complete."""
    batch = sched.schedule(spent)
    planned = plan(batch)
    sched.postprocess(batch, {item.seq.request_id: token for item in batch.sequences if item.samples})
    for item in batch.sequences:
        if item.seq.is_complete:
            sched.finish(item.seq.request_id)
    sched.check_integrity()
    return planned


def test_a_prompt_is_computed_in_chunks_then_decodes_one_token_a_step() -> None:
    sched = scheduler(max_num_batched_tokens=6)
    seq = sequence("a", 14, max_tokens=3)
    sched.add(seq)
    steps = [step(sched) for _ in range(5)]
    assert steps == [
        [("a", 0, 6, False)],
        [("a", 6, 6, False)],
        [("a", 12, 2, True)],
        [("a", 14, 1, True)],
        [("a", 15, 1, True)],
    ]
    assert seq.token_ids[14:] == [1, 1, 1]
    assert seq.status is SequenceStatus.FINISHED
    assert not sched.has_work
    assert sched.schedule().sequences == ()
    assert sched.blocks.stats.used == 0


def test_decodes_come_first_and_prefills_get_the_rest() -> None:
    sched = scheduler(max_num_batched_tokens=8)
    sched.add(sequence("a", 3, max_tokens=9))
    sched.add(sequence("b", 2, max_tokens=9))
    step(sched)
    sched.add(sequence("long", 40))
    batch = sched.schedule()
    assert plan(batch) == [("a", 3, 1, True), ("b", 2, 1, True), ("long", 0, 6, False)]
    assert batch.num_decodes == 2
    assert batch.num_tokens == 8


def test_prompts_under_way_go_before_waiting_ones() -> None:
    sched = scheduler(max_num_batched_tokens=8)
    sched.add(sequence("a", 12))
    sched.add(sequence("b", 6))
    assert step(sched) == [("a", 0, 8, False)]
    assert step(sched) == [("a", 8, 4, True), ("b", 0, 4, False)]
    assert step(sched) == [("a", 12, 1, True), ("b", 4, 2, True)]


def test_max_prefill_chunk_bounds_steps_that_decode_and_only_those() -> None:
    sched = scheduler(max_num_batched_tokens=16, max_prefill_chunk=3)
    sched.add(sequence("a", 8, max_tokens=9))
    assert step(sched) == [("a", 0, 8, True)]
    sched.add(sequence("b", 5))
    sched.add(sequence("c", 5))
    assert step(sched) == [("a", 8, 1, True), ("b", 0, 3, False)]
    assert step(sched) == [("a", 9, 1, True), ("b", 3, 2, True), ("c", 0, 1, False)]


def test_the_pace_bounds_steps_that_decode_and_only_those() -> None:
    pace = Pace(stretch=2, least=2)
    pace.observe(1, 0, 0.010)
    pace.observe(0, 100, 0.100)  # 1 ms a token: ten beside a decode
    sched = scheduler(max_num_batched_tokens=32, pace=pace)
    sched.add(sequence("a", 20, max_tokens=9))
    assert step(sched) == [("a", 0, 20, True)]
    sched.add(sequence("b", 40))
    assert step(sched) == [("a", 20, 1, True), ("b", 0, 10, False)]
    assert step(sched, spent=0.0055) == [("a", 21, 1, True), ("b", 10, 4, False)]
    assert step(sched, spent=1.0) == [("a", 22, 1, True), ("b", 14, 2, False)]
    sched.abort("a")
    assert step(sched) == [("b", 16, 24, True)]


def test_what_was_preempted_with_an_unread_token_waits_until_it_is_read() -> None:
    """Its tokens are to be computed again, and a chunk has no place for one that only the device knows."""
    sched = scheduler(num_blocks=5, block_size=2, caching=False)
    old, young = sequence("old", 3, 5), sequence("young", 3, 5)
    for seq in (old, young):
        sched.add(seq)
    for _ in range(2):  # until each lacks a block for its next token, and there is one
        step(sched)
    old.token_ids[-1] = young.token_ids[-1] = UNKNOWN
    batch = sched.schedule()
    assert plan(batch) == [("old", 4, 1, True)]
    old.token_ids[-1] = 7
    sched.postprocess(batch, {"old": UNKNOWN})
    sched.abort("old")
    assert sched.schedule().sequences == ()
    young.token_ids[-1] = 7
    assert step(sched) == [("young", 0, 5, True)]


def test_adapters_take_turns_and_keep_order_within() -> None:
    sched = scheduler(max_num_seqs=1)
    for name, adapter in [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c"), ("b2", "b")]:
        sched.add(sequence(name, 3, max_tokens=1, adapter=adapter))
    order = [step(sched)[0][0] for _ in range(6)]
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_whoever_does_not_fit_holds_the_line() -> None:
    sched = scheduler(num_blocks=8, block_size=4, max_num_batched_tokens=64)
    sched.add(sequence("first", 16, max_tokens=2, adapter="a"))
    sched.add(sequence("large", 20, max_tokens=2, adapter="b"))
    sched.add(sequence("small", 4, max_tokens=2, adapter="c"))
    assert [name for name, *_ in step(sched)] == ["first"]
    assert [name for name, *_ in step(sched)] == ["first"]
    assert [name for name, *_ in step(sched)] == ["large", "small"]


def test_max_adapters_bounds_what_runs_together_but_not_the_base() -> None:
    sched = scheduler(max_adapters=1)
    for name, adapter in [("a", "x"), ("base", None), ("b", "y")]:
        sched.add(sequence(name, 2, max_tokens=2, adapter=adapter))
    assert [name for name, *_ in step(sched)] == ["a", "base"]
    assert [name for name, *_ in step(sched)] == ["a", "base"]
    assert [name for name, *_ in step(sched)] == ["b"]


def test_the_last_to_arrive_gives_its_blocks_to_an_older_decode_and_resumes_first() -> None:
    sched = scheduler(num_blocks=6, block_size=2, caching=False)
    old, young, later = sequence("old", 4, 6), sequence("young", 4, 4), sequence("later", 2, 2)
    for seq in (old, young, later):
        sched.add(seq)
    assert [name for name, *_ in step(sched)] == ["old", "young"]
    assert [name for name, *_ in step(sched)] == ["old", "young"]  # each takes its third block
    step(sched)
    assert step(sched) == [("old", 6, 1, True)]
    assert sched.num_preemptions == young.num_preemptions == 1
    assert young.status is SequenceStatus.WAITING
    assert len(young) == 7  # keeps what it generated
    steps = [step(sched) for _ in range(5)]
    resumed = next(planned for planned in steps if any(name == "young" for name, *_ in planned))
    assert resumed == [("young", 0, 7, True), ("later", 0, 2, True)]
    while sched.has_work:
        step(sched)
    assert [len(seq) for seq in (old, young, later)] == [10, 8, 4]


def test_a_preempted_sequence_finds_its_own_blocks_in_the_cache() -> None:
    sched = scheduler(num_blocks=6, block_size=2, caching=True)
    old, young = sequence("old", 4, 5), sequence("young", 4, 4)
    sched.add(old)
    sched.add(young)
    planned: list[list[tuple[str, int, int, bool]]] = []
    while sched.has_work:
        planned.append(step(sched))
    assert young.num_preemptions == 1
    starts = [start for names in planned for name, start, *_ in names if name == "young"]
    assert starts.count(0) == 1
    assert young.num_cached_tokens == 0  # what the first admission found, not the second
    stats = sched.blocks.stats  # nor does the second make the cache look better than callers find it
    assert (stats.prefix_queries, stats.prefix_hits) == (8, 0)


def test_cached_tokens_are_counted_and_skipped() -> None:
    sched = scheduler()
    sched.add(sequence("a", 10, max_tokens=1))
    step(sched)
    again = sequence("a", 10, max_tokens=1)
    sched.add(again)
    assert step(sched) == [("a", 8, 2, True)]
    assert again.num_cached_tokens == 8


def test_a_prompt_alone_can_be_computed_without_sampling() -> None:
    sched = scheduler(max_num_batched_tokens=4)
    sched.add(sequence("score", 6, max_tokens=0))
    assert step(sched) == [("score", 0, 4, False)]
    assert step(sched) == [("score", 4, 2, False)]
    assert not sched.has_work


def test_an_abort_frees_at_once_except_under_a_running_step() -> None:
    sched = scheduler()
    for name in ("a", "b", "c"):
        sched.add(sequence(name, 8))
    step(sched)
    assert sched.abort("b")
    assert sched.blocks.stats.used == 2
    batch = sched.schedule()
    assert sched.abort("a")
    assert sched.abort("c")
    assert not sched.has_work
    sched.check_integrity()
    assert sched.blocks.stats.used > 0
    sched.postprocess(batch, {})
    assert sched.blocks.stats.used == 0
    assert not sched.abort("a")
    with pytest.raises(KeyError):
        sched.finish("a")


def test_an_id_can_be_used_again_while_its_aborted_step_still_runs() -> None:
    sched = scheduler()
    sched.add(sequence("a", 8))
    batch = sched.schedule()
    sched.abort("a")
    again = sequence("a", 8)
    sched.add(again)
    sched.postprocess(batch, {"a": 7})
    assert len(again) == 8
    assert step(sched) == [("a", 0, 8, True)]


def test_a_discarded_step_is_planned_again() -> None:
    sched = scheduler()
    sched.add(sequence("a", 8))
    sched.add(sequence("b", 4))
    batch = sched.schedule()
    sched.abort("b")
    sched.discard(batch)
    assert sched.blocks.stats.used == 2
    assert sched.blocks.stats.cached == 0
    assert step(sched) == [("a", 0, 8, True)]


def test_forget_keeps_running_sequences_out_of_the_cache() -> None:
    sched = scheduler(block_size=8, max_num_batched_tokens=4)
    sched.add(sequence("a", 12, adapter="x"))
    sched.add(sequence("b", 12, adapter="y"))
    step(sched)
    sched.forget(lambda key: key == "x")
    while sched.has_work:
        step(sched)
    assert not sched.blocks.match_prefix(sequence("a", 12, adapter="x"))
    assert len(sched.blocks.match_prefix(sequence("b", 12, adapter="y"))) == 1


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "error"),
    [
        (20, 5, SequenceTooLong),  # the context
        (25, 0, SequenceTooLong),
        (0, 4, SequenceRejected),
        (4, -1, SequenceRejected),
    ],
)
def test_what_can_never_run_is_refused(num_tokens: int, max_tokens: int, error: type[ValueError]) -> None:
    sched = scheduler(max_model_len=24)
    with pytest.raises(error, match="prompt"):
        sched.add(sequence("a", num_tokens, max_tokens))
    assert not sched.has_work
    sched.check_integrity()


def test_what_needs_more_blocks_than_there_are_is_refused_and_what_needs_all_runs() -> None:
    sched = scheduler(num_blocks=3, block_size=4, caching=False)
    with pytest.raises(SequenceTooLong, match="12"):
        sched.add(sequence("large", 8, max_tokens=5))
    sched.add(sequence("fits", 8, max_tokens=4))
    while sched.has_work:
        step(sched)
    assert sched.num_preemptions == 0


def test_a_request_id_runs_once() -> None:
    sched = scheduler()
    sched.add(sequence("a", 2))
    with pytest.raises(SequenceRejected, match="'a'"):
        sched.add(sequence("a", 2))


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        scheduler(max_num_seqs=17, max_num_batched_tokens=16)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler(max_prefill_chunk=0)


def test_misuse_by_the_engine_is_noticed() -> None:
    sched = scheduler()
    sched.add(sequence("a", 2, max_tokens=1))
    batch = sched.schedule()
    with pytest.raises(AssertionError, match="postprocessed"):
        sched.schedule()
    with pytest.raises(AssertionError, match="last"):
        sched.postprocess(Batch(batch.sequences), {"a": 1})
    sched.postprocess(batch, {"a": 1})
    with pytest.raises(AssertionError, match="finished"):
        sched.schedule()


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 4)), min_size=20, max_size=60
    ),
    every=st.integers(1, 3),
    max_num_seqs=st.integers(1, 4),
    num_blocks=st.integers(8, 20),
)
def test_no_adapter_overtakes_another_twice(
    arrivals: list[tuple[int, int, int]], every: int, max_num_seqs: int, num_blocks: int
) -> None:
    """While an adapter waits, each other one starts at most one request before it."""
    sched = scheduler(num_blocks, block_size=2, max_num_seqs=max_num_seqs)
    overtaken: dict[str, list[str]] = {}  # adapter that waits → who started since its last turn
    queued: dict[str, list[str]] = {}
    upcoming = list(enumerate(arrivals))
    while upcoming or sched.has_work:
        for index, (adapter, num_tokens, max_tokens) in upcoming[:every]:
            name = f"adapter{adapter}"
            sched.add(sequence(str(index), num_tokens, max_tokens, name))
            queued.setdefault(name, []).append(str(index))
            overtaken.setdefault(name, [])
        del upcoming[:every]
        batch = sched.schedule()
        for item in batch.sequences:
            adapter_id = str(item.seq.adapter_id)
            if item.seq.request_id not in queued[adapter_id]:
                continue
            assert queued[adapter_id].pop(0) == item.seq.request_id  # first come, first served
            del overtaken[adapter_id]
            for others in overtaken.values():
                assert adapter_id not in others
                others.append(adapter_id)
            if queued[adapter_id]:
                overtaken[adapter_id] = []
        sched.postprocess(batch, {item.seq.request_id: 1 for item in batch.sequences if item.samples})
        for item in batch.sequences:
            if item.seq.is_complete:
                sched.finish(item.seq.request_id)


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    max_num_seqs=st.integers(1, 6),
    chunk=st.none() | st.integers(1, 6),
)
def test_running_decodes_never_wait_for_prompts(
    prompts: list[int], max_num_seqs: int, chunk: int | None
) -> None:
    sched = scheduler(
        num_blocks=500, max_num_seqs=max_num_seqs, max_num_batched_tokens=8, max_prefill_chunk=chunk
    )
    decoding: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, num_tokens in enumerate(prompts):
        sched.add(sequence(str(index), num_tokens, max_tokens=5))
    count = 0
    while sched.has_work:
        for name, _, _, samples in step(sched):
            if samples:
                decoding[name].append(count)
        count += 1
    for steps in decoding.values():
        assert len(steps) == 5
        assert all(later == earlier + 1 for earlier, later in pairwise(steps))


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, aborts, failures and forgetting on tiny pools, checked by the simulated model.

    A step's tokens are told with its end, or read when the next step runs already.
    """

    @initialize(
        num_blocks=st.integers(4, 12),
        block_size=st.integers(1, 3),
        caching=st.booleans(),
        max_num_seqs=st.integers(1, 6),
        extra_tokens=st.integers(0, 12),
        max_prefill_chunk=st.none() | st.integers(1, 4),
        max_adapters=st.none() | st.integers(1, 3),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        caching: bool,
        max_num_seqs: int,
        extra_tokens: int,
        max_prefill_chunk: int | None,
        max_adapters: int | None,
    ) -> None:
        self.sched = scheduler(
            num_blocks,
            block_size,
            caching=caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_tokens,
            max_prefill_chunk=max_prefill_chunk,
            max_adapters=max_adapters,
        )
        self.model = SimulatedModel(block_size)
        self.live: dict[str, Sequence] = {}
        self.ended: list[Sequence] = []  # by the model, not by an abort
        self.versions = {"a": 0, "b": 0, "c": 0}
        self.pending: tuple[Batch, dict[str, int]] | None = None
        self.count = 0

    @rule(
        adapter=st.sampled_from(["a", "b", "c", None]),
        prefix=st.integers(0, 8),
        suffixes=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=4), min_size=1, max_size=4),
        max_tokens=st.sampled_from([8, 12, 1, 0]),
        skip=st.sampled_from([False, False, True]),
    )
    def add(
        self, adapter: str | None, prefix: int, suffixes: list[list[int]], max_tokens: int, skip: bool
    ) -> None:
        """A few requests at once that begin alike."""
        for suffix in suffixes:
            self.count += 1
            name, tokens = str(self.count), [1] * prefix + suffix
            seq = Sequence(name, tokens, max_tokens, adapter, adapter or "base", skip)
            # After `forget` the same key stands for other keys and values: the worst case for a stale block.
            self.model.identity[seq] = (adapter, self.versions.get(adapter or "", 0))
            room = self.sched.blocks.num_blocks * self.sched.blocks.block_size
            if len(tokens) + max_tokens > room:
                with pytest.raises(SequenceTooLong):
                    self.sched.add(seq)
            else:
                self.sched.add(seq)
                self.live[name] = seq

    @rule(halves=st.integers(1, 20), ahead=st.booleans())
    def steps(self, halves: int, ahead: bool) -> None:
        """Half a step plans and runs, or takes the result: whatever comes next may come in between."""
        for _ in range(halves):
            if self.pending is None:
                self.begin()
            else:
                self.end(ahead)
            self.sched.check_integrity()

    def begin(self) -> None:
        had_work = self.sched.has_work
        batch = self.sched.schedule()
        self.check_batch(batch, had_work)
        self.pending = batch, self.model.run(batch)

    def end(self, ahead: bool) -> None:
        assert self.pending is not None
        batch, tokens = self.pending
        self.pending = None
        self.read()
        self.sched.postprocess(batch, dict.fromkeys(tokens, UNKNOWN) if ahead else tokens)
        for item in batch.sequences:
            if self.live.get(item.seq.request_id) is not item.seq:
                continue
            if ahead and item.samples:
                self.model.unread[item.seq] = tokens[item.seq.request_id]
            elif item.seq.is_complete or (item.samples and item.seq.token_ids[-1] == EOS):
                self.finish(item.seq)

    def read(self) -> None:
        """What the step before has left unread; whoever ends with it may be in the next step already."""
        unread, self.model.unread = self.model.unread, {}
        for seq, token in unread.items():
            assert seq.token_ids[-1] == UNKNOWN
            seq.token_ids[-1] = token
            if self.live.get(seq.request_id) is seq and (token == EOS or seq.has_all_tokens):
                self.finish(seq)

    def finish(self, seq: Sequence) -> None:
        self.sched.finish(seq.request_id)
        self.ended.append(self.live.pop(seq.request_id))

    @rule()
    def fail(self) -> None:
        if self.pending is not None:
            self.read()
            self.sched.discard(self.pending[0])
            self.pending = None

    @rule(index=st.integers(0, 7))
    def abort(self, index: int) -> None:
        for name in list(self.live)[index : index + 1]:
            assert self.sched.abort(name)
            assert not self.sched.abort(name)
            del self.live[name]

    @rule(adapter=st.sampled_from(["a", "b", "c"]))
    def forget(self, adapter: str) -> None:
        self.sched.forget(lambda key: key == adapter)
        self.versions[adapter] += 1

    def check_batch(self, batch: Batch, had_work: bool) -> None:
        sched, items = self.sched, batch.sequences
        assert bool(items) <= had_work
        assert items or not had_work or self.model.unread, "there is work, but nothing moves"
        assert batch.num_tokens <= sched.max_num_batched_tokens
        assert len(items) <= sched.max_num_seqs
        assert len({item.seq.request_id for item in items}) == len(items)
        decodes, prefills = items[: batch.num_decodes], items[batch.num_decodes :]
        assert all(item.num_tokens == 1 and item.start == len(item.seq) - 1 for item in decodes)
        assert all(item.num_tokens >= 1 for item in prefills)
        if decodes and sched.max_prefill_chunk is not None:
            assert sum(item.num_tokens for item in prefills) <= sched.max_prefill_chunk
        adapters = {item.seq.adapter_id for item in items} - {None}
        assert sched.max_adapters is None or len(adapters) <= sched.max_adapters
        for item in items:
            assert item.seq.status is SequenceStatus.RUNNING
            assert item.start == item.seq.num_computed_tokens
            at_end = item.start + item.num_tokens == len(item.seq)
            assert item.samples == (at_end and item.seq.max_tokens > 0)
            assert not (at_end and item.seq.waits_to_be_read) or item.num_tokens == 1, "an unread prompt"

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "sched"):
            self.sched.check_integrity()

    def teardown(self) -> None:
        """Everything that was accepted ends, in the steps that the oldest alone needs, one after another."""
        if not hasattr(self, "sched"):
            return
        enough = sum(2 * (len(seq) + seq.max_tokens) for seq in self.live.values()) + 1
        event(f"tokens unread: {bool(self.model.unread)}")
        self.steps(2 * (enough + bool(self.model.unread)) + (self.pending is not None), ahead=False)
        assert not self.sched.has_work, "a request starves"
        event(f"preempted: {self.sched.num_preemptions > 0}")
        event(f"found in the cache: {self.sched.blocks.stats.prefix_hits > 0}")
        assert not self.live
        assert self.sched.blocks.num_available == self.sched.blocks.num_blocks
        for seq in self.ended:
            self.check_generation(seq)

    def check_generation(self, seq: Sequence) -> None:
        """Chunks, preemptions and cached prefixes change nothing in what is generated."""
        alone = Sequence("alone", seq.token_ids[: seq.num_prompt_tokens], seq.max_tokens)
        self.model.identity[alone] = self.model.identity[seq]
        while len(alone) - alone.num_prompt_tokens < seq.max_tokens:
            alone.token_ids.append(self.model.next_token(alone))
            if alone.token_ids[-1] == EOS:
                break
        assert seq.token_ids == alone.token_ids


TestSchedulerMachine = pytest.mark.long(SchedulerMachine.TestCase)
TestSchedulerMachine.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
