"""What vLLM's tokens become is what the native step loop makes of them."""

from __future__ import annotations

from server.worker.messages import Delta, Finished, SamplingParams, Usage
from server.worker.request import Prepared
from server.worker.vllm_answer import Answer


class Letters:
    """A tokenizer whose tokens are code points."""

    eos_ids = frozenset({1})
    strips_leading_space = False

    def token_bytes(self, id: int) -> bytes:
        return chr(id).encode()

    def partial_bytes(self, id: int) -> None:
        return None


def test_no_stop_string_ends_the_first_tokens() -> None:
    params = SamplingParams(min_tokens=3)
    answer = Answer(Prepared("r", [5], params, max_tokens=9, stop=("x",)), Letters())  # type: ignore[arg-type]
    events = answer.push([ord("x")] * 9, None, 0)
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "xxx"
    assert events[-1] == Finished("stop", Usage(1, 4))
