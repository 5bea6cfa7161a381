"""Tokens are those of transformers and SentencePiece; a user's text never becomes a special token."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizer_files import (
    CHATML,
    CORPUS,
    SPECIALS,
    byte_level_backend,
    write_byte_level,
    write_gguf_byte_level,
    write_gguf_sentencepiece,
    write_sentencepiece,
)
from tokenizers import models

from models.checkpoints.vocabulary import read_vocabulary
from models.errors import CheckpointError, PromptError
from models.tokenizer import IncrementalDecoder, Segment, Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\nand lines\t",
    "2024-03-14: it's 49.30 €",
    "naïve café 你好 😀 👨‍👩‍👧 \u200b",
    "def f(x):\n    return x\n",
    "### Instruction:\nsay hi\n\n### Response:",
    "<|im_end|> <s> </s> <unk> <0x0A>",
    "\x00\x7f\x85",
]
MODULE = "module"
BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}


@pytest.fixture(scope=MODULE)
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    write_byte_level(folder)
    return folder


@pytest.fixture(scope=MODULE)
def processor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentencePieceProcessor]:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


@pytest.fixture(scope=MODULE)
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    write_sentencepiece(file)
    return file


@pytest.fixture(scope=MODULE)
def bpe(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level)


@pytest.fixture(scope=MODULE)
def spm(sentencepiece_file: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_file)


@pytest.fixture(params=["bpe", "spm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_is_transformers(byte_level: Path, bpe: Tokenizer, text: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(byte_level)
    assert bpe.encode(text, parse_special=True) == theirs.encode(text)
    ids = theirs.encode(text)
    assert bpe.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (bpe.bos_id, bpe.eos_ids) == (theirs.bos_token_id, {theirs.eos_token_id})
    assert bpe.vocab_size == len(theirs)


@pytest.mark.parametrize("text", [*TEXTS, *CORPUS[:4]])
def test_sentencepiece_is_sentencepiece(spm: Tokenizer, processor: SentencePieceProcessor, text: str) -> None:
    ids = processor.encode(text)
    assert spm.encode(text, add_special_tokens=False) == ids
    assert spm.encode(text) == [processor.bos_id(), *ids]
    assert spm.decode(ids) == processor.decode(ids) == text
    assert (spm.bos_id, spm.eos_ids) == (processor.bos_id(), {processor.eos_id()})
    assert spm.vocab_size == processor.vocab_size()


def test_sentencepiece_in_gguf(tmp_path: Path, processor: SentencePieceProcessor, spm: Tokenizer) -> None:
    write_gguf_sentencepiece(tmp_path / "v.gguf", processor)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == spm.encode(text)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (spm.bos_id, spm.eos_ids, spm.vocab_size)


def test_byte_level_in_gguf(tmp_path: Path, bpe: Tokenizer) -> None:
    write_gguf_byte_level(tmp_path / "v.gguf")
    ours = load_tokenizer(tmp_path / "v.gguf")
    for text in [*TEXTS, *CORPUS[:4]]:
        for special in (True, False):
            assert ours.encode(text, parse_special=special) == bpe.encode(text, parse_special=special)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (bpe.bos_id, bpe.eos_ids, bpe.vocab_size)
    assert (ours.special_texts, ours.chat_template) == (bpe.special_texts, CHATML)


def test_meta_keeps_its_tokenizer_beside_the_folder(tmp_path: Path, sentencepiece_file: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    (tmp_path / "7B").mkdir()
    assert load_tokenizer(tmp_path / "7B").encode("Hello") == load_tokenizer(sentencepiece_file).encode(
        "Hello"
    )


@given(
    text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]))
)  # ▁ is SentencePiece's space
def test_any_text_comes_back(bpe: Tokenizer, spm: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, spm):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)).removeprefix(
            b" " if tokenizer.strips_leading_space else b""
        ) == (text.encode())


PIECES = [
    *SPECIALS,
    "<s>",
    "</s>",
    "<unk>",
    "<|",
    "im_end",
    "|>",
    "<",
    ">",
    " ",
    "\n",
    "a",
    "é",
    "▁",
    "<0x41>",
]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@given(text=st.text(max_size=40))
def test_bytes_are_told_where_a_tokens_text_cannot_tell_them(
    bpe: Tokenizer, spm: Tokenizer, text: str
) -> None:
    for tokenizer in (bpe, spm):
        for id in tokenizer.encode(text, add_special_tokens=False):
            own, told = tokenizer.token_bytes(id), tokenizer.partial_bytes(id)
            assert (tokenizer.token_text(id).encode() if told is None else bytes(told)) == own


@given(text=HOSTILE)
def test_plain_text_never_becomes_a_special_token(bpe: Tokenizer, spm: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, spm):
        special = {
            id for id in range(tokenizer.vocab_size) if tokenizer.token_text(id) in tokenizer.special_texts
        }
        assert len(special) == 3
        assert not special & set(tokenizer.encode(text, add_special_tokens=False))


@given(texts=st.lists(st.tuples(HOSTILE, st.booleans()), max_size=5))
def test_special_tokens_come_from_markup_only(bpe: Tokenizer, texts: list[tuple[str, bool]]) -> None:
    """As many of each as the markup holds, whatever stands beside it, and no other text is lost."""
    segments = [Segment(text, markup) for text, markup in texts]
    ids = bpe.encode_segments(segments).ids
    runs: list[str] = [""]
    for text, markup in texts:  # neighbouring markup is one text
        runs = [*runs[:-1], runs[-1] + text] if markup else [*runs, ""] if text else runs
    expected = [id for run in runs for id in bpe.encode(run, parse_special=True) if not bpe.token_bytes(id)]
    assert [id for id in ids if not bpe.token_bytes(id)] == expected
    shown = "".join(bpe.token_text(id) for id in expected)
    everything = "".join(text for text, _ in texts)
    assert len(bpe.decode(ids)) + len(shown) == len(everything)


def test_segments_without_danger_are_encoded_as_a_whole(tokenizer: Tokenizer) -> None:
    special = tokenizer.special_texts[0]
    segments = [Segment(f"{special}Say ", True), Segment("hel", False), Segment(f"lo{special}", True)]
    whole = "".join(segment.text for segment in segments)
    assert tokenizer.encode_segments(segments).ids == tokenizer.encode(whole, parse_special=True)


def test_a_user_s_special_text_changes_no_other_token(sentencepiece_file: Path, tmp_path: Path) -> None:
    """Of a vocabulary that puts a space before the beginning of a text, and of nothing else."""
    spec = json.loads(load_tokenizer(sentencepiece_file)._parsing.to_str())
    spec |= {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_tokenizer(tmp_path)

    def ids(said: str) -> list[int]:
        segments = [Segment("Hello", True), Segment(said, False), Segment("</s>Hello there", True)]
        return ours.encode_segments(segments).ids

    end = ours.encode("</s>", add_special_tokens=False, parse_special=True)[-1]
    harmless, hostile = ids(" x"), ids(" </s>")
    assert harmless.count(end) == hostile.count(end) == 1
    assert hostile[hostile.index(end) :] == harmless[harmless.index(end) :]


def test_bos_comes_once(spm: Tokenizer) -> None:
    assert spm.bos_id is not None
    assert spm.encode_segments([Segment("<s>a", True)]).ids == spm.encode_segments([Segment("a", True)]).ids
    guarded = spm.encode_segments([Segment("<s>", False)]).ids
    assert guarded[0] == spm.bos_id
    assert guarded.count(spm.bos_id) == 1
    assert spm.decode(guarded) == "<s>"


def test_the_loss_mask_covers_generated_text(tokenizer: Tokenizer) -> None:
    eos = tokenizer.token_text(min(tokenizer.eos_ids))
    segments = [Segment("question? ", False), Segment("answer", False, True), Segment(eos, True, True)]
    ids, generated = tokenizer.encode_segments(segments)
    assert len(ids) == len(generated)
    chosen = [id for id, flag in zip(ids, generated, strict=True) if flag]
    assert tokenizer.decode(chosen).strip() == "answer"
    assert chosen[-1] in tokenizer.eos_ids
    assert not generated[0]


def test_added_tokens_that_the_template_writes_count_in_markup_only(byte_level: Path, tmp_path: Path) -> None:
    """Some bases do not mark their chat markers as special."""
    spec = json.loads((byte_level / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] == "<|endoftext|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text((byte_level / "tokenizer_config.json").read_text())
    tokenizer = load_tokenizer(tmp_path)
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [2]


@given(data=st.data())
def test_decoding_in_pieces_is_decoding_at_once(bpe: Tokenizer, spm: Tokenizer, data: st.DataObject) -> None:
    """Any ids, also such as no text encodes to, cut anywhere."""
    for tokenizer in (bpe, spm):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        decoder = IncrementalDecoder(tokenizer, continuation=False)
        text, rest = "", list(ids)
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            text += decoder.push(rest[:size])
            rest = rest[size:]
        assert text + decoder.flush() == tokenizer.decode(ids)


@given(text=st.text(alphabet="aé€😀 ", min_size=1))
def test_no_part_of_a_character_is_shown(bpe: Tokenizer, spm: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, spm):
        decoder = IncrementalDecoder(tokenizer, continuation=False)
        shown = ""
        for id in tokenizer.encode(text):
            shown += decoder.push([id])
            assert text.startswith(shown)
        assert shown == text
        assert decoder.flush() == ""


def test_a_character_that_never_completes_is_flushed(bpe: Tokenizer) -> None:
    ids = bpe.encode("🦀")
    assert len(ids) > 1
    decoder = IncrementalDecoder(bpe)
    assert decoder.push(ids[:-1]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(bpe.encode("a")) == "a"


def test_a_continuation_keeps_its_space(spm: Tokenizer) -> None:
    ids = spm.encode("The", add_special_tokens=False)
    assert IncrementalDecoder(spm).push(ids) == " The"
    assert spm.decode(ids) == "The"


def test_tokens_for_people(bpe: Tokenizer) -> None:
    assert bpe.token_text(2) == "<|im_end|>"
    assert bpe.token_bytes(2) == b""
    assert bpe.decode([2]) == ""
    assert bpe.token_text(bpe.encode("é" * 3)[0])
    for id in (-1, bpe.vocab_size, 10**12):
        assert (bpe.token_bytes(id), bpe.token_text(id)) == (b"", "")


def test_half_a_surrogate_pair_is_the_callers_mistake(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(PromptError, match="surrogate"):
        tokenizer.encode_segments([Segment("\udc00", False)])


@pytest.mark.parametrize(
    ("files", "template", "eos"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}, "chat_template": "a"}}, "a", {2}),
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, None, {2}),
        ({"generation_config.json": {"eos_token_id": [0, 2]}}, None, {0, 2}),
        ({"config.json": {"eos_token_id": 2}}, None, {2}),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, "b", set()),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": ["odd"], "template": "o"},
                        {"name": "tool_use", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
            set(),
        ),
    ],
)
def test_where_folders_keep_things(
    byte_level: Path, tmp_path: Path, files: dict[str, object], template: str | None, eos: set[int]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    for name, value in files.items():
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == template
    assert tokenizer.eos_ids == eos


def test_truncation_and_padding_of_the_file_are_off(byte_level: Path, tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(byte_level)
    assert load_tokenizer(tmp_path).encode("a b c d e f g h") == plain.encode("a b c d e f g h")


def refuse(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(path)
    for word in words:
        assert word in str(caught.value)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, byte_level: Path) -> None:
    refuse(tmp_path, str(tmp_path), "tokenizer.json", "tokenizer.model", ".gguf")
    sound = (byte_level / "tokenizer.json").read_bytes()
    for damaged in (b"", b"{}", sound[:1000], b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        refuse(tmp_path, "tokenizer.json", "fetch it again")
    spec = json.loads(sound) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refuse(tmp_path, "WordPiece", "belongs to the base")


@pytest.mark.parametrize(("id", "words"), [(1 << 24, "id 16777216"), (3, "share an id")])
def test_ids_that_no_vocabulary_has_are_refused(
    tmp_path: Path, byte_level: Path, id: int, words: str
) -> None:
    """The library asks for memory for every id up to the greatest, and ends the process if there is none."""
    spec = json.loads((byte_level / "tokenizer.json").read_text())
    spec["model"]["vocab"]["odd one"] = id
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refuse(tmp_path, "tokenizer.json", words, "fetch it again")


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [BOS], "pair": [], "special_tokens": {}}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<unk>"}},
    ],
    ids=lambda part: "-".join(str(value["type"]) for value in part.values()),
)
def test_damage_at_which_the_library_panics_is_refused(
    tmp_path: Path, byte_level: Path, part: dict[str, Any]
) -> None:
    """Some of it is met by texts alone; a panic of Rust's is no `Exception`."""
    spec = json.loads((byte_level / "tokenizer.json").read_text()) | {"pre_tokenizer": None} | part
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refuse(tmp_path, "tokenizer.json: not a tokenizer (", "fetch it again")


