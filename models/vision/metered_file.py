"""An image file for Pillow that says how much may be read of it. Needs no more than Python.

Who checks an image (the gateway) and who decodes it (a worker, an expert) are equally careful by it.
"""

from __future__ import annotations

from io import BytesIO

_METADATA_READS = 10_000  # before the pixels; of real pictures some hundred
METADATA_BYTES = 2**22


class ExcessiveMetadata(OSError):
    """A file from which Pillow would read on and on."""


class MeteredFile(BytesIO):
    """An image file for Pillow, whose readers of metadata know no end: what they read is counted.

    Each segment or chunk takes a few small reads; a file may hold millions, and they work in Python on
    every one. Reading all at once, as for WebP, costs a copy and is free. `read` raises `ExcessiveMetadata`
    for more than is allowed: at first, what a file may hold before its pixels.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.allow(_METADATA_READS, METADATA_BYTES)

    def allow(self, reads: int, size: int) -> None:
        """From now on, so many reads of so many bytes together."""
        self._reads = reads
        self._left = size

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if size is not None and size >= 0:
            self._reads -= 1
            self._left -= _cost(data)
            if self._reads < 0 or self._left < 0:
                raise ExcessiveMetadata("there is more metadata than is read")
        return data


def _cost(data: bytes) -> int:
    """What Pillow makes of a read, reckoned in bytes that it merely keeps."""
    if data.startswith(b"Exif\0\0"):
        return 16 * len(data)  # taken apart number by number, and each segment copies those before it
    if data.endswith(b"iCCP"):
        return 2**20  # the profile in the chunk that begins here, unpacked
    return len(data)
