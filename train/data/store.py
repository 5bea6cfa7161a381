"""A source, rendered and tokenised once, in files that are mapped into memory.

Shapes: R rows, N tokens of all rows one after another, J images.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha1
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from models.errors import PromptError
from models.prompts import render
from models.tokenizer import Encoded, Tokenizer
from models.vision.images import DEFAULT_LIMITS
from train.data.formats import Sample, read_samples
from train.errors import DataError, RowError, TrainError
from train.recipe import SourceRecipe

_TOKENS, _GENERATED, _ROWS, _IMAGES, _SUMMARY = (
    "tokens.u32",
    "generated.u8",
    "rows.npz",
    "images.jsonl",
    "summary.json",
)
_SHOWN_FAULTS = 20
NO_IMAGE = -1
HASH_BYTES = 32  # of an image file, by SHA-256

Report = Callable[[int], None]
_Number = TypeVar("_Number", np.uint32, np.bool_)


@dataclass
class Summary:
    """What became of a source's rows."""

    read: int = 0
    used: int = 0
    held_out: int = 0
    truncated: int = 0
    bad: int = 0
    tokens: int = 0
    targets: int = 0  # tokens that the model is to write
    faults: list[str] | None = None  # the first ones

    def add_fault(self, file: Path, line: int, reason: str) -> None:
        self.bad += 1
        self.faults = self.faults or []
        if len(self.faults) < _SHOWN_FAULTS:
            self.faults.append(f"{file}:{line}: {reason}")


class Store:
    """The rows of one prepared source. `train` and `held_out` number them."""

    def __init__(self, folder: Path) -> None:
        """Raises TrainError for one that an earlier version prepared."""
        self.summary = Summary(**json.loads((folder / _SUMMARY).read_text()))
        rows = np.load(folder / _ROWS)
        if "hashes" not in rows:
            raise TrainError(f"{folder}: an earlier version prepared this; remove it, and it is made again")
        self._starts_R: NDArray[np.int64] = rows["starts"]
        self.targets_R: NDArray[np.int32] = rows["targets"]
        self.image_R: NDArray[np.int32] = rows["image"]
        self._hashes_J: NDArray[np.uint8] = rows["hashes"]
        usable = rows["usable"]
        self.train: NDArray[np.int64] = np.flatnonzero(usable & ~rows["held_out"])
        self.held_out: NDArray[np.int64] = np.flatnonzero(usable & rows["held_out"])
        self._tokens_N = _mapped(folder / _TOKENS, np.uint32)
        self._generated_N = _mapped(folder / _GENERATED, np.bool_)
        self.image_paths = [
            Path(json.loads(line)["path"]) for line in (folder / _IMAGES).read_text("utf-8").splitlines()
        ]

    def length(self, row: int) -> int:
        return int(self._starts_R[row + 1] - self._starts_R[row])

    def image_hash(self, image: int) -> bytes:
        """Of the file as it was when it was checked."""
        return bytes(self._hashes_J[image])

    def tokens(self, row: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids of a row, and for each whether the model is to write it."""
        span = slice(self._starts_R[row], self._starts_R[row + 1])
        return self._tokens_N[span], self._generated_N[span]


def remove_stores(folder: Path) -> None:
    """Remove the sources that were prepared in `folder`, whole or in part.

    Raises TrainError, having removed nothing, where it holds anything else: somebody's own data.
    """
    known = {_TOKENS, _GENERATED, _ROWS, _IMAGES, _SUMMARY}
    found = list(folder.iterdir()) if folder.exists() else []
    for path in found:
        if path.is_symlink() or not path.is_dir() or not known.issuperset(p.name for p in path.iterdir()):
            raise TrainError(
                f"{path}: no training has made this, and prepared rows would be put beside it; choose "
                "another output"
            )
    for path in found:
        shutil.rmtree(path)


def _mapped(file: Path, dtype: type[_Number]) -> NDArray[_Number]:
    if file.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")


class Encoder:
    """Sample → tokens, by the template that serves the adapter. Images are read only if it sees."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, max_tokens: int, vocab_size: int, sees: bool
    ) -> None:
        self._tokenizer = tokenizer
        self.template = template
        self.sees = sees
        self._max_tokens = max_tokens
        self._vocab_size = vocab_size

    def encode(self, sample: Sample) -> tuple[Encoded, bool]:
        """Tokens cut at `max_tokens`, and whether they were. Raises RowError where no target is left."""
        try:
            rendered = render(self.template, sample.turns, (), self._tokenizer, add_generation_prompt=False)
            ids, generated = self._tokenizer.encode_segments(rendered.segments)
        except PromptError as error:
            raise RowError(str(error)) from error
        if max(ids, default=0) >= self._vocab_size:
            raise RowError("a token lies outside the model's vocabulary")
        kept = slice(self._max_tokens)
        if not any(generated[1:][: self._max_tokens - 1]):
            raise RowError(f"no word of an answer lies within {self._max_tokens} tokens")
        return Encoded(ids[kept], generated[kept]), len(ids) > self._max_tokens


def image_path(root: Path | None, name: str) -> Path:
    """Where an image lies, `root` being its source's resolved folder.

    Raises RowError if it is outside of it, not there, or larger than images may be.
    """
    if root is None:
        raise RowError(f"has the image {name[:200]!r}, but the source has no `images` folder; give one")
    try:
        path = (root / name).resolve()
        size = path.stat().st_size if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError, RuntimeError) as error:  # NUL bytes, endless links, too long
        raise RowError(f"the image {name[:200]!r} is no path") from error
    if size is None:
        raise RowError(f"the image {name[:200]!r} is not in {root}")
    if size > DEFAULT_LIMITS.max_bytes:  # it would be read whole before anything is looked at
        raise RowError(
            f"the image {name[:200]!r} has {size} bytes; at most {DEFAULT_LIMITS.max_bytes} are read"
        )
    return path


