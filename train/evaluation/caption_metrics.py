"""COCO's caption metrics and word F1: BLEU by sacrebleu, ROUGE-L and CIDEr by pycocoevalcap.

pycocoevalcap's PTB tokenizer, METEOR and SPICE need Java: `tokenize` takes the tokenizer's place, and METEOR
and SPICE are not computed. Its BLEU is not used, whose file forbids commercial use.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
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
    for package in ("pycocoevalcap", "sacrebleu"):
        if find_spec(package) is None:
            raise EvaluationError(f"scoring captions needs {package}; install llama-adapter-server[eval]")


def score_captions(references: Sequence[Sequence[str]], captions: Sequence[str]) -> CaptionScores:
    """Captions of pictures against each picture's references, at least one each.

    CIDEr weighs words by how few pictures' references have them: figures compare only over the same
    references, and of a single picture it is 0. Raises EvaluationError where no reference has a word.
    """
    check_scorers()
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    cut = [[tokenize(reference) for reference in group] for group in references]
    answers = [tokenize(caption) for caption in captions]
    if not any(words for group in cut for words in group):
        raise EvaluationError("no reference has a word to compare with; is `caption` the right column?")
    theirs = {i: [" ".join(words) for words in group] for i, group in enumerate(cut)}
    ours = {i: [" ".join(words)] for i, words in enumerate(answers)}
    rouge, _ = Rouge().compute_score(theirs, ours)
    cider, ciders = Cider().compute_score(theirs, ours)
    f1 = [word_f1(group, words) for group, words in zip(cut, answers, strict=True)]
    values = [*_bleus(cut, answers), rouge, cider, sum(f1) / len(f1)]
    total = {name: 100 * float(value) for name, value in zip(METRICS, values, strict=True)}
    return CaptionScores(total, [100 * float(value) for value in ciders], [100 * value for value in f1])


def _bleus(references: Sequence[Sequence[Sequence[str]]], answers: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to 4 of all answers together: the brevity penalty times the geometric mean of precisions."""
    from sacrebleu.metrics.bleu import BLEU

    texts = [[" ".join(words) for words in group] for group in references]
    streams: list[Any] = list(zip_longest(*texts))  # None stands where a picture has fewer references
    bleu = BLEU(tokenize="none", smooth_method="none", force=True)  # they are cut already
    score = bleu.corpus_score([" ".join(words) for words in answers], streams)
    precisions = [precision / 100 for precision in score.precisions]
    return [score.bp * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def word_f1(references: Sequence[Sequence[str]], words: Sequence[str]) -> float:
    """2PR / (P + R) of the words as multisets, against the reference where it is greatest."""
    return max(_f1(reference, words) for reference in references)


def _f1(reference: Sequence[str], words: Sequence[str]) -> float:
    shared = (Counter(reference) & Counter(words)).total()
    return 2 * shared / (len(reference) + len(words)) if shared else 0.0
