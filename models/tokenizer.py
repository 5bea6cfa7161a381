"""Text to tokens and back, for every tokenizer that LLaMA bases come with.

All formats end in one backend, Hugging Face's `tokenizers`, which `models.checkpoints.vocabulary`
reads or builds. What is added here is safety: special tokens are read only in the template's own
text, never in what a user wrote; and decoding in pieces, which is bytes and one UTF-8 decoder.
"""

from __future__ import annotations

import codecs
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from models.checkpoints.vocabulary import read_vocabulary
from models.checkpoints.vocabulary_build import Vocabulary
from models.errors import PromptError, is_rusts
from models.token_bytes import PieceDecoder


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered prompt.

    `markup` is the template's own text, in which special tokens count as such; in other text
    `<|im_end|>` is ten characters. `generated` is text that the model is to have written.
    """

    text: str
    markup: bool
    generated: bool = False


class Encoded(NamedTuple):
    """Token ids, and for each whether it begins in a `generated` segment: the loss mask of training."""

    ids: list[int]
    generated: list[bool]


class _Token(NamedTuple):
    id: int
    start: int  # in characters of the whole text
    end: int


class Tokenizer:
    """Encodes, decodes, and knows the special tokens and the chat template that belong to a base.

    `bos_id` is None where the base has none; `eos_ids` are all tokens that end an answer, `eos_id` is
    the one of them that templates write, None where there is none;
    `vocab_size` is the greatest id plus one, which the model's own vocabulary may exceed.
    `special_texts` are the texts of all tokens that count in markup only. No token has more than
    `longest_token` bytes of text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eos_ids = vocabulary.eos_ids
        self.chat_template = vocabulary.chat_template
        self._add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        spec = _with_template_markers(json.loads(vocabulary.backend.to_str()), vocabulary.chat_template or "")
        self._parsing = Backend.from_str(json.dumps(spec))
        self._plain = _without_special(spec)
        further = _not_beginning(spec)  # as text that stands behind something else is read
        self._further = self._plain if further == spec else _without_special(further)
        added = self._parsing.get_added_tokens_decoder()
        self._control = frozenset(id for id, token in added.items() if token.special)
        self.special_texts = tuple(sorted(added[id].content for id in self._control))
        # Which tokens are hidden is the vocabulary's own word, not the template's.
        hidden = {id for id, token in vocabulary.backend.get_added_tokens_decoder().items() if token.special}
        self._hidden_texts = {id: added[id].content for id in hidden}
        decoder = PieceDecoder(spec.get("decoder"))
        self.strips_leading_space = decoder.strips_leading_space
        texts = {id: text for text, id in self._parsing.get_vocab().items()}
        self.vocab_size = max(texts, default=-1) + 1
        self._bytes = [b""] * self.vocab_size
        for id, text in texts.items():
            if id not in hidden:
                self._bytes[id] = added[id].content.encode() if id in added else decoder.bytes_of(text)
        self.longest_token = max(map(len, (*self._bytes, *self.special_texts)), default=0)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, after BOS if the base's convention is to begin with it.

        With `parse_special` the texts of special tokens become those tokens. Raises PromptError for
        text that is not valid Unicode.
        """
        backend = self._parsing if parse_special else self._plain
        prefix = self._prefix(add_special_tokens=add_special_tokens)
        return prefix + _encoding(backend, text).ids

    def encode_segments(self, segments: Iterable[Segment]) -> Encoded:
        """Token ids of the segments' text as a whole, with special tokens only where markup has them.

        BOS comes first, once, if that is the base's convention, whether or not the markup has it.
        Raises PromptError for text that is not valid Unicode.
        """
        segments = [segment for segment in segments if segment.text]
        text = "".join(segment.text for segment in segments)
        markup = _spans((segment.text, segment.markup) for segment in segments)
        tokens = _encode(self._parsing, text, 0)
        if any(token.id in self._control and not _within(markup, token) for token in tokens):
            tokens = self._encode_guarded(text, markup)
        generated = _spans((segment.text, segment.generated) for segment in segments)
        prefix = self._prefix(add_special_tokens=not tokens or tokens[0].id != self.bos_id)
        flags = [_within(generated, _Token(token.id, token.start, token.start + 1)) for token in tokens]
        return Encoded(prefix + [token.id for token in tokens], [False] * len(prefix) + flags)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence. Special tokens are not shown, invalid UTF-8 becomes U+FFFD."""
        decoder = IncrementalDecoder(self, continuation=False)
        return decoder.push(ids) + decoder.flush()

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes, perhaps of a part of a character, that a token adds to the text.

        Empty for special tokens and for ids without a token.
        """
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def partial_bytes(self, id: int) -> tuple[int, ...] | None:
        """The bytes of a token that are no text by themselves, such as a part of a character; else None."""
        own = self.token_bytes(id)
        try:
            own.decode()
        except UnicodeDecodeError:
            return tuple(own)
        return None

    def token_text(self, id: int) -> str:
        """A token as shown to people: special tokens by their name, part of a character as U+FFFD."""
        return self._hidden_texts.get(id) or self.token_bytes(id).decode(errors="replace")

    def _prefix(self, *, add_special_tokens: bool) -> list[int]:
        return [self.bos_id] if add_special_tokens and self._add_bos and self.bos_id is not None else []

    def _encode_guarded(self, text: str, markup: Sequence[tuple[int, int]]) -> list[_Token]:
        """For text in which something other than markup reads like a special token."""
        marks = [
            token
            for start, end in markup
            for token in _encode(self._parsing, text[start:end], start)
            if token.id in self._control
        ]
        tokens: list[_Token] = []
        position = 0
        for mark in marks:
            tokens += self._encode_stretch(text[position : mark.start], position)
            tokens.append(mark)
            position = mark.end
        return tokens + self._encode_stretch(text[position:], position)

    def _encode_stretch(self, text: str, position: int) -> list[_Token]:
        return _encode(self._further if position else self._plain, text, position)


class IncrementalDecoder:
    """Turns a sequence of tokens into text as they come, never showing a part of a character.

    SentencePiece vocabularies begin a text with a space that is not the text's; it is dropped unless
    the tokens are a `continuation` of earlier text. Each token costs the same however many came before.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_leading_space and not continuation

    def push(self, ids: Iterable[int]) -> str:
        """The text that is complete with these tokens and was not returned before."""
        new = b"".join(map(self._tokenizer.token_bytes, ids))
        if self._strip and new:
            self._strip = False
            new = new.removeprefix(b" ")
        return self._utf8.decode(new)

    def flush(self) -> str:
        """What is left of a character that never became complete, as U+FFFD; then start anew."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a base: a Hugging Face folder, a Meta folder, a `.gguf` or `tokenizer.model` file.

    Raises CheckpointError naming file, key and remedy.
    """
    return Tokenizer(read_vocabulary(path))


