"""`llama-adapter train`."""

from pathlib import Path

import pytest
from train_files import text_recipe, write_recipe
from typer.testing import CliRunner

from server.cli import app
from train.errors import RecipeError
from train.recipe import SHIPPED


def test_the_command_trains(tiny: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_ADAPTER_CACHE_DIR", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path / "r.yaml", text_recipe(tiny, tmp_path / "run", instructions))
    result = CliRunner().invoke(app, ["train", recipe, "optimizer.max_steps=1", "seed=3"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "adapter" / "adapter.json").is_file()
    wrong = CliRunner().invoke(app, ["train", recipe, "optimizer.rate=1"])
    assert isinstance(wrong.exception, RecipeError)


def test_help_names_the_shipped_recipes():
    told = CliRunner().invoke(app, ["train", "--help"]).output
    listed = told.partition("Shipped recipes:")[2].partition("Examples:")[0].split()
    assert sorted(listed) == sorted(file.stem for file in SHIPPED.glob("*.yaml"))
