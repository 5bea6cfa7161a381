"""What a schema may cost, counted before anything is compiled."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.worker.schema_limits import excess, pattern_size


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("a*b+c?", 3),
        ("^[a-z]{2,5}$", 7),
        ("a{3}", 3),
        ("a{3,}", 3),
        ("a{0}", 1),
        ("(ab){10}", 30),
        ("((ab){10}c){10}", 320),
        ("(a{1000}){1000}", 1_001_000),
        ("a{10}{10}", 100),
        (r"\{5\}", 3),
        (r"[\]{9}]{2}", 2),
        ("[]a]{4}", 4),
        ("a|(b|c){2}", 7),
        ("x{", 2),
        (")a", 2),
        ("(a", 1),
        ("[a", 1),
        ("\\", 1),
    ],
)
def test_the_size_of_a_pattern(pattern: str, size: int):
    assert pattern_size(pattern) == size


@given(st.text(st.sampled_from("ab(){},[]\\019|*^")))
def test_any_text_has_a_size(pattern: str):
    assert pattern_size(pattern) >= 0
    assert excess({"pattern": pattern}) is None or pattern_size(pattern) > 20_000


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}, None),
        ({"anyOf": [{"items": {"properties": {f"p{i}": {} for i in range(1001)}}}]}, "1001 properties"),
        ({"$defs": {"x": {"patternProperties": {f"{i}": {} for i in range(17)}}}}, "17 patternProperties"),
        ({"patternProperties": {"(a{999}){999}": {}}}, "multiply"),
        ({"properties": {"pattern": {"type": "string"}, "properties": {"const": [1]}}}, None),
        ({"pattern": "a" * 1001}, "1001 characters"),
        ({"const": "a" * 2001}, "2001 characters"),
        ({"enum": ["a" * 2000]}, None),
        ({"enum": ["a", "a" * 2001]}, "2001 characters"),
        ({"const": {"a": ["b" * 100] * 100}}, "characters, of at most 2000"),
        ({"properties": {"a" * 2001: {}}}, "2001 characters"),
        ({"required": ["a" * 2001]}, "2001 characters"),
        ({"multipleOf": 9999991}, "9999991 remainders"),
        ({"multipleOf": 9_000_000_000}, None),
        ({"multipleOf": 0.05, "anyOf": [{"multipleOf": 1e-300}, {"multipleOf": 2.5e20}]}, None),
        ({"allOf": [{"multipleOf": 313}, {"items": {"multipleOf": 3.17}}]}, "99221 remainders"),
        ({"multipleOf": 12.345678}, "12345678 remainders"),
        ({"multipleOf": True, "items": {"multipleOf": "7"}}, None),
        ([1, None, "x"], None),
    ],
)
def test_what_is_too_much(schema: Any, word: str | None):
    found = excess(schema)
    assert (found is None) if word is None else (found is not None and word in found)
