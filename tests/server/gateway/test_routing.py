"""Where requests go, as pure policy: alike together, nobody overloaded, little moved when workers change."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.gateway.clients.routing import SPREAD, choose, load_bound, prefix_key
from server.worker.messages import (
    ChatMessage,
    ChatPrompt,
    ContextItem,
    GenerateRequest,
    TextPrompt,
    TokenPrompt,
)

names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)
keys = st.binary(min_size=16, max_size=16)
loads = st.dictionaries(st.text(min_size=1, max_size=8), st.integers(0, 1000), min_size=1, max_size=8)


def asked(*messages: tuple[str, str], model: str = "m", **fields) -> GenerateRequest:
    prompt = ChatPrompt(tuple(ChatMessage(role, text) for role, text in messages), fields.pop("context", ()))
    return GenerateRequest("r", model, prompt, **fields)


@given(keys, loads)
def test_whoever_is_chosen_stays_within_the_bound(key: bytes, loads: dict[str, int]) -> None:
    chosen = choose(key, loads)
    mean = (sum(loads.values()) + 1) / len(loads)
    assert loads[chosen] < load_bound(loads)
    assert loads[chosen] + 1 <= SPREAD * mean + 1


@given(keys, loads)
def test_the_choice_is_a_function_of_key_and_loads(key: bytes, loads: dict[str, int]) -> None:
    backwards = dict(reversed(loads.items()))
    assert choose(key, loads) == choose(key, backwards)


@given(keys, names, st.data())
def test_losing_a_worker_moves_only_its_own_requests(
    key: bytes, names: list[str], data: st.DataObject
) -> None:
    idle = dict.fromkeys(names, 0)
    chosen = choose(key, idle)
    lost = data.draw(st.sampled_from(names))
    rest = {name: 0 for name in names if name != lost}
    if rest and lost != chosen:
        assert choose(key, rest) == chosen


@given(keys, names, st.integers(1, 60))
def test_a_hot_prefix_runs_over_in_one_order(key: bytes, names: list[str], requests: int) -> None:
    """All with the same key and none ending: everyone's load is bounded all along."""
    loads = dict.fromkeys(names, 0)
    for placed in range(requests):
        loads[choose(key, loads)] += 1
        assert max(loads.values()) <= SPREAD * (placed + 1) / len(names) + 1


def test_different_prefixes_spread_over_idle_workers() -> None:
    idle = {f"http://10.0.0.{i}:8001": 0 for i in range(4)}
    counts = Counter(choose(prefix_key(asked(("user", f"question {i}"))), idle) for i in range(1000))
    assert len(counts) == 4
    assert min(counts.values()) > 180  # of 250; a fair draw misses that once in a million


def test_a_conversation_keeps_its_key() -> None:
    first = asked(("system", "Be kind."), ("user", "Hello"))
    later = asked(("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "And then?"))
    assert prefix_key(first) == prefix_key(later)


def test_a_long_system_prompt_is_a_key_by_itself() -> None:
    rules = "rule " * 200
    assert prefix_key(asked(("system", rules), ("user", "a"))) == prefix_key(
        asked(("system", rules), ("user", "b"))
    )


def test_what_a_cache_cannot_share_has_another_key() -> None:
    distinct = [
        asked(("user", "Hello")),
        asked(("user", "Hello"), model="n"),
        asked(("user", "Hello!")),
        asked(("system", "Hello")),
        asked(("system", "x"), ("user", "Hello")),
        asked(("user", "Hello"), images=(b"one",)),
        asked(("user", "Hello"), images=(b"two",)),
        asked(("user", "Hello"), images=(bytes(20_000),)),
        asked(("user", "Hello"), images=(bytes(20_001),)),
        asked(("user", "Hello"), context=(ContextItem("ocr", "Total"),)),
        GenerateRequest("r", "m", TextPrompt("Hello")),
        GenerateRequest("r", "m", TokenPrompt((1, 2))),
        GenerateRequest("r", "m", TokenPrompt((12,))),
    ]
    assert len({prefix_key(request) for request in distinct}) == len(distinct)
    assert prefix_key(asked(("user", "x"), images=(b"old", b"new"))) == prefix_key(
        asked(("user", "x"), images=(b"new",))
    )


@given(st.text(), st.text(max_size=3))
def test_any_text_has_a_key(text: str, model: str) -> None:
    lone = "\ud800" + text
    assert len(prefix_key(GenerateRequest("r", model, TextPrompt(lone)))) == 16
    assert len(prefix_key(asked(("user", lone)))) == 16
