"""Noto's emoji with their names, from npm's `emoji-datasource-google`: pictures Apache-2.0, names MIT."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress

from models.vision.images import ImageError, decode_image
from train.datasets.archives import read_tgz
from train.datasets.captions import CAPTIONS, reserved, write_lines
from train.datasets.packages import Package
from train.errors import TrainError

NAME = "noto_emoji"
PACKAGE = Package(
    name="emoji-datasource-google 16.0.0",
    command=("npm", "pack", "emoji-datasource-google@16.0.0", "--ignore-scripts"),
    option="--emoji-tgz",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    size=74_344_091,
)

_TABLE = "package/emoji.json"
_ROOT = "package/img/google/64/"


def make(tgz: Path, folder: Path, progress: Progress) -> None:
    """Write `img/*.png`, as they come, and `captions.jsonl` into `folder`. Raises TrainError."""
    [(_, table)] = read_tgz(tgz, [_TABLE])
    try:
        rows = list(_rows(json.loads(table)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrainError(f"{tgz}: {_TABLE} is no table of emoji ({error}); is it another version?") from error
    files = {_ROOT + row["file"].removeprefix("img/"): row["file"] for row in rows}
    (folder / "img").mkdir()
    task = progress.add_task(NAME, total=len(files))
    for name, data in read_tgz(tgz, files):
        try:
            decode_image(data)
        except ImageError as error:
            raise TrainError(f"{tgz}: {name}: {error}") from error
        (folder / files[name]).write_bytes(data)
        progress.advance(task)
    write_lines(folder / CAPTIONS, rows)


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    """All with a picture but the bare skin tones, and what is reserved."""
    for emoji in table:
        name = emoji["name"].lower()
        if not emoji["has_img_google"] or emoji["category"] == "Component" or reserved(name):
            continue
        if not re.fullmatch(r"[0-9a-f-]+\.png", emoji["image"]):  # it becomes a file's name here
            raise ValueError(f"{emoji['image']!r} is no picture's name")
        yield {
            "file": f"img/{emoji['image']}",
            "name": name,
            "short_names": emoji["short_names"],
            "category": emoji["category"],
            "subcategory": emoji["subcategory"],
            "caption": name,
        }
