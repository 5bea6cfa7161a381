"""Small data and recipes on disk, for trainings on a tiny base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from train import main

WORDS = ("river", "stone", "lantern", "copper", "winter", "market", "engine", "garden")


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_instructions(file: Path, count: int = 24) -> Path:
    """Rows of unequal length, every third with an input."""
    rows = [
        {
            "instruction": f"Say {WORDS[i % 8]} {1 + i % 5} times.",
            "input": "Be quick." if i % 3 == 0 else "",
            "output": " ".join([WORDS[i % 8]] * (1 + i % 5)),
        }
        for i in range(count)
    ]
    return write_lines(file, rows)


def write_captions(folder: Path, count: int = 16) -> Path:
    """Pictures of one colour each, and `captions.jsonl` that names it."""
    (folder / "img").mkdir(parents=True)
    colors = ("red", "green", "blue", "white")
    rows = []
    for i in range(count):
        color = colors[i % 4]
        Image.new("RGB", (40 + i, 30), color).save(folder / "img" / f"{i}.png")
        rows.append({"file": f"img/{i}.png", "caption": f"a {color} sheet number {i}"})
    return write_lines(folder / "captions.jsonl", rows)


def text_recipe(base: Path, output: Path, data: Path, **sections: Any) -> dict[str, Any]:
    """V1 with everything that trains quickly on a tiny base; `sections` are merged one level deep."""
    recipe: dict[str, Any] = {
        "base": str(base),
        "output": str(output),
        "adapter": {"prompt": {"length": 4, "layers": "last 3"}},
        "data": {"instruct": {"format": "alpaca", "path": str(data), "holdout": 0.2}},
        "optimizer": {"epochs": 2, "batch_size": 4, "lr": 0.01, "warmup": 0.2},
        "compute": {"workers": 0, "device": "cpu"},
        "keep": {"checkpoint_every": 3, "evaluate_every": 4},
    }
    for name, value in sections.items():
        recipe[name] = recipe.get(name, {}) | value if isinstance(value, dict) else value
    return recipe


def write_recipe(file: Path, recipe: dict[str, Any]) -> str:
    file.write_text(yaml.safe_dump(recipe))
    return str(file)


def train(recipe: str, overrides: Sequence[str] = ()) -> None:
    """Train with a cache of the test's own, beside the recipe."""
    main.train(recipe, overrides, Path(recipe).parent / "cache")
