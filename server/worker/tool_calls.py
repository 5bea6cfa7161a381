"""Calls of tools in the stream of an answer's text, taken out of it as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto

from models.tool_text import CALL_CLOSE, CALL_OPEN, CALL_SEPARATOR, call_head
from server.worker.messages import Delta, Event, Finished, Grammar, ToolCallDelta

_BEFORE_NAME, _, _AFTER_NAME = call_head("\0").partition(json.dumps("\0"))
_HEAD = re.compile(f'{re.escape(_BEFORE_NAME)}("(?:[^"\\\\]|\\\\.)*"){re.escape(_AFTER_NAME)}')


class _Place(Enum):
    TEXT = auto()  # before the first call
    ONLY_TEXT = auto()  # of an answer that no call can follow
    HEAD = auto()
    ARGUMENTS = auto()
    AFTER = auto()  # behind a call


class ToolCallReader:
    """Splits text that keeps to a grammar with tools. Never gives a part of a marker as text or arguments.

    Where the answer is JSON a call can only be all of it: what else has a marker in it is text.
    """

    def __init__(self, *, is_json: bool = False) -> None:
        self._is_json = is_json
        self._place = _Place.TEXT
        self._held = ""
        self.num_calls = 0  # whose name is known

    @property
    def is_within_call(self) -> bool:
        return self._place in (_Place.HEAD, _Place.ARGUMENTS)

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The answer's text, and the pieces of calls, that are certain now."""
        self._held += text
        shown = ""
        pieces: list[ToolCallDelta] = []
        while True:
            place = self._place
            match place:
                case _Place.TEXT if self._is_json and not _may_begin(self._held, CALL_OPEN):
                    self._place = _Place.ONLY_TEXT
                case _Place.ONLY_TEXT:
                    shown += self._held
                    self._held = ""
                case _Place.TEXT:
                    shown += self._upto(CALL_OPEN, _Place.HEAD)
                case _Place.HEAD:
                    self._read_head(pieces)
                case _Place.ARGUMENTS:
                    arguments = self._upto(CALL_CLOSE, _Place.AFTER)
                    if arguments:
                        pieces.append(ToolCallDelta(self.num_calls - 1, None, arguments))
                case _Place.AFTER:
                    self._upto(CALL_SEPARATOR + CALL_OPEN, _Place.HEAD)
            if self._place is place:
                return shown, pieces

    def finish(self) -> str:
        """The text that was held back in vain. Half of a marker within a call is nothing."""
        return self._held if self._place is _Place.TEXT else ""

    def _upto(self, marker: str, then: _Place) -> str:
        """What comes before the marker, or before what may become one at the end."""
        before, found, rest = self._held.partition(marker)
        if found:
            self._held, self._place = rest, then
            return before
        size = next(
            size for size in range(min(len(marker) - 1, len(before)), -1, -1)
            if before.endswith(marker[:size])
        )  # fmt: skip
        cut = len(before) - size
        self._held = before[cut:]
        return before[:cut]

    def _read_head(self, pieces: list[ToolCallDelta]) -> None:
        head = _HEAD.match(self._held)
        if head:
            pieces.append(ToolCallDelta(self.num_calls, json.loads(head[1]), ""))
            self.num_calls += 1
            self._held, self._place = self._held[head.end() :], _Place.ARGUMENTS


def _may_begin(text: str, marker: str) -> bool:
    """Whether `text` begins with `marker`, or may when it goes on."""
    return text.startswith(marker) or marker.startswith(text)


class ToolCallEvents:
    """Passes on to `emit` the events of a request with `grammar`, calls of tools as such and not as text."""

    def __init__(self, emit: Callable[[Event], None], grammar: Grammar) -> None:
        self._emit = emit
        self._reader = ToolCallReader(is_json=grammar.kind in ("json_object", "json_schema"))

    def __call__(self, event: Event) -> None:
        match event:
            case Delta():
                text, calls = self._reader.push(event.text)
                self._emit(replace(event, text=text, tool_calls=tuple(calls)))
            case Finished():
                # Cut off for its length, what may have become a marker is no text.
                if event.finish_reason == "stop" and (text := self._reader.finish()):
                    self._emit(Delta(text))
                called = self._reader.num_calls and not self._reader.is_within_call
                if called and event.finish_reason == "stop":
                    event = replace(event, finish_reason="tool_calls")
                self._emit(event)
            case _:
                self._emit(event)
