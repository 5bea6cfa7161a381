"""The native folder: what is saved is what is opened, and whatever does not belong is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import Sample, chat_65b, reference_7b, reference_v1
from safetensors.torch import load_file, save_file
from support import MHA, random_adapter

from models.adapter import Adapter, base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.checkpoints.adapter_table import AdapterOptions
from models.checkpoints.adapters import export_adapter, open_adapter
from models.checkpoints.native import load_adapter, save_adapter
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError

EVERYTHING: dict[str, Any] = {
    "prompt": {"length": 2, "layers": (0, 2), "projection": "regrouped"},
    "gate": {"per": "layer", "activation": "raw", "new_gate": True},
    "norms": True,
    "final_norm": True,
    "head": True,
    "scale_bias": {"scale": "output", "scale_targets": ("wq",), "bias_targets": LINEARS},
    "lora": {"rank": 2, "alpha": 4.0, "targets": ("wq", "w2"), "on_prompts": True},
    "vision": {
        "encoder": "efficientnet-lite0",
        "features": "global",
        "projector": "mlp",
        "fusion": "early",
        "layers": (1,),
        "num_tokens": 2,
        "feature_dim": 5,
        "hidden_size": 6,
        "input_norm": True,
    },
    "template": "plain",
    "description": 'Everything at once, é and " included.',
}


def everything(config: ModelConfig) -> Adapter:
    return random_adapter(
        AdapterConfig.model_validate(
            {"base": base_spec(config, "0123456789abcdef").model_dump(), **EVERYTHING}
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(everything(MHA), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same(ours: Adapter, theirs: Adapter) -> None:
    assert ours.config == theirs.config
    mine, others = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[key], others[key]) for key in mine)


def test_what_is_saved_is_opened(config: ModelConfig, tmp_path: Path):
    adapter = everything(config)
    save_adapter(adapter, tmp_path / "a" / "b")
    assert_same(open_adapter(tmp_path / "a" / "b", config), adapter)
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]


@pytest.mark.parametrize("build", [reference_v1, reference_7b, chat_65b])
def test_imported_adapters_survive_the_native_folder(config: ModelConfig, tmp_path: Path, build: Any):
    sample: Sample = build(config)
    adapter = random_adapter(sample.config)
    export_adapter(adapter, "native", tmp_path / "x")
    assert_same(open_adapter(tmp_path / "x", config), adapter)


def test_saving_again_replaces_and_leaves_other_files(folder: Path):
    (folder / "notes.txt").write_text("mine")
    adapter = random_adapter(everything(MHA).config, seed=5)
    save_adapter(adapter, folder)
    assert_same(load_adapter(folder, MHA), adapter)
    assert len(list(folder.iterdir())) == 3


def test_a_failed_save_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = load_adapter(folder, MHA)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.checkpoints.native.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(random_adapter(before.config, seed=5), folder)
    monkeypatch.undo()
    assert_same(load_adapter(folder, MHA), before)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompt": {"length": 0, "layers": [0]}}, "prompt: length"),
        ({"prompt": {"length": 2, "layers": [2, 0]}}, "prompt: layers"),
        ({"prompt": {"length": 2, "layers": [9]}}, "layer 9 does not exist"),
        ({"gate": {"activation": "relu"}}, "gate: activation"),
        ({"format_version": 2}, "format_version"),
        ({"surprise": 1}, "surprise"),
        ({"base": {"hidden_size": -1}}, "base: hidden_size"),
        ({"template": "x" * 100}, "template"),
    ],
)
def test_a_bad_manifest_names_file_and_field(folder: Path, changes: dict[str, object], match: str):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"adapter\.json: .*{match}"):
        open_adapter(folder, MHA)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"format": "llama-adapter"}', "\xff"]
)
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str):
    (folder / "adapter.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"adapter\.json"):
        open_adapter(folder, MHA)


def test_a_manifest_of_absurd_size_is_not_read(folder: Path):
    (folder / "adapter.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(CheckpointError, match="larger than"):
        open_adapter(folder, MHA)


@pytest.mark.parametrize(
    ("field", "value"), [("feature_dim", 1 << 24), ("hidden_size", 1 << 62), ("hidden_size", 1 << 23)]
)
def test_absurd_sizes_allocate_nothing(folder: Path, field: str, value: int):
    edit(folder, vision={**EVERYTHING["vision"], field: value})
    with pytest.raises(CheckpointError, match=r"has shape|hidden_size: Input should be less than"):
        open_adapter(folder, MHA)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("gate"), "missing gate"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t: t.update(prompt=torch.zeros(1, 2, 48)), r"prompt has shape \[1, 2, 48\]"),
        (lambda t: t.update(gate=torch.full((3,), float("nan"))), "gate holds NaN"),
        (lambda t: t.update(gate=torch.zeros(3, dtype=torch.int32)), r"gate is torch\.int32"),
    ],
)
def test_bad_weights_name_file_and_tensor(folder: Path, change: Any, match: str):
    file = folder / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"adapter\.safetensors: {match}"):
        open_adapter(folder, MHA)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder: Path, size: int):
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: .*truncated"):
        open_adapter(folder, MHA)


def test_missing_weights_are_refused(folder: Path):
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: missing"):
        open_adapter(folder, MHA)


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_layers", "intermediate_size", "vocab_size", "head_dim"]
)
def test_another_base_is_refused_by_name(folder: Path, field: str):
    other = replace(MHA, **{field: getattr(MHA, field) + 2})
    with pytest.raises(AdapterMismatch, match=field):
        open_adapter(folder, other)


def test_a_base_of_the_same_shape_with_other_weights_is_refused(folder: Path):
    open_adapter(folder, MHA, fingerprint="0123456789abcdef")
    with pytest.raises(AdapterMismatch, match="fingerprint 0123456789abcdef"):
        open_adapter(folder, MHA, fingerprint="fedcba9876543210")


def test_only_the_template_can_be_said_otherwise(folder: Path):
    assert open_adapter(folder, MHA, AdapterOptions(template="alpaca")).config.template == "alpaca"
    with pytest.raises(CheckpointError, match=r"gate= does not apply to native.*adapter\.json"):
        open_adapter(folder, MHA, AdapterOptions(gate="raw"))


@pytest.mark.parametrize("name", ["reference-v1", "reference-7b", "chat-65b", "peft", "litgpt"])
def test_formats_refuse_to_export_what_they_cannot_say(tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match=rf"a {name} file cannot express this adapter"):
        export_adapter(everything(MHA), name, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_an_export_that_would_be_read_otherwise_is_refused(tmp_path: Path):
    """Same tensors, another meaning: tanh gates, which PEFT would use raw."""
    spec = {"base": base_spec(MHA).model_dump(), "prompt": {"length": 2, "layers": (2, 3)}}
    tanh = random_adapter(AdapterConfig.model_validate({**spec, "gate": {"per": "layer"}}))
    with pytest.raises(CheckpointError, match="gate would be read as something else"):
        export_adapter(tanh, "peft", tmp_path / "x")
    low = random_adapter(
        AdapterConfig.model_validate(
            {**spec, "prompt": {"length": 2, "layers": (0, 1)}, "template": "alpaca"}
        )
    )
    with pytest.raises(CheckpointError, match="prompt, gate would be read as something else"):
        export_adapter(low, "reference-v1", tmp_path / "x.pth")


def test_an_unknown_format_is_named(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"'onnx' is no adapter format; use one of native, reference-v1"
    ):
        export_adapter(everything(MHA), "onnx", tmp_path / "x")


def test_a_pipe_is_not_waited_for(folder: Path):
    (folder / "adapter.safetensors").unlink()
    os.mkfifo(folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors: is no regular file"):
        load_adapter(folder, MHA, "0123456789abcdef")
