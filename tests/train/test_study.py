"""Studies: every shipped one at tiny size, going on after a stop, mistakes, and what the report says."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from tiny_base import write_tiny_base
from train_files import text_recipe, train, write_recipe
from typer.testing import CliRunner

from models.checkpoints.manifest import read_manifest
from models.checkpoints.native import load_unchecked
from models.errors import ModelError
from server.cli import app
from train.checkpoints import Checkpoints
from train.errors import RecipeError, TrainError
from train.log import read_log
from train.recipe import load_recipe
from train.run_study import run_study
from train.study import SHIPPED, Study, load_study, plan_runs

pytestmark = pytest.mark.long

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with as many layers as the studies' own."""
    folder = tmp_path_factory.mktemp("base") / "deep"
    write_tiny_base(folder, num_layers=30)
    return folder


def conduct(name: str, overrides: Sequence[str], output: Path) -> None:
    """A study with a cache of the test's own."""
    run_study(name, overrides, output, output.parent / "cache")


def shrunk(study: Study, base: Path, instructions: Path, captions: Path) -> list[str]:
    """Overrides that make a shipped study fit the tiny base and data; its variants stay as they are."""
    overrides: dict[str, Any] = {
        "base": base,
        "compute.device": "cpu",
        "compute.max_tokens": 400,
        "optimizer.batch_size": 4,
        "keep.evaluate_every": 3,
        "data.instruct.path": instructions,
        "data.instruct.holdout": 0.3,
    }
    if "captions" in study.measure:
        overrides |= {
            "data.captions.path": captions,
            "data.captions.images": captions.parent,
            "data.captions.holdout": 0.3,
            "adapter.vision.hidden_size": 32,
        }
    else:
        overrides["optimizer.max_steps"] = 4
    return [f"{key}={value}" for key, value in overrides.items()]


def cells(report: str, variant: str) -> list[str]:
    """The variant's row in the table of results."""
    [row] = [
        line for line in report.partition("## Result")[2].splitlines() if line.startswith(f"| {variant} |")
    ]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_study_runs_from_end_to_end(
    name: str, deep: Path, instructions: Path, captions: Path, tmp_path: Path
):
    fields = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()) | {"seeds": [0]}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(fields, sort_keys=False))
    _, study = load_study(str(file))
    output = tmp_path / "out"
    run_study(str(file), shrunk(study, deep, instructions, captions), output, tmp_path / "cache")
    report = (output / "report.md").read_text()
    assert study.claim.strip() in report
    for variant in study.variants:
        run = output / variant / "seed-0"
        row = cells(report, variant)
        assert f"| trained parameters | {row[1]} |" in (run / "report.md").read_text()
        for place, source in enumerate(study.measure):
            log = read_log(run)
            losses = [line["held_out"][source] for line in log if "held_out" in line]
            steps = [line["loss"] for line in log if line.get("source") == source]
            assert len(steps) < 15  # so that the last tenth of them is one
            trained = f"{steps[-1]:.3f}" if steps else "–"
            held_out = [f"{loss:.3f}" for loss in (losses[0], min(losses), losses[-1])]
            assert row[3 + 4 * place :][:4] == [trained, *held_out]
    for kind in ("training", "held-out", *(["over-x"] if study.x_label else [])):
        assert f"]({name}-{kind}.png)" in report
        assert (output / f"{name}-{kind}.png").read_bytes().startswith(b"\x89PNG")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_unchecked(run / "adapter", read_manifest(run / "adapter")).state_dict()


def test_what_the_shipped_variants_are():
    """Where one differs from the next, by its recipe; only trainings can tell the rest."""
    recipes = {
        name: {run.variant: run.recipe for run in plan_runs(*load_study(name), (), Path("runs"))}
        for name in NAMES
    }
    gates = {name: (r.init.gate, r.adapter.gate.activation) for name, r in recipes["zero-init"].items()}
    assert gates == {
        "zero-init": ("zeros", "tanh"),
        "random-gate": ("normal", "tanh"),
        "ungated": ("ones", "raw"),
    }
    assert recipes["zero-init"]["ungated"].data["instruct"].trains == ("prompt",)
    joint = {
        name: (r.adapter.vision and r.adapter.vision.fusion, *(s.trains for s in r.data.values()))
        for name, r in recipes["interference"].items()
    }
    assert joint == {
        "disjoint-early": ("early", "text", "visual"),
        "naive-early": ("early", "all", "all"),
        "naive-late": ("add", "all", "all"),
        "instructions-only": ("early", "text", "text"),
    }
    assert recipes["interference"]["instructions-only"].data["captions"].epochs == 0
    for name in ("layers", "epochs"):
        _, study = load_study(name)
        assert [str(int(variant.x or 0)) for variant in study.variants.values()] == [
            variant.split("-")[1] for variant in study.variants
        ]


