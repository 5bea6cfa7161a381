"""Image files of unknown origin, decoded under limits to upright RGB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image, UnidentifiedImageError

from models.vision.metered_file import METADATA_BYTES, MeteredFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_SIDE = 65_535  # JPEG's own; a PNG of one column has a memory block a row, which takes Pillow seconds
_PIXEL_READS = 100_000  # a PNG of 20 MiB in chunks of 1 KiB takes 61,440; those of libpng have 8 KiB
_MAX_SCANS = 64  # of a progressive JPEG: encoders make ten; one of sixty bytes passes over all pixels
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # marker, length, components
_PNG_DEPTH = 24  # the byte of IHDR, the first chunk, that tells the bits of a sample
_MAX_EXIF = 2**18  # bytes searched for the orientation; a camera's have 64 KiB at most
_ORIENTATION_TAG = 0x0112
# EXIF orientation → what turns the stored picture upright (EXIF 2.32, table 6).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Limit = Literal["bytes", "pixels", "format", "data"]


class ImageError(ValueError):
    """An image that is not read. `limit` says which rule it broke; `data`: the file is corrupt."""

    def __init__(self, limit: Limit, message: str) -> None:
        super().__init__(message)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """`max_pixels` is held against the file's header, before any pixel is decoded."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 40_000_000


DEFAULT_LIMITS = ImageLimits()


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode PNG, JPEG, WebP or GIF (of an animation the first frame) to an RGB image.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.
    Raises `ImageError` whatever the bytes are.
    """
    if len(data) > limits.max_bytes:
        raise ImageError("bytes", f"The image has {len(data)} bytes; at most {limits.max_bytes} are read.")
    # Pillow's decoders meet broken files with exceptions of a dozen unrelated classes (SyntaxError,
    # struct.error, zlib.error, …); for the caller they all mean one thing.
    try:
        file = MeteredFile(data)
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image, limits)
            if image.format in ("JPEG", "MPO") and len(_SCAN.findall(data)) > _MAX_SCANS:
                raise ImageError("data", f"The JPEG has over {_MAX_SCANS} scans; save it with fewer.")
            file.allow(_PIXEL_READS, len(data) + METADATA_BYTES)
            image.load()
            if image.format == "PNG":
                _scale_transparent_color(image, depth=data[_PNG_DEPTH])
            return _rgb(_upright(image))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("pixels", f"The image has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("format", "The image is not a PNG, JPEG, WebP or GIF file.") from error
    except Exception as error:
        raise ImageError("data", f"The image file is corrupt or truncated: {error}") from error


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            "pixels",
            f"The image has {width}×{height} pixels; at most {limits.max_pixels} in all are decoded.",
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            "pixels", f"The image has {width}×{height} pixels; a side may have {MAX_SIDE} at most."
        )


def _upright(image: Image.Image) -> Image.Image:
    if len(image.info.get("exif", b"")) > _MAX_EXIF:
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block says nothing about the picture itself
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _scale_transparent_color(image: Image.Image, depth: int) -> None:
    """Pillow makes a PNG's samples 8 bits, but leaves the colour that is transparent at the file's depth."""
    color = image.info.get("transparency")
    if isinstance(color, tuple) and depth == 16:
        image.info["transparency"] = tuple(sample >> 8 for sample in color)
    elif isinstance(color, int) and image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = color * 255 // (2**depth - 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _rgb_of_16_bit_grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    pasted = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pasted.size, "white"), pasted).convert("RGB")


def _rgb_of_16_bit_grey(image: Image.Image) -> Image.Image:
    """`convert` would clip values at 255, and compare the transparent one with what is left of them."""
    import numpy as np  # decoding alone needs it, and the gateway, which imports this, does not decode

    values_HW = np.asarray(image)
    grey_HW = (values_HW // 257).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey_HW[values_HW == transparent] = 255
    return Image.fromarray(grey_HW).convert("RGB")
