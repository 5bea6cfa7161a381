"""What a JSON schema may not be, because following it would hold up everybody's steps.

llguidance bounds its own work, but not in these: pairs of `patternProperties` and of optional
`properties` are compared one by one, a pattern's counted repetitions and all remainders of a `multipleOf` are
written out, and each step goes through a text of its own all over again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

MAX_PROPERTIES = 1000  # of one object
MAX_PATTERN_PROPERTIES = 16
MAX_PATTERN_CHARS = 1000
MAX_PATTERN_SIZE = 20_000  # characters, all repetitions written out

MAX_TEXT_CHARS = 2000  # of a value of `const` or `enum`, or of a property's name: about 1 ms for a row's mask
MAX_REMAINDERS = 10_000  # of all `multipleOf` together: 25 ms, and a few megabytes

_COUNTED = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def excess(schema: Any) -> str | None:
    """The first thing in `schema` that is too much, as a sentence's beginning; None if nothing is."""
    remainders = 1
    for node in _objects(schema):
        properties, patterned = node.get("properties"), node.get("patternProperties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            return f"{len(properties)} properties of one object, of at most {MAX_PROPERTIES}"
        if isinstance(patterned, dict) and len(patterned) > MAX_PATTERN_PROPERTIES:
            return f"{len(patterned)} patternProperties of one object, of at most {MAX_PATTERN_PROPERTIES}"
        longest = max(map(len, _texts(node)), default=0)
        if longest > MAX_TEXT_CHARS:
            return f"a value or name of {longest} characters, of at most {MAX_TEXT_CHARS}"
        remainders = math.lcm(remainders, _digits(node.get("multipleOf")))
        if remainders > MAX_REMAINDERS:
            return f"multipleOf has {remainders} remainders to tell apart, of at most {MAX_REMAINDERS}"
        for pattern in (node.get("pattern"), *(patterned if isinstance(patterned, dict) else ())):
            if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
                return f"a pattern of {len(pattern)} characters, of at most {MAX_PATTERN_CHARS}"
            if isinstance(pattern, str) and pattern_size(pattern) > MAX_PATTERN_SIZE:
                return f"the pattern {pattern[:80]!r}, whose repetitions multiply to over {MAX_PATTERN_SIZE}"
    return None


def _texts(node: dict[str, Any]) -> Iterator[str]:
    """What answers may have to repeat word for word."""
    for field in ("properties", "required"):
        names = node.get(field)
        if isinstance(names, dict | list):
            yield from (name for name in names if isinstance(name, str))
    values = node.get("enum")
    for value in (node.get("const"), *(values if isinstance(values, list) else ())):
        yield value if isinstance(value, str) else json.dumps(value)


def _digits(number: Any) -> int:
    """The digits of a decimal number without the zeros around them: its powers of ten cost nothing."""
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not number
        or not math.isfinite(number)
    ):
        return 1
    return int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits)))


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
