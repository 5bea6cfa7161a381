"""Whole trainings on a tiny base: what they leave behind, and how they go on after a stop."""

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_files import text_recipe, train, write_lines, write_recipe

from models.checkpoints.manifest import read_manifest
from models.checkpoints.native import load_unchecked
from train.checkpoints import Checkpoints
from train.errors import TrainError
from train.log import read_log
from train.recipe import OptimizerRecipe
from train.trainer import Trainer, learning_rate

pytestmark = pytest.mark.long


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_unchecked(folder, read_manifest(folder)).state_dict()


def assert_bit_identical(one: Path, two: Path) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_learns_and_tells(recipe: str, tmp_path: Path):
    run = tmp_path / "run"
    train(recipe, ["optimizer.epochs=6", "adapter.head=true", "keep.evaluate_every=10", "optimizer.lr=0.1"])
    log = read_log(run)
    held_out = [(line["step"], line["held_out"]["instruct"]) for line in log if "held_out" in line]
    assert [step for step, _ in held_out] == [0, 10, 20, 30]
    assert held_out[-1][1] < 0.9 * held_out[0][1]
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert {"lr", "gradient_norm", "tokens", "tokens_per_second", "source"} <= steps[0].keys()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-0000027", "step-0000030"]
    assert_bit_identical(run / "adapter", run / "checkpoints" / "step-0000030")
    report = (run / "report.md").read_text()
    assert "| instruct | 24 |" in report
    assert f"| 30 | {held_out[-1][1]:.4f} |" in report
    for plot in ("loss.png", "gates.png"):
        assert (run / plot).read_bytes().startswith(b"\x89PNG")
        assert f"({plot})" in report
    assert list((run / "tensorboard").glob("events.*"))


def test_the_same_recipe_gives_the_same_bits(recipe: str, tmp_path: Path):
    for name in ("one", "two"):
        train(recipe, [f"output={tmp_path / name}"])
    train(recipe, [f"output={tmp_path / 'three'}", "seed=1"])
    assert_bit_identical(tmp_path / "one" / "adapter", tmp_path / "two" / "adapter")
    with pytest.raises(AssertionError):
        assert_bit_identical(tmp_path / "one" / "adapter", tmp_path / "three" / "adapter")


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """A crash right after the checkpoint of `step`, which leaves log lines behind it."""
    save = Checkpoints.save

    def crash(self: Checkpoints, number: int, *rest: Any) -> Path:
        if number > step:
            raise KeyboardInterrupt
        return save(self, number, *rest)

    patch.setattr(Checkpoints, "save", crash)


