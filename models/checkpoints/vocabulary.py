"""Reading a base's tokenizer, whatever its format, and writing it as Hugging Face has it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from models.checkpoints.fields import read_json
from models.checkpoints.gguf_file import find_gguf
from models.checkpoints.vocabulary_build import Vocabulary, build_gguf, build_sentencepiece
from models.errors import CheckpointError, is_rusts

_PROBE = "a \U0010ffff"  # a word, and a character that no vocabulary has


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer of a folder or file. Raises CheckpointError naming file, key and remedy.

    In a folder `tokenizer.json` comes before `tokenizer.model` (also looked for one level up, where
    Meta's releases have it), and that before a `.gguf` file.
    """
    if path.suffix == ".gguf" and path.is_file():
        return build_gguf(path)
    if path.name == "tokenizer.model" and path.is_file():
        return _of_folder(path.parent, build_sentencepiece(path))
    if (path / "tokenizer.json").is_file():
        return _of_folder(path, _read_backend(path / "tokenizer.json"))
    for folder in (path, path.parent):
        if path.is_dir() and (folder / "tokenizer.model").is_file():
            return _of_folder(path, build_sentencepiece(folder / "tokenizer.model"))
    gguf = find_gguf(path) if path.is_dir() else None
    if gguf is not None:
        return build_gguf(gguf)
    raise CheckpointError(
        f"{path}: no tokenizer; the folder needs tokenizer.json, tokenizer.model or a .gguf file"
    )


def write_vocabulary(folder: Path, vocabulary: Vocabulary, max_length: int) -> None:
    """Write the tokenizer files that transformers, and `read_vocabulary`, load."""
    bos, eos = (
        None if id is None else vocabulary.backend.id_to_token(id)
        for id in (vocabulary.bos_id, vocabulary.eos_id)
    )
    vocabulary.backend.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            "add_bos_token": vocabulary.add_bos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "chat_template": vocabulary.chat_template,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": vocabulary.bos_id, "eos_token_id": sorted(vocabulary.eos_ids)},
    )


def _write_json(file: Path, values: dict[str, Any]) -> None:
    present = {key: value for key, value in values.items() if value is not None}
    file.write_text(json.dumps(present, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_backend(file: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(file))
        _check_ids(file, backend)
        backend.no_truncation()
        backend.no_padding()
        backend.encode(_PROBE)  # some damage is met by texts alone
    except BaseException as error:
        if not is_rusts(error):
            raise
        raise CheckpointError(f"{file}: not a tokenizer ({error}); fetch it again") from error
    return backend


def _check_ids(file: Path, backend: Tokenizer) -> None:
    """`tokenizers` asks for memory for each id up to the greatest, and ends the process if there is none."""
    ids = backend.get_vocab().values()
    greatest = max(ids, default=0)
    if greatest >= 1 << 24 or len(set(ids)) < len(ids):
        fault = f"a token has the id {greatest}" if greatest >= 1 << 24 else "two tokens share an id"
        raise CheckpointError(f"{file}: {fault}, as in no sound vocabulary; fetch it again")


def _of_folder(folder: Path, backend: Tokenizer) -> Vocabulary:
    """A backend with what the JSON files around it say of special tokens and chat template."""
    names = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
    config, generation, token_map, tokenizer = (_optional_json(folder / name) for name in names)
    if (folder / "added_tokens.json").is_file():
        _add_tokens(folder / "added_tokens.json", backend)
    bos = _token_id(backend, tokenizer.get("bos_token") or token_map.get("bos_token"))
    if bos is None:
        bos = next(iter(_ids(folder / "config.json", backend, config.get("bos_token_id"))), None)
    eos: set[int | None] = {
        *_ids(folder / "generation_config.json", backend, generation.get("eos_token_id")),
        *_ids(folder / "config.json", backend, config.get("eos_token_id")),
    }
    named = _token_id(backend, tokenizer.get("eos_token") or token_map.get("eos_token"))
    eos.add(named)
    if not tokenizer and not token_map and bos is None and eos == {None}:
        # A bare tokenizer.model, as Meta ships it: SentencePiece's own names.
        bos, named = backend.token_to_id("<s>"), backend.token_to_id("</s>")
        eos = {named}
    add_bos = tokenizer.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos is not None and _adds(backend, bos)
    eos_ids = frozenset(id for id in eos if id is not None)
    eos_id = min(eos_ids, default=None) if named is None else named
    return Vocabulary(backend, bos, eos_id, eos_ids, add_bos, _chat_template(folder, tokenizer))


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _add_tokens(file: Path, backend: Tokenizer) -> None:
    """`added_tokens.json` of folders without `tokenizer.json`: text → id, in addition to the vocabulary."""
    for text, id in sorted(read_json(file).items(), key=lambda item: str(item[1]).zfill(12)):
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if backend.token_to_id(text) != id:
            raise CheckpointError(
                f"{file}: {text} has id {id}, the vocabulary gives it {backend.token_to_id(text)}; "
                "use the file that belongs to this tokenizer"
            )


def _token_id(backend: Tokenizer, token: object) -> int | None:
    """The id of a special token, given as its text or as `{"content": text}`."""
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _ids(file: Path, backend: Tokenizer, value: object) -> Iterable[int]:
    """Ids that a config file gives as one number, several or none."""
    ids = value if isinstance(value, list) else [value]
    for id in ids:
        if id is None:
            continue
        if not isinstance(id, int) or not 0 <= id < (1 << 31) or backend.id_to_token(id) is None:
            raise CheckpointError(
                f"{file}: special token {id!r} is not in the vocabulary; "
                "use the file that belongs to this tokenizer"
            )
        yield id


def _adds(backend: Tokenizer, bos: int) -> bool:
    return backend.encode("", add_special_tokens=True).ids[:1] == [bos]


def _chat_template(folder: Path, tokenizer: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else the `chat_template` of `tokenizer_config.json`, of several the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); fetch it again") from error
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
