import math
import random
from dataclasses import replace

import pytest

from experts.reading_order import Piece, compose


def piece(
    text: str, x: float, y: float, *, height: float = 20, confidence: float = 0.9, angle: float = 0
) -> Piece:
    """`text` with its top left at (x, y) on a page that is then rotated by `angle` degrees."""
    width = height * max(len(text), 1) * 0.6
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    level = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    return Piece([(px * cos - py * sin, px * sin + py * cos) for px, py in level], text, confidence)


TABLE = [
    ("INVOICE", 10, 5),
    ("Espresso", 10, 50),
    ("$7.00", 400, 53),
    ("Total", 10, 90),
    ("amount", 120, 88),
    ("$48.20", 400, 86),
]
TABLE_TEXT = "INVOICE\nEspresso $7.00\nTotal amount $48.20"


@pytest.mark.parametrize("angle", [0, 3, -8, 25, 80])
@pytest.mark.parametrize("seed", range(5))
def test_lines_in_order_whatever_the_detectors_order_and_the_pages_skew(angle: float, seed: int) -> None:
    pieces = [piece(text, x, y, angle=angle) for text, x, y in TABLE]
    random.Random(seed).shuffle(pieces)
    assert compose(pieces, 0.5).text == TABLE_TEXT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("angle", [88, 90, 93])
def test_a_page_on_its_side_is_read_line_by_line(angle: float, seed: int) -> None:
    """A detector's corners begin at the picture's top left, which is the text's bottom left here."""
    pieces = [piece(text, x, y, angle=angle) for text, x, y in TABLE]
    pieces = [replace(p, corners=[p.corners[3], *p.corners[:3]]) for p in pieces]
    random.Random(seed).shuffle(pieces)
    assert compose(pieces, 0.5).text == TABLE_TEXT


def test_a_tall_box_on_an_upright_page_turns_nothing() -> None:
    tall = Piece([(300, 0), (310, 0), (310, 90), (300, 90)], "margin", 0.9)
    pieces = [piece("first line", 0, 0), piece("second line", 0, 30), piece("third line", 0, 60), tall]
    assert compose(pieces, 0.5).text == "first line\nsecond line margin\nthird line"


def test_a_large_heading_beside_small_print_takes_only_its_own_line() -> None:
    pieces = [
        piece("SALE", 0, 0, height=60),
        piece("first", 300, 2, height=15),
        piece("second", 300, 22, height=15),
        piece("third", 300, 44, height=15),
    ]
    assert compose(pieces, 0).text == "first\nSALE second\nthird"


def test_unsure_and_blank_pieces_are_dropped() -> None:
    pieces = [piece("sure", 0, 0), piece("unsure", 0, 40, confidence=0.59), piece("  ", 0, 80)]
    assert compose(pieces, 0.6).text == "sure"
    assert compose(pieces, 0.95).text == ""
    assert compose(pieces, 0.95).confidence is None
    assert compose([], 0).text == ""


def test_the_confidence_is_weighted_by_length() -> None:
    pieces = [piece("123456789", 0, 0, confidence=1.0), piece("x", 0, 50, confidence=0.5)]
    assert compose(pieces, 0).confidence == pytest.approx(0.95)
