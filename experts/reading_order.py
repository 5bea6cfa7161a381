"""From the boxes of a text detector to text as a person reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from experts.contract import Reading

Point = Sequence[float]  # x to the right, y down, in pixels


@dataclass(frozen=True, slots=True)
class Piece:
    """What a recogniser read in one box. Four `corners`, clockwise from the text's top left.

    Of a page on its side they are taken to begin at the picture's top left, where detectors begin.
    """

    corners: Sequence[Point]
    text: str
    confidence: float


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece in the page's own, levelled frame."""

    left: float
    middle: float
    height: float
    text: str


def compose(pieces: Iterable[Piece], min_confidence: float) -> Reading:
    """The pieces' text, top to bottom, those on one line joined by a space.

    Pieces below `min_confidence` are left out. The confidence is the rest's mean, weighted by length.
    """
    kept = [p for p in pieces if p.confidence >= min_confidence and p.text.strip()]
    if not kept:
        return Reading("")
    if _turned(kept):
        kept = [replace(p, corners=[*p.corners[1:], p.corners[0]]) for p in kept]
    angle = _skew(kept)
    rows = _rows([_place(piece, angle) for piece in kept])
    text = "\n".join(" ".join(placed.text for placed in row) for row in rows)
    weight = sum(len(p.text) for p in kept)
    return Reading(text, confidence=sum(p.confidence * len(p.text) for p in kept) / weight)


def _turned(pieces: Sequence[Piece]) -> bool:
    """Whether the page lies on its right side, its lines running down: most long boxes are tall.

    On its left side its lines would run up, but recognisers take a tall box for one that runs down.
    """
    votes = 0
    for piece in pieces:
        top_left, top_right, _, bottom_left = piece.corners
        width, height = math.dist(top_left, top_right), math.dist(top_left, bottom_left)
        votes += (height >= 2 * width) - (width >= 2 * height)
    return votes > 0


def _skew(pieces: Sequence[Piece]) -> float:
    """The page's rotation in radians: the median of its long lines, whose direction is sure."""
    angles = []
    for piece in pieces:
        top_left, top_right, _, bottom_left = piece.corners
        if math.dist(top_left, top_right) >= 2 * math.dist(top_left, bottom_left):
            angles.append(math.atan2(top_right[1] - top_left[1], top_right[0] - top_left[0]))
    return median(angles) if angles else 0.0


def _place(piece: Piece, angle: float) -> _Placed:
    cos, sin = math.cos(angle), math.sin(angle)
    level = [(x * cos + y * sin, y * cos - x * sin) for x, y in piece.corners]
    tops, bottoms = (level[0][1] + level[1][1]) / 2, (level[2][1] + level[3][1]) / 2
    return _Placed(
        left=min(x for x, _ in level),
        middle=(tops + bottoms) / 2,
        height=abs(bottoms - tops),
        text=piece.text.strip(),
    )


def _rows(placed: Sequence[_Placed]) -> list[list[_Placed]]:
    """A piece joins the row above if its middle lies within half the lower of the two heights."""
    rows: list[list[_Placed]] = []
    for piece in sorted(placed, key=lambda p: p.middle):
        if rows:
            middle = sum(p.middle for p in rows[-1]) / len(rows[-1])
            height = min(piece.height, *(p.height for p in rows[-1]))
            if piece.middle - middle < height / 2:
                rows[-1].append(piece)
                continue
        rows.append([piece])
    return [sorted(row, key=lambda p: p.left) for row in rows]
