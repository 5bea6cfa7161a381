"""Images: decoded in worker processes, encoded once, their features kept on disk by image hash."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.adapter_config import VisionConfig
from models.vision.encoder import VisionEncoder, encode
from models.vision.images import ImageError, decode_image
from train.data.store import HASH_BYTES
from train.data.workers import quiet_worker, worker_start
from train.errors import TrainError

_BATCH = 16

Progress = Callable[[int], None]


class Decoded(NamedTuple):
    """An image file's hash and pixels [3, H, W]; or why there are none."""

    digest: bytes
    pixels: Tensor | None
    fault: str = ""


class ImageFiles(Dataset[Decoded]):
    """Image files for worker processes. `known`: hashes whose pixels nobody needs."""

    def __init__(
        self, paths: Sequence[Path], encoder: VisionEncoder, config: VisionConfig, known: frozenset[bytes]
    ) -> None:
        self._paths = paths
        self._encoder = encoder
        self._color = config.color
        self._known = known

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Decoded:
        try:
            data = self._paths[index].read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest in self._known:
                return Decoded(digest, None)
            return Decoded(digest, self._encoder.preprocess(decode_image(data), self._color))
        except (ImageError, OSError) as error:
            return Decoded(b"", None, str(error))


class FeatureCache:
    """Features of one encoder by image hash: two files, `rows.f32` and `hashes.bin`, that only grow.

    A row is on disk before its hash, so that a run, or a machine, that stops leaves nothing false behind.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rows_file, self._hashes_file = folder / "rows.f32", folder / "hashes.bin"
        self._shape = shape
        self._row_bytes = 4 * int(np.prod(shape))
        self._index: dict[bytes, int] = {}
        self._recover()

    def _recover(self) -> None:
        for file in (self._rows_file, self._hashes_file):
            file.touch()
        hashes = self._hashes_file.read_bytes()
        count = min(len(hashes) // HASH_BYTES, self._rows_file.stat().st_size // self._row_bytes)
        self._index = {hashes[i * HASH_BYTES : (i + 1) * HASH_BYTES]: i for i in range(count)}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def known(self) -> frozenset[bytes]:
        return frozenset(self._index)

    def row(self, digest: bytes) -> int | None:
        return self._index.get(digest)

    def add(self, digests: Sequence[bytes], features: Tensor) -> None:
        """Append features, [n, *shape], of n images that are not there yet."""
        count = len(self._index)
        with self._rows_file.open("r+b") as rows, self._hashes_file.open("r+b") as hashes:
            rows.seek(count * self._row_bytes)
            rows.write(features.to(torch.float32).cpu().contiguous().numpy().tobytes())
            rows.flush()
            os.fsync(rows.fileno())
            hashes.seek(count * HASH_BYTES)
            hashes.write(b"".join(digests))
        self._index |= {digest: count + i for i, digest in enumerate(digests)}

    def open(self) -> NDArray[np.float32]:
        """All features [J, *shape], mapped into memory."""
        if not self._index:
            return np.empty((0, *self._shape), np.float32)
        return np.memmap(self._rows_file, np.float32, "r", shape=(len(self._index), *self._shape))


def cache_folder(root: Path, encoder: VisionEncoder, config: VisionConfig) -> Path:
    """One folder for all that decides what an image's features are."""
    name = "".join(char if char.isalnum() or char in "-." else "_" for char in encoder.name)
    return root / "features" / f"{name}-{encoder.version}-{config.features}-{config.color}"


def feature_shape(encoder: VisionEncoder, config: VisionConfig) -> tuple[int, ...]:
    """Of one image: [T, F] or [F]."""
    if config.features == "tokens":
        return encoder.num_tokens, encoder.token_dim
    return (encoder.global_dim,)


def encode_images(
    paths: Sequence[Path],
    encoder: VisionEncoder,
    config: VisionConfig,
    cache: FeatureCache | None,
    workers: int,
    progress: Progress,
) -> list[bytes | str]:
    """The hash of each image, under which `cache` has its features then; or why it has none."""
    known = cache.known if cache else frozenset()
    found: list[bytes | str] = []
    waiting: dict[bytes, Tensor] = {}

    def flush() -> None:
        if waiting and cache is not None:
            cache.add(list(waiting), encode(config, encoder, torch.stack(list(waiting.values()))))
        waiting.clear()

    for decoded in _decode(ImageFiles(paths, encoder, config, known), workers):
        found.append(decoded.fault or decoded.digest)
        new = cache is not None and decoded.pixels is not None and cache.row(decoded.digest) is None
        if new and decoded.pixels is not None:
            waiting[decoded.digest] = decoded.pixels
        if len(waiting) >= _BATCH:
            flush()
        progress(len(found))
    flush()
    return found


def _decode(images: ImageFiles, workers: int) -> Iterator[Decoded]:
    if not len(images):
        return iter(())
    workers = min(workers, len(images))
    loader: DataLoader[Decoded] = DataLoader(
        images,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        multiprocessing_context=worker_start(workers),
    )
    return iter(loader)


def live_pixels(path: Path, encoder: VisionEncoder, config: VisionConfig, augment_seed: int | None) -> Tensor:
    """[3, H, W] of an image file; with a seed, of a random part of it."""
    try:
        image = decode_image(path.read_bytes())
    except (ImageError, OSError) as error:
        raise TrainError(f"{path}: was readable when the training began and is not now: {error}") from error
    if augment_seed is not None:
        image = random_resized_crop(image, encoder.image_size, random.Random(augment_seed))  # noqa: S311
    return encoder.preprocess(image, config.color)


def random_resized_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A part of 90 to 100 % of the area and 3:4 to 4:3 of the aspect, at `size`² (the released 7B code's)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.9, 1.0)
        ratio = (3 / 4) * (16 / 9) ** rng.random()
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
