"""From a request's `image_url`s to image files in memory, within the limits and off the event loop."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from models.vision.metered_file import ExcessiveMetadata, MeteredFile
from server.errors import InvalidRequest
from server.gateway.fetching import Allowance, ImageFetcher
from server.gateway.tasks import all_or_none
from server.settings import GatewaySettings
from server.tracing import span

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MAX_SIDE = 65_535  # JPEG's own; what decodes a PNG of millions of rows stands still meanwhile
_BASE64_PIECE = 4 * 2**18  # decoded piecewise, since a piece holds the interpreter
_DATA_HEADER = 256  # characters before a data URL's comma

Given = TypeVar("Given", str, bytes)


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded file that says it is a PNG, JPEG, WebP or GIF of allowed size."""

    data: bytes
    sha256: str


class ImageLoader:
    def __init__(self, limits: GatewaySettings, fetcher: ImageFetcher) -> None:
        self._limits = limits
        self._fetcher = fetcher

    async def load(self, urls: Sequence[tuple[str, str]]) -> tuple[Image, ...]:
        """The images behind `(param, url)` pairs, in order.

        Raises `InvalidRequest`, naming the limit that was passed and, in `param`, the image.
        """
        if len(urls) > self._limits.max_images:
            raise InvalidRequest(
                f"The request has {len(urls)} images; {self._limits.max_images} are allowed (max_images).",
                param="messages",
                code="too_many_images",
            )
        allowance = Allowance(self._limits.max_body_bytes)
        keys = [number if _is_inline(url) else url for number, (_, url) in enumerate(urls)]
        firsts: dict[int | str, tuple[str, str]] = {}  # what is named twice is fetched once
        for key, named in zip(keys, urls, strict=True):
            firsts.setdefault(key, named)
        loaded = await all_or_none(self._load(param, url, allowance) for param, url in firsts.values())
        images = dict(zip(firsts, loaded, strict=True))
        return tuple(images[key] for key in keys)

    async def _load(self, param: str, url: str, allowance: Allowance) -> Image:
        inline = _is_inline(url)
        try:
            with span("image", source="data" if inline else "fetch"):
                if inline:
                    return await self._in_thread(self._from_data_url, url)
                return await self._in_thread(self._checked, await self._fetcher.fetch(url, allowance))
        except InvalidRequest as error:
            error.param = param
            raise

    async def _in_thread(self, work: Callable[[Given], Image], given: Given) -> Image:
        return await asyncio.get_running_loop().run_in_executor(self._fetcher.readers, work, given)

    def _from_data_url(self, url: str) -> Image:
        comma = url.find(",", 0, _DATA_HEADER)
        kind, *options = url[5 : max(comma, 0)].lower().split(";")
        if "base64" not in options or not kind.startswith("image/"):
            raise InvalidRequest(
                "A data URL must look like data:image/png;base64,….", code="invalid_image_url"
            )
        if (len(url) - comma - 1) * 3 // 4 > self._limits.max_image_bytes + 2:
            raise self._too_large()
        return self._checked(_decode_base64(url[comma + 1 :]))

    def _checked(self, data: bytes) -> Image:
        if len(data) > self._limits.max_image_bytes:
            raise self._too_large()
        width, height = self._size(data)
        if width * height > self._limits.max_image_pixels:
            raise self._too_many_pixels(f"{width}x{height}")
        if max(width, height) > _MAX_SIDE:
            raise InvalidRequest(
                f"The image has {width}x{height} pixels; a side may have {_MAX_SIDE} at most.",
                code="image_too_large",
            )
        return Image(data, hashlib.sha256(data).hexdigest())

    def _size(self, data: bytes) -> tuple[int, int]:
        """Width and height that the file's header declares; nothing is decoded."""
        try:
            with PillowImage.open(MeteredFile(data), formats=_FORMATS) as header:
                return header.size
        except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning):
            raise self._too_many_pixels("far more") from None
        except ExcessiveMetadata:
            raise InvalidRequest(
                "The image has more metadata than is read; send it without.", code="invalid_image"
            ) from None
        except (
            UnidentifiedImageError,
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            IndexError,
            TypeError,
            KeyError,
        ):
            # What Pillow's readers raise on hostile headers.
            raise InvalidRequest(
                "The image is not a readable PNG, JPEG, WebP or GIF.", code="invalid_image"
            ) from None

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(
            f"The image is over {self._limits.max_image_bytes} bytes (max_image_bytes).",
            code="image_too_large",
        )

    def _too_many_pixels(self, size: str) -> InvalidRequest:
        return InvalidRequest(
            f"The image has {size} pixels; {self._limits.max_image_pixels} are allowed (max_image_pixels).",
            code="image_too_large",
        )


def _is_inline(url: str) -> bool:
    return url[:5].lower() == "data:"


def _decode_base64(text: str) -> bytes:
    try:
        encoded = text.encode("ascii")
        pieces = (encoded[i : i + _BASE64_PIECE] for i in range(0, len(encoded), _BASE64_PIECE))
        return b"".join(b64decode(piece, validate=True) for piece in pieces)
    except (UnicodeEncodeError, binascii.Error):
        raise InvalidRequest("The data URL is not valid base64.", code="invalid_image_url") from None
