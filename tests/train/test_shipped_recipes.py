"""Every shipped recipe, from its data formats to a served folder, at a size that runs here.

The bases and CLIP are replaced by small ones; all that a recipe says of formats, groups, templates,
fusion and schedule stays.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_files import WORDS, write_captions, write_instructions, write_lines

from models.checkpoints.manifest import read_manifest
from models.checkpoints.native import load_unchecked
from train.log import read_log
from train.main import train
from train.recipe import SHIPPED, Recipe, SourceRecipe, load_recipe

pytestmark = pytest.mark.long

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def write_data(folder: Path, source: SourceRecipe) -> Path:
    """A file of the source's format, its images in the same folder."""
    captions = write_captions(folder, 8)
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    match source.format:
        case "alpaca":
            return write_instructions(folder / "rows.jsonl", 12)
        case "captions":
            return captions
        case "coco":
            images = [{"id": i, "file_name": row["file"]} for i, row in enumerate(rows)]
            annotations = [{"image_id": i, "caption": row["caption"]} for i, row in enumerate(rows)]
            file = folder / "coco.json"
            file.write_text(json.dumps({"images": images, "annotations": annotations}))
        case "scienceqa":
            problems = {}
            for i, word in enumerate(WORDS):
                image = "image.png" if i % 2 else None
                if image:
                    (folder / "train" / str(i)).mkdir(parents=True)
                    Image.new("RGB", (8, 8), (i * 30, 0, 0)).save(folder / "train" / str(i) / image)
                problems[str(i)] = {
                    "question": f"Which is a {word}?",
                    "choices": [word, "sea"],
                    "answer": i % 2,
                    "hint": "",
                    "image": image,
                    "split": "train",
                }
            file = folder / "problems.json"
            file.write_text(json.dumps(problems))
        case "llava" | "sharegpt":
            talks = [
                {
                    "image": row["file"],
                    "conversations": [
                        {"from": "human", "value": "<image>\nWhat?"},
                        {"from": "gpt", "value": row["caption"]},
                        {"from": "human", "value": "And?"},
                        {"from": "gpt", "value": "No more."},
                    ],
                }
                for row in rows
            ]
            if source.format == "sharegpt":
                talks = [{"conversations": talk["conversations"]} for talk in talks]
            return write_lines(folder / "talks.jsonl", talks)
        case _:
            raise AssertionError(f"no data for {source.format}")
    return file


def shrunk(recipe: Recipe, tiny: Path, tmp_path: Path) -> list[str]:
    """Overrides that make a recipe fit the tiny base and this machine, and no more."""
    overrides: dict[str, Any] = {
        "base": tiny,
        "output": tmp_path / recipe.output.name,
        "optimizer.batch_size": 4,
        "compute.workers": 0,
        "compute.device": "cpu",
        "compute.max_tokens": 400,
    }
    if recipe.adapter.prompt:
        overrides["adapter.prompt.layers"] = "last 3"
    vision = recipe.adapter.vision
    if vision:
        overrides |= {
            "adapter.vision.encoder": "efficientnet-lite0",
            "adapter.vision.feature_dim": 1752 if vision.features == "global" else 1280,
            "adapter.vision.hidden_size": 32,
        }
        if vision.projector == "query_blocks":
            overrides |= {"adapter.vision.num_blocks": 1, "adapter.vision.num_heads": 4}
        overrides["adapter.vision.layers"] = "last 3" if vision.fusion == "add" else "first 1"
    for name, source in recipe.data.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        overrides |= {f"data.{name}.path": write_data(folder, source), f"data.{name}.epochs": 1}
        overrides[f"data.{name}.holdout"] = 0
        if source.images:
            overrides[f"data.{name}.images"] = folder
    return [f"{key}={value}" for key, value in overrides.items()]


def check(name: str, run: Path) -> None:
    """What each run leaves behind."""
    recipe = load_recipe(name)
    losses = [line for line in read_log(run) if "loss" in line]
    assert {line["source"] for line in losses} == set(recipe.data)
    config = read_manifest(run / "adapter")
    assert config.template == recipe.adapter.template
    adapter = load_unchecked(run / "adapter", config)
    assert not config.gated_layers or adapter.gates().any()
    assert all(torch.isfinite(tensor).all() for tensor in adapter.state_dict().values())
    assert (run / "report.md").is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("released-7b")])
def test_runs_from_end_to_end(name: str, tiny: Path, tmp_path: Path):
    recipe = load_recipe(name)
    train(name, shrunk(recipe, tiny, tmp_path), tmp_path / "cache")
    check(name, tmp_path / recipe.output.name)


def test_the_released_codes_two_stages(tiny: Path, tmp_path: Path):
    """The second leaves prompts, gates and projection to the bit as the first made them."""
    runs: list[Path] = []
    for name in ("released-7b-pretrain", "released-7b-finetune"):
        folder = tmp_path / name
        folder.mkdir()
        recipe = load_recipe(name)
        overrides = shrunk(recipe, tiny, folder)
        if runs:
            assert recipe.start_from
            assert recipe.start_from.parent == load_recipe("released-7b-pretrain").output
            overrides.append(f"start_from={runs[0] / 'adapter'}")
        train(name, overrides, tmp_path / "cache")
        runs.append(folder / recipe.output.name)
        check(name, runs[-1])
    first, second = (
        load_unchecked(run / "adapter", read_manifest(run / "adapter")).state_dict() for run in runs
    )
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if name in ("prompt", "gate") or name.startswith("vision.")}
