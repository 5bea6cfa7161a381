"""An output folder: nobody's data is lost in it, no run is mixed with another, a full disk takes nothing."""

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from train_files import train, write_lines

from models.adapter import Adapter
from train import main
from train.checkpoints import Checkpoints
from train.data.store import remove_stores
from train.errors import TrainError
from train.log import read_log
from train.output import claimed, write_whole


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A limit on the size of files is met like a full disk: writing fails half-way through."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def crash_at_first_save(patch: pytest.MonkeyPatch) -> None:
    def crash(self: Checkpoints, *rest: Any) -> Path:
        raise KeyboardInterrupt

    patch.setattr(Checkpoints, "save", crash)


@pytest.mark.parametrize("name", ["instruct.jsonl", "img/1.png", "instruct/summary.json.bak"])
def test_somebodys_own_data_is_never_removed(recipe: str, run: Path, name: str):
    """`output=.` beside the `data` folder that recipes read."""
    own = run / "data" / name
    own.parent.mkdir(parents=True)
    own.write_text("precious")
    with pytest.raises(TrainError, match=r"run/data/.*no training has made this.*another output"):
        train(recipe, ["optimizer.max_steps=1"])
    assert own.read_text() == "precious"


def test_what_another_recipe_prepared_makes_way(tmp_path: Path):
    for name in ("old", ".older.partial"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "tokens.u32").touch()
    remove_stores(tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
    remove_stores(tmp_path / "none")


def test_write_whole_takes_nothing_from_a_full_disk(tmp_path: Path):
    file = tmp_path / "log.jsonl"
    write_whole(file, ["a\n", "b\n"])
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write_whole(file, ["x" * 1000])
    assert file.read_text() == "a\nb\n"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.long
def test_rows_that_are_not_on_disk_are_prepared_again(
    recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch
):
    """A machine that loses power keeps what it likes of the rest: rows of zeros would be trained on."""

    def broken(handle: int) -> None:
        if "/data" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", broken)
        with pytest.raises(TrainError, match="Input/output error"):
            train(recipe, ["optimizer.max_steps=1"])
    assert [path.name for path in (run / "data").iterdir()] == [".instruct.partial"]
    train(recipe, ["optimizer.max_steps=1"])


@pytest.mark.long
def test_one_training_at_a_time(recipe: str, run: Path):
    with claimed(run), pytest.raises(TrainError, match=r"run: another training writes there"):
        train(recipe, ["optimizer.max_steps=1"])
    train(recipe, ["optimizer.max_steps=1"])


@pytest.mark.long
@pytest.mark.parametrize("resume", ["true", "false"])
def test_an_adapter_without_checkpoints_is_not_overwritten(recipe: str, run: Path, resume: str):
    train(recipe, ["optimizer.max_steps=2"])
    before = (run / "adapter" / "adapter.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(TrainError, match="holds an adapter, but no checkpoint"):
        train(recipe, ["optimizer.max_steps=3", f"resume={resume}"])
    assert (run / "adapter" / "adapter.safetensors").read_bytes() == before


@pytest.mark.long
def test_a_run_that_saved_nothing_leaves_no_losses_to_the_next(recipe: str, run: Path, instructions: Path):
    with pytest.MonkeyPatch.context() as patch:
        crash_at_first_save(patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert read_log(run)[0]["held_out"].keys() == {"instruct"}
    source = json.dumps({"other": {"format": "alpaca", "path": str(instructions), "holdout": 0.3}})
    train(recipe, [f"data={source}"])
    assert all(line["held_out"].keys() == {"other"} for line in read_log(run) if "held_out" in line)
    assert "| step | other |" in (run / "report.md").read_text()


@pytest.mark.long
def test_going_on_without_room_does_no_harm(recipe: str, run: Path):
    train(recipe, ["optimizer.max_steps=3"])
    before = (run / "recipe.yaml").read_bytes()
    more = ["optimizer.max_steps=3", "resume=true", "optimizer.clip=1.0"]
    with full_disk(256), pytest.raises(TrainError, match=r"File too large.*go on with resume=true"):
        train(recipe, more)
    assert (run / "recipe.yaml").read_bytes() == before
    train(recipe, more)


@pytest.mark.long
def test_a_disk_that_fills_up_at_the_very_end(recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch):
    save = main.save_adapter

    def full(adapter: Adapter, folder: Path) -> None:
        with full_disk(64):
            save(adapter, folder)

    monkeypatch.setattr(main, "save_adapter", full)
    with pytest.raises(TrainError, match=r"run: .*what was saved before is kept.*resume=true"):
        train(recipe, ["optimizer.max_steps=2"])


def test_too_little_memory_is_said(recipe: str, monkeypatch: pytest.MonkeyPatch):
    for error, told in (
        (torch.OutOfMemoryError("CUDA out of memory"), "compute.pass_tokens"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "Bus error.*/dev/shm"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(main, "build", fail)
        with pytest.raises(TrainError, match=told):
            train(recipe)


@pytest.mark.long
def test_brackets_in_rows_are_no_markup(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows: list[Any] = [{"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(8)]
    file = write_lines(tmp_path / "rows.jsonl", ["[/INST] Yes. [bold]", *rows])
    train(recipe, [f"data.instruct.path={file}", "data.instruct.bad_rows=skip", "optimizer.max_steps=1"])
    assert "[/INST] Yes. [bold]" in " ".join(capsys.readouterr().err.split())
