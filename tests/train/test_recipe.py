"""Recipes are typed; every mistake is named with file and key."""

from pathlib import Path

import pytest
from support import MHA
from train_files import text_recipe, write_recipe

from models.adapter import base_spec
from train.errors import RecipeError
from train.recipe import Recipe, load_recipe, recipe_text


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_recipe(tmp_path / "r.yaml", text_recipe(Path("base"), Path("out"), Path("d.jsonl")))


def test_overrides_reach_nested_keys(file: str):
    recipe = load_recipe(
        file, ["optimizer.lr=1e-4", "data.instruct.path=[a.json, b.json]", "init.prompt_std=0.5", "seed=7"]
    )
    assert recipe.optimizer.lr == 1e-4
    assert recipe.data["instruct"].path == (Path("a.json"), Path("b.json"))
    assert (recipe.init.prompt_std, recipe.seed) == (0.5, 7)


def test_written_recipe_reads_the_same(file: str, tmp_path: Path):
    recipe = load_recipe(file, ["adapter.vision=null"])
    for brief in (True, False):
        (tmp_path / "again.yaml").write_text(recipe_text(recipe, brief=brief))
        assert load_recipe(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rate=1", r"r\.yaml: optimizer\.rate: there is no such key"),
        ("optimizer.lr=fast", r"optimizer\.lr: .*number"),
        ("optimizer.base_lr=1", "either `lr` or `base_lr`"),
        ("optimizer.lr=null", "either `lr` or `base_lr`"),
        ("data.instruct.format=csv", r"data\.instruct\.format: .*'alpaca'"),
        ("data.instruct.trains=visual", r"data\.instruct\.trains .*early"),
        ("data.instruct.format=captions", r"data\.instruct\.question: .*template 'chat'"),
        ("compute.augment=true", "features: live"),
        ("compute={features: live, feature_noise: 0.1}", "cached features"),
        ("init.features=standardized", r"init\.features: .*input_norm"),
        ("adapter.prompt.layers=middle 3", r"adapter\.prompt\.layers"),
        ("nonsense", r"overrides read key=value"),
        (".=1", r"overrides read key=value"),
        ("base.x=1", "base is no section"),
        ("seed=[", "not YAML"),
        ("output=2026-13-45", "not YAML"),
        ("optimizer.lr=.inf", r"optimizer\.lr: .*finite"),
        ("optimizer.epochs=.inf", r"optimizer\.epochs: .*finite"),
        ("optimizer.warmup=.nan", r"optimizer\.warmup: .*finite"),
        ("optimizer.betas=[1, 0.95]", r"optimizer\.betas\.0: .*less than 1"),
        ("data={}", "data: .*at least 1"),
    ],
)
def test_mistakes_are_named(file: str, override: str, message: str):
    with pytest.raises(RecipeError, match=message):
        load_recipe(file, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1", "a recipe is a mapping"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"output: 2026-13-45", "not YAML"),
        (b"#" * (1 << 20) + b"#", "larger than"),
        (b"", "mapping"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"bad\.yaml: .*{message}"):
        load_recipe(str(tmp_path / "bad.yaml"))
    with pytest.raises(RecipeError, match=r"cannot be read .* one of: .*smollm2-caption"):
        load_recipe(str(tmp_path / "none.yaml"))


def _adapter(file: str, *overrides: str) -> Recipe:
    return load_recipe(file, overrides)


def test_layers_count_from_either_end(file: str):
    spec = base_spec(MHA)
    layers = {
        choice: _adapter(file, f"adapter.prompt.layers={choice}").adapter.config(spec).gated_layers
        for choice in ("last 3", "first 2", "all", "[0, 3]")
    }
    assert layers == {"last 3": (1, 2, 3), "first 2": (0, 1), "all": (0, 1, 2, 3), "[0, 3]": (0, 3)}


def test_an_adapter_that_does_not_fit_its_base(file: str):
    spec = base_spec(MHA)
    with pytest.raises(RecipeError, match=r"adapter\.prompt\.layers: 'last 30' of a base with 4 layers"):
        _adapter(file, "adapter.prompt.layers=last 30").adapter.config(spec)
    with pytest.raises(RecipeError, match="layer 9 does not exist"):
        _adapter(file, "adapter.prompt.layers=[9]").adapter.config(spec)
