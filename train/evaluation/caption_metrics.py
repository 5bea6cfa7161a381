"""COCO's caption metrics, by pycocoevalcap's own scorers, and word F1.

Only its scorers in Python are used. Its PTB tokenizer, METEOR and SPICE need Java: `tokenize` takes the
tokenizer's place, and METEOR and SPICE are not computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from train.errors import EvaluationError

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "F1")

# What PTB makes a token of and COCO's evaluation keeps: words, with inner hyphens, dots and the like;
# n't and other clitics by themselves; signs that are no punctuation. Quotes, brackets and dashes go.
_TOKEN = re.compile(
    r"""
      \w+(?=n't\b)                    # do|n't
    | n't\b
    | '(?:s|m|d|re|ve|ll)\b           # man|'s
    | can(?=not\b)                    # can|not
    | \w+(?:[-./,:&@]+\w+)*        # t-shirt, 3.5, 10:30, u.s, and/or
    | [^\w\s"'`.?!,:;()\[\]{}…-]      # $ & % + and other signs
    """,
    re.VERBOSE,
)
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": " "})


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Of all pictures, and CIDEr and F1 of each; times 100, as papers have them."""

    total: dict[str, float]
    cider: list[float]
    f1: list[float]


def tokenize(caption: str) -> list[str]:
    """Lower-case words without punctuation, near to PTB's as COCO's evaluation uses them."""
    return _TOKEN.findall(caption.lower().translate(_ASCII))


def check_scorers() -> None:
    """Raises EvaluationError where the scorers are not installed: before the answers, not after them."""
    if find_spec("pycocoevalcap") is None:
        raise EvaluationError("scoring captions needs pycocoevalcap; install llama-adapter-server[eval]")


def score_captions(references: Sequence[Sequence[str]], captions: Sequence[str]) -> CaptionScores:
    """Captions of pictures against each picture's references, at least one each.

    CIDEr weighs words by how few pictures' references have them: figures compare only over the same
    references, and of a single picture it is 0. Raises EvaluationError where no reference has a word.
    """
    check_scorers()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    cut = [[tokenize(reference) for reference in group] for group in references]
    answers = [tokenize(caption) for caption in captions]
    if not any(words for group in cut for words in group):
        raise EvaluationError("no reference has a word to compare with; is `caption` the right column?")
    theirs = {i: [" ".join(words) for words in group] for i, group in enumerate(cut)}
    ours = {i: [" ".join(words)] for i, words in enumerate(answers)}
    bleus: Any = Bleu(4).compute_score(theirs, ours, verbose=0)[0]
    rouge, _ = Rouge().compute_score(theirs, ours)
    cider, ciders = Cider().compute_score(theirs, ours)
    f1 = [word_f1(group, words) for group, words in zip(cut, answers, strict=True)]
    values = [*bleus, rouge, cider, sum(f1) / len(f1)]
    total = {name: 100 * float(value) for name, value in zip(METRICS, values, strict=True)}
    return CaptionScores(total, [100 * float(value) for value in ciders], [100 * value for value in f1])


def word_f1(references: Sequence[Sequence[str]], words: Sequence[str]) -> float:
    """2PR / (P + R) of the words as multisets, against the reference where it is greatest."""
    return max(_f1(reference, words) for reference in references)


def _f1(reference: Sequence[str], words: Sequence[str]) -> float:
    shared = (Counter(reference) & Counter(words)).total()
    return 2 * shared / (len(reference) + len(words)) if shared else 0.0
