"""What a JSON schema may not be, because following it would hold up everybody's steps.

llguidance bounds its own work, but not in these: pairs of `patternProperties` and of optional
`properties` are compared one by one, and a pattern's counted repetitions are written out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MAX_PROPERTIES = 1000  # of one object
MAX_PATTERN_PROPERTIES = 16
MAX_PATTERN_CHARS = 1000
MAX_PATTERN_SIZE = 20_000  # characters, all repetitions written out

_COUNTED = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def excess(schema: Any) -> str | None:
    """The first thing in `schema` that is too much, as a sentence's beginning; None if nothing is."""
    for node in _objects(schema):
        properties, patterned = node.get("properties"), node.get("patternProperties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            return f"{len(properties)} properties of one object, of at most {MAX_PROPERTIES}"
        if isinstance(patterned, dict) and len(patterned) > MAX_PATTERN_PROPERTIES:
            return f"{len(patterned)} patternProperties of one object, of at most {MAX_PATTERN_PROPERTIES}"
        for pattern in (node.get("pattern"), *(patterned if isinstance(patterned, dict) else ())):
            if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
                return f"a pattern of {len(pattern)} characters, of at most {MAX_PATTERN_CHARS}"
            if isinstance(pattern, str) and pattern_size(pattern) > MAX_PATTERN_SIZE:
                return f"the pattern {pattern[:80]!r}, whose repetitions multiply to over {MAX_PATTERN_SIZE}"
    return None


def pattern_size(pattern: str) -> int:
    """About how many characters a regular expression has, each `x{m,n}` written out n times."""
    sizes, last, position = [0], 0, 0  # of the open groups; of what a repetition would repeat
    while position < len(pattern):
        char = pattern[position]
        counted = _COUNTED.match(pattern, position)
        if counted:
            times = int(counted[2] or counted[1])
            sizes[-1] += last * max(times - 1, 0)
            last *= times
            position = counted.end()
            continue
        if char == "(":
            sizes.append(0)
        elif char == ")" and len(sizes) > 1:
            last = sizes.pop() + 1
            sizes[-1] += last
        elif char not in "*+?|":
            position = _end_of_atom(pattern, position) - 1
            last = 1
            sizes[-1] += 1
        position += 1
    return sum(sizes)


def _end_of_atom(pattern: str, start: int) -> int:
    """Where one character, escape or class ends."""
    if pattern[start] == "\\":
        return start + 2
    if pattern[start] != "[":
        return start + 1
    position = start + 1
    for literal in "^]":  # what comes first in a class does not end it
        position += pattern.startswith(literal, position)
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from _objects(item)
