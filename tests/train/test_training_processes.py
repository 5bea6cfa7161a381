"""Several processes, and signals: real ones."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from train_files import text_recipe, train, write_instructions, write_recipe

from models.checkpoints.manifest import read_manifest
from models.checkpoints.native import load_unchecked
from train.log import read_log

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tiny: Path, instructions: Path, tmp_path: Path) -> str:
    values: dict[str, Any] = {"adapter": {"norms": True, "scale_bias": {"bias_targets": ["wq", "w2"]}}}
    return write_recipe(tmp_path / "r.yaml", text_recipe(tiny, tmp_path / "run", instructions, **values))


Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the job in processes of their own, as torchrun does; what is left of them ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(
        recipe: str,
        overrides: list[str],
        world: int = 1,
        program: Sequence[str] = ("-m", "server.cli", "train"),
    ) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            env = os.environ | {key: str(value) for key, value in place.items() if world > 1}
            env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "error", *program, recipe, *overrides]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=pipe, stdout=pipe, text=True))
        return started[-world:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(processes: list["subprocess.Popen[str]"], code: int = 0) -> list[str]:
    errors = []
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == code, error
        errors.append(error)
    return errors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_unchecked(folder, read_manifest(folder)).state_dict()


def first_moments(run: Path) -> list[torch.Tensor]:
    """AdamW's after one step: (1 − β₁) times the gradient."""
    state = torch.load(run / "checkpoints" / "step-0000001" / "trainer.pt", weights_only=True)
    return [values["exp_avg"] for values in state["optimizer"]["state"].values()]


def test_two_processes_give_the_gradients_of_one(recipe: str, start: Start, tmp_path: Path):
    one_step = ["optimizer.max_steps=1", "optimizer.warmup=0", "optimizer.batch_size=5", "init.gate=normal"]
    train(recipe, [*one_step, f"output={tmp_path / 'one'}"])
    finish(start(recipe, [*one_step, f"output={tmp_path / 'two'}"], world=2))
    one, two = first_moments(tmp_path / "one"), first_moments(tmp_path / "two")
    assert len(one) == len(two) == 6
    for alone, shared in zip(one, two, strict=True):
        assert alone.any()
        torch.testing.assert_close(shared, alone, atol=1e-7, rtol=1e-4)
    losses = [
        [line.get("loss") or line["held_out"]["instruct"] for line in read_log(tmp_path / name)]
        for name in ("one", "two")
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


def wait_for_steps(run: Path, count: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while len(read_log(run)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


LONG = ["optimizer.epochs=200", "keep.checkpoint_every=10000", "keep.evaluate_every=10000"]


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_and_exits_with_0(recipe: str, start: Start, tmp_path: Path, world: int):
    """One process of two is told; both stop after the same step."""
    processes = start(recipe, LONG, world)
    wait_for_steps(tmp_path / "run", 6, processes[0])
    processes[-1].send_signal(signal.SIGTERM)
    errors = finish(processes)
    assert "Stopped and saved at step" in errors[0]
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == read_log(tmp_path / "run")[-1]["step"] >= 5
    assert not (tmp_path / "run" / "adapter").exists()


THREADS_LEFT = """
import sys
from pathlib import Path
from train.main import train

train(sys.argv[1], sys.argv[2:], Path("unused"))
threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
sys.exit(", ".join(name for name in threads if "gloo" in name or "tcpstore" in name) or 0)
"""


def test_a_training_leaves_no_threads_of_its_group(recipe: str, start: Start):
    """One that still runs when the interpreter is taken down aborts the process, now and then."""
    finish(start(recipe, ["optimizer.max_steps=2"], world=2, program=("-c", THREADS_LEFT)))


def test_a_stopped_run_goes_on_to_the_same_bits(recipe: str, start: Start, tmp_path: Path):
    middle = ["optimizer.epochs=30", "keep.checkpoint_every=10000", "keep.evaluate_every=10000"]
    processes = start(recipe, middle)
    wait_for_steps(tmp_path / "run", 20, processes[0])
    processes[0].send_signal(signal.SIGTERM)
    [error] = finish(processes)
    assert "go on with resume=true" in error
    finish(start(recipe, [*middle, "resume=true"]))
    finish(start(recipe, [*middle, f"output={tmp_path / 'whole'}"]))
    one, two = weights(tmp_path / "run" / "adapter"), weights(tmp_path / "whole" / "adapter")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_workers_survive_a_signal_to_the_whole_group(recipe: str, start: Start, tmp_path: Path):
    """A terminal's Ctrl-C, and torchrun's SIGTERM, reach the processes that read ahead as well."""
    processes = start(recipe, [*LONG, "compute.workers=2"])
    wait_for_steps(tmp_path / "run", 6, processes[0])
    children = Path(f"/proc/{processes[0].pid}/task/{processes[0].pid}/children").read_text().split()
    assert len(children) >= 2
    for pid in children:
        os.kill(int(pid), signal.SIGTERM)
    processes[0].send_signal(signal.SIGTERM)
    assert "Stopped and saved" in finish(processes)[0]


def test_a_worker_that_is_killed_is_told_of(recipe: str, start: Start, tmp_path: Path):
    """As the kernel does where memory, or a container's /dev/shm, is used up."""
    [process] = start(recipe, [*LONG, "compute.workers=1"])
    wait_for_steps(tmp_path / "run", 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    [error] = finish([process], code=1)
    assert "error: a process that reads rows has ended" in error
    assert "compute.workers=0" in error
    assert "Traceback" not in error


def test_a_signal_while_reading_data(recipe: str, start: Start, tmp_path: Path):
    many = write_instructions(tmp_path / "many.jsonl", 100_000)
    processes = start(recipe, [f"data.instruct.path={many}"], world=2)
    partial = tmp_path / "run" / "data" / ".instruct.partial"
    deadline = time.monotonic() + 60
    while not partial.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert "Stopped before the first step" in finish(processes)[0]


def test_what_ends_one_process_ends_all(recipe: str, start: Start):
    errors = finish(start(recipe, ["data.instruct.path=none.jsonl"], world=2), code=1)
    assert "none.jsonl: there is no such file" in errors[0]
    assert "error: another process of this training has ended" in errors[1]


def test_a_mistake_is_one_sentence_and_exit_code_1(recipe: str, start: Start):
    [error] = finish(start(recipe, ["optimizer.rate=1"]), code=1)
    assert error.startswith("error: ")
    assert "optimizer.rate: there is no such key" in error
    assert "Traceback" not in error
