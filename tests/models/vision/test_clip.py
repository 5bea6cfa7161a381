"""CLIP through open_clip. No weights are at hand in tests, so these are the model's own, random ones."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import CheckpointError, ModelError
from models.vision.clip import ClipEncoder
from models.vision.encoder import load_encoder

MODEL = "ViT-S-32"
INSTALLED = find_spec("open_clip") is not None and find_spec("torchvision") is not None
needs_clip = [pytest.mark.clip, pytest.mark.skipif(not INSTALLED, reason="the clip extra is not installed")]


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModelError, match=r"install llama-adapter-server\[clip\]"):
        load_encoder("open_clip:ViT-L-14:openai")


@pytest.fixture(scope="module")
def model() -> Any:
    import open_clip

    torch.manual_seed(0)
    return open_clip.create_model(MODEL).eval()


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "weights.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> ClipEncoder:
    return load_encoder(f"open_clip:{MODEL}:{checkpoint}")


class TestClip:
    pytestmark = needs_clip

    def test_the_class_token_is_open_clips_image_embedding(self, encoder: ClipEncoder, model: Any) -> None:
        pixels = torch.randn(2, 3, 224, 224)
        tokens = encoder.tokens(pixels)
        assert tokens.shape == (2, encoder.num_tokens, encoder.token_dim) == (2, 50, 384)
        with torch.no_grad():
            torch.testing.assert_close(tokens[:, 0], model.encode_image(pixels), rtol=1e-4, atol=1e-5)

    def test_patch_tokens_and_scales_equal_a_walk_through_the_blocks(
        self, encoder: ClipEncoder, model: Any
    ) -> None:
        pixels, visual = torch.randn(1, 3, 224, 224), model.visual
        with torch.no_grad():
            patches = (
                torch.nn.functional.conv2d(pixels, visual.conv1.weight, stride=32).flatten(2).transpose(1, 2)
            )
            x = torch.cat([visual.class_embedding.expand(1, 1, -1), patches], dim=1)
            x = visual.ln_pre(x + visual.positional_embedding)
            scales = []
            for i, block in enumerate(visual.transformer.resblocks):
                x = block(x)
                if i in (2, 5, 8, 11):
                    scales.append(visual.ln_post(x[:, 0]))
            tokens = visual.ln_post(x) @ visual.proj
        torch.testing.assert_close(encoder.tokens(pixels), tokens, rtol=1e-4, atol=1e-5)
        pooled = encoder.global_features(pixels)
        assert pooled.shape == (1, encoder.global_dim) == (1, 4 * 384)
        torch.testing.assert_close(pooled, torch.cat(scales, dim=-1), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("size", [(640, 480), (301, 500), (60, 97)])
    def test_preprocessing_is_open_clips_own(
        self, encoder: ClipEncoder, model: Any, size: tuple[int, int]
    ) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        noise = np.random.default_rng(0).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        theirs = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)(image)
        std = torch.tensor(model.visual.preprocess_cfg["std"])[:, None, None]
        levels = ((encoder.preprocess(image) - theirs) * std * 255).abs()
        assert levels.mean() < 0.3  # of 255; the resampler's box is in single precision
        assert levels.max() < 3.5

    def test_bgr_swaps_the_channels_first(self, encoder: ClipEncoder) -> None:
        image = Image.new("RGB", (30, 30), (255, 10, 90))
        swapped = Image.new("RGB", (30, 30), (90, 10, 255))
        torch.testing.assert_close(encoder.preprocess(image, "bgr"), encoder.preprocess(swapped))

    def test_the_version_is_of_the_weights(self, encoder: ClipEncoder, model: Any, tmp_path: Path) -> None:
        state = model.state_dict()
        torch.save(state, tmp_path / "same.pt")
        torch.save(state | {"visual.proj": state["visual.proj"] + 1}, tmp_path / "other.pt")
        same, other = (
            load_encoder(f"open_clip:{MODEL}:{tmp_path / name}") for name in ("same.pt", "other.pt")
        )
        assert same.version == encoder.version != other.version

    def test_a_large_models_shapes(self) -> None:
        import open_clip

        visual = open_clip.create_model("ViT-L-14", device="meta").visual
        encoder = ClipEncoder("open_clip:ViT-L-14:openai", "0", visual, "meta")
        assert (encoder.num_tokens, encoder.token_dim, encoder.global_dim) == (257, 768, 4 * 1024)
        pixels = torch.empty(1, 3, 224, 224, device="meta")
        assert encoder.tokens(pixels).shape == (1, 257, 768)
        assert encoder.global_features(pixels).shape == (1, 4096)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("open_clip:ViT-S-32", "needs trained weights"),
            ("open_clip:ViT-B-32:nonsense", "one of open_clip's tags .*openai"),
            ("open_clip:ViT-L-14:/gone/weights.pt", "or the path of a checkpoint"),
            ("open_clip:ViT-Z-99:openai", "open_clip has no model 'ViT-Z-99'"),
        ],
    )
    def test_never_random_weights(self, name: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            load_encoder(name)

    def test_a_broken_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "broken.pt").write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match="open_clip cannot load"):
            load_encoder(f"open_clip:{MODEL}:{tmp_path / 'broken.pt'}")

    def test_a_pickle_runs_no_code(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "owned",))

        torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(CheckpointError):
            load_encoder(f"open_clip:{MODEL}:{tmp_path / 'evil.pt'}")
        assert not (tmp_path / "owned").exists()

    def test_towers_without_a_class_token_are_refused(self) -> None:
        import open_clip

        visual = open_clip.create_model("RN50", device="meta").visual
        with pytest.raises(ModelError, match="plain vision transformers"):
            ClipEncoder("open_clip:RN50:openai", "0", visual, "meta")
