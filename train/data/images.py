"""A recipe's images, by whichever way it has chosen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from models.adapter_config import VisionConfig
from models.vision.encoder import VisionEncoder
from train.data.batches import ImageReader
from train.data.features import FeatureCache, cache_folder, encode_images, feature_shape, live_pixels
from train.data.store import NO_IMAGE, Store
from train.errors import TrainError
from train.processes import StopSignal
from train.recipe import ComputeRecipe


class Images:
    """A recipe's images: encoded once and looked up, or read anew in each step."""

    def __init__(
        self,
        compute: ComputeRecipe,
        vision: VisionConfig | None,
        encoder: VisionEncoder | None,
        cache_dir: Path,
        stop: StopSignal,
    ) -> None:
        self._compute = compute
        self._vision = vision
        self._encoder = encoder
        self._stop = stop
        self._folder: Path | None = None
        if vision and encoder and compute.features == "cached":
            self._folder = cache_folder(cache_dir, encoder, vision)

    def read_all(self, paths: list[Path]) -> list[bytes | str]:
        """Check, and encode where features are kept."""
        if self._vision is None or self._encoder is None:
            return []
        workers = self._compute.workers

        def progress(count: int) -> None:
            self._stop.check()

        if self._folder is None:
            return encode_images(paths, self._encoder, self._vision, None, workers, progress)
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / ".lock"):
            cache = FeatureCache(self._folder, feature_shape(self._encoder, self._vision))
            return encode_images(paths, self._encoder, self._vision, cache, workers, progress)

    def reader(self, stores: Iterable[Store]) -> ImageReader:
        """For the images of these stores. Raises TrainError where the features of one are not there."""
        vision, encoder = self._vision, self._encoder
        if vision is None or encoder is None:
            return _no_image
        if self._folder is None:
            augment = self._compute.augment

            def read_live(store: Store, image: int, seed: int | None) -> Tensor:
                return live_pixels(store.image_paths[image], encoder, vision, seed if augment else None)

            return read_live
        folder, noise = self._folder, self._compute.feature_noise
        cache = FeatureCache(folder, feature_shape(encoder, vision))
        for store in stores:
            _check_cached(cache, store, folder)
        features = cache.open()

        def read_cached(store: Store, image: int, seed: int | None) -> Tensor:
            row = cache.row(store.image_hash(image))
            assert row is not None
            feature = torch.from_numpy(features[row].copy())
            return feature if seed is None else noisy(feature, noise, seed)

        return read_cached


def _check_cached(cache: FeatureCache, store: Store, folder: Path) -> None:
    for image in np.unique(store.image_R[np.concatenate([store.train, store.held_out])]):
        if image != NO_IMAGE and cache.row(store.image_hash(image)) is None:
            raise TrainError(
                f"{folder}: has no features of {store.image_paths[image]} any more; put the cache back, or "
                "remove `data` from the training's output: then they are made again"
            )


def noisy(features: Tensor, std: float, seed: int) -> Tensor:
    """Each feature times 1 + std · n, n standard normal: Gaussian dropout (Srivastava 2014, section 10)."""
    if std == 0:
        return features
    generator = torch.Generator().manual_seed(seed)
    return features * (1 + std * torch.randn(features.shape, generator=generator))


def _no_image(store: Store, image: int, seed: int | None) -> Tensor:
    raise AssertionError("an adapter without vision was given an image")
