"""docs/adapters.md: its commands work as they are written, and its tables leave out nothing."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import torch
from adapter_files import Sample, chat_65b, reference_7b, reference_v1, save_sample
from safetensors.torch import save_file
from service import serving
from tiny_base import tiny_config, write_tiny_base

from models.checkpoints.adapter_table import AdapterOptions
from models.checkpoints.adapters import FORMATS
from models.prompts import template_names

GUIDE = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the guide names, on a tiny base."""
    folder, config = tmp_path_factory.mktemp("guide"), tiny_config()
    write_tiny_base(folder / "llama-7b")
    samples = {
        "llama_adapter_len10_layer30_release.pth": reference_v1(config, activation="raw", length=10),
        "v1.pth": reference_v1(config, length=10),
        "chat.pth": chat_65b(config),
        "7b.pth": reference_7b(config),
    }
    for name, sample in samples.items():
        if sample.config.prompt and not sample.config.vision:  # trained as the reference code does
            sample.tensors["layers.0.attention.gate"].zero_()
        save_sample(sample, folder / name)
    write_peft(folder / "peft-folder", samples["v1.pth"])
    return folder


def write_peft(folder: Path, sample: Sample) -> None:
    folder.mkdir()
    prefix = "base_model.model.model.layers.{}.self_attn.adaption_"
    tensors = {
        prefix.format(3) + "prompt": sample.own["prompt"][:1],
        prefix.format(3) + "gate": torch.ones(1),
    }
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    told = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 10, "adapter_layers": 1}
    (folder / "adapter_config.json").write_text(json.dumps(told))


def test_every_option_template_and_format_is_told() -> None:
    table = GUIDE.split("## Options")[1].split("## ")[0]
    told = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert set(told) == {field.name for field in fields(AdapterOptions)}
    for name in template_names():
        assert f"`{name}`" in table, name
    options = {option for form in FORMATS for option in form.options} | {"template"}
    assert options == {f.name for f in fields(AdapterOptions)}


@pytest.mark.server
@pytest.mark.timeout(300)
def test_every_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the guide's order; a `serve` runs until the next, and curl asks the one that runs."""
    monkeypatch.chdir(folder)
    url, ran = "", set()
    with ExitStack() as running:
        for command in COMMANDS:
            program, *arguments = shlex.split(command)
            ran.add(f"{program} {arguments[0]}" if program == "llama-adapter" else program)
            if program == "curl":
                arguments = [a.replace("http://127.0.0.1:8000", url) for a in arguments]
                run(["curl", "--fail-with-body", "--silent", "--show-error", *arguments])
            elif arguments[0] == "serve":
                running.close()
                url = running.enter_context(serving(*arguments[1:], "--experts", "")).url
            else:
                run([sys.executable, "-m", "server.cli", *arguments])
        names = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in names] == ["llama-7b", "alpaca"]  # what curl has loaded
    assert ran == {"curl", *(f"llama-adapter {name}" for name in ("serve", "inspect", "verify", "convert"))}


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    assert done.stdout.strip()