@pytest.fixture
def study(tiny: Path, instructions: Path, tmp_path: Path) -> dict[str, Any]:
    """A small one of three variants; five steps each, saved after each third."""
    recipe = text_recipe(tiny, Path("unused"), instructions, optimizer={"max_steps": 5})
    return {
        "title": "Gates",
        "claim": "Gates matter.",
        "recipe": write_recipe(tmp_path / "r.yaml", recipe),
        "measure": ["instruct"],
        "variants": {
            "zeros": {"what": "gates of zero"},
            "normal": {"what": "random gates", "overrides": ["init.gate=normal"]},
            "ones": {
                "what": "no gates",
                "overrides": [
                    "adapter.gate.activation=raw",
                    "init.gate=ones",
                    "data.instruct.trains=[prompt]",
                ],
            },
        },
    }


def write_study(folder: Path, study: dict[str, Any]) -> str:
    file = folder / "gates.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return str(file)


def test_prompts_without_gates(study: dict[str, Any], tmp_path: Path):
    """`ones` stay what they are, and act from the beginning."""
    conduct(write_study(tmp_path, study), (), tmp_path / "out")
    assert (weights(tmp_path / "out" / "ones" / "seed-0")["gate"] == 1).all()
    first = {
        name: read_log(tmp_path / "out" / name / "seed-0")[0]["held_out"]["instruct"]
        for name in study["variants"]
    }
    assert len(set(first.values())) == 3


def test_a_repeated_study_trains_what_is_missing_only(study: dict[str, Any], tmp_path: Path):
    output = tmp_path / "out"
    conduct(write_study(tmp_path, study), (), output)
    logs = {file: file.stat().st_mtime_ns for file in output.glob("*/*/log.jsonl")}
    assert len(logs) == 3
    study["seeds"] = [0, 7]
    study["variants"]["raw"] = {"what": "raw gates", "overrides": ["adapter.gate.activation=raw"]}
    conduct(write_study(tmp_path, study), ["compute.threads=1"], output)
    assert {file: file.stat().st_mtime_ns for file in logs} == logs
    assert len(list(output.glob("*/*/log.jsonl"))) == 8
    report = (output / "report.md").read_text()
    last = {
        name: [read_log(output / name / f"seed-{seed}")[-1]["held_out"]["instruct"] for seed in (0, 7)]
        for name in study["variants"]
    }
    raw = last["raw"]
    assert cells(report, "raw")[-1] == f"{fmean(raw):.3f} ({min(raw):.3f}–{max(raw):.3f})"
    first, second, *_ = sorted(last, key=lambda name: fmean(last[name]))
    assert (
        f"instruct: {first}, {fmean(last[first]):.3f} against {fmean(last[second]):.3f} ({second})" in report
    )
    apart = max(last[first]) < min(last[second])
    assert f"the first two {'do not overlap' if apart else 'overlap'}." in report


def test_an_interrupted_study_goes_on_to_the_same_bits(study: dict[str, Any], tmp_path: Path):
    name, output = write_study(tmp_path, study), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoints.save

        def save_and_stop(self: Checkpoints, step: int, *rest: Any) -> Path:
            saved = save(self, step, *rest)
            if "normal" in str(saved):
                os.kill(os.getpid(), signal.SIGTERM)
            return saved

        patch.setattr(Checkpoints, "save", save_and_stop)
        conduct(name, (), output)
    assert [path.parent.parent.name for path in output.glob("*/*/report.md")] == ["zeros"]
    assert [line["step"] for line in read_log(output / "normal" / "seed-0")][-1] == 4
    assert not (output / "ones").exists()
    assert not (output / "report.md").exists()
    conduct(name, (), output)
    assert (output / "report.md").is_file()
    conduct(name, (), tmp_path / "whole")
    for variant in study["variants"]:
        parts, whole = (weights(folder / variant / "seed-0") for folder in (output, tmp_path / "whole"))
        assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_a_signal_in_the_last_step_loses_no_measure(study: dict[str, Any], tmp_path: Path):
    name, output = write_study(tmp_path, study), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoints.save

        def stop_and_save(self: Checkpoints, step: int, *rest: Any) -> Path:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return save(self, step, *rest)

        patch.setattr(Checkpoints, "save", stop_and_save)
        conduct(name, (), output)
    assert not (output / "zeros" / "seed-0" / "report.md").exists()
    assert not (output / "normal").exists()
    conduct(name, (), output)
    assert read_log(output / "zeros" / "seed-0")[-1].keys() >= {"step", "held_out"}
    assert (output / "report.md").is_file()


def test_trainings_of_another_recipe_are_not_mixed(study: dict[str, Any], tmp_path: Path):
    name, output = write_study(tmp_path, study), tmp_path / "out"
    conduct(name, (), output)
    for changed in ("optimizer.lr=0.02", "keep.evaluate_rows=3"):
        key = changed.partition("=")[0].replace(".", r"\.")
        with pytest.raises(TrainError, match=rf"zeros/seed-0/recipe\.yaml: .* {key} changed"):
            conduct(name, [changed], output)