class _Writer:
    """Rows to disk as they come; what is kept in memory is some dozen bytes a row."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._tokens = self._files.enter_context((folder / _TOKENS).open("wb"))
        self._generated = self._files.enter_context((folder / _GENERATED).open("wb"))
        self._starts = array("q", [0])
        self._targets = array("i")
        self._held_out = array("b")
        self._image = array("i")
        self._places = (array("i"), array("q"))  # each row's number of file, and line
        self._images: dict[Path, int] = {}

    def add(self, encoded: Encoded, image: Path | None, held_out: bool, place: tuple[int, int]) -> None:
        self._tokens.write(np.array(encoded.ids, np.uint32).tobytes())
        self._generated.write(np.array(encoded.generated, np.bool_).tobytes())
        self._starts.append(self._starts[-1] + len(encoded.ids))
        self._targets.append(sum(encoded.generated[1:]))
        self._image.append(NO_IMAGE if image is None else self._images.setdefault(image, len(self._images)))
        self._held_out.append(held_out)
        for column, value in zip(self._places, place, strict=True):
            column.append(value)

    @property
    def images(self) -> list[Path]:
        return list(self._images)

    def rows_of(self, images: Collection[int]) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """(row, image, place) of each row that has one of these images."""
        for row, image in enumerate(self._image):
            if image in images:
                yield row, image, (self._places[0][row], self._places[1][row])

    def close(self, hashes: list[bytes], dropped: Collection[int], summary: Summary) -> None:
        """Write what belongs to the rows; the `dropped` ones stay unused."""
        self._files.close()
        usable = np.ones(len(self._targets), np.bool_)
        usable[list(dropped)] = False
        held_out = np.array(self._held_out, np.bool_)
        targets = np.array(self._targets, np.int32)
        used = usable & ~held_out
        summary.used, summary.held_out = int(used.sum()), int((usable & held_out).sum())
        summary.tokens = int(np.diff(self._starts)[used].sum())
        summary.targets = int(targets[used].sum())
        np.savez(
            self._folder / _ROWS,
            starts=np.array(self._starts),
            targets=targets,
            image=np.array(self._image, np.int32),
            hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES),
            usable=usable,
            held_out=held_out,
        )
        lines = (json.dumps({"path": str(path)}) + "\n" for path in self._images)
        (self._folder / _IMAGES).write_text("".join(lines), encoding="utf-8")
        (self._folder / _SUMMARY).write_text(json.dumps(asdict(summary)))

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


# Image paths → the hash of each one's file, or why it cannot be used.
ReadImages = Callable[[list[Path]], list[bytes | str]]


def prepare(
    name: str,
    source: SourceRecipe,
    encoder: Encoder,
    folder: Path,
    read_images: ReadImages,
    progress: Report,
    wanted: Callable[[Sample], bool] | None = None,
) -> Store:
    """Render, tokenise and check every row and image of a source, then write them to `folder`.

    `progress` is told each row's number, and may raise to stop. Of the rows only the `wanted` ones are
    used; it may raise RowError. Raises DataError at a bad row if the policy is to stop, TrainError
    where no row is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    with _Writer(folder) as writer:
        for encoded, image, held_out, place in _encoded(source, encoder, wanted, summary, progress):
            writer.add(encoded, image, held_out, place)
        found = read_images(writer.images)
        faults = {image: fault for image, fault in enumerate(found) if isinstance(fault, str)}
        dropped = []
        for row, number, (file, line) in writer.rows_of(faults):
            reason = f"image {writer.images[number]}: {faults[number]}"
            _fault(source, summary, source.path[file], line, reason)
            dropped.append(row)
        unread = bytes(HASH_BYTES)
        writer.close([unread if isinstance(one, str) else one for one in found], dropped, summary)
    if not summary.used:
        shown = f": {summary.faults[0]}" if summary.faults else ""
        raise TrainError(f"data.{name}: none of {summary.read} rows can be used{shown}")
    return Store(folder)


def _encoded(
    source: SourceRecipe,
    encoder: Encoder,
    wanted: Callable[[Sample], bool] | None,
    summary: Summary,
    progress: Report,
) -> Iterator[tuple[Encoded, Path | None, bool, tuple[int, int]]]:
    """Tokens, image, whether held out, and place of each good row."""
    files = {file: number for number, file in enumerate(source.path)}
    root = source.images.resolve() if source.images else None
    for row, sample in read_samples(source, encoder.template):
        summary.read += 1
        progress(summary.read)
        try:
            if isinstance(sample, RowError):
                raise sample
            if wanted is not None and not wanted(sample):
                continue
            encoded, cut = encoder.encode(sample)
            image = image_path(root, sample.image) if sample.image and encoder.sees else None
        except RowError as error:
            _fault(source, summary, row.file, row.line, str(error))
            continue
        summary.truncated += cut
        yield encoded, image, is_held_out(sample.key, source.holdout), (files[row.file], row.line)


def is_held_out(key: str, share: float) -> bool:
    """By a hash of the text, so that the same rows are held out in every run, and twins together."""
    digest = sha1(key.strip().lower().encode(errors="replace"), usedforsecurity=False).hexdigest()
    return int(digest[:8], 16) < share * 2**32


def _fault(source: SourceRecipe, summary: Summary, file: Path, line: int, reason: str) -> None:
    if source.bad_rows == "stop":
        raise DataError(file, line, f"{reason} (to go on without such rows: bad_rows: skip)")
    summary.add_fault(file, line, reason)
