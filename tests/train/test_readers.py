"""Every format people have, plain and compressed; damage is named with file and line."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from train_files import write_lines

from models.prompts import Turn
from train.data import json_stream
from train.data.formats import Sample, read_samples
from train.data.rows import read_rows
from train.errors import DataError, RowError, TrainError
from train.recipe import SourceRecipe


def read(format: str, *files: Path, template: str = "alpaca", **options: Any) -> list[Sample | RowError]:
    source = SourceRecipe(format=format, path=files, **options)
    return [sample for _, sample in read_samples(source, template)]


def dialog(sample: Sample | RowError) -> list[tuple[str, str]]:
    assert isinstance(sample, Sample), sample
    return [(turn.role, turn.content) for turn in sample.turns]


ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hi"},
]


def test_alpaca_json_gives_the_input_its_place(tmp_path: Path):
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(ALPACA, indent=2))
    with_input, without = read("alpaca", file)
    assert dialog(with_input) == [("system", "1 and 2"), ("user", "Add."), ("assistant", "3")]
    assert dialog(without) == [("user", "Greet."), ("assistant", "Hi")]
    chat, _ = read("alpaca", file, template="chat")
    assert dialog(chat) == [("user", "Add.\n\n1 and 2"), ("assistant", "3")]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": lambda data: data,
    ".jsonl.gz": gzip.compress,
    ".jsonl.bz2": bz2.compress,
    ".jsonl.xz": lzma.compress,
    ".jsonl.zst": zstd.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str):
    file = tmp_path / f"rows{suffix}"
    lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in ALPACA)
    file.write_bytes(PACKERS[suffix](lines.encode()))
    assert [dialog(sample)[-1] for sample in read("alpaca", file)] == [
        ("assistant", "3"),
        ("assistant", "Hi"),
    ]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst"])
def test_damaged_compressed_files(tmp_path: Path, suffix: str):
    whole = PACKERS[suffix](json.dumps(ALPACA[0]).encode() * 2000)
    file = tmp_path / f"rows{suffix}"
    for damaged in (whole[: len(whole) // 2], b"nonsense" + whole):
        file.write_bytes(damaged)
        with pytest.raises(TrainError, match=r"rows\.jsonl.*cannot be read"):
            list(read_rows(file))


def test_files_of_no_known_kind(tmp_path: Path):
    with pytest.raises(TrainError, match=r"missing\.json: there is no such file"):
        read("alpaca", tmp_path / "missing.json")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrainError, match=r"neither \.json"):
        read("alpaca", tmp_path / "rows.parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(TrainError, match="is not UTF-8"):
        read("alpaca", tmp_path / "latin.jsonl")


def test_sharegpt_keeps_every_turn(tmp_path: Path):
    talk = [
        ("gpt", "Begins too early"),
        ("human", "Hi"),
        ("gpt", "Hello"),
        ("human", "More"),
        ("chatgpt", "Yes"),
        ("human", "unanswered"),
    ]
    row = {"id": "x", "conversations": [{"from": who, "value": text} for who, text in talk]}
    file = tmp_path / "sg.json"
    file.write_text(json.dumps([row, {"conversations": [{"from": "human", "value": "Hi"}]}]))
    good, bad = read("sharegpt", file)
    assert dialog(good) == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "More"),
        ("assistant", "Yes"),
    ]
    assert isinstance(bad, RowError)
    assert "no answer" in str(bad)


def test_messages(tmp_path: Path):
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    [sample] = read("messages", write_lines(tmp_path / "m.jsonl", [row]))
    assert dialog(sample) == [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]


def test_llava_keeps_all_turns_and_the_image(tmp_path: Path):
    rows = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "Color?"},
                {"from": "gpt", "value": "Red."},
            ],
        },
        {"conversations": [{"value": "Hi"}, {"value": "Hello"}]},
    ]
    seen, blind = read("llava", write_lines(tmp_path / "l.jsonl", rows))
    assert dialog(seen) == [
        ("user", "What?"),
        ("assistant", "A cat."),
        ("user", "Color?"),
        ("assistant", "Red."),
    ]
    assert isinstance(seen, Sample)
    assert seen.image == "a.png"
    assert dialog(blind) == [("user", "Hi"), ("assistant", "Hello")]


def test_coco_finds_images_by_id_wherever_the_arrays_stand(tmp_path: Path):
    annotations = [
        {"image_id": 7, "id": 1, "caption": "A dog. "},
        {"image_id": 8, "id": 2, "caption": "No image"},
    ]
    images = [{"id": 7, "file_name": "x/7.jpg"}]
    for order in (("images", "annotations"), ("annotations", "images")):
        parts = {"images": images, "annotations": annotations}
        file = tmp_path / "coco.json"
        file.write_text(json.dumps({"info": {"year": 2014}, **{name: parts[name] for name in order}}))
        good, bad = read("coco", file, question="What?")
        assert dialog(good) == [("user", "What?"), ("assistant", "A dog.")]
        assert isinstance(good, Sample)
        assert good.image == "x/7.jpg"
        assert "image_id 8 is not among" in str(bad)
    file.write_text('{"images": []}')
    with pytest.raises(DataError, match="no array 'annotations'"):
        read("coco", file)


def test_tsv_with_and_without_header(tmp_path: Path):
    file = tmp_path / "pairs.tsv"
    file.write_text('url\tcaption\na.jpg\tA "big" cat\nb.jpg\nc.jpg\t"two\nlines"\n')
    good, bad, quoted = read("captions", file)
    assert dialog(good) == [("user", ""), ("assistant", 'A "big" cat')]
    assert "has 1 columns, not 2" in str(bad)
    assert dialog(quoted)[1] == ("assistant", "two\nlines")
    file.write_text("A cat\ta.jpg\n")
    [sample] = read("captions", file, columns=("caption", "image"))
    assert isinstance(sample, Sample)
    assert (sample.image, sample.turns[1]) == ("a.jpg", Turn("assistant", "A cat"))


def test_scienceqa_asks_as_the_paper_does(tmp_path: Path):
    problem = {
        "question": "Select the fish below.",
        "choices": ["eel", "rabbit"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "split": "train",
    }
    file = tmp_path / "problems.json"
    problems = {"12": problem, "13": problem | {"split": "test"}, "14": problem | {"answer": 2, "hint": "h"}}
    file.write_text(json.dumps(problems))
    good, bad = read("scienceqa", file, split="train")
    assert dialog(good) == [
        ("user", "Question: Select the fish below.\nContext: N/A\nChoices: (A) eel (B) rabbit"),
        ("assistant", "The answer is (A)"),
    ]
    assert isinstance(good, Sample)
    assert good.image == "train/12/image.png"
    assert "answer 2 is the index of none of the 2 choices" in str(bad)


def test_limit_and_several_files(tmp_path: Path):
    one, two = (write_lines(tmp_path / f"{i}.jsonl", ALPACA) for i in range(2))
    assert len(read("alpaca", one, two)) == 4
    assert len(read("alpaca", one, two, limit=3)) == 3


def test_bad_rows_are_named_by_line(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    good = json.dumps(ALPACA[0])
    file.write_text(f'{good}\n\n{{"instruction": 1, "output": "x"}}\nno json\n[]\n{good}\n')
    source = SourceRecipe(format="alpaca", path=(file,))
    faults = [
        (row.line, str(found)) for row, found in read_samples(source, "chat") if isinstance(found, RowError)
    ]
    assert [line for line, _ in faults] == [3, 4, 5]
    assert "'instruction' is no text" in faults[0][1]
    assert "is not JSON" in faults[1][1]
    assert "an object should stand here" in faults[2][1]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"a": 1},\n{"b": }\n]', 3, "not JSON"),
        ('[\n{"a": 1}\n{"b": 2}]', 3, "',' should stand here"),
        ('[{"a": 1},\n', 2, "not JSON"),
        ('[{"a": 1}', 1, "ends too early"),
        ('{"a": 1}\n{"b": 2}', 2, "belong in a .jsonl file"),
        ("3", 1, "array or object should begin"),
        ("", 1, "array or object should begin"),
        ("[" * 100_000, 1, "not JSON|nested too deeply"),
    ],
)
def test_broken_json_is_named_by_line(tmp_path: Path, text: str, line: int, reason: str):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(DataError, match=rf"broken\.json:{line}: .*({reason})"):
        list(read_rows(file))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(rows=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 9))
def test_streamed_json_is_the_whole_json(rows: list[Any], indent: int | None, chunk: int, tmp_path_factory):
    text = json.dumps(rows, indent=indent)
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        found = list(read_rows(file))
    assert [row.value for row in found] == rows
    starts = [
        line
        for line, content in enumerate(text.splitlines(), 1)
        if content.startswith(" ") and content[1] != " "
    ]
    if indent:
        assert {row.line for row in found} <= set(starts)


def test_json_is_read_in_bounded_memory(tmp_path: Path):
    """A file of some 40 MB is read while holding a small part of it."""
    import tracemalloc

    file = tmp_path / "large.json"
    row = json.dumps({"text": "x" * 4000})
    file.write_text("[" + ",\n".join([row] * 10_000) + "]")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 12e6
