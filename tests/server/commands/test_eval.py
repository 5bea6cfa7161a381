"""`llama-adapter eval` against real services: what a folder is found to be, its endpoint is found to be."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import psutil
import pytest
from scripted_endpoint import Reply, listening, said
from service import Service, serving, until
from tiny_base import write_adapter, write_tiny_base
from train_files import write_captions, write_instructions, write_lines
from typer.testing import CliRunner

from models.errors import ModelError
from server.cli import app
from server.serving import StartupError

GUIDE = (Path(__file__).parents[3] / "docs" / "evaluate.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.S) for line in block.splitlines()]

# Who runs these tests in the background of a script has SIGINT ignored, and so have we and our children.
HEARD = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, adapters for it, and data."""
    folder = tmp_path_factory.mktemp("eval")
    write_tiny_base(folder / "tiny")
    write_adapter(folder / "v1", "v1")
    write_adapter(folder / "sight", "sight", seed=1)  # it says something else of each colour
    write_captions(folder / "pictures")
    write_instructions(folder / "instructions.jsonl")
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    adapters = [f"--adapter={kind}={folder / kind}" for kind in ("v1", "sight")]
    base = ("--base", str(folder / "tiny"), "--dtype", "float32")
    with serving(*base, *adapters, "--experts", "classifier") as service:
        yield service


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the local service takes from our environment. Keys are not among it."""
    monkeypatch.setenv("LLAMA_ADAPTER_KV_CACHE_MIB", "8")
    monkeypatch.setenv("LLAMA_ADAPTER_DTYPE", "float32")
    monkeypatch.setenv("LLAMA_ADAPTER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMA_ADAPTER_API_KEYS", '["secret"]')


class Evaluation:
    """One run of the command, and what it left."""

    def __init__(self, tmp_path: Path, *arguments: object, predictions: bool = True) -> None:
        output, lines = tmp_path / "scores.json", tmp_path / "predictions.jsonl"
        command = ["eval", *map(str, arguments), "--output", str(output)]
        command += ["--predictions", str(lines)] if predictions else []
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        self.table: list[str] = result.stdout.splitlines()
        self.told: dict[str, Any] = json.loads(output.read_text())
        self.scores: Any = self.told["scores"]
        self.predictions = (
            [json.loads(line) for line in lines.read_text().splitlines()] if predictions else []
        )


def local(folder: Path, adapter: str | None = None) -> list[object]:
    base = ["--base", folder / "tiny"]
    return base if adapter is None else [*base, "--adapter", folder / adapter]


def remote(service: Service, model: str) -> list[object]:
    return ["--url", f"{service.url}/v1", "--model", model]


def test_captions_of_a_folder_are_those_of_its_endpoint(
    folder: Path, service: Service, tmp_path: Path
) -> None:
    pictures = folder / "pictures"
    common = ["captions", pictures / "captions.jsonl", "--images", pictures, "--max-tokens", 12]
    here = Evaluation(tmp_path, *common, *local(folder, "sight"))
    there = Evaluation(tmp_path, *common, *remote(service, "sight"), "--no-experts")
    said = [line["caption"] for line in here.predictions]
    assert [line["caption"] for line in there.predictions] == said
    assert len(set(said)) == 4
    assert here.scores == there.scores
    assert here.told["pictures"] == 16
    shuffled = Evaluation(
        tmp_path, *common, *remote(service, "sight"), "--no-experts", "--shuffle-images", 3, "--limit", 4
    )
    assert sorted(line["caption"] for line in shuffled.predictions) == sorted(said[:4])
    assert [line["caption"] for line in shuffled.predictions] != said[:4]


def test_the_base_alone_is_blind(folder: Path, tmp_path: Path) -> None:
    pictures = folder / "pictures"
    common = ["captions", pictures / "captions.jsonl", "--images", pictures, "--max-tokens", 12]
    base = Evaluation(tmp_path, *common, *local(folder), "--limit", 6)
    assert len({line["caption"] for line in base.predictions}) == 1
    assert base.told["model"] == str(folder / "tiny")


def test_baselines_need_no_model(folder: Path, tmp_path: Path) -> None:
    rows = folder / "pictures" / "captions.jsonl"
    common = ["captions", rows, "--images", rows.parent, "--split", "held-out", "--holdout", 0.3]
    nearest = Evaluation(tmp_path, *common, "--nearest", rows)
    names = Evaluation(tmp_path, *common, "--classifier")
    assert nearest.scores["CIDEr"] > names.scores["CIDEr"]
    assert nearest.told["references"] == names.told["references"] == len(names.predictions)


@pytest.mark.parametrize("template", ["alpaca", "chat", "vicuna_v1"])
def test_the_loss_of_a_folder_is_that_of_its_endpoint(
    template: str, folder: Path, service: Service, tmp_path: Path
) -> None:
    rows = folder / "instructions.jsonl"
    common = ["loss", rows, "--template", template, "--split", "held-out", "--holdout", 0.4]
    losses = []
    for adapter in ("v1", None):
        here = Evaluation(tmp_path, *common, *local(folder, adapter), predictions=False)
        model = remote(service, adapter or "tiny")
        there = Evaluation(tmp_path, *common, *local(folder), *model, predictions=False)
        assert here.scores["loss"] == pytest.approx(there.scores["loss"], abs=1e-4)
        assert here.scores["answer tokens"] == there.scores["answer tokens"]
        assert 0 < here.scores["rows"] < 24
        losses.append(here.scores["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3  # the adapter counts


def test_an_endpoint_is_given_no_pictures_to_score(folder: Path, service: Service) -> None:
    rows = folder / "pictures" / "captions.jsonl"
    command = ["eval", "loss", rows, "--format", "captions", "--template", "caption", "--images", rows.parent]
    result = CliRunner().invoke(app, [*map(str, [*command, *local(folder), *remote(service, "sight")])])
    assert isinstance(result.exception, ModelError)
    assert "captions.jsonl:1: has an image, which an endpoint" in str(result.exception)


def science(folder: Path) -> list[object]:
    """Six problems, every other one with an image."""
    rows = {
        str(i): {
            "question": f"Which is number {i}?",
            "choices": ["one", "two"],
            "answer": i % 2,
            "hint": "",
            "image": "image.png" if i % 2 else None,
            "subject": "natural science",
            "grade": f"grade{2 * i + 1}",
            "split": "test",
        }
        for i in range(6)
    }
    for id in rows:
        (folder / "science" / "test" / id).mkdir(parents=True, exist_ok=True)
        copyfile(folder / f"pictures/img/{id}.png", folder / "science" / "test" / id / "image.png")
    (folder / "science" / "problems.json").write_text(json.dumps(rows))
    return ["scienceqa", folder / "science" / "problems.json", "--images", folder / "science"]


def objects(folder: Path) -> list[object]:
    rows = [
        {"question_id": i, "image": f"{i}.png", "text": f"Is number {i} red?", "label": ("yes", "no")[i % 2]}
        for i in range(6)
    ]
    file = write_lines(folder / "coco_pope_random.jsonl", rows)
    return ["pope", file, "--images", folder / "pictures" / "img"]


def subtasks(folder: Path) -> list[object]:
    (folder / "mme" / "count").mkdir(parents=True, exist_ok=True)
    lines = ""
    for i in range(3):
        copyfile(folder / f"pictures/img/{i}.png", folder / f"mme/count/{i}.png")
        lines += f"{i}.png\tOne sheet?\tYes\n{i}.png\tTwo sheets?\tNo\n"
    (folder / "mme" / "count.txt").write_text(lines)
    return ["mme", folder / "mme", "--images", folder / "mme"]


@pytest.mark.parametrize("questions", [science, objects, subtasks], ids=["scienceqa", "pope", "mme"])
def test_answers_of_a_folder_are_those_of_its_endpoint(
    questions: Callable[[Path], list[object]], folder: Path, service: Service, tmp_path: Path
) -> None:
    common = [*questions(folder), "--max-tokens", 8]
    here = Evaluation(tmp_path, *common, *local(folder, "sight"))
    there = Evaluation(tmp_path, *common, *remote(service, "sight"), "--no-experts")
    assert len(here.predictions) == 6
    assert len({line["answer"] for line in here.predictions}) > 1
    assert here.predictions == there.predictions
    assert here.scores == there.scores
    assert here.told["measure"] == common[0]
    assert len(here.table) >= 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to evaluate is named"),
        (["--url", "http://127.0.0.1:9/v1"], "--url needs --model"),
        (["--url", "http://127.0.0.1:9/v1", "--model", "m", "--adapter", "a"], "two things to evaluate"),
        (["--base", "./no-such-base"], "no-such-base"),
        (["--base", "BASE", "--adapter", "./no-such-adapter"], "no-such-adapter"),
        (["--base", "BASE", "--output", "no/such/folder.json"], "make its folder"),
        (["--classifier", "--nearest", "x.jsonl"], "two captioners"),
        (["--classifier", "--split", "held-out"], "needs --holdout"),
    ],
)
def test_what_cannot_be_evaluated_is_told(arguments: list[str], sentence: str, folder: Path) -> None:
    rows = folder / "pictures" / "captions.jsonl"
    given = [str(folder / "tiny") if argument == "BASE" else argument for argument in arguments]
    command = ["eval", "captions", str(rows), "--images", str(rows.parent), *given]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ModelError | StartupError), result.exception
    assert sentence in str(result.exception)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_service_outlives_its_evaluation(number: signal.Signals, folder: Path) -> None:
    rows = folder / "pictures" / "captions.jsonl"
    command = [sys.executable, "-m", "server.cli", "eval", "captions", rows, "--images", rows.parent]
    words = [*map(str, [*command, *local(folder)])]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, preexec_fn=HEARD) as process:
        try:
            evaluation = psutil.Process(process.pid)
            until(lambda: len(evaluation.children(recursive=True)) >= 2, 60)  # the service and its worker
            started = evaluation.children(recursive=True)
        finally:
            process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    until(lambda: not any(child.is_running() for child in started), 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_no_answers(number: signal.Signals, folder: Path) -> None:
    asked, over = threading.Event(), threading.Event()

    def never(body: dict[str, Any]) -> Reply:
        asked.set()
        over.wait(60)
        return said("late")

    rows = folder / "pictures" / "captions.jsonl"
    command = [sys.executable, "-m", "server.cli", "eval", "captions", rows, "--images", rows.parent]
    with listening(never) as url:
        words = [*map(str, [*command, "--url", url, "--model", "m"])]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=HEARD) as process:
            try:
                assert asked.wait(60)
                process.send_signal(number)
                _, error = process.communicate(timeout=20)
            finally:
                over.set()
                process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in error


def test_an_unknown_model_is_told(folder: Path, service: Service) -> None:
    rows = write_lines(folder / "one.jsonl", [{"file": "img/0.png", "caption": "a sheet"}])
    command = ["eval", "captions", rows, "--images", folder / "pictures", *remote(service, "nobody")]
    result = CliRunner().invoke(app, [*map(str, command)])
    assert isinstance(result.exception, ModelError)
    assert "nobody" in str(result.exception)
    assert "correct --model" in str(result.exception)


def test_the_guide_s_commands_and_options_exist() -> None:
    told = {shlex.split(command)[2] for command in COMMANDS}
    assert told == {"captions", "loss", "scienceqa", "pope", "mme"}
    helps = {name: CliRunner().invoke(app, ["eval", name, "--help"]).output for name in told}
    for command in COMMANDS:
        _, _, name, *arguments = shlex.split(command)
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert re.search(rf"^ +{option} ", helps[name], re.M), command
    for option in re.findall(r"`(--[a-z-]+)", GUIDE):
        assert any(re.search(rf"^ +{option}\b", text, re.M) for text in helps.values()) or option == "--help"
