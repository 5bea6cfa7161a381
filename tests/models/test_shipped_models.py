"""The adapters that come with the project: each loads, is small, and says how it is made again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.checkpoints.adapters import open_adapter
from models.checkpoints.inspect import read_base, verify
from models.config import ModelConfig
from models.pull import resolve_base
from server.settings import default_cache_dir
from server.shipped import SHIPPED_DIR
from train.recipe import SHIPPED as RECIPES

MAX_BYTES = 4_000_000  # of a folder, so that a package stays small
SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)

cards = pytest.mark.parametrize("card", sorted(SHIPPED_DIR.glob("*/README.md")), ids=lambda p: p.parent.name)
adapters = pytest.mark.parametrize(
    "folder", sorted(path.parent for path in SHIPPED_DIR.glob("*/adapter.json")), ids=lambda p: p.name
)


@cards
def test_a_card_names_what_makes_the_adapter_again(card: Path):
    text, name = card.read_text(), card.parent.name
    [recipe] = re.findall(r"`train/recipes/([\w-]+)\.yaml`", text)
    assert (RECIPES / f"{recipe}.yaml").is_file()
    assert f"llama-adapter train {recipe} " in text
    assert re.search(rf"llama-adapter convert runs/{recipe}/adapter models/shipped/{name}\b", text)
    for said in (f"# {name}\n", "licence |", "## Data", "## Figures", "## Limits"):
        assert said in text


@adapters
def test_an_adapter_is_small_and_loads(folder: Path):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_BYTES
    adapter = open_adapter(folder, SMOLLM2)  # which checks every value
    count = sum(parameter.numel() for parameter in adapter.parameters())
    card = (folder / "README.md").read_text()
    assert f"{count:,}" in card
    assert "not measured yet" not in card


@pytest.mark.weights
@adapters
def test_an_adapter_is_of_the_base_that_is_served(folder: Path):
    base = read_base(resolve_base("smollm2-135m", default_cache_dir()))
    assert verify(folder, base)["verified"] == "values and base"


@pytest.mark.weights
def test_the_sizes_above_are_the_base_s():
    assert read_base(resolve_base("smollm2-135m", default_cache_dir())).config == SMOLLM2
