"""Calls in an answer's text, however it is cut into pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tool_text import call_text
from server.worker.messages import Delta, Event, Finished, Grammar, Started, ToolCallDelta, Usage
from server.worker.tool_calls import ToolCallEvents

USAGE = Usage(1, 2)
ARGUMENTS = st.dictionaries(
    st.text(max_size=3), st.one_of(st.integers(), st.text("}\n</tool_call>{ab", max_size=20)), max_size=3
).map(json.dumps)
CALLS = st.lists(st.tuples(st.text(max_size=5), ARGUMENTS), max_size=3)
TEXTS = st.text("<tool_cal>x\n", max_size=30).filter(lambda text: "<tool_call>" not in text)


def read(pieces: list[str], reason: str = "stop", kind: str = "text") -> list[Event]:
    events: list[Event] = []
    see = ToolCallEvents(events.append, Grammar(kind))  # type: ignore[arg-type]
    for piece in pieces:
        see(Delta(piece, (1,)))
    see(Finished(reason, USAGE))  # type: ignore[arg-type]
    return events


def put_together(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    deltas = [event for event in events if isinstance(event, Delta)]
    calls: list[tuple[str, str]] = []
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        if piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        name, arguments = calls[piece.index]
        calls[piece.index] = (name, arguments + piece.arguments)
    return "".join(delta.text for delta in deltas), calls


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


@given(TEXTS, CALLS, st.lists(st.integers(0, 500), max_size=40))
def test_any_cut_reads_the_same(text: str, calls: list[tuple[str, str]], places: list[int]):
    whole = text + "\n".join(call_text(*call) for call in calls)
    if not calls and whole.endswith("<tool_call>"):
        return
    events = read(cut(whole, places))
    assert put_together(events) == (text, calls)
    assert events[-1] == Finished("tool_calls" if calls else "stop", USAGE)


@given(CALLS.filter(len), st.integers(0, 500), st.sampled_from(["length", "stop"]))
def test_a_truncated_call_shows_no_marker(calls: list[tuple[str, str]], place: int, reason: str):
    whole = "\n".join(call_text(*call) for call in calls)
    cut_off = whole[: place % len(whole)]
    events = read(list(cut_off), reason)
    text, read_calls = put_together(events)
    assert text == ("" if reason == "length" or "<tool_call>" in cut_off else cut_off)
    for (name, arguments), (full_name, full_arguments) in zip(read_calls, calls, strict=False):
        assert name == full_name
        assert full_arguments.startswith(arguments)
    within = cut_off.count("<tool_call>\n{") > cut_off.count("}\n</tool_call>")
    if reason == "length" or within:
        assert events[-1].finish_reason == reason


def test_pieces_come_as_soon_as_they_are_certain():
    events = read(
        ["Hm <tool", "_call>", '\n{"name": "f", "arg', 'uments": {"a', '": 1', "}", "}", "\n</tool_call>"]
    )
    assert [(e.text, e.tool_calls) for e in events if isinstance(e, Delta)] == [
        ("Hm ", ()),
        ("", ()),
        ("", ()),
        ("", (ToolCallDelta(0, "f", ""), ToolCallDelta(0, None, '{"a'))),
        ("", (ToolCallDelta(0, None, '": 1'),)),
        ("", ()),
        ("", (ToolCallDelta(0, None, "}"),)),
        ("", ()),
    ]
    assert all(event.token_ids == (1,) for event in events if isinstance(event, Delta))


@pytest.mark.parametrize("text", ["", "a < b", "<tool", "</tool_call>"])
def test_text_without_calls_is_left_alone(text: str):
    assert put_together(read([text])) == (text, [])


def test_other_events_pass():
    events: list[Event] = []
    ToolCallEvents(events.append, Grammar("text"))(Started(3))
    assert events == [Started(3)]


@given(
    st.dictionaries(st.text(max_size=3), st.text("<tool_cal>\n", max_size=20)), st.lists(st.integers(0, 99))
)
def test_in_json_a_marker_is_text(answer: dict[str, str], places: list[int]):
    whole = json.dumps(answer | {"": "<tool_call>"})
    events = read(cut(whole, places), kind="json_object")
    assert put_together(events) == (whole, [])
    assert events[-1] == Finished("stop", USAGE)


@given(CALLS.filter(len), st.lists(st.integers(0, 500), max_size=40))
def test_calls_in_the_place_of_json(calls: list[tuple[str, str]], places: list[int]):
    whole = "\n".join(call_text(*call) for call in calls)
    events = read(cut(whole, places), kind="json_schema")
    assert put_together(events) == ("", calls)
    assert events[-1] == Finished("tool_calls", USAGE)
