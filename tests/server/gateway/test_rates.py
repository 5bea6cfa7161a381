"""The arithmetic of limits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.rates import Rate, Window
from server.settings import RATE


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1/second", Rate(1, 1)),
        ("60/minute", Rate(60, 60)),
        ("5/hour", Rate(5, 3600)),
        ("9/day", Rate(9, 86400)),
    ],
)
def test_rates_are_read(text: str, rate: Rate) -> None:
    assert re.fullmatch(RATE, text)
    assert Rate.parse(text) == rate


@pytest.mark.parametrize(
    "text", ["0/minute", "-1/minute", "1/week", "1", "/minute", "1.5/minute", "1/minute "]
)
def test_what_is_no_rate(text: str) -> None:
    assert not re.fullmatch(RATE, text)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    seconds = draw(st.integers(1, 86400))
    left = draw(st.floats(0, seconds))
    return Window(draw(st.integers(0, 10**6)), left, draw(st.integers(0, 10**6)), left, seconds)


def later(window: Window, seconds: float) -> Window:
    """The same counter after `seconds` in which nothing was counted."""
    if seconds <= window.current_left:
        left = window.current_left - seconds
        return replace(window, previous_left=left, current_left=left)
    left = max(0.0, window.seconds - (seconds - window.current_left))
    return Window(window.current, left, 0, left, window.seconds)


@given(windows(), st.integers(1, 10**6), st.data())
def test_after_the_wait_there_is_room_and_not_before(window: Window, limit: int, data: st.DataObject) -> None:
    cost = data.draw(st.integers(1, limit))
    wait = window.wait(limit, cost)
    assert 0 <= wait <= 2 * window.seconds
    slack = 1e-6 * (limit + window.previous + window.current)
    assert later(window, wait).used <= limit - cost + slack
    if wait > 1e-3:
        assert later(window, wait * 0.99).used >= limit - cost - slack
    else:
        assert window.used <= limit - cost + (window.previous + window.current) * 1e-2 + slack
