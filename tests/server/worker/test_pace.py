"""How much may stand beside decodes, from what steps took."""

from __future__ import annotations

import pytest

from server.worker.pace import Pace


def test_nothing_known_lets_the_first_tokens_in_and_images_whole() -> None:
    pace = Pace(first=64)
    assert pace.prompt_tokens(1) == 64
    assert pace.spare_seconds(1) == float("inf")


def test_a_step_may_be_stretched_as_often_as_decoding_alone_takes() -> None:
    pace = Pace(stretch=3, least=4)
    pace.observe(1, 0, 0.010)
    pace.observe(0, 100, 0.040)  # 0.4 ms a token
    assert pace.spare_seconds(1) == pytest.approx(0.020)
    assert pace.prompt_tokens(1) == 50
    assert pace.prompt_tokens(1, spent=0.010) == 25
    assert pace.prompt_tokens(1, spent=1.0) == 4  # prompts move on, whatever else there is
    assert pace.spare_seconds(0) == float("inf")


def test_what_stands_beside_decodes_is_reckoned_without_them() -> None:
    pace = Pace(stretch=2, least=4)
    pace.observe(1, 0, 0.010)
    pace.observe(1, 20, 0.030)  # 1 ms a token
    assert pace.prompt_tokens(1) == 10


def test_many_decodes_are_told_from_few() -> None:
    pace = Pace(stretch=2, least=4)
    pace.observe(0, 100, 0.100)
    pace.observe(1, 0, 0.010)
    pace.observe(16, 0, 0.030)
    assert pace.prompt_tokens(1) == 10
    assert pace.prompt_tokens(20) == 30
    assert pace.prompt_tokens(64) == 30  # the nearest that is known


def test_one_slow_step_changes_nothing() -> None:
    pace = Pace(stretch=2, least=4)
    pace.observe(0, 100, 0.100)
    for seconds in (0.010, 0.010, 5.0, 0.010):
        pace.observe(1, 0, seconds)
    assert pace.prompt_tokens(1) == 10
