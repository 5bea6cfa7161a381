"""Building a `tokenizers` backend from SentencePiece models and from GGUF metadata."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import BaseModel, Field, model_validator
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from models.checkpoints.fields import parse
from models.checkpoints.gguf_file import metadata, read_gguf
from models.errors import CheckpointError

_LLAMA3_HINT = (
    "fetch it again, or, as Llama 3's tokenizer.model is of another format, put the tokenizer.json of its "
    "Hugging Face folder beside it"
)
_MAX_PIECE = 1000  # characters; LLaMA's have 16, and each way to split one is looked up
# Token types, the same numbers in SentencePiece's protocol and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its files describe it. `add_bos`: a text begins with BOS by convention.

    Of `eos_ids`, all that end an answer, `eos_id` is the one that templates write; None without any.
    """

    backend: Tokenizer
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    chat_template: str | None


def build_sentencepiece(file: Path) -> Tokenizer:
    """The backend of a `tokenizer.model`. A text begins with BOS, as LLaMA's do.

    Raises CheckpointError for a damaged file and for models that are not BPE without normalisation.
    """
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model ({error}); {_LLAMA3_HINT}") from error
    if not proto.pieces:
        raise CheckpointError(f"{file}: not a SentencePiece model; {_LLAMA3_HINT}")
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != 2:  # BPE
        raise CheckpointError(f"{file}: not a BPE model; use the tokenizer that belongs to the base")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise CheckpointError(
            f"{file}: normalises its text, which LLaMA's do not; use the base's own tokenizer"
        )
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    backend = _sentencepiece_backend(file, pieces, normalizer.add_dummy_prefix)
    _begin_with(backend, next((piece.text for piece in pieces if piece.text == "<s>"), None))
    return backend


def build_gguf(file: Path) -> Vocabulary:
    """The tokenizer in a GGUF file's metadata. Raises CheckpointError for kinds that LLaMA does not use."""
    spec = parse(_GgufSpec, metadata(file, read_gguf(file), "tokenizer."), file)
    if spec.model == "llama":
        scores = spec.scores or [0.0] * len(spec.tokens)
        pieces = [Piece(*piece) for piece in zip(spec.tokens, scores, spec.kinds, strict=True)]
        backend = _sentencepiece_backend(file, pieces, spec.add_space_prefix)
    else:
        backend = _byte_level_backend(file, spec)
    add_bos = spec.add_bos if spec.add_bos is not None else spec.model == "llama" or spec.pre in _LLAMA3
    if add_bos and spec.bos_id is not None:
        _begin_with(backend, spec.tokens[spec.bos_id])
    eos = frozenset(id for id in (spec.eos_id, spec.eot_id, spec.eom_id) if id is not None)
    named = min(eos, default=None) if spec.eos_id is None else spec.eos_id
    return Vocabulary(backend, spec.bos_id, named, eos, add_bos, spec.chat_template)


class _GgufSpec(BaseModel):
    model: str = Field(alias="tokenizer.ggml.model", pattern="^(gpt2|llama)$")
    pre: str = Field("default", alias="tokenizer.ggml.pre")
    tokens: list[str] = Field(alias="tokenizer.ggml.tokens", min_length=1)
    kinds: list[int] = Field([], alias="tokenizer.ggml.token_type")
    scores: list[float] = Field([], alias="tokenizer.ggml.scores")
    merges: list[str] = Field([], alias="tokenizer.ggml.merges")
    bos_id: int | None = Field(None, alias="tokenizer.ggml.bos_token_id", ge=0)
    eos_id: int | None = Field(None, alias="tokenizer.ggml.eos_token_id", ge=0)
    eot_id: int | None = Field(None, alias="tokenizer.ggml.eot_token_id", ge=0)
    eom_id: int | None = Field(None, alias="tokenizer.ggml.eom_token_id", ge=0)
    add_bos: bool | None = Field(None, alias="tokenizer.ggml.add_bos_token")
    add_space_prefix: bool = Field(True, alias="tokenizer.ggml.add_space_prefix")
    chat_template: str | None = Field(None, alias="tokenizer.chat_template")

    @model_validator(mode="after")
    def _consistent(self) -> _GgufSpec:
        self.kinds = self.kinds or [NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens) or len(self.scores) not in (0, len(self.tokens)):
            raise ValueError("tokens, scores and token types differ in number")
        for id in (self.bos_id, self.eos_id, self.eot_id, self.eom_id):
            if id is not None and id >= len(self.tokens):
                raise ValueError(f"special token {id} is not in the vocabulary of {len(self.tokens)}")
        return self


_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(file: Path, name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words before BPE, by llama.cpp's name for it."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _LLAMA3:
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated")
        return pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    raise CheckpointError(
        f"{file}: tokenizer.ggml.pre {name!r}; only gpt-2, smollm and llama-bpe are supported. "
        "Use the base's Hugging Face folder"
    )


def _byte_level_backend(file: Path, spec: _GgufSpec) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in spec.merges]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{file}: tokenizer.ggml.merges is missing or damaged; convert the model again")
    model = _bpe(file, spec.tokens, merges, ignore_merges=spec.pre in _LLAMA3)
    backend = Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(file, spec.pre)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_tokens(backend, zip(spec.tokens, spec.kinds, strict=True))
    return backend


def _sentencepiece_backend(file: Path, pieces: Sequence[Piece], dummy_prefix: bool) -> Tokenizer:
    longest = max(len(piece.text) for piece in pieces)
    if longest > _MAX_PIECE:
        raise CheckpointError(
            f"{file}: a token has {longest} characters, of at most {_MAX_PIECE}; use the tokenizer that "
            "belongs to the base"
        )
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    merges = _merges([piece for piece in pieces if piece.kind == NORMAL])
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": any(p.kind == BYTE for p in pieces)}
    backend = Tokenizer(_bpe(file, [piece.text for piece in pieces], merges, **options))
    spaces = normalizers.Replace(" ", "▁")
    prefix = [normalizers.Prepend("▁")] if dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(backend, ((piece.text, piece.kind) for piece in pieces))
    return backend


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE makes, which it keeps only as scores of their results.

    It merges the neighbours whose result scores best; so each split of a piece into two others is a
    merge, ranked by the piece's score, then by the order of its parts.
    """
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        splits = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
        known = [split for split in splits if split[0] in ids and split[1] in ids]
        merges += sorted(known, key=lambda split: (ids[split[0]], ids[split[1]]))
    return merges


def _bpe(file: Path, tokens: Sequence[str], merges: Iterable[Sequence[str]], **options: Any) -> BPE:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{file}: a token comes twice in the vocabulary; convert the model again")
    try:
        return BPE(vocabulary, [(left, right) for left, right in merges], **options)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{file}: the vocabulary contradicts itself ({error}); fetch it again"
        ) from error


def _add_tokens(backend: Tokenizer, tokens: Iterable[tuple[str, int]]) -> None:
    """Control tokens become special; user-defined ones are matched in any text."""
    for text, kind in tokens:
        if kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(text, special=False, normalized=False)])


def _begin_with(backend: Tokenizer, bos: str | None) -> None:
    """Let texts begin with BOS when special tokens are asked for."""
    if bos is not None:
        template = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", "$B"],
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
        inner = [backend.post_processor] if backend.post_processor is not None else []
        backend.post_processor = processors.Sequence([*inner, template])
