"""Features start standardized over the images that are trained on, and only where that is asked for."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from train_files import text_recipe, write_captions, write_lines, write_recipe

from train.build import Run, build
from train.data.batches import make_passes
from train.errors import TrainError
from train.processes import Processes, StopSignal
from train.recipe import load_recipe

VISION = {
    "encoder": "efficientnet-lite0",
    "features": "global",
    "feature_dim": 1752,
    "input_norm": True,
    "projector": "mlp",
    "hidden_size": 8,
    "num_tokens": 1,
    "fusion": "add",
    "layers": "last 3",
}


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> str:
    captions = write_captions(tmp_path / "pictures", 24)
    fields = text_recipe(tiny, tmp_path / "run", captions, adapter={"template": "caption", "vision": VISION})
    source = {"format": "captions", "path": str(captions), "images": str(captions.parent), "holdout": 0.3}
    return write_recipe(tmp_path / "r.yaml", fields | {"data": {"captions": source}})


def built(recipe: str, cache: Path, *overrides: str) -> Run:
    processes = Processes(0, 1, torch.device("cpu"))
    return build(load_recipe(recipe, overrides), cache, processes, StopSignal(), Console(stderr=True))


def features_of(run: Run, rows: Sequence[int]) -> Tensor:
    store = run.stores["captions"]
    return torch.stack([run.read_image(store, int(store.image_R[row]), None) for row in rows])


def test_each_feature_leaves_the_norm_with_mean_zero_and_spread_one(recipe: str, tmp_path: Path):
    run = built(recipe, tmp_path, "init.features=standardized")
    store, norm = run.stores["captions"], run.adapter.vision.input_norm
    assert isinstance(norm, nn.LayerNorm)
    assert len(store.held_out) > 0
    with torch.no_grad():
        plain = F.layer_norm(features_of(run, store.train), norm.normalized_shape)
        out = norm(features_of(run, store.train))
    lively = plain.std(0) > 0.05
    assert 10 < lively.sum() < len(lively)  # both kinds are there
    torch.testing.assert_close(out.mean(0), torch.zeros_like(out[0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std(0)[lively], torch.ones(int(lively.sum())), atol=1e-3, rtol=0)
    assert (out.std(0)[~lively] < 1.001).all()


def test_noise_varies_training_images_only(recipe: str, tmp_path: Path):
    run = built(recipe, tmp_path, "compute.feature_noise=0.5")
    store = run.stores["captions"]
    first, again = (run.steps[0].passes[0].images for _ in range(2))
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    quiet = built(recipe, tmp_path, f"output={tmp_path / 'quiet'}").steps[0].passes[0].images
    assert quiet is not None
    assert (first / quiet)[quiet != 0].std() == pytest.approx(0.5, rel=0.05)
    passes = make_passes(store, store.held_out.tolist(), run.read_image, 1000)
    assert torch.allclose(
        sum(p.images.sum(0) for p in passes if p.images is not None), features_of(run, store.held_out).sum(0)
    )


def test_plain_is_the_default(recipe: str, tmp_path: Path):
    norm = built(recipe, tmp_path).adapter.vision.input_norm
    assert isinstance(norm, nn.LayerNorm)
    assert torch.equal(norm.weight, torch.ones(1752))


@pytest.mark.parametrize("images", [0, 1])
def test_without_images_to_compare_there_is_no_spread(images: int, recipe: str, tmp_path: Path):
    """One image's would be NaN, and the first step would blame the learning rate."""
    rows = [
        {"instruction": f"Say {i}.", "output": "one", **({"image": "img/0.png"} if i < images else {})}
        for i in range(8)
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    source = {"format": "alpaca", "path": str(file), "images": str(tmp_path / "pictures")}
    with pytest.raises(
        TrainError, match=rf"`standardized` compares .* which have {images}; set it to `plain`"
    ):
        built(
            recipe,
            tmp_path,
            "init.features=standardized",
            "adapter.template=chat",
            f"data={json.dumps({'instruct': source})}",
        )
