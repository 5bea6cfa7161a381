"""Images are decoded in workers, encoded once, and found again by their content."""

import multiprocessing
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_base import tiny_config
from torch import Tensor
from train_files import write_lines

from models.adapter_config import VisionConfig
from models.tokenizer import load_tokenizer
from models.vision.preprocess import Color
from train.data.batches import Steps
from train.data.features import (
    FeatureCache,
    cache_folder,
    encode_images,
    feature_shape,
    live_pixels,
    random_resized_crop,
)
from train.data.images import Images, noisy
from train.data.plan import Plan, SourcePlan
from train.data.store import Encoder, Store, prepare
from train.errors import TrainError
from train.processes import StopSignal
from train.recipe import ComputeRecipe, SourceRecipe

VISION = VisionConfig(
    encoder="efficientnet-lite0",
    features="global",
    projector="linear",
    fusion="early",
    layers=(0,),
    num_tokens=1,
    feature_dim=3,
    hidden_size=3,
)


class MeanColor:
    """An encoder in a few lines: global features are an image's mean colour. Counts what it encodes."""

    name = "mean:colour"
    version = "1"
    image_size = 8
    token_dim = 3
    num_tokens = 1
    global_dim = 3

    def __init__(self) -> None:
        self.encoded = 0

    def preprocess(self, image: Image.Image, color: Color = "rgb") -> Tensor:
        pixels = torch.from_numpy(np.array(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255
        return pixels if color == "rgb" else pixels.flip(0)

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        return self.global_features(pixels_BCHW)[:, None]

    def global_features(self, pixels_BCHW: Tensor) -> Tensor:
        self.encoded += len(pixels_BCHW)
        return pixels_BCHW.mean((2, 3))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """40 images of colours of their own, two twins among them, one broken and one missing."""
    paths = [tmp_path / f"{i}.png" for i in range(42)]
    for i, path in enumerate(paths[:40]):
        Image.new("RGB", (9, 9), (i, 2 * i, 255 - i)).save(path)
    shutil.copy(paths[0], paths[1])
    Image.effect_noise((60, 60), 90).save(paths[40])
    paths[40].write_bytes(paths[40].read_bytes()[:2000])
    return paths


def read(
    paths: list[Path], encoder: MeanColor, cache: FeatureCache | None, workers: int = 0
) -> list[int | str]:
    return encode_images(paths, encoder, VISION, cache, workers, lambda count: None)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_content_is_encoded_once(paths: list[Path], tmp_path: Path, workers: int):
    encoder = MeanColor()
    folder = cache_folder(tmp_path, encoder, VISION)
    cache = FeatureCache(folder, feature_shape(encoder, VISION))
    rows = read(paths, encoder, cache, workers)
    assert encoder.encoded == len(cache) == 39
    assert rows[0] == rows[1]
    assert "corrupt or truncated" in str(rows[40])
    assert "No such file" in str(rows[41])
    features = cache.open()
    for i in (0, 17, 39):
        expected = np.array([i, 2 * i, 255 - i], np.float32) / 255
        np.testing.assert_allclose(features[cache.row(rows[i])], expected, atol=1e-6)
    again = FeatureCache(folder, (3,))
    assert read(paths[:40], encoder, again, workers) == rows[:40]
    assert encoder.encoded == 39


def test_an_interrupted_cache_goes_on(paths: list[Path], tmp_path: Path):
    """Features whose hash was not written, or only in part, are written again."""
    encoder, folder = MeanColor(), tmp_path / "features"
    read(paths[:40], encoder, FeatureCache(folder, (3,)))
    hashes = folder / "hashes.bin"
    hashes.write_bytes(hashes.read_bytes()[: 10 * 32 + 5])
    cache = FeatureCache(folder, (3,))
    assert len(cache) == 10
    rows = read(paths[:40], encoder, cache)
    assert encoder.encoded == 39 + 29
    features = cache.open()
    for i in range(40):
        expected = (
            np.array([max(i, 0) if i != 1 else 0, 2 * i if i != 1 else 0, 255 - (i if i != 1 else 0)]) / 255
        )
        np.testing.assert_allclose(features[cache.row(rows[i])], expected, atol=1e-6)


def test_features_that_are_not_on_disk_have_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine that loses power keeps what it likes of the rest: a hash there would vouch for zeros."""

    def broken(handle: int) -> None:
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", broken)
        with pytest.raises(OSError, match="Input/output"):
            FeatureCache(tmp_path, (3,)).add([bytes(32)], torch.ones(1, 3))
    assert not (tmp_path / "hashes.bin").read_bytes()
    assert len(FeatureCache(tmp_path, (3,))) == 0


def prepared(images: Images, base: Path, folder: Path, shades: list[int]) -> Store:
    """Captions of grey images, one of each shade."""
    folder.mkdir()
    for shade in shades:
        Image.new("RGB", (8, 8), (shade,) * 3).save(folder / f"{shade}.png")
    rows = [{"image": f"{shade}.png", "caption": f"shade {shade}"} for shade in shades]
    file = write_lines(folder / "rows.jsonl", rows)
    source = SourceRecipe(format="captions", path=(file,), images=folder, question="What?")
    tokens = Encoder(load_tokenizer(base), "chat", 512, tiny_config().vocab_size, sees=True)
    return prepare(folder.name, source, tokens, folder / "store", images.read_all, lambda count: None)


@pytest.fixture
def forkserver() -> Iterator[None]:
    """Python's own way of starting processes since 3.14."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
@pytest.mark.usefixtures("forkserver")
@pytest.mark.parametrize("features", ["cached", "live"])
def test_workers_have_the_images_however_python_starts_processes(tiny: Path, tmp_path: Path, features: str):
    compute = ComputeRecipe.model_validate({"workers": 1, "features": features})
    images = Images(compute, VISION, MeanColor(), tmp_path, StopSignal())
    store = prepared(images, tiny, tmp_path / "grey", [51, 102])
    plan = Plan([SourcePlan("grey", store.train, 1)], batch_size=1, seed=0)
    read = images.reader([store])
    steps = list(Steps(plan, [store], read, 1 << 14, rank=0, world=1, seed=0).load(0, workers=1))
    seen = sorted(round(255 * float(part.images.mean())) for step in steps for part in step.passes)
    assert seen == [51, 102]


def test_a_row_gets_its_own_image_from_another_cache(tiny: Path, tmp_path: Path):
    """A training goes on when the cache was emptied, or on another machine, and others have filled it."""
    images = Images(ComputeRecipe(workers=0), VISION, MeanColor(), tmp_path, StopSignal())
    ours = prepared(images, tiny, tmp_path / "ours", [51, 102])
    shutil.rmtree(tmp_path / "features")
    theirs = prepared(images, tiny, tmp_path / "theirs", [153, 204, 255])
    with pytest.raises(TrainError, match=r"has no features of .*51\.png.*remove `data`"):
        images.reader([theirs, ours])
    images.read_all(ours.image_paths)
    read = images.reader([theirs, ours])
    shades = [round(255 * float(read(store, image, None)[0])) for store in (ours, theirs) for image in (0, 1)]
    assert shades == [51, 102, 153, 204]


def test_without_a_cache_images_are_only_checked(paths: list[Path]):
    encoder = MeanColor()
    found = read(paths, encoder, None)
    assert [isinstance(fault, str) for fault in found] == [False] * 40 + [True] * 2
    assert encoder.encoded == 0


def test_colour_order_and_encoder_have_caches_of_their_own(tmp_path: Path):
    encoder = MeanColor()
    bgr = VISION.model_copy(update={"color": "bgr"})
    tokens = VISION.model_copy(update={"features": "tokens"})
    folders = {cache_folder(tmp_path, encoder, config) for config in (VISION, bgr, tokens)}
    assert len(folders) == 3
    assert all(folder.parent == tmp_path / "features" for folder in folders)


def test_live_pixels_follow_seed_and_colour(paths: list[Path]):
    encoder = MeanColor()
    picture = paths[0].with_name("gradient.png")
    Image.linear_gradient("L").convert("RGB").save(picture)
    plain, one, two, other = (live_pixels(picture, encoder, VISION, seed) for seed in (None, 1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)
    with pytest.raises(TrainError, match=r"41\.png: was readable when the training began"):
        live_pixels(paths[41], encoder, VISION, None)


def test_random_crops_keep_to_their_bounds():
    image = Image.new("RGB", (90, 60))
    boxes = []

    class Watched(Image.Image):
        def resize(self, size, resample=None, box=None, reducing_gap=None):  # type: ignore[no-untyped-def]
            boxes.append(box)
            return Image.new("RGB", size)

    image.__class__ = Watched
    for seed in range(200):
        assert random_resized_crop(image, 8, random.Random(seed)).size == (8, 8)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        assert 0.6 <= (right - left) / (bottom - top) <= 1.55
    areas = [(r - l) * (b - t) / 5400 for l, t, r, b in boxes]
    assert len(set(boxes)) > 20
    assert max(areas) <= 1


def test_noise_follows_the_seed_and_scales_with_the_feature():
    feature = torch.tensor([0.0, 1.0, -2.0] * 2000)
    one, again, other = (noisy(feature, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not one[feature == 0].any()
    for value in (1.0, -2.0):
        assert one[feature == value].mean() == pytest.approx(value, abs=0.1)
        assert one[feature == value].std() == pytest.approx(0.5 * abs(value), rel=0.05)
    assert noisy(feature, 0, 1) is feature
