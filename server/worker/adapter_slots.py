"""Who sits in which slot of a cache with few places. Plain Python, no tensors.

One table serves the adapter bank (keys are adapters), one the prompt cache (keys are adapters with
images). A step asks for all the keys it needs at once; they keep each other's places.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable


class SlotTable:
    """Keys in slots 1 … capacity, least recently used first to go. Slot 0 means: nothing."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: OrderedDict[Hashable, int] = OrderedDict()  # least recently used first
        self._free = list(range(capacity, 0, -1))

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._slots

    @property
    def has_room(self) -> bool:
        """Whether a new key takes no other one's place."""
        return bool(self._free)

    def assign(self, keys: Iterable[Hashable]) -> tuple[dict[Hashable, int], list[Hashable]]:
        """Slots of all `keys`, and which of them are new to theirs and have to be filled.

        At most `capacity` different keys. None is slot 0.
        """
        wanted = dict.fromkeys(key for key in keys if key is not None)
        assert len(wanted) <= self.capacity, "a step needs more slots than there are"
        for key in wanted.keys() & self._slots.keys():
            self._slots.move_to_end(key)
        missing = [key for key in wanted if key not in self._slots]
        for key in missing:
            self._slots[key] = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        return {None: 0, **{key: self._slots[key] for key in wanted}}, missing

    def forget(self, matches: Callable[[Hashable], bool]) -> None:
        """Give back the slots of matching keys."""
        for key in [key for key in self._slots if matches(key)]:
            self._free.append(self._slots.pop(key))

    def check_integrity(self) -> None:
        """Assert that every slot has one holder or is free."""
        taken = [*self._slots.values(), *self._free]
        assert sorted(taken) == list(range(1, self.capacity + 1)), "a slot is lost or held twice"
