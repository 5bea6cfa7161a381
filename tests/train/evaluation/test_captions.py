"""Which pictures are described, by whom, and the controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from train_files import write_lines

from train.data.store import is_held_out
from train.errors import DataError, EvaluationError
from train.evaluation.baselines import imagenet_captioner, nearest_captioner
from train.evaluation.captions import Picture, evaluate_captions, read_pictures, shuffled
from train.evaluation.samples import all_rows, held_out_rows, trained_rows
from train.recipe import SourceRecipe


def source(file: Path, **fields: object) -> SourceRecipe:
    given = {"format": "captions", "path": str(file), "images": str(file.parent)} | fields
    return SourceRecipe.model_validate(given)


def names(images: Sequence[Path]) -> list[str]:
    """A captioner that knows each image file by name."""
    return [path.stem for path in images]


def test_a_picture_s_captions_are_its_references(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    annotations = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 1, "caption": "one"},
            {"image_id": 2, "caption": "two"},
            {"image_id": 1, "caption": "another"},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(annotations))
    pictures = read_pictures(source(tmp_path / "coco.json", format="coco"), all_rows, [])
    assert [(picture.path.name, picture.references) for picture in pictures] == [
        ("a.png", ("one", "another")),
        ("b.png", ("two",)),
    ]


def test_held_out_rows_are_those_of_a_training(captions: Path) -> None:
    held_out = read_pictures(source(captions), held_out_rows(0.3), [])
    trained = read_pictures(source(captions), trained_rows(0.3), [])
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    expected = {row["file"] for row in rows if is_held_out(row["caption"], 0.3)}
    assert 0 < len(expected) < len(rows)
    assert {f"img/{picture.path.name}" for picture in held_out} == expected
    assert len(held_out) + len(trained) == len(rows)
    with pytest.raises(EvaluationError, match="needs --holdout"):
        held_out_rows(0)


def test_the_limit_counts_pictures(captions: Path) -> None:
    assert [p.path.name for p in read_pictures(source(captions), all_rows, [], 3)] == [
        "0.png",
        "1.png",
        "2.png",
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file": "gone.png", "caption": "x"}, "is not in"),
        ({"file": "../rows.jsonl", "caption": "x"}, "is not in"),
        ({"file": "ok.png"}, "none of caption"),
        ({"file": "text.png", "caption": "x"}, "not a PNG"),
        ("no object", "an object should stand here"),
    ],
)
def test_bad_rows_are_named_or_skipped(row: object, reason: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "ok.png")
    (tmp_path / "d" / "text.png").write_text("no picture")
    file = write_lines(tmp_path / "d" / "rows.jsonl", [{"file": "ok.png", "caption": "fine"}, row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        read_pictures(source(file), all_rows, [])
    faults: list[str] = []
    pictures = read_pictures(source(file, bad_rows="skip"), all_rows, faults)
    assert [picture.references for picture in pictures] == [("fine",)]
    assert len(faults) == 1
    assert reason in faults[0]


def test_no_picture_is_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"rows\.jsonl: no picture"):
        read_pictures(source(write_lines(tmp_path / "rows.jsonl", [])), all_rows, [])


@pytest.mark.parametrize("count", [2, 3, 7, 30])
def test_shuffling_shows_every_picture_another_one(count: int) -> None:
    images = [Path(f"{i}.png") for i in range(count)]
    shown = shuffled(names, seed=5)(images)
    assert sorted(shown) == sorted(names(images))
    assert all(name != path.stem for name, path in zip(shown, images, strict=True))
    assert shown == shuffled(names, seed=5)(images)


def test_shuffling_seeds_differ_and_one_picture_is_too_few() -> None:
    images = [Path(f"{i}.png") for i in range(30)]
    assert shuffled(names, seed=5)(images) != shuffled(names, seed=6)(images)
    with pytest.raises(EvaluationError, match="at least two"):
        shuffled(names, seed=5)(images[:1])


def test_the_nearest_training_picture_speaks(captions: Path, tmp_path: Path) -> None:
    """Sheets of one colour: a held-out red one is nearest to a red one."""
    trained = read_pictures(source(captions), trained_rows(0.3), [])
    held_out = read_pictures(source(captions), held_out_rows(0.3), [])
    captioner = nearest_captioner(trained, "efficientnet-lite0", tmp_path)
    found = captioner([picture.path for picture in held_out])
    known = {caption for picture in trained for caption in picture.references}
    for picture, caption in zip(held_out, found, strict=True):
        assert caption in known
        assert caption.split()[1] == picture.references[0].split()[1]
    with pytest.raises(EvaluationError, match=r"gone\.png"):
        captioner([captions.parent / "gone.png"])


def test_the_classifier_names_what_is_there() -> None:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    assert imagenet_captioner()([folder / "coffee.png", folder / "chelsea.png"]) == [
        "espresso",
        "tiger cat",
    ]


def test_scores_stand_beside_what_was_said() -> None:
    pictures = [Picture(Path("a.png"), ("a", "the letter a")), Picture(Path("b.png"), ("b",))]
    result = evaluate_captions(pictures, names)
    assert result.scores["F1"] == pytest.approx(100)
    assert result.predictions[0] == {
        "image": "a.png",
        "caption": "a",
        "references": ["a", "the letter a"],
        "CIDEr": pytest.approx(result.predictions[0]["CIDEr"]),
        "F1": 100.0,
    }
    assert json.loads(result.as_json())["references"] == 3
    head, line, row = result.table().splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(result.scores)
    assert len(head) == len(line) == len(row)


def test_nobody_is_asked_without_the_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(images: Sequence[Path]) -> list[str]:
        raise AssertionError("hours of answers that nothing can score")

    monkeypatch.setattr("train.evaluation.caption_metrics.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"install llama-adapter-server\[eval\]"):
        evaluate_captions([Picture(Path("a.png"), ("a frog",))], asked)