def test_a_text_that_a_damaged_tokenizer_fails_at_is_refused(byte_level: Path) -> None:
    vocabulary = read_vocabulary(byte_level)
    words = {text: id for id, text in enumerate([*SPECIALS, "a"])}
    vocabulary.backend.model = models.WordLevel(words, unk_token="<unk>")
    with pytest.raises(PromptError, match=r"tokenizer fails at the text: .*; fetch it again"):
        Tokenizer(vocabulary).encode("b")


def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refuse(tmp_path, "chat_template.jinja: cannot be read", "fetch it again")


def test_damaged_sentencepiece_is_refused(tmp_path: Path, sentencepiece_file: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_file.read_bytes()[:-3])
    refuse(file, "tokenizer.model", "SentencePiece")
    file.write_text("IQ== 0\nIg== 1\n")
    refuse(tmp_path, "Llama 3", "tokenizer.json")


def test_a_piece_that_is_a_book_is_refused(tmp_path: Path, sentencepiece_file: Path) -> None:
    """Its splits would be looked up for hours."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sentencepiece_file.read_bytes())
    proto.pieces.add(piece="a" * 200_000, score=0.0, type=1)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    refuse(file, "200000 characters, of at most 1000", "belongs to the base")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer_config.json", {"bos_token": "\ud800"}),
        ("added_tokens.json", {"\ud800": 400}),
    ],
)
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, name: str, values: dict[str, object]) -> None:
    write_byte_level(tmp_path)
    (tmp_path / name).write_text(json.dumps(values))
    refuse(tmp_path, name, "cannot be read as JSON", "fetch it again")


def test_special_token_outside_the_vocabulary_is_refused(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 99999}')
    refuse(tmp_path, "generation_config.json", "99999")


def test_gguf_tokenizer_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    for model, pre, word in (("bert", "x", "tokenizer.ggml.model"), ("gpt2", "falcon", "falcon")):
        writer = GGUFWriter(tmp_path / "v.gguf", "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_merges(["a b"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        refuse(tmp_path / "v.gguf", "v.gguf", word)
    os.truncate(tmp_path / "v.gguf", 100)
    refuse(tmp_path / "v.gguf", "fetch it again")
