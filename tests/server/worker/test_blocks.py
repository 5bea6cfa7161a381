"""Blocks: units of the policy, then random operations against a model of what each block contains."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.worker.blocks import BlockManager
from server.worker.sequence import Sequence


def sequence(tokens: list[int], key: Hashable = "a", name: str = "r") -> Sequence:
    return Sequence(name, list(tokens), max_tokens=8, cache_key=key)


def run(blocks: BlockManager, seq: Sequence) -> Sequence:
    """Allocate, as if computed in one step."""
    blocks.allocate(seq)
    blocks.commit(seq, len(seq))
    return seq


def test_a_second_prompt_finds_the_full_blocks_of_the_first() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    first = run(blocks, sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    second = sequence([1, 2, 3, 4, 5, 6, 7, 8, 0, 0])
    blocks.allocate(second)
    assert second.num_computed_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    stats = blocks.stats
    assert (stats.used, stats.cached, stats.prefix_queries, stats.prefix_hits) == (4, 2, 19, 8)
    blocks.check_integrity([first, second])


def test_at_least_one_token_of_a_known_prompt_is_computed() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    first = run(blocks, sequence([1, 2, 3, 4, 5, 6, 7, 8]))
    assert blocks.match_prefix(sequence([1, 2, 3, 4, 5, 6, 7, 8])) == first.block_table[:1]


def test_nothing_is_found_before_it_is_computed() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    first = sequence([1, 2, 3, 4, 5])
    blocks.allocate(first)
    assert blocks.match_prefix(sequence([1, 2, 3, 4, 5])) == []
    blocks.commit(first, 3)
    assert blocks.match_prefix(sequence([1, 2, 3, 4, 5])) == first.block_table[:1]


def test_another_key_finds_nothing() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    run(blocks, sequence([1, 2, 3], key=("a", 1, None)))
    assert blocks.match_prefix(sequence([1, 2, 3], key=("a", 2, None))) == []
    assert blocks.match_prefix(sequence([1, 2, 3], key=("a", 1, b"image"))) == []
    assert len(blocks.match_prefix(sequence([1, 2, 3], key=("a", 1, None)))) == 1


def test_equal_blocks_after_different_ones_are_different() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    run(blocks, sequence([1, 1, 7, 7, 0]))
    assert blocks.match_prefix(sequence([2, 2, 7, 7, 0])) == []
    assert blocks.match_prefix(sequence([7, 7, 0])) == []


def test_generated_tokens_are_cached_too() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    seq = run(blocks, sequence([1, 2, 3]))
    seq.token_ids.append(4)
    blocks.append(seq)
    blocks.commit(seq, 4)
    blocks.free(seq)
    assert len(blocks.match_prefix(sequence([1, 2, 3, 4, 5]))) == 2


@pytest.mark.parametrize(
    ("caching", "key", "skip"), [(False, "a", False), (True, None, False), (True, "a", True)]
)
def test_lookup_can_be_off_for_all_or_for_one(caching: bool, key: str | None, skip: bool) -> None:
    blocks = BlockManager(num_blocks=8, block_size=2, prefix_caching=caching)
    run(blocks, sequence([1, 2, 3], key=key))
    again = sequence([1, 2, 3], key=key)
    again.skip_prefix_lookup = skip
    blocks.allocate(again)
    assert again.num_computed_tokens == 0
    assert blocks.stats.prefix_queries == (3 if caching and key and not skip else 0) + (3 if skip else 0)
    blocks.commit(again, 3)


def test_a_key_of_none_is_never_published() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    run(blocks, sequence([1, 2, 3], key=None))
    assert blocks.stats.cached == 0


def test_the_same_prefix_computed_twice_is_kept_once() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    first, second = sequence([1, 2, 3, 4, 5]), sequence([1, 2, 3, 4, 6])
    blocks.allocate(first)
    blocks.allocate(second)
    assert set(first.block_table).isdisjoint(second.block_table)
    blocks.commit(first, 5)
    blocks.commit(second, 5)
    assert first.block_table[:2] == second.block_table[:2]
    assert blocks.stats.used == 4
    blocks.check_integrity([first, second])


def test_the_least_recently_used_contents_go_first_and_from_the_end() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1)
    for tokens in ([1, 2, 0], [3, 4, 0]):
        seq = sequence(tokens)
        blocks.allocate(seq)
        blocks.commit(seq, 2)  # two blocks cached, the third not
        blocks.free(seq)
    blocks.allocate(sequence([9]))
    assert len(blocks.match_prefix(sequence([1, 2, 0]))) == 1
    assert len(blocks.match_prefix(sequence([3, 4, 0]))) == 2


def test_a_find_makes_contents_recent() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1)
    for tokens in ([1, 0], [2, 0], [3, 0], [1, 0]):
        seq = sequence(tokens)
        blocks.allocate(seq)
        blocks.commit(seq, 1)
        blocks.free(seq)
    blocks.allocate(sequence([8, 9]))
    found = [len(blocks.match_prefix(sequence([first, 0]))) for first in (1, 2, 3)]
    assert found == [1, 0, 1]


def test_evictable_blocks_that_a_prompt_reuses_are_no_room_for_its_rest() -> None:
    blocks = BlockManager(num_blocks=3, block_size=1)
    old = run(blocks, sequence([1, 2]))
    blocks.free(old)
    assert blocks.can_allocate(sequence([1, 2, 3]))
    assert not blocks.can_allocate(sequence([1, 2, 3, 4]))
    assert not blocks.can_allocate(sequence([1, 2, 3]), spare=1)
    assert blocks.can_allocate(sequence([1, 2]), spare=1)


def test_blocks_without_room_are_refused() -> None:
    blocks = BlockManager(num_blocks=2, block_size=2)
    seq = run(blocks, sequence([1, 2, 3, 4]))
    seq.token_ids.append(5)
    assert not blocks.can_append(seq)
    with pytest.raises(AssertionError, match="no room"):
        blocks.append(seq)
    assert not blocks.can_allocate(sequence([1]))


def test_forget_drops_held_and_idle_blocks_of_matching_keys_only() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    held, kept = run(blocks, sequence([1, 2, 3], key="a")), run(blocks, sequence([1, 2, 3], key="b"))
    blocks.free(run(blocks, sequence([5, 6, 7], key="a")))
    blocks.forget(lambda key: key == "a")
    assert blocks.stats.cached == 1
    assert blocks.stats.used == 4
    assert blocks.match_prefix(sequence([1, 2, 3], key="a")) == []
    assert blocks.match_prefix(sequence([1, 2, 3], key="b")) == kept.block_table[:1]
    held.token_ids += [4]
    blocks.commit(held, 4)  # what follows a forgotten block is not cached either
    assert blocks.stats.cached == 1
    blocks.check_integrity([held, kept])
    blocks.free(held)
    assert blocks.num_available == 6


def test_reset_starts_anew_and_refuses_while_blocks_are_held() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    seq = run(blocks, sequence([1, 2, 3]))
    with pytest.raises(AssertionError, match="hold"):
        blocks.reset()
    blocks.free(seq)
    blocks.reset()
    stats = blocks.stats
    assert (stats.used, stats.cached, stats.prefix_queries) == (0, 0, 0)
    assert blocks.num_available == 8


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (16, 0), (-1, 1)])
def test_a_pool_of_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="kv_cache_mib"):
        BlockManager(num_blocks, block_size)


def test_integrity_notices_a_lost_block_and_a_wrong_table() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    seq = run(blocks, sequence([1, 2, 3]))
    seq.block_table.pop()
    with pytest.raises(AssertionError, match="disagree"):
        blocks.check_integrity([seq])


def test_an_append_does_not_look_at_earlier_tokens() -> None:
    """A generation costs linear time: each commit slices at most the one block that became full."""
    reads: list[int] = []

    class Watched(list[int]):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            reads.append(len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1)
            return super().__getitem__(index)

    blocks = BlockManager(num_blocks=100, block_size=4)
    seq = run(blocks, sequence([0] * 40))
    seq.token_ids = Watched(seq.token_ids)
    for token in range(200):
        seq.token_ids.append(token)
        blocks.append(seq)
        blocks.commit(seq, len(seq))
    assert sum(reads) == 200
    assert blocks.stats.cached == 60


class BlockMachine(RuleBasedStateMachine):
    """Sequences come, grow and go. `contents` says what each block was last filled with."""

    @initialize(num_blocks=st.integers(1, 24), block_size=st.integers(1, 3), caching=st.booleans())
    def start(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.contents: dict[int, tuple[Hashable, tuple[int, ...]]] = {}
        self.held: list[Sequence] = []
        self.count = 0

    def block_contents(self, seq: Sequence, index: int) -> tuple[Hashable, tuple[int, ...]]:
        return seq.cache_key, tuple(seq.token_ids[: (index + 1) * self.blocks.block_size])

    def compute(self, seq: Sequence, end: int) -> None:
        size = self.blocks.block_size
        for index in range(seq.num_computed_tokens // size, -(-end // size)):
            self.contents[seq.block_table[index]] = self.block_contents(seq, index)
        self.blocks.commit(seq, end)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), key=st.sampled_from(["a", "b", None]))
    def allocate(self, tokens: list[int], key: str | None) -> None:
        self.count += 1
        seq = sequence(tokens, key, str(self.count))
        if self.blocks.can_allocate(seq):
            self.blocks.allocate(seq)
            self.held.append(seq)
            assert seq.num_computed_tokens < len(seq)
            assert len(seq.block_table) == -(-len(seq) // self.blocks.block_size)

    @rule(index=st.integers(0, 5), num_tokens=st.integers(1, 12))
    def prefill(self, index: int, num_tokens: int) -> None:
        for seq in self.held[index : index + 1]:
            self.compute(seq, min(seq.num_computed_tokens + num_tokens, len(seq)))

    @rule(index=st.integers(0, 5), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def decode(self, index: int, tokens: list[int]) -> None:
        for seq in self.held[index : index + 1]:
            for token in tokens:
                self.compute(seq, len(seq))
                seq.token_ids.append(token)
                if self.blocks.can_append(seq):
                    self.blocks.append(seq)
                else:
                    assert self.blocks.num_available == 0
                    seq.token_ids.pop()

    @rule(index=st.integers(0, 5))
    def free(self, index: int) -> None:
        for seq in self.held[index : index + 1]:
            self.held.remove(seq)
            self.blocks.free(seq)

    @rule(key=st.sampled_from(["a", "b"]))
    def forget(self, key: str) -> None:
        self.blocks.forget(lambda other: other == key)
        assert not self.blocks.match_prefix(sequence([0] * 9, key))

    @invariant()
    def every_computed_block_holds_what_its_sequence_wrote(self) -> None:
        for seq in self.held:
            for index in range(seq.num_computed_tokens // self.blocks.block_size):
                key, tokens = self.contents[seq.block_table[index]]
                assert tokens == self.block_contents(seq, index)[1]
                assert key == seq.cache_key

    @invariant()
    def nothing_is_lost(self) -> None:
        self.blocks.check_integrity(self.held)

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            for seq in self.held:
                self.blocks.free(seq)
            self.blocks.check_integrity()
            assert self.blocks.num_available == self.blocks.num_blocks


TestBlockMachine = pytest.mark.long(BlockMachine.TestCase)
TestBlockMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
