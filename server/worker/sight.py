"""What adapters see: encoders' features of images, kept, and made a layer at a time beside decodes."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.adapter import Adapter
from models.uploads import upload
from models.vision.encoder import VisionEncoder
from server.worker.device import check_device

log = logging.getLogger(__name__)

# Images that are encoded at once. Each takes 17 MB within EfficientNet-Lite0, more within a large ViT, and
# a layer of more of them is no quicker for each, but a longer time in which nothing else steps.
_BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """One version of one adapter. Requests hold on to theirs, whatever is loaded or unloaded meanwhile."""

    key: tuple[str, int]  # id, version
    adapter: Adapter
    encoder: VisionEncoder | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """Pixels [3, H, W] as the adapter's encoder wants them. `key` is the image's hash."""

    key: str
    pixels: Tensor


class Sight:
    """Features by encoder and image, least recently used first to go.

    Also those of requests that still wait: a full queue's may be many times what there is room for. A
    request whose features have gone has its image encoded again in the step that admits it, so that too
    small a cache costs time, but no memory.
    """

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        """`max_bytes` of features on the device; more only for the images of one batch."""
        self._device = device
        self._max_bytes = max_bytes
        self._bytes = 0
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def wait(self) -> None:
        """Until the device is done with what it was given: else the clock would tell when it was given it."""
        check_device(self._device)

    def knows(self, loaded: LoadedAdapter, image: ImageInput) -> bool:
        return _key(loaded, image) in self._features

    def see(self, loaded: LoadedAdapter, images: Sequence[ImageInput]) -> Tensor:
        """Features [S, …] of the images, from the cache or computed, in batches as elsewhere."""
        by_key = {_key(loaded, image): image for image in images}
        found = {key: self._use(key) for key in by_key if key in self._features}
        missing = [key for key in by_key if key not in found]
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            for _ in self.seeing(loaded, [by_key[key] for key in batch]):
                pass
            found |= {key: self._features[key] for key in batch}  # before the next batch may want their room
        self._make_room()
        return torch.stack([found[_key(loaded, image)] for image in images])

    def seeing(self, loaded: LoadedAdapter, images: Sequence[ImageInput]) -> Generator[None]:
        """Put what the cache lacks into it, in one batch, yielding after each layer of the encoder.

        Then the cache is no larger than it may be, or than `images` are: nobody may come to `see` them.
        """
        vision, encoder = loaded.adapter.config.vision, loaded.encoder
        assert vision is not None
        assert encoder is not None
        missing = {key: i.pixels for i in images if (key := _key(loaded, i)) not in self._features}
        if missing:
            pixels = upload(torch.stack(list(missing.values())), self._device)
            features = yield from encoder.by_layers(vision.features, pixels)
            for key, feature in zip(missing, features.unbind(), strict=True):
                self._drop(key)  # another encoding of it may have ended meanwhile
                self._features[key] = feature.clone()  # by itself: it is not to keep the whole batch
                self._bytes += self._features[key].nbytes
        # Without those that made room for another encoding meanwhile.
        keys = dict.fromkeys(key for i in images if (key := _key(loaded, i)) in self._features)
        for key in keys:
            self._use(key)
        self._make_room(kept=len(keys))

    def _make_room(self, kept: int = 0) -> None:
        """What is too much goes, but for those that were used last."""
        while self._bytes > self._max_bytes and len(self._features) > kept:
            self._drop(next(iter(self._features)))

    def _use(self, key: Hashable) -> Tensor:
        self._features.move_to_end(key)
        return self._features[key]

    def _drop(self, key: Hashable) -> None:
        """If it is there."""
        feature = self._features.pop(key, None)
        self._bytes -= 0 if feature is None else feature.nbytes

    def check_integrity(self) -> None:
        """Assert that the bytes are those of the features."""
        assert self._bytes == sum(feature.nbytes for feature in self._features.values()), "bytes are lost"


class ImageQueue:
    """Requests that wait for their images' features, first come first served.

    Beside decodes images are encoded one after another, as long as there is time: no step is longer than
    its time by more than a layer of one image. Else those that wait for the same features are a batch,
    and one batch a step, so that between two of them requests come, start and leave.
    """

    def __init__(self, sight: Sight) -> None:
        self._sight = sight
        self._waiting: dict[str, tuple[LoadedAdapter, ImageInput]] = {}  # by request id
        self._batch: list[str] = []  # whose images are being encoded
        self._layers: Generator[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request_id: str, loaded: LoadedAdapter, image: ImageInput) -> None:
        self._waiting[request_id] = (loaded, image)

    def remove(self, request_id: str) -> None:
        """It no longer waits; what is under way for it goes on, for whoever asks next."""
        self._waiting.pop(request_id, None)

    def forget_unwanted(self) -> None:
        """What is under way for nobody ends, lest it keeps an encoder that has no adapter any more."""
        if self._waiting.keys().isdisjoint(self._batch):
            self._end()

    def work(self, seconds: float) -> tuple[list[str], list[str]]:
        """Encode for so long, a layer at least; one batch, without end. Whose features are there now, and
        whose cannot be had."""
        until = time.perf_counter() + seconds
        done: list[str] = []
        failed: list[str] = []
        while self._waiting:
            if self._layers is None:
                self._layers = self._start(alone=seconds < float("inf"))
            try:
                next(self._layers)
                self._sight.wait()
            except StopIteration:
                done += self._end()
            except Exception:
                log.exception("images of %d requests were not encoded", len(self._batch))
                failed += self._end()
            if time.perf_counter() >= until or (seconds == float("inf") and (done or failed)):
                break
        return done, failed

    def _start(self, *, alone: bool) -> Generator[None]:
        first, _ = next(iter(self._waiting.values()))
        same = [id for id, (loaded, _) in self._waiting.items() if _source(loaded) == _source(first)]
        self._batch = same[: 1 if alone else _BATCH]
        return self._sight.seeing(first, [self._waiting[id][1] for id in self._batch])

    def _end(self) -> list[str]:
        done = [id for id in self._batch if self._waiting.pop(id, None) is not None]
        self._batch, self._layers = [], None
        return done


def _source(loaded: LoadedAdapter) -> Hashable:
    """Whose features they are."""
    vision, encoder = loaded.adapter.config.vision, loaded.encoder
    assert vision is not None
    assert encoder is not None
    return encoder.name, encoder.version, vision.features, vision.color


def _key(loaded: LoadedAdapter, image: ImageInput) -> Hashable:
    return _source(loaded), image.key