def test_nothing_held_out_is_said_after_the_first_training(study: dict[str, Any], tmp_path: Path):
    with pytest.raises(
        TrainError, match=r"zeros.*no row of 'instruct' was held out.*data\.instruct\.holdout"
    ):
        conduct(write_study(tmp_path, study), ["data.instruct.holdout=1e-9"], tmp_path / "out")
    assert not (tmp_path / "out" / "normal").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": "x"}, r"claims: there is no such key"),
        ({"title": ""}, r"title: .*at least 1"),
        ({"seeds": []}, r"seeds: .*at least 1"),
        ({"seeds": [1, 1]}, r"seeds: a seed is named twice"),
        ({"seeds": [-1]}, r"seeds\.0: .*greater than or equal to 0"),
        ({"measure": ["chat"]}, r"measure: 'chat' is no source; there are: instruct"),
        ({"overrides": ["data.instruct.holdout=0"]}, r"measure: no rows of 'instruct' are held out"),
        (
            {"overrides": ["optimizer.rate=1"]},
            r"variants\.zeros: .*r\.yaml: optimizer\.rate: there is no such key",
        ),
        ({"overrides": ["seed=1"]}, r"overrides: 'seed=1': output, seed, resume are the study's own"),
        ({"overrides": [{"seed": 1}]}, r"overrides\.0: .*valid string"),
        ({"overrides": ["nonsense"]}, r"variants\.zeros: 'nonsense': overrides read key=value"),
        ({"recipe": "none"}, r"variants\.zeros: none: cannot be read"),
        ({"variants": {"one": {"what": "x"}}}, r"variants: .*at least 2"),
        ({"variants": {"a": {"what": "x"}, "../b": {"what": "x"}}}, r"variants\.\.\./b.*pattern"),
        ({"variants": {"a": {"what": "x"}, "b": {}}}, r"variants\.b\.what: Field required"),
        ({"variants": {"a": {"what": "x", "x": 1}, "b": {"what": "x"}}}, r"give every variant an `x`"),
        ({"x_label": "epochs"}, r"give every variant an `x` and the study an `x_label`"),
    ],
)
def test_mistakes_in_a_study_are_named(
    study: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
):
    with pytest.raises(RecipeError, match=rf"gates\.yaml: .*{message}"):
        conduct(write_study(tmp_path, study | change), (), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("output=x", "--output sets the folder"),
        ("seed=3", "`seeds` in a copy of"),
        ("init.gate=zeros", r"the variant 'normal' sets init\.gate itself"),
        ("init={gate: zeros}", r"the variant 'normal' sets init\.gate itself"),
        ("data.instruct.trains.x=1", r"the variant 'ones' sets data\.instruct\.trains itself"),
        ("optimizer.rate=1", r"optimizer\.rate: there is no such key"),
    ],
)
def test_what_a_study_would_not_heed_is_refused(
    study: dict[str, Any], tmp_path: Path, given: str, message: str
):
    with pytest.raises(RecipeError, match=message):
        conduct(write_study(tmp_path, study), [given], tmp_path / "out")


def test_a_report_that_cannot_be_written(study: dict[str, Any], tmp_path: Path):
    output = tmp_path / "out"
    (output / "report.md").mkdir(parents=True)
    with pytest.raises(TrainError, match=r"out: Is a directory; mend it and repeat the command"):
        conduct(write_study(tmp_path, study), (), output)


def test_the_command(study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_ADAPTER_CACHE_DIR", str(tmp_path / "cache"))
    arguments = ["study", write_study(tmp_path, study), "optimizer.max_steps=1"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for line in ("1 of 3: zeros, seed 0", "3 of 3: ones, seed 0"):
        assert line in result.output
    assert "optimizer.max_steps=1" in (tmp_path / "out" / "report.md").read_text()
    assert isinstance(CliRunner().invoke(app, ["study", "none"]).exception, ModelError)


def test_help_and_docs_name_every_shipped_study():
    told = CliRunner().invoke(app, ["study", "--help"]).output
    page = (Path(__file__).parents[2] / "docs" / "ablations.md").read_text()
    for name in NAMES:
        assert f"  {name} " in told
        assert f"llama-adapter study {name}" in page
        assert load_study(name)[1].recipe in {"smollm2-text", "smollm2-visual"}


def test_the_example_in_the_docs_is_a_study(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    file = tmp_path / "example.yaml"
    file.write_text(page.partition("```yaml\ntitle:")[2].partition("```")[0].join(["title:", ""]))
    assert [run.variant for run in plan_runs(*load_study(str(file)), (), tmp_path)] == [
        "rows-5",
        "rows-20",
    ] * 2


def test_a_source_that_is_only_measured(tiny: Path, instructions: Path, tmp_path: Path):
    recipe = text_recipe(tiny, tmp_path / "run", instructions, keep={"evaluate_every": 100})
    recipe["data"]["other"] = recipe["data"]["instruct"] | {"epochs": 0}
    train(write_recipe(tmp_path / "r.yaml", recipe), ())
    log = read_log(tmp_path / "run")
    assert {line["source"] for line in log if "loss" in line} == {"instruct"}
    assert log[-1]["held_out"]["other"] == log[-1]["held_out"]["instruct"]
    with pytest.raises(RecipeError, match="every source has `epochs: 0`"):
        load_recipe(str(tmp_path / "r.yaml"), ["data.instruct.epochs=0"])
    assert json.loads((tmp_path / "run" / "data" / "other" / "summary.json").read_text())["held_out"] > 0
