"""JSON files larger than memory, one item at a time, each with the line it begins on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from train.errors import DataError

_CHUNK = 1 << 20
_MAX_ITEM = 64 << 20  # characters
_EXPONENT = 4  # a number that ends so close to what was read, such as 1 of 1.5 or 1e-5, might go on
_WHITESPACE = " \t\r\n"


class Item(NamedTuple):
    """An array's item, or an object's member with its key."""

    line: int
    key: str | None
    value: Any


def stream_items(stream: TextIO, file: Path, member: str | None = None) -> Iterator[Item]:
    """Items of the top-level array, or members of the top-level object.

    With `member`: the items of the array under that key of the top-level object. Raises DataError where
    the file is not such JSON; memory is bounded by its largest item.
    """
    reader = _Reader(stream, file)
    if member is not None:
        yield from reader.array_under(member)
    elif reader.peek() == "[":
        for line, value in reader.array():
            yield Item(line, None, value)
    elif reader.peek() == "{":
        for key in reader.keys():  # noqa: SIM118 - it reads on
            yield Item(reader.line, key, reader.value())
    else:
        raise reader.error("a JSON array or object should begin here")
    if reader.peek():
        raise reader.error("something follows the end of the JSON; JSON lines belong in a .jsonl file")


class _Reader:
    """A cursor in a text that is read as it moves."""

    def __init__(self, stream: TextIO, file: Path) -> None:
        self._stream = stream
        self._file = file
        self._text = ""
        self._at = 0
        self._ended = False
        self._decoder = json.JSONDecoder()
        self.line = 1

    def error(self, reason: str) -> DataError:
        return DataError(self._file, self.line, reason)

    def peek(self) -> str:
        """The next character that is no whitespace, or nothing at the end; `line` is then its line."""
        while True:
            while self._at < len(self._text):
                char = self._text[self._at]
                if char not in _WHITESPACE:
                    return char
                self.line += char == "\n"
                self._at += 1
            if not self._fill():
                return ""

    def value(self) -> Any:
        """The JSON value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.error("the JSON is nested too deeply") from error
            except ValueError as error:
                if len(self._text) - self._at > _MAX_ITEM or not self._fill():
                    raise self.error(f"this is not JSON: {error}") from error
                continue
            if isinstance(value, int | float) and len(self._text) - end < _EXPONENT and self._fill():
                continue
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def array(self) -> Iterator[tuple[int, Any]]:
        """(line, item) of the array that begins here."""
        yield from self._between("[", "]", lambda: (self.line, self.value()))

    def keys(self) -> Iterator[str]:
        """Keys of the object that begins here; whoever takes one reads its value before the next."""
        yield from self._between("{", "}", self._key)

    def array_under(self, member: str) -> Iterator[Item]:
        found = False
        if self.peek() != "{":
            raise self.error("a JSON object should begin here")
        for key in self.keys():
            if self.peek() != "[":
                self.value()
                continue
            for line, value in self.array():
                if key == member:
                    yield Item(line, None, value)
            found = found or key == member
        if not found:
            raise self.error(f"the object has no array {member!r}; is the format right?")

    def _between(self, opening: str, closing: str, read: Any) -> Iterator[Any]:
        self._take(opening)
        if self.peek() == closing:
            self._take(closing)
            return
        while True:
            self.peek()
            yield read()
            if self.peek() == closing:
                self._take(closing)
                return
            self._take(",")

    def _key(self) -> str:
        if self.peek() != '"':
            raise self.error("a key in double quotes should stand here")
        key: str = self.value()
        self._take(":")
        self.peek()
        return key

    def _take(self, char: str) -> None:
        found = self.peek()
        if found != char:
            raise self.error(
                f"{char!r} should stand here, not {found!r}" if found else "the file ends too early"
            )
        self._at += 1

    def _fill(self) -> bool:
        """Read on, at least doubling an item that is already long, so that it is parsed few times."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        more = self._stream.read(max(_CHUNK, len(rest)))
        if not more:
            self._ended = True
            return False
        self._text, self._at = rest + more, 0
        return True