def _with_template_markers(spec: dict[str, Any], chat_template: str) -> dict[str, Any]:
    """A `tokenizer.json` in which the added tokens that the chat template writes count as special too."""

    def counts(text: str) -> bool:
        return bool(text.strip()) and text in chat_template

    tokens = [
        token | {"special": token["special"] or counts(token["content"])} for token in spec["added_tokens"]
    ]
    return spec | {"added_tokens": tokens}


def _not_beginning(spec: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` that adds no space where one is added to the beginning of a text alone."""
    steps = json.dumps(spec["pre_tokenizer"])
    return spec | {
        "pre_tokenizer": json.loads(steps.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
    }


def _without_special(spec: dict[str, Any]) -> Backend:
    backend = Backend.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    return backend


def _encode(backend: Backend, text: str, offset: int) -> list[_Token]:
    """Tokens of one stretch of text that begins `offset` characters into the whole."""
    encoding = _encoding(backend, text)
    return [
        _Token(id, start + offset, end + offset)
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]


def _encoding(backend: Backend, text: str) -> Encoding:
    """Raises PromptError for text that is not valid Unicode, or that a damaged tokenizer fails at."""
    try:
        # A batch, since this library lets other threads run meanwhile only for batches: a megabyte of
        # text takes a second, in which the process would answer nobody.
        [encoding] = backend.encode_batch([text], add_special_tokens=False)
        return encoding
    except (UnicodeEncodeError, TypeError) as error:
        raise PromptError("the text holds half of a surrogate pair; send valid Unicode") from error
    except BaseException as error:
        if not is_rusts(error):
            raise
        raise PromptError(f"the base's tokenizer fails at the text: {error}; fetch it again") from error


def _spans(texts: Iterable[tuple[str, bool]]) -> list[tuple[int, int]]:
    """[start, end) of the flagged texts within all of them, neighbours joined."""
    spans: list[tuple[int, int]] = []
    position = 0
    for text, flagged in texts:
        end = position + len(text)
        if flagged and spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], end)
        elif flagged:
            spans.append((position, end))
        position = end
    return spans


def _within(spans: Sequence[tuple[int, int]], token: _Token) -> bool:
    """Whether one of the ascending spans holds the whole token."""
    index = bisect_right(spans, token.start, key=itemgetter(0)) - 1
    return index >= 0 and token.end <= spans[index][1]
