"""What people's data formats mean: a row → a conversation, with an image or without.

Formats say nothing of templates: rendering is the serving code's (`models.prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from models.prompts import Turn
from train.data.rows import Row, read_rows
from train.errors import DataError, RowError
from train.recipe import SourceRecipe


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `key` is the text by which held-out rows are chosen; `image` a path in the source."""

    turns: tuple[Turn, ...]
    key: str
    image: str | None = None


Parse = Callable[[Row, SourceRecipe, str], Sample | None]


def read_samples(source: SourceRecipe, template: str) -> Iterator[tuple[Row, Sample | RowError]]:
    """A source's rows in their files' order, each as a sample or what is wrong with it."""
    return islice(_all_samples(source, template), source.limit)


def _all_samples(source: SourceRecipe, template: str) -> Iterator[tuple[Row, Sample | RowError]]:
    for file in source.path:
        for row, parse in _rows(file, source):
            try:
                if row.fault:
                    raise RowError(row.fault)
                sample = parse(row, source, template)
            except RowError as error:
                yield row, error
                continue
            if sample is not None:
                yield row, sample


def _rows(file: Path, source: SourceRecipe) -> Iterator[tuple[Row, Parse]]:
    if source.format != "coco":
        parse = _PARSERS[source.format]
        return ((row, parse) for row in read_rows(file, columns=source.columns))
    names = _coco_images(file)
    return ((row, _coco(names)) for row in read_rows(file, "annotations"))


def _alpaca(row: Row, source: SourceRecipe, template: str) -> Sample:
    """Alpaca's and GPT-4-LLM's rows. The input is V1's `### Input:`; other templates append it."""
    fields = _object(row.value)
    instruction, answer = _text(fields, "instruction"), _text(fields, "output")
    given = _text(fields, "input", optional=True)
    question = [Turn("user", instruction)]
    if given and template == "alpaca":  # which writes system texts as its input
        question.insert(0, Turn("system", given))
    elif given:
        question = [Turn("user", f"{instruction}\n\n{given}")]
    image = _text(fields, "image", optional=True) or None
    return Sample((*question, Turn("assistant", answer)), f"{instruction}\n{given}", image)


_Role = Literal["system", "user", "assistant"]
_ROLES: Mapping[str, _Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
}


def _sharegpt(row: Row, source: SourceRecipe, template: str) -> Sample:
    """`conversations` of {from, value}, every turn."""
    turns = _list(_object(row.value), "conversations")
    return _conversation([_turn(turn, "from", "value") for turn in turns])


def _messages(row: Row, source: SourceRecipe, template: str) -> Sample:
    """OpenAI's `messages` of {role, content}, every turn."""
    turns = _list(_object(row.value), "messages")
    return _conversation([_turn(turn, "role", "content") for turn in turns])


def _llava(row: Row, source: SourceRecipe, template: str) -> Sample:
    """LLaVA's rows: `image` and `conversations`, every turn; without `from`, turns alternate.

    The place of the image in the text is dropped: these adapters see it beside the text.
    """
    fields = _object(row.value)
    turns = []
    for index, value in enumerate(_list(fields, "conversations")):
        speaker = {"from": "gpt" if index % 2 else "human"}
        turn = _turn(speaker | _object(value), "from", "value")
        turns.append(Turn(turn.role, turn.content.replace("<image>", "").strip()))
    image = _text(fields, "image", optional=True) or None
    return _conversation(turns, image)


def _captions(row: Row, source: SourceRecipe, template: str) -> Sample:
    """A table or JSON lines of image and caption, under the usual names."""
    fields = _object(row.value)
    image = _first(fields, ("image", "file", "file_name", "filepath", "image_path", "url"))
    caption = _first(fields, ("caption", "text", "title"))
    return _captioned(image, caption, source)


def _coco_images(file: Path) -> dict[Any, str]:
    """Image id → file name of a COCO annotation file."""
    names = {}
    for row in read_rows(file, "images"):
        try:
            fields = _object(row.value)
            names[fields.get("id")] = _text(fields, "file_name")
        except (RowError, TypeError) as error:
            raise DataError(file, row.line, f"images: {error}") from error
    return names


def _coco(names: Mapping[Any, str]) -> Parse:
    def parse(row: Row, source: SourceRecipe, template: str) -> Sample:
        fields = _object(row.value)
        id = fields.get("image_id")
        if not isinstance(id, int | str) or id not in names:
            raise RowError(f"image_id {id!r} is not among the file's images")
        return _captioned(names[id], _text(fields, "caption"), source)

    return parse


def _captioned(image: str, caption: str, source: SourceRecipe) -> Sample:
    caption = caption.strip()
    return Sample((Turn("user", source.question), Turn("assistant", caption)), caption, image)


def _scienceqa(row: Row, source: SourceRecipe, template: str) -> Sample | None:
    """ScienceQA's `problems.json`, or its rows as JSON lines: question, context, choices → the letter.

    The order is V1's (section 4.2), the wording its supplement's figure 1. Images lie where the data
    set has them: `<split>/<id>/<image>`.
    """
    fields = _object(row.value)
    split = _text(fields, "split", optional=True)
    if source.split and split != source.split:
        return None
    choices = _list(fields, "choices")
    answer = fields.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= 26:
        raise RowError(f"answer {answer!r} is the index of none of the {len(choices)} choices")
    question = science_question(_text(fields, "question"), _text(fields, "hint", optional=True), choices)
    image = _text(fields, "image", optional=True) or None
    if image and "/" not in image and row.key is not None:
        image = f"{split}/{row.key}/{image}"
    turns = (Turn("user", question), Turn("assistant", f"The answer is ({_letter(answer)})"))
    return Sample(turns, question, image)


def science_question(question: str, hint: str, choices: list[Any]) -> str:
    """The text of a multiple-choice question, as training and evaluation ask it."""
    options = " ".join(f"({_letter(index)}) {choice}" for index, choice in enumerate(choices))
    return f"Question: {question}\nContext: {hint.strip() or 'N/A'}\nChoices: {options}"


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _conversation(turns: list[Turn], image: str | None = None) -> Sample:
    """From the first question to the last answer."""
    asked = next((index for index, turn in enumerate(turns) if turn.role == "user"), len(turns))
    kept = [turn for index, turn in enumerate(turns) if turn.role == "system" or index >= asked]
    while kept and kept[-1].role != "assistant":
        kept.pop()
    if not kept:
        raise RowError("the conversation has no answer to a question")
    return Sample(tuple(kept), turns[asked].content, image)


def _turn(value: Any, role_key: str, text_key: str) -> Turn:
    fields = _object(value)
    role = _ROLES.get(_text(fields, role_key))
    if role is None:
        raise RowError(f"{role_key} {fields[role_key]!r} is unknown; known: {', '.join(_ROLES)}")
    return Turn(role, _text(fields, text_key))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"an object should stand here, not {str(value)[:60]!r}")
    return value


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list) or not value:
        raise RowError(f"{key!r} is missing or no list")
    return value


def _text(fields: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    value = fields.get(key)
    if optional and value is None:
        return ""
    if not isinstance(value, str) or not (optional or value.strip()):
        raise RowError(f"{key!r} is missing or empty" if value in (None, "") else f"{key!r} is no text")
    return value


def _first(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    for key in keys:
        if key in fields:
            return _text(fields, key)
    raise RowError(f"none of {', '.join(keys)} is there")


_PARSERS: Mapping[str, Parse] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "captions": _captions,
    "llava": _llava,
    "scienceqa": _scienceqa,
}
