"""Pictures with captions: who describes them, and how near to people's own words that comes.

A captioner is a function from image files to their captions. All are scored in the same way on the same
references, so that an adapter, a control and a baseline can be set beside each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.data.rows import Row
from train.errors import EvaluationError
from train.evaluation.caption_metrics import check_scorers, score_captions
from train.evaluation.endpoint import Endpoint
from train.evaluation.results import Prediction, Result
from train.evaluation.samples import Wanted, check_image, fault, read_wanted
from train.recipe import SourceRecipe

Captioner = Callable[[Sequence[Path]], list[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file and what people said of it, in the data's order."""

    path: Path
    references: tuple[str, ...]


def read_pictures(
    source: SourceRecipe, wanted: Wanted, faults: list[str], limit: int | None = None
) -> list[Picture]:
    """The first `limit` pictures that have wanted rows; a picture's captions in those are its references.

    Raises DataError at a bad row or image if the policy is to stop, else adds it to `faults`, and
    EvaluationError where no picture is left.
    """
    captions: dict[Path, list[str]] = {}
    first: dict[Path, Row] = {}
    for row, sample, image in read_wanted(source, wanted, faults):
        assert image is not None  # every row of a caption format has one
        captions.setdefault(image, []).append(sample.turns[-1].content)
        first.setdefault(image, row)
    pictures: list[Picture] = []
    for path, references in captions.items():
        if len(pictures) == limit:
            break
        reason = check_image(path)
        if reason is None:
            pictures.append(Picture(path, tuple(references)))
        else:
            fault(source, first[path], reason, faults)
    if not pictures:
        shown = f": {faults[0]}" if faults else ""
        files = ", ".join(map(str, source.path))
        raise EvaluationError(f"{files}: no picture with a caption is among the chosen rows{shown}")
    return pictures


def asked(endpoint: Endpoint, question: str, max_tokens: int) -> Captioner:
    """The endpoint's greedy answers."""

    def caption(images: Sequence[Path]) -> list[str]:
        answers = endpoint.each(
            lambda image: endpoint.ask(question, image, max_tokens), images, "captions", _shown
        )
        return [" ".join(answer.split()) for answer in answers]

    return caption


def _shown(image: Path, answer: str) -> Prediction:
    """What is kept before there are scores."""
    return {"shown": str(image), "caption": " ".join(answer.split())}


def shuffled(captioner: Captioner, seed: int) -> Captioner:
    """The control: each picture's caption is that of another picture. Whoever looks then does worse."""

    def caption(images: Sequence[Path]) -> list[str]:
        if len(images) < 2:
            raise EvaluationError("--shuffle-images needs at least two pictures to exchange")
        ring = list(range(len(images)))
        random.Random(seed).shuffle(ring)  # noqa: S311
        other = dict(zip(ring, [*ring[1:], ring[0]], strict=True))  # one ring: none keeps its own
        return captioner([images[other[i]] for i in range(len(images))])

    return caption


def evaluate_captions(pictures: Sequence[Picture], captioner: Captioner) -> Result:
    """Describe and score. Scores are times 100."""
    check_scorers()
    captions = captioner([picture.path for picture in pictures])
    scores = score_captions([picture.references for picture in pictures], captions)
    predictions = [
        {
            "image": str(picture.path),
            "caption": caption,
            "references": list(picture.references),
            "CIDEr": round(cider, 4),
            "F1": round(f1, 4),
        }
        for picture, caption, cider, f1 in zip(pictures, captions, scores.cider, scores.f1, strict=True)
    ]
    counts = {
        "pictures": len(pictures),
        "references": sum(len(picture.references) for picture in pictures),
    }
    return Result("captions", scores.total, counts, predictions)
