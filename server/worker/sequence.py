"""One request's tokens on their way through scheduler, blocks and runner. Plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto

UNKNOWN = -1  # stands for a token that the device has computed, or will have, and nobody has read


class SequenceStatus(Enum):
    WAITING = auto()  # holds no blocks
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """The caller sets the first six fields; scheduler and block manager own the rest.

    `token_ids` is the prompt, then what was generated; its last may be `UNKNOWN`. `adapter_id` is what
    takes turns in the queue and one place in the adapter bank; None is the base, which takes none.
    `cache_key` is all that keys and values depend on besides the tokens; None: neither looked up nor
    published.
    """

    request_id: str
    token_ids: list[int]
    max_tokens: int  # 0: the prompt is computed and nothing is sampled
    adapter_id: Hashable | None = None
    cache_key: Hashable | None = None
    skip_prefix_lookup: bool = False  # compute every position, as a prompt's log-probabilities need

    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = field(init=False, default=0)  # positions whose keys and values are in blocks
    num_cached_tokens: int = field(init=False, default=0)  # positions found in the cache when first admitted
    num_preemptions: int = field(init=False, default=0)
    block_table: list[int] = field(init=False, default_factory=list)
    status: SequenceStatus = field(init=False, default=SequenceStatus.WAITING)
    arrival: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """1: ready to decode; more: a prompt, or what a preemption makes it compute again."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def lacks_one(self) -> bool:
        """It decodes in the next step."""
        return self.num_uncomputed_tokens == 1 and not self.is_complete

    @property
    def waits_to_be_read(self) -> bool:
        """Its last token is not known yet."""
        return self.token_ids[-1] == UNKNOWN

    @property
    def has_all_tokens(self) -> bool:
        """`max_tokens` is reached."""
        return len(self.token_ids) - self.num_prompt_tokens >= self.max_tokens

    @property
    def is_complete(self) -> bool:
        """Nothing is left to compute or to sample."""
        return self.has_all_tokens and self.num_computed_tokens >= self.num_prompt_tokens
