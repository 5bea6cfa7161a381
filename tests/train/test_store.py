"""Rows become tokens by the serving templates; whatever is bad is reported or stops, with its place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_base import tiny_config
from train_files import write_captions, write_lines

from models.tokenizer import load_tokenizer
from train.data.store import Encoder, Store, prepare
from train.errors import DataError, TrainError
from train.recipe import SourceRecipe


def encoder(tiny: Path, template: str = "chat", max_tokens: int = 512, sees: bool = False) -> Encoder:
    return Encoder(load_tokenizer(tiny), template, max_tokens, tiny_config().vocab_size, sees)


def store(
    folder: Path, encoder: Encoder, file: Path, faults: dict[str, str] | None = None, **options: Any
) -> Store:
    """`faults`: by name, what is wrong with an image."""

    def read_images(paths: list[Path]) -> list[bytes | str]:
        return [(faults or {}).get(path.name, path.name.encode().ljust(32)) for path in paths]

    source = SourceRecipe(**({"format": "alpaca", "path": (file,)} | options))
    return prepare("source", source, encoder, folder / "store", read_images, lambda count: None)


def test_what_the_model_is_to_write_is_flagged(tiny: Path, tmp_path: Path):
    file = write_lines(
        tmp_path / "r.jsonl", [{"instruction": "Say hi", "input": "", "output": "Hello, world"}]
    )
    prepared = store(tmp_path, encoder(tiny), file)
    ids, generated = prepared.tokens(0)
    tokenizer = load_tokenizer(tiny)
    written = b"".join(tokenizer.token_bytes(int(id)) for id in ids[generated])
    assert written == b"Hello, world"
    assert int(ids[generated][-1]) in tokenizer.eos_ids
    assert tokenizer.token_bytes(int(ids[0])) == b""  # the template's own start
    assert prepared.targets_R.tolist() == [int(generated.sum())]
    assert prepared.length(0) == len(ids)


def test_every_answer_of_a_conversation_is_learnt(tiny: Path, tmp_path: Path):
    talk = [("human", "One"), ("gpt", "first"), ("human", "Two"), ("gpt", "second")]
    row = {"conversations": [{"from": who, "value": text} for who, text in talk]}
    prepared = store(tmp_path, encoder(tiny), write_lines(tmp_path / "r.jsonl", [row]), format="sharegpt")
    ids, generated = prepared.tokens(0)
    tokenizer = load_tokenizer(tiny)
    assert b"".join(tokenizer.token_bytes(int(id)) for id in ids[generated]) == b"firstsecond"


def test_long_rows_are_cut_and_counted(tiny: Path, tmp_path: Path):
    rows = [{"instruction": "Hi", "input": "", "output": "river " * count} for count in (2, 90)]
    rows.append({"instruction": "stone " * 90, "input": "", "output": "never seen"})
    prepared = store(
        tmp_path, encoder(tiny, max_tokens=60), write_lines(tmp_path / "r.jsonl", rows), bad_rows="skip"
    )
    assert prepared.summary.truncated == 1
    assert max(prepared.length(int(row)) for row in prepared.train) == 60
    assert prepared.summary.bad == 1
    assert "r.jsonl:3: no word of an answer lies within 60 tokens" in prepared.summary.faults[0]


def test_policy_stops_or_skips(tiny: Path, tmp_path: Path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\nx\n')
    with pytest.raises(DataError, match=r"r\.jsonl:2: 'output' is missing or empty .*bad_rows: skip"):
        store(tmp_path, encoder(tiny), file)
    summary = store(tmp_path, encoder(tiny), file, bad_rows="skip").summary
    assert (summary.read, summary.used, summary.bad) == (3, 1, 2)
    file.write_text("x\n")
    with pytest.raises(TrainError, match=r"none of 1 rows can be used: .*r\.jsonl:1"):
        store(tmp_path, encoder(tiny), file, bad_rows="skip")


def test_twins_lie_on_one_side(tiny: Path, tmp_path: Path):
    rows = [{"instruction": f"Say {i % 50}", "input": "", "output": f"{i}"} for i in range(200)]
    prepared = store(tmp_path, encoder(tiny), write_lines(tmp_path / "r.jsonl", rows), holdout=0.3)
    sides = [{int(row) % 50 for row in part} for part in (prepared.train, prepared.held_out)]
    assert not sides[0] & sides[1]
    assert 5 <= len(sides[1]) <= 25
    assert prepared.summary.held_out == len(prepared.held_out) == 4 * len(sides[1])


def test_images_are_shared_and_bad_ones_drop_their_rows(tiny: Path, tmp_path: Path):
    file = write_captions(tmp_path / "c", 4)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, [*rows, rows[0] | {"caption": "again"}])
    options: dict[str, Any] = {"format": "captions", "images": file.parent, "question": "What?"}
    seeing = encoder(tiny, sees=True)
    prepared = store(tmp_path, seeing, file, **options)
    assert prepared.image_R.tolist() == [0, 1, 2, 3, 0]
    assert [prepared.image_hash(image)[:5] for image in range(4)] == [b"0.png", b"1.png", b"2.png", b"3.png"]
    assert [path.name for path in prepared.image_paths] == ["0.png", "1.png", "2.png", "3.png"]
    faults = {"0.png": "is black"}
    with pytest.raises(DataError, match=r"captions\.jsonl:1: image .*0\.png: is black"):
        store(tmp_path, seeing, file, faults, **options)
    skipped = store(tmp_path, seeing, file, faults, bad_rows="skip", **options)
    assert skipped.train.tolist() == [1, 2, 3]
    assert (skipped.summary.used, skipped.summary.bad) == (3, 2)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "img/none.png", "a\0b", "x" * 5000, "img"]
)
def test_image_paths_stay_in_their_folder(tiny: Path, tmp_path: Path, name: str):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "c" / "img").mkdir(parents=True)
    file = write_lines(tmp_path / "c" / "captions.jsonl", [{"file": name, "caption": "x"}])
    with pytest.raises(DataError, match=r"captions\.jsonl:1: the image .* (is not in|is no path)"):
        store(
            tmp_path, encoder(tiny, sees=True), file, format="captions", images=tmp_path / "c", question="?"
        )


def test_an_image_file_of_any_size_is_never_read_whole(tiny: Path, tmp_path: Path):
    with (tmp_path / "huge.png").open("wb") as stream:
        stream.truncate(1 << 40)
    file = write_lines(tmp_path / "captions.jsonl", [{"file": "huge.png", "caption": "x"}])
    with pytest.raises(DataError, match=r"captions\.jsonl:1: the image .* has 1099511627776 bytes; at most"):
        store(tmp_path, encoder(tiny, sees=True), file, format="captions", images=tmp_path, question="?")


def test_images_need_a_folder_only_where_the_adapter_sees(tiny: Path, tmp_path: Path):
    file = write_lines(tmp_path / "c.jsonl", [{"file": "a.png", "caption": "x"}])
    with pytest.raises(DataError, match="no `images` folder"):
        store(tmp_path, encoder(tiny, sees=True), file, format="captions", question="?")
    blind = store(tmp_path, encoder(tiny), file, format="captions", question="?")
    assert blind.image_R.tolist() == [-1]


def test_tokens_must_lie_in_the_vocabulary(tiny: Path, tmp_path: Path):
    file = write_lines(tmp_path / "r.jsonl", [{"instruction": "a", "output": "b"}])
    small = Encoder(load_tokenizer(tiny), "chat", 512, vocab_size=10, sees=False)
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        store(tmp_path, small, file)


def test_what_an_earlier_version_prepared_is_refused(tiny: Path, tmp_path: Path):
    file = write_lines(tmp_path / "r.jsonl", [{"instruction": "Hi", "input": "", "output": "Hello"}])
    store(tmp_path, encoder(tiny), file)
    [rows_file] = (tmp_path / "store").glob("*.npz")
    rows = dict(np.load(rows_file))
    del rows["hashes"]
    np.savez(rows_file, **rows)
    with pytest.raises(TrainError, match="earlier version prepared this; remove it"):
        Store(tmp_path / "store")