def test_a_resumed_run_ends_with_the_same_bits(recipe: str, tmp_path: Path):
    train(recipe, [f"output={tmp_path / 'whole'}"])
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, [f"output={tmp_path / 'parts'}"])
    assert Checkpoints(tmp_path / "parts" / "checkpoints", 2).last().name == "step-0000006"  # type: ignore[union-attr]
    train(recipe, [f"output={tmp_path / 'parts'}", "resume=true", "compute.pass_tokens=4096"])
    assert_bit_identical(tmp_path / "whole" / "adapter", tmp_path / "parts" / "adapter")
    whole, parts = (
        [(line["step"], line.get("loss"), line.get("held_out")) for line in read_log(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert parts == whole
    # A finished run goes on to its end at once.
    train(recipe, [f"output={tmp_path / 'parts'}", "resume=true"])
    assert_bit_identical(tmp_path / "whole" / "adapter", tmp_path / "parts" / "adapter")


def test_an_evaluation_that_was_cut_off_is_made_when_the_run_goes_on(recipe: str, tmp_path: Path):
    train(recipe, [f"output={tmp_path / 'whole'}"])
    whole = [line for line in read_log(tmp_path / "whole") if "held_out" in line]
    together = ["keep.checkpoint_every=4", f"output={tmp_path / 'parts'}"]
    for cut_off in (4, whole[-1]["step"]):  # the last one's step is saved, too
        with pytest.MonkeyPatch.context() as patch:
            evaluate = Trainer._evaluate

            def cut(self: Trainer, *rest: Any, at: int = cut_off, go_on: Any = evaluate) -> Any:
                if self.finished_steps == at:
                    raise KeyboardInterrupt
                return go_on(self, *rest)

            patch.setattr(Trainer, "_evaluate", cut)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, [*together, f"resume={str(cut_off > 4).lower()}"])
    train(recipe, [*together, "resume=true"])
    assert [line for line in read_log(tmp_path / "parts") if "held_out" in line] == whole


def test_a_run_may_go_on_with_another_weight_decay(recipe: str, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, [f"output={tmp_path / 'same'}"])
    shutil.copytree(tmp_path / "same", tmp_path / "decayed")
    train(recipe, [f"output={tmp_path / 'same'}", "resume=true"])
    train(recipe, [f"output={tmp_path / 'decayed'}", "resume=true", "optimizer.weight_decay=10"])
    same, decayed = (weights(tmp_path / name / "adapter")["prompt"] for name in ("same", "decayed"))
    assert decayed.norm() < same.norm()


def test_a_run_is_neither_overwritten_nor_mixed(recipe: str, tmp_path: Path):
    train(recipe, ["optimizer.max_steps=2"])
    before = (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes()
    with pytest.raises(TrainError, match=r"run: holds a training already \(step-0000002\); add resume=true"):
        train(recipe)
    with pytest.raises(TrainError, match=r"another recipe; optimizer\.max_steps, seed changed"):
        train(recipe, ["resume=true", "seed=3"])
    (tmp_path / "run" / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(TrainError, match=r"recipe\.yaml: cannot be read .*restore it"):
        train(recipe, ["resume=true"])
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes() == before


def test_a_loss_that_is_no_number_stops_before_it_does_harm(recipe: str, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    last = tmp_path / "run" / "checkpoints" / "step-0000003"
    before = {file.name: file.read_bytes() for file in last.iterdir()}
    too_fast = ["resume=true", "optimizer.lr=1e38", "keep.checkpoint_every=100"]
    with pytest.raises(TrainError, match=r"step 5: the loss is nan.*last good checkpoint is .*step-0000003"):
        train(recipe, too_fast)
    assert {file.name: file.read_bytes() for file in last.iterdir()} == before
    train(recipe, ["resume=true", "optimizer.lr=0.01"])  # as the message says
    assert (tmp_path / "run" / "adapter" / "adapter.json").is_file()


def test_a_full_disk_keeps_the_last_good_checkpoint(recipe: str, tmp_path: Path):
    """A limit on the size of files is met like a full disk: writing fails half-way through."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    def fill_up(self: Checkpoints, step: int, *rest: Any) -> Path:
        saved = save(self, step, *rest)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return saved

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", fill_up)
            with pytest.raises(TrainError, match=r"cannot be written.*(is|kept).*resume=true"):
                train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000003"]
    train(recipe, ["resume=true"])
    train(recipe, [f"output={tmp_path / 'whole'}"])
    assert_bit_identical(tmp_path / "whole" / "adapter", tmp_path / "run" / "adapter")


def test_a_damaged_checkpoint_is_named(recipe: str, tmp_path: Path):
    train(recipe, ["optimizer.max_steps=2"])
    file = tmp_path / "run" / "checkpoints" / "step-0000002" / "trainer.pt"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(TrainError, match=r"step-0000002/trainer\.pt: is damaged .*remove its folder"):
            train(recipe, ["optimizer.max_steps=2", "resume=true"])


def test_going_on_from_another_adapter(recipe: str, tmp_path: Path):
    train(recipe)
    first = tmp_path / "run" / "adapter"
    more = [f"output={tmp_path / 'more'}", f"start_from={first}"]
    train(recipe, [*more, "optimizer.max_steps=1"])  # whose rate is 0
    assert_bit_identical(first, tmp_path / "more" / "adapter")
    with pytest.raises(TrainError, match=r"another kind of adapter than the recipe's: prompt\.length differ"):
        train(recipe, [f"output={tmp_path / 'other'}", f"start_from={first}", "adapter.prompt.length=5"])


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_and_workers_decide_nothing(recipe: str, tmp_path: Path, workers: int):
    small = ["compute.pass_tokens=60", f"compute.workers={workers}", "compute.checkpointing=true"]
    train(recipe, [f"output={tmp_path / 'large'}", "optimizer.max_steps=4"])
    train(recipe, [f"output={tmp_path / 'small'}", "optimizer.max_steps=4", *small])
    one, two = weights(tmp_path / "large" / "adapter"), weights(tmp_path / "small" / "adapter")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_learns_too(recipe: str, tmp_path: Path, dtype: str):
    train(
        recipe, [f"compute.dtype={dtype}", "optimizer.epochs=4", "adapter.norms=true", "optimizer.clip=1.0"]
    )
    losses = [line["held_out"]["instruct"] for line in read_log(tmp_path / "run") if "held_out" in line]
    assert losses[-1] < 0.97 * losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run" / "adapter").values())


@pytest.mark.parametrize(("multiplies", "computed"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_is_for_processors_that_have_it(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiplies: bool, computed: str
):
    """Without its instructions a step takes tens of times as long, in every shipped recipe."""
    monkeypatch.setattr("train.build.multiplies_bfloat16", lambda: multiplies)
    train(recipe, ["compute.dtype=bfloat16", "optimizer.max_steps=1"])
    assert f"| computed | {computed}, torch" in (tmp_path / "run" / "report.md").read_text()


def test_gradients_are_clipped_and_their_norm_is_told(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An optimizer that divides by their size would hide both."""
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *rest: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for name, clip in (("plain", "null"), ("clipped", "0.001")):
        train(recipe, [f"output={tmp_path / name}", "optimizer.max_steps=3", f"optimizer.clip={clip}"])
    plain, clipped = (
        [line["gradient_norm"] for line in read_log(tmp_path / name) if "loss" in line]
        for name in ("plain", "clipped")
    )
    assert min(plain + clipped) > 0.002
    assert norms == pytest.approx(plain + [0.001] * 3, rel=1e-3)


def test_a_gradient_is_of_the_mean_over_its_targets(tiny: Path, tmp_path: Path):
    """Of the same row so many times as of it once."""
    row = {"instruction": "Say it.", "input": "", "output": "copper"}
    rows = write_lines(tmp_path / "same.jsonl", [row] * 8)
    recipe = write_recipe(tmp_path / "r.yaml", text_recipe(tiny, tmp_path / "run", rows))
    told = []
    for size in (1, 8):
        own = [f"output={tmp_path / str(size)}", f"optimizer.batch_size={size}", "optimizer.max_steps=1"]
        train(recipe, [*own, "data.instruct.holdout=0"])
        told.append(next(line for line in read_log(tmp_path / str(size)) if "loss" in line))
    once, often = ((line["loss"], line["gradient_norm"]) for line in told)
    assert often == pytest.approx(once, rel=1e-4)


def test_nothing_to_hold_out_and_no_prompts(recipe: str, tmp_path: Path):
    train(recipe, ["data.instruct.holdout=0", "adapter.prompt=null", "adapter.lora={rank: 2, targets: [wq]}"])
    report = (tmp_path / "run" / "report.md").read_text()
    assert "no rows were held out" in report
    assert "gates.png" not in report


def test_what_is_wrong_is_said_before_anything_is_trained(recipe: str, tmp_path: Path, instructions: Path):
    from models.errors import CheckpointError

    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        train(recipe, ["base=/none"])
    with pytest.raises(TrainError, match=r"compute\.device: 'cuda:9' cannot be used"):
        train(recipe, ["compute.device=cuda:9"])
    with pytest.raises(TrainError, match="fewer than one step's 64"):
        train(recipe, ["optimizer.batch_size=64"])
    with pytest.raises(TrainError, match=r"none\.jsonl: there is no such file"):
        train(recipe, ["data.instruct.path=none.jsonl"])
    assert not (tmp_path / "run" / "checkpoints").exists()
    train(recipe, ["optimizer.max_steps=1"])  # what was tried before is no obstacle


def test_learning_rate():
    """From 0 over the warm-up to its peak, then half a cosine: the reference's, per step."""
    optimizer = OptimizerRecipe(batch_size=64, base_lr=0.009, warmup=0.4, min_lr=0.0001)
    rates = [learning_rate(optimizer, step, 100) for step in range(101)]
    assert rates[0] == 0
    assert rates[20] == pytest.approx(0.00225 / 2)
    assert rates[40] == max(rates) == pytest.approx(0.009 * 64 / 256)
    assert rates[70] == pytest.approx((0.00225 + 0.0001) / 2)
    assert rates[100] == pytest.approx(0.0001)
    assert math.isclose(learning_rate(OptimizerRecipe(batch_size=1, lr=0.5), 0, 10), 0.5)


def test_log_is_json_lines(recipe: str, tmp_path: Path):
    train(recipe, ["optimizer.max_steps=3"])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 3]
