"""Clip art with its titles, from Debian's `openclipart-png`; all in the public domain.

`openclipart.jsonl.xz` names the pictures and has their columns (see `openclipart.LICENSE`): the titles are
in another package, and which of them tell what a picture shows no rule can say.
"""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from rich.progress import Progress

from models.vision.images import DEFAULT_LIMITS, ImageError, decode_image
from train.data.rows import read_rows
from train.datasets.archives import read_deb
from train.datasets.captions import CAPTIONS, write_lines
from train.datasets.packages import Package
from train.errors import TrainError

NAME = "openclipart"
PACKAGE = Package(
    name="openclipart-png 1:0.18+dfsg-19",
    command=("apt-get", "download", "openclipart-png=1:0.18+dfsg-19"),
    option="--openclipart-deb",
    sha256="f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    size=130_910_028,
)
LIST = Path(__file__).with_name("openclipart.jsonl.xz")

_ROOT = "usr/share/openclipart/png/"
_SIDE = 160  # pixels of the longer one
_MAX_PIXELS = 1 << 30


def make(deb: Path, folder: Path, progress: Progress) -> None:
    """Write `img/*.webp` and `captions.jsonl` into `folder`. Raises TrainError."""
    rows = [row.value for row in read_rows(LIST)]
    files: dict[str, list[str]] = {}
    for row in rows:  # some pictures are symbolic links, `linked` is where they lead
        files.setdefault(_ROOT + row.pop("linked", row["orig"]), []).append(row["file"])
    (folder / "img").mkdir()
    task = progress.add_task(NAME, total=len(rows))
    for name, data in read_deb(deb, files):
        try:
            small = _small(data)
        except ImageError as error:
            raise TrainError(f"{deb}: {name}: {error}") from error
        for file in files[name]:
            (folder / file).write_bytes(small)
            progress.advance(task)
    write_lines(folder / CAPTIONS, rows)


def _small(data: bytes) -> bytes:
    image, out = _decoded(data), BytesIO()
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    image.save(out, "WEBP", quality=60, method=4)
    return out.getvalue()


def _decoded(data: bytes) -> Image.Image:
    """RGB over white; the few posters of hundreds of megapixels at about eight times the size asked for.

    Raises ImageError.
    """
    try:
        image = PngImageFile(BytesIO(data))  # `Image.open` takes the largest for bombs
        if math.prod(image.size) <= DEFAULT_LIMITS.max_pixels:
            return decode_image(data)
        if math.prod(image.size) > _MAX_PIXELS:
            raise ImageError("pixels", f"{image.size} are more than {_MAX_PIXELS} pixels")
        return _reduced(image, max(image.size) // (8 * _SIDE))
    except ImageError:
        raise
    except Exception as error:  # broken files raise a dozen unrelated classes
        raise ImageError("data", f"is corrupt: {error}") from error


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """Over white and by a whole factor smaller, in bands: a copy of all of it would take gigabytes more."""
    width, height = image.size
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = 64 * factor
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB")
        small.paste(flat.reduce(factor), (0, top // factor))
    return small
