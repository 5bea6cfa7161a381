"""The packaged encoder: real weights, real photos."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from models.adapter_config import VisionConfig
from models.errors import CheckpointError, ModelError
from models.vision.efficientnet import EfficientNetLite0, imagenet_labels, load_efficientnet
from models.vision.encoder import VisionEncoder, check_features, encode, load_encoder
from models.vision.preprocess import center_crop, to_pixels

PHOTOS = Path(find_spec("skimage").submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return load_encoder("efficientnet-lite0")


def photo(name: str) -> Image.Image:
    with Image.open(PHOTOS / name) as image:
        return image.convert("RGB")


@pytest.mark.parametrize(
    ("file", "label"), [("coffee.png", "espresso"), ("chelsea.png", "tiger cat"), ("rocket.jpg", "missile")]
)
def test_it_names_real_photos(encoder: EfficientNetLite0, file: str, label: str) -> None:
    logits = encoder.logits(encoder.preprocess(photo(file))[None])
    assert logits.shape == (1, 1000)
    assert imagenet_labels()[int(logits.argmax())] == label


def test_the_labels_are_imagenets() -> None:
    labels = imagenet_labels()
    assert len(labels) == 1000
    assert all(label == label.strip() and label for label in labels)
    # Well-known indices of ILSVRC 2012.
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 388: "giant panda", 967: "espresso"}
    assert {i: labels[i] for i in known} == known


def test_logits_equal_the_packages_own_forward_pass(encoder: EfficientNetLite0) -> None:
    pixels = torch.stack([encoder.preprocess(photo(name)) for name in ("coffee.png", "chelsea.png")])
    torch.testing.assert_close(encoder.logits(pixels), encoder._model(pixels))


def test_features_of_every_scale(encoder: EfficientNetLite0) -> None:
    pixels = encoder.preprocess(photo("coffee.png"))[None]
    tokens, pooled = encoder.tokens(pixels), encoder.global_features(pixels)
    assert tokens.shape == (1, encoder.num_tokens, encoder.token_dim) == (1, 49, 1280)
    assert pooled.shape == (1, encoder.global_dim)
    feature_map = encoder._model.extract_features(pixels)
    torch.testing.assert_close(tokens[0, 7 * 2 + 3], feature_map[0, :, 2, 3])
    torch.testing.assert_close(pooled[:, -1280:], feature_map.mean((2, 3)))
    # The first 40 are the means of the stride-8 stage, taken here by a hook instead.
    seen = {}
    with torch.no_grad():
        hook = encoder._model._blocks[4].register_forward_hook(lambda *call: seen.update(out=call[2]))
        encoder._model(pixels)
        hook.remove()
    assert seen["out"].shape == (1, 40, 28, 28)
    torch.testing.assert_close(pooled[:, :40], seen["out"].mean((2, 3)))


def test_a_batch_equals_its_images(encoder: EfficientNetLite0) -> None:
    pixels = torch.stack([encoder.preprocess(photo(name)) for name in ("coffee.png", "rocket.jpg")])
    alone = torch.cat([encoder.global_features(one[None]) for one in pixels])
    torch.testing.assert_close(encoder.global_features(pixels), alone, rtol=1e-4, atol=1e-5)


def test_what_follows_the_features_can_be_trained(encoder: EfficientNetLite0) -> None:
    head = torch.nn.Linear(encoder.global_dim, 2)
    head(encoder.global_features(torch.zeros(1, 3, 224, 224))).sum().backward()
    assert head.weight.grad is not None
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())


def test_normalisation_and_colour_order(encoder: EfficientNetLite0) -> None:
    flat = Image.new("RGB", (300, 260), (255, 127, 0))
    rgb, bgr = encoder.preprocess(flat), encoder.preprocess(flat, "bgr")
    assert rgb.dtype == torch.float32
    torch.testing.assert_close(rgb[:, 5, 9], torch.tensor([1.0, 0.0, -127 / 128]))
    torch.testing.assert_close(bgr, rgb.flip(0))


def test_bgr_swaps_before_it_normalises() -> None:
    pixels = to_pixels(Image.new("RGB", (1, 1), (255, 0, 0)), (0.1, 0.2, 0.3), (1, 2, 4), "bgr")
    torch.testing.assert_close(pixels.ravel(), torch.tensor([-0.1, -0.1, (1 - 0.3) / 4]))


@pytest.mark.parametrize("resize", [224, 256])
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (100, 60), (900, 224), (641, 77)])
def test_center_crop_equals_resize_then_crop(size: tuple[int, int], resize: int) -> None:
    image = photo("coffee.png").resize(size)
    width, height = (int(resize * side / min(size)) for side in size)
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    expected = np.asarray(whole.crop((left, top, left + 224, top + 224)), int)
    difference = np.abs(np.asarray(center_crop(image, 224, resize), int) - expected)
    assert difference.mean() < 0.3  # the resampler's box is in single precision; half a pixel would be 4
    assert difference.max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 4_000_000), (4_000_000, 1), (2, 100_000)])
def test_hostile_aspect_ratios_cost_nothing(encoder: EfficientNetLite0, size: tuple[int, int]) -> None:
    assert encoder.preprocess(Image.new("RGB", size, "red")).shape == (3, 224, 224)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"_fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(CheckpointError, match=r"other\.pth: SHA-256 is [0-9a-f]{64}, not 5793442"):
        load_efficientnet(weights=path)
    with pytest.raises(CheckpointError, match=r"gone\.pth: cannot be read"):
        load_efficientnet(weights=tmp_path / "gone.pth")


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="'resnet50'; use 'efficientnet-lite0' or"):
        load_encoder("resnet50")


def test_similar_pictures_have_similar_features(encoder: EfficientNetLite0) -> None:
    cat, coffee = photo("chelsea.png"), photo("coffee.png")
    crop = cat.crop((20, 10, cat.width - 5, cat.height - 15))
    features = encoder.global_features(torch.stack([encoder.preprocess(i) for i in (cat, crop, coffee)]))
    near, far = F.cosine_similarity(features[0], features[1:])
    assert near > far + 0.1


def vision(**changes: object) -> VisionConfig:
    defaults = {
        "encoder": "efficientnet-lite0",
        "features": "tokens",
        "projector": "mlp",
        "fusion": "early",
        "layers": (0,),
        "num_tokens": 49,
        "feature_dim": 1280,
        "hidden_size": 8,
    }
    return VisionConfig.model_validate(defaults | changes)


@pytest.mark.parametrize(
    ("config", "shape"),
    [(vision(), (1, 49, 1280)), (vision(features="global", feature_dim=1752, num_tokens=4), (1, 1752))],
)
def test_a_config_reads_its_features(
    encoder: EfficientNetLite0, config: VisionConfig, shape: tuple[int, ...]
) -> None:
    check_features(config, encoder)
    assert encode(config, encoder, torch.zeros(1, 3, 224, 224)).shape == shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feature_dim": 768},
            "`feature_dim` is 768, but the encoder 'efficientnet-lite0' gives 1280 `tokens` features",
        ),
        ({"features": "global"}, "gives 1752 `global` features"),
        (
            {"num_tokens": 10},
            "a row per token, 49 with the encoder 'efficientnet-lite0', so `num_tokens` cannot be 10",
        ),
    ],
)
def test_a_config_for_another_encoder_is_refused(
    encoder: EfficientNetLite0, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_features(vision(**changes), encoder)
