"""Paged KV blocks: who holds them, and whose contents can be used again.

A block is free (nothing worth keeping), held (by one or more sequences) or evictable (held by nobody,
contents cached). Position p of a sequence lives in slot
`block_table[p // block_size] * block_size + p % block_size`.

Cached contents form a trie: below each `cache_key`, one node per full block, keyed by the block's own
token ids. A lookup compares the tokens themselves, so that no hash collision can serve another
prompt's block. Whoever holds a block holds all before it, and a sequence gives its blocks back last
one first: the least recently used evictable block is always a leaf, and the trie never loses an inner
node.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from server.worker.sequence import Sequence

_NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class BlockStats:
    """Blocks now, and tokens since the start: looked up in the prefix cache, and found there.

    A sequence counts once, when it is first admitted: not again after a preemption.
    """

    total: int
    used: int  # held by sequences
    cached: int  # contents that a later prompt may find, held or not
    prefix_queries: int
    prefix_hits: int


@dataclass(slots=True, eq=False)
class _Node:
    """One cached block. A cache key's own node has neither parent nor block."""

    key: Hashable  # the block's token ids, or the cache key
    parent: _Node | None = None
    block: int = _NO_BLOCK
    children: dict[Hashable, _Node] = field(default_factory=dict)


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens.

    What a sequence asks for costs at most its number of blocks; a decode step and a commit cost O(1).
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"{num_blocks} blocks of {block_size} tokens hold nothing; raise kv_cache_mib or block_size"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._clear()

    def _clear(self) -> None:
        self._free = list(range(self.num_blocks - 1, -1, -1))  # a stack
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders = [0] * self.num_blocks
        self._roots: dict[Hashable, _Node] = {}  # by cache key
        self._nodes: dict[int, _Node] = {}  # by cached block
        self._queries = 0
        self._hits = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be had now, some by evicting cached contents."""
        return len(self._free) + len(self._evictable)

    @property
    def stats(self) -> BlockStats:
        return BlockStats(
            total=self.num_blocks,
            used=self.num_blocks - self.num_available,
            cached=len(self._nodes),
            prefix_queries=self._queries,
            prefix_hits=self._hits,
        )

    def match_prefix(self, seq: Sequence) -> list[int]:
        """The cached blocks that `seq` begins with; never all of it, for one token must be computed."""
        if not self._looks_up(seq):
            return []
        blocks: list[int] = []
        node = self._roots.get(seq.cache_key)
        for index in range((len(seq) - 1) // self.block_size):
            node = node and node.children.get(self._tokens(seq, index))
            if node is None:
                break
            blocks.append(node.block)
        return blocks

    def can_allocate(self, seq: Sequence, spare: int = 0) -> bool:
        """Whether all known tokens of a waiting sequence find room, with `spare` blocks left over."""
        matched = self.match_prefix(seq)
        revived = sum(self._holders[block] == 0 for block in matched)
        missing = self._num_blocks_for(seq) - len(matched)
        return missing + spare <= self.num_available - revived

    def allocate(self, seq: Sequence) -> None:
        """Blocks for all known tokens; `num_computed_tokens` then says how many a cached prefix spares."""
        assert not seq.block_table, f"{seq.request_id} has blocks already"
        for block in self.match_prefix(seq):
            self._hold(block)
            seq.block_table.append(block)
        seq.num_computed_tokens = len(seq.block_table) * self.block_size
        if self._looks_up(seq) and not seq.num_preemptions:  # what it finds of its own spares no caller
            self._queries += len(seq)
            self._hits += seq.num_computed_tokens
        self.append(seq)

    def can_append(self, seq: Sequence) -> bool:
        """Whether the tokens that a running sequence gained find room."""
        return self._num_blocks_for(seq) - len(seq.block_table) <= self.num_available

    def append(self, seq: Sequence) -> None:
        """Extend the block table to all known tokens."""
        assert self.can_append(seq), f"no room for {seq.request_id}"
        for _ in range(self._num_blocks_for(seq) - len(seq.block_table)):
            seq.block_table.append(self._take())

    def commit(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Keys and values up to `num_computed_tokens` are written, or will be before the device does anything
        else; blocks that became full are cached."""
        if self.prefix_caching and seq.cache_key is not None:
            for index in range(
                seq.num_computed_tokens // self.block_size, num_computed_tokens // self.block_size
            ):
                self._publish(seq, index)
        seq.num_computed_tokens = num_computed_tokens

    def free(self, seq: Sequence) -> None:
        """Take the sequence's blocks back; what is cached stays until its block is needed."""
        for block in reversed(seq.block_table):
            self._release(block)
        seq.block_table.clear()
        seq.num_computed_tokens = 0

    def forget(self, matches: Callable[[Hashable], bool]) -> None:
        """Drop the cached contents under every cache key that `matches`; holders keep their blocks."""
        for key in [key for key in self._roots if matches(key)]:
            nodes = list(self._roots.pop(key).children.values())
            while nodes:
                node = nodes.pop()
                nodes.extend(node.children.values())
                del self._nodes[node.block]
                if node.block in self._evictable:
                    del self._evictable[node.block]
                    self._free.append(node.block)

    def reset(self) -> None:
        """Everything free, nothing cached, counters at 0. No sequence may hold a block."""
        assert not any(self._holders), "reset while sequences hold blocks"
        self._clear()

    def _num_blocks_for(self, seq: Sequence) -> int:
        return -(-len(seq) // self.block_size)

    def _looks_up(self, seq: Sequence) -> bool:
        return self.prefix_caching and seq.cache_key is not None and not seq.skip_prefix_lookup

    def _tokens(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _publish(self, seq: Sequence, index: int) -> None:
        """Cache the sequence's full block `index`, or swap it for its twin that is cached already.

        Without the swap a sequence could hold a cached block but not the one before it, which then
        could be evicted first.
        """
        parent = self._nodes.get(seq.block_table[index - 1]) if index else self._root(seq.cache_key)
        if parent is None:  # forgotten since
            return
        block, tokens = seq.block_table[index], self._tokens(seq, index)
        twin = parent.children.get(tokens)
        if twin is not None:
            self._hold(twin.block)
            seq.block_table[index] = twin.block
            self._release(block)
        else:
            self._nodes[block] = parent.children[tokens] = _Node(tokens, parent, block)

    def _root(self, cache_key: Hashable) -> _Node:
        return self._roots.setdefault(cache_key, _Node(cache_key))

    def _hold(self, block: int) -> None:
        self._evictable.pop(block, None)
        self._holders[block] += 1

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._nodes:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        if not self._free:
            self._evict()
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        node = self._nodes.pop(block)
        parent = node.parent
        assert parent is not None, f"block {block} is cached below no key"
        assert not node.children, f"block {block} would go before its children"
        del parent.children[node.key]
        if parent.parent is None and not parent.children:  # a key goes with its last block
            del self._roots[parent.key]
        self._free.append(block)

    def check_integrity(self, sequences: Iterable[Sequence] = ()) -> None:
        """Assert that nothing is lost, shared wrongly or cached out of order.

        `sequences` are all that may hold blocks. Costs O(blocks); for tests and idle moments.
        """
        holders = [0] * self.num_blocks
        for seq in sequences:
            assert len(set(seq.block_table)) == len(seq.block_table), f"{seq.request_id} has a block twice"
            for block in seq.block_table:
                holders[block] += 1
        assert holders == self._holders, "holders and block tables disagree"

        held = {block for block, count in enumerate(holders) if count}
        idle = [*self._free, *self._evictable]
        assert sorted([*held, *idle]) == list(range(self.num_blocks)), "a block is lost or in two places"
        assert self._nodes.keys().isdisjoint(self._free), "a free block is cached"
        assert self._nodes.keys() >= self._evictable.keys(), "an evictable block is not cached"
        assert all(root.children for root in self._roots.values()), "a cache key outlived its last block"
        self._check_trie()

    def _check_trie(self) -> None:
        age = {block: age for age, block in enumerate(self._evictable)}
        reached: set[int] = set()
        parents = list(self._roots.values())
        while parents:
            parent = parents.pop()
            parents.extend(parent.children.values())
            for key, node in parent.children.items():
                assert (node.key, node.parent) == (key, parent), f"block {node.block} is filed wrongly"
                assert self._nodes.get(node.block) is node, f"block {node.block} is cached as another"
                assert isinstance(key, tuple), f"block {node.block} is keyed by no tokens"
                assert len(key) == self.block_size, f"block {node.block} is cached before it was full"
                reached.add(node.block)
            if parent.block == _NO_BLOCK:
                continue
            held_below = sum(self._holders[node.block] for node in parent.children.values())
            assert self._holders[parent.block] >= held_below, f"block {parent.block} is held below, not here"
            youngest = max((age.get(node.block, -1) for node in parent.children.values()), default=-1)
            assert youngest < age.get(parent.block, len(age)), (
                f"block {parent.block} would go before its children"
            )
        assert reached == self._nodes.keys(), "a cached block is out of reach"
