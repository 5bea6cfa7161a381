"""What a client is shown of an answer: whole characters, nothing of a stop string, every token once."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.worker.messages import Delta, TokenLogprob
from server.worker.output import OutputStream


class Decoder:
    """Token i is `pieces[i]`, which may be a part of a character."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(self._pieces[id] for id in ids))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def shown(pieces: Sequence[bytes], stop: Sequence[str]) -> tuple[list[Delta], bool]:
    """The deltas of an answer of these tokens, and whether a stop string ended it."""
    output = OutputStream(Decoder(pieces), stop)
    deltas = []
    for id in range(len(pieces)):
        deltas.append(output.push(id, TokenLogprob(id, str(id), -1.0)))
        if output.stopped:
            break
    else:
        deltas.append(output.finish())
    return [delta for delta in deltas if delta is not None], output.stopped


def cut(pieces: Sequence[bytes], stop: Sequence[str]) -> tuple[str, bool]:
    """The same with all of the text at hand: where the first stop string begins once one is complete."""
    for count in range(1, len(pieces) + 1):
        whole = count == len(pieces)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(b"".join(pieces[:count]), whole)
        places = [text.find(one) for one in stop if one in text]
        if places:
            return text[: min(places)], True
    return b"".join(pieces).decode(errors="replace"), False


FEW = st.text(alphabet="aბ😀", min_size=1, max_size=4)  # few letters, so that stop strings do occur


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet="aბ😀", max_size=20), st.data(), st.lists(FEW, max_size=3))
def test_an_answer_ends_before_its_first_stop_string(text: str, data: st.DataObject, stop: list[str]) -> None:
    raw = text.encode()
    ends = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=12)) | {0, len(raw)})
    pieces = [raw[start:end] for start, end in pairwise(ends)]
    deltas, stopped = shown(pieces, stop)
    assert ("".join(delta.text for delta in deltas), stopped) == cut(pieces, stop)
    ids = [id for delta in deltas for id in delta.token_ids]
    assert ids == list(range(len(ids)))  # in order, none twice
    assert stopped or len(ids) == len(pieces)
    assert [scored.token_id for delta in deltas for scored in delta.logprobs] == ids


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=3), max_size=10), st.lists(FEW, max_size=2))
def test_any_bytes(pieces: list[bytes], stop: list[str]) -> None:
    deltas, stopped = shown(pieces, stop)
    if not stopped:
        assert "".join(delta.text for delta in deltas) == b"".join(pieces).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["Hello", " wor", "ld"], ["xyz"], ["Hello", " wor", "ld"]),  # nothing is held back in vain
        (["a", "b", "c", "d"], ["bcx"], ["a", "bcd"]),  # it might have become one
        (["one EN", "D two"], ["END"], ["one "]),
        (["aa", "aa", "b"], ["aab"], ["aa"]),
        (["xEND"], ["ND", "END"], ["x"]),  # the one that begins first
        (["STOP"], ["STOP"], []),
    ],
)
def test_when_text_is_shown(pieces: list[str], stop: list[str], expected: list[str]) -> None:
    deltas, _ = shown([piece.encode() for piece in pieces], stop)
    assert [delta.text for delta in deltas if delta.text] == expected


@pytest.mark.parametrize(
    ("min_tokens", "expected", "ended"),
    [
        (0, "", True),
        (1, "a", True),
        (2, "ab", True),
        (3, "aba", True),
        (4, "abab", False),
        (9, "abab", False),
    ],
)
def test_no_stop_string_ends_the_first_tokens(min_tokens: int, expected: str, ended: bool) -> None:
    """Nor one that begins in them."""
    output = OutputStream(Decoder([b"a", b"b"] * 2), ["ab", "b"], min_tokens)
    deltas = []
    for id in range(4):
        deltas.append(output.push(id))
        if output.stopped:
            break
    else:
        deltas.append(output.finish())
    assert "".join(delta.text for delta in deltas if delta) == expected
    assert output.stopped is ended


def test_a_character_comes_whole() -> None:
    raw = "a😀b".encode()
    deltas, _ = shown([raw[:2], raw[2:4], raw[4:]], [])
    assert [delta.text for delta in deltas if delta.text] == ["a", "😀b"]


def test_what_is_held_back_costs_no_more_the_more_it_is() -> None:
    """A stop string may be as long as a body, and a biased answer may keep to its beginning throughout."""
    pieces = [b"a"] * 8000 + [b"c"]
    for stop in ("a" * 4000 + "b", "a" * 100_000):
        began = time.process_time()
        deltas, stopped = shown(pieces, [stop] * 4)
        assert time.process_time() - began < 5  # a pass over what is held at each token took half a minute
        assert "".join(delta.text for delta in deltas) == "a" * 8000 + "c"
        assert not stopped
