"""Caption metrics against values computed by hand, and what must hold of any."""

from __future__ import annotations

import math

import pytest

from train.errors import EvaluationError
from train.evaluation.caption_metrics import METRICS, score_captions, tokenize, word_f1

CAPTIONS = [
    "a dog runs over the green grass",
    "two red cups stand on a wooden table",
    "an old man reads the morning paper",
]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A Man's T-shirt.", ["a", "man", "'s", "t-shirt"]),
        ("It isn't 3.5 m (or 1,000)!", ["it", "is", "n't", "3.5", "m", "or", "1,000"]),
        ("cannot ‘see’ “it” — ok...", ["can", "not", "see", "it", "ok"]),
        ("50% & more; e-mail", ["50", "%", "&", "more", "e-mail"]),
        ("", []),
        ("?!", []),
    ],
)
def test_tokens(caption: str, words: list[str]) -> None:
    assert tokenize(caption) == words


def test_identical_captions_reach_every_metric_s_height() -> None:
    scores = score_captions([[caption] for caption in CAPTIONS], CAPTIONS)
    assert list(scores.total) == list(METRICS)
    for name in METRICS:
        assert scores.total[name] == pytest.approx(1000 if name == "CIDEr" else 100, abs=1e-4), name


def test_captions_without_a_common_word_score_nothing() -> None:
    scores = score_captions([[caption] for caption in CAPTIONS], ["x", "", "y z"])
    assert scores.total == pytest.approx(dict.fromkeys(METRICS, 0.0), abs=1e-4)


def test_bleu_and_rouge_by_hand() -> None:
    """Four of six words, three of five pairs, two of four triples; the answer is as long as the reference."""
    scores = score_captions([["a b c d e f"]], ["a b c d x y"]).total
    one, two, three, four = 4 / 6, 3 / 5, 2 / 4, 1 / 3
    assert scores["BLEU-1"] == pytest.approx(100 * one)
    assert scores["BLEU-2"] == pytest.approx(100 * (one * two) ** (1 / 2))
    assert scores["BLEU-3"] == pytest.approx(100 * (one * two * three) ** (1 / 3))
    assert scores["BLEU-4"] == pytest.approx(100 * (one * two * three * four) ** (1 / 4))
    assert scores["ROUGE-L"] == pytest.approx(100 * 4 / 6)  # P = R: F is the same for any beta


def test_bleu_punishes_brevity() -> None:
    scores = score_captions([["a b c d e f"]], ["a b c"]).total
    assert scores["BLEU-1"] == pytest.approx(100 * math.exp(1 - 6 / 3))


def test_bleu_is_of_all_answers_together_and_takes_the_closest_lengths() -> None:
    """Clipped by each picture's references: one of two, and two of four words; 6 words for 2 + 3 closest."""
    scores = score_captions([["a b", "a b c d"], ["x y z"]], ["a a", "x x y q"]).total
    assert scores["BLEU-1"] == pytest.approx(100 * 3 / 6)
    assert scores["BLEU-2"] == pytest.approx(100 * (3 / 6 * 1 / 4) ** (1 / 2))
    shorter = score_captions([["a b c", "a b c d e f"], ["x y z"]], ["a", "x y"]).total
    assert shorter["BLEU-1"] == pytest.approx(100 * math.exp(1 - (3 + 3) / (1 + 2)))


def test_rouge_weighs_recall() -> None:
    scores = score_captions([["a b c d"]], ["a b"]).total
    precision, recall, beta = 1.0, 0.5, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert scores["ROUGE-L"] == pytest.approx(100 * expected)


def test_cider_by_hand() -> None:
    """Single words only: of two pictures each word is in one, so that its weight is log 2."""
    scores = score_captions([["a b"], ["c d"]], ["a c", "c d"])
    # Picture 1: one of two words of equal weight is shared, cosine 1/2; no pair is. A mean over n = 1 to 4.
    assert scores.cider == pytest.approx([100 * 10 * (1 / 2) / 4, 100 * 10 * (1 + 1) / 4])


def test_words_of_every_picture_count_nothing_for_cider() -> None:
    scores = score_captions([["picture a"], ["picture b"]], ["picture", "picture"])
    assert scores.cider == pytest.approx([0, 0])
    assert scores.total["BLEU-1"] > 0


def test_the_best_reference_counts() -> None:
    references = [["something else entirely", CAPTIONS[0]], [CAPTIONS[1]]]
    scores = score_captions(references, CAPTIONS[:2])
    for name in ("BLEU-4", "ROUGE-L", "F1"):
        assert scores.total[name] == pytest.approx(100, abs=1e-4), name


@pytest.mark.parametrize(
    ("references", "caption", "f1"),
    [
        (["a b c"], "a b x y z", 2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3)),
        (["a a b"], "a a a", 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)),
        (["x", "a b"], "b a", 1.0),
        (["a"], "", 0.0),
    ],
)
def test_word_f1_by_hand(references: list[str], caption: str, f1: float) -> None:
    assert word_f1([reference.split() for reference in references], caption.split()) == pytest.approx(f1)


def test_references_without_words_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no reference has a word"):
        score_captions([["?"], [""]], ["a", "b"])
