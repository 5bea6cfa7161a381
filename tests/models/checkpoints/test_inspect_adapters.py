"""Describing, verifying and converting adapter files, as functions and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_files import K, Sample, chat_65b, reference_7b, reference_v1, save_sample
from safetensors.torch import load_file, save_file
from support import MHA, canonical_weights, random_base
from tiny_base import tiny_config, write_tiny_base
from typer.testing import CliRunner

from models.checkpoints.adapters import AdapterOptions, open_adapter
from models.checkpoints.huggingface import write_huggingface
from models.checkpoints.inspect import Base, convert, describe, read_base, verify
from models.checkpoints.manifest import read_manifest
from models.checkpoints.tensor_file import read_tensor_file
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError
from models.fingerprint import fingerprint
from models.registry import content_hash
from server.commands.adapters import app

LITGPT = Path(__file__).parents[2] / "fixtures" / "litgpt"
LENGTH = AdapterOptions(length=K)
BASE = Base(MHA, "0123456789abcdef")


def v1(tmp_path: Path) -> Path:
    torch.save(reference_v1(MHA).tensors, tmp_path / "v1.pth")
    return tmp_path / "v1.pth"


def seven(tmp_path: Path) -> Path:
    torch.save({"model": reference_7b(MHA, lora=2).tensors}, tmp_path / "7b.pth")
    return tmp_path / "7b.pth"


def test_a_description_of_v1(tmp_path: Path):
    told = describe(v1(tmp_path), LENGTH)
    assert told["format"] == "reference-v1"
    assert told["variant"] == "V1 text"
    assert told["base"] == {"hidden_size": 48, "num_layers": 4, "num_heads": 6}
    assert told["prompt"] == {"length": K, "layers": [1, 2, 3], "projection": "wk_wv"}
    assert told["parameters"] == 3 * K * 48 + 3 * 6  # the bottom layer's gates are never used
    assert told["options"] == {"gate": "tanh", "template": "alpaca", "length": K}
    assert len(told["sha256"]) == 64
    json.dumps(told)


def test_a_description_of_7b(tmp_path: Path):
    sample = reference_7b(MHA, lora=2)
    told = describe(seven(tmp_path), AdapterOptions(color="rgb", template="plain"))
    assert told["variant"] == "V2 multimodal"
    assert told["base"] == {
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 6,
        "intermediate_size": MHA.intermediate_size,
    }
    assert told["vision"]["encoder"] == "open_clip:ViT-L-14:openai"
    assert told["lora"]["rank"] == 2
    assert told["options"] == {"template": "plain", "color": "rgb", "encoder": "open_clip:ViT-L-14:openai"}
    assert told["template"] == "plain"
    assert told["parameters"] == sum(tensor.numel() for tensor in sample.own.values())


def test_a_description_of_the_others(tmp_path: Path):
    torch.save({"model": chat_65b(MHA).tensors}, tmp_path / "chat.pth")
    told = describe(tmp_path / "chat.pth")
    assert "gate" not in told  # there is nothing to gate
    assert told["base"] == {"hidden_size": 48, "num_layers": 4, "intermediate_size": MHA.intermediate_size}
    told = describe(LITGPT / "adapter_v2-0.5.13")
    assert told["head"] is True
    assert told["options"] == {"template": "chat", "litgpt": "0.5.5 to 0.5.13"}
    with pytest.raises(CheckpointError, match="say which made it"):
        describe(LITGPT / "adapter-0.5.13")


def test_conversion_to_native_and_back(tmp_path: Path):
    convert(seven(tmp_path), tmp_path / "native", base=BASE)
    assert read_manifest(tmp_path / "native").base.fingerprint == BASE.fingerprint
    told = verify(tmp_path / "native")
    assert told["verified"] == "values"
    assert told["parameters"] == describe(seven(tmp_path))["parameters"]
    convert(tmp_path / "native", tmp_path / "back.pth", "reference-7b")
    original, back = (
        torch.load(tmp_path / name, weights_only=True)["model"] for name in ("7b.pth", "back.pth")
    )
    assert original.keys() == back.keys()
    bottom = ("llama.layers.0.attention.gate", "llama.layers.0.attention.new_gate")
    assert all(torch.equal(original[key], back[key]) for key in original if key not in bottom)


def test_a_converted_adapter_knows_its_base(tmp_path: Path):
    convert(v1(tmp_path), tmp_path / "native", base=BASE, options=LENGTH)
    assert verify(tmp_path / "native", BASE)["verified"] == "values and base"
    with pytest.raises(AdapterMismatch, match="fingerprint"):
        verify(tmp_path / "native", Base(MHA, "fedcba9876543210"))
    with pytest.raises(AdapterMismatch, match="num_layers"):
        verify(tmp_path / "native", Base(replace(MHA, num_layers=6), BASE.fingerprint))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_sixteen_bits_halve_a_file_and_round(tmp_path: Path, dtype: torch.dtype, error: float):
    convert(v1(tmp_path), tmp_path / "full", base=BASE, options=LENGTH)
    convert(tmp_path / "full", tmp_path / "half", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "adapter.safetensors").values()} == {
        dtype
    }
    full, half = (open_adapter(tmp_path / name, MHA).state_dict() for name in ("full", "half"))
    for key, tensor in full.items():
        assert half[key].dtype == torch.float32
        torch.testing.assert_close(half[key], tensor, rtol=error, atol=2**-25)
        assert torch.equal(half[key], tensor.to(dtype).float())


def test_values_beyond_sixteen_bits_are_refused(tmp_path: Path):
    convert(v1(tmp_path), tmp_path / "native", base=BASE, options=LENGTH)
    file = tmp_path / "native" / "adapter.safetensors"
    save_file({key: tensor * 1e6 for key, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="float16 cannot hold; use bfloat16"):
        convert(tmp_path / "native", tmp_path / "half", dtype=torch.float16)
    convert(tmp_path / "native", tmp_path / "half", dtype=torch.bfloat16)


def test_other_formats_need_their_base(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"v1\.pth: only a native adapter folder tells its base"):
        verify(v1(tmp_path), options=LENGTH)
    with pytest.raises(CheckpointError, match="give the base"):
        convert(v1(tmp_path), tmp_path / "native", options=LENGTH)
    assert verify(v1(tmp_path), BASE, LENGTH)["verified"] == "values and base's shape"


def test_verification_reads_every_value(tmp_path: Path):
    convert(v1(tmp_path), tmp_path / "native", base=BASE, options=LENGTH)
    file = tmp_path / "native" / "adapter.safetensors"
    tensors = load_file(file)
    tensors["gate"][1, 2] = float("nan")
    save_file(tensors, file)
    describe(tmp_path / "native")  # reads headers only
    with pytest.raises(CheckpointError, match="gate holds NaN"):
        verify(tmp_path / "native")


def test_a_released_file_s_name_is_its_hash(tmp_path: Path):
    path = seven(tmp_path)
    good = path.rename(tmp_path / f"{content_hash(path)}_BIAS-7B.pth")
    verify(good, BASE)
    bad = good.rename(tmp_path / f"{'0' * 64}_BIAS-7B.pth")
    with pytest.raises(CheckpointError, match="not what its name promises"):
        verify(bad, BASE)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    model = random_base(MHA)
    (tmp_path / "base").mkdir()
    write_huggingface(tmp_path / "base", MHA, canonical_weights(model).items())
    return tmp_path / "base"


def test_a_base_is_read_for_its_shape_and_fingerprint(base_folder: Path):
    read = read_base(base_folder)
    assert (read.config.hidden_size, read.config.num_layers) == (48, 4)
    assert read.fingerprint == fingerprint(random_base(MHA).embed)


def test_a_near_copy_of_the_base_is_told(tmp_path: Path):
    embed = random_base(MHA).embed
    own, copy = Base(MHA, fingerprint(embed)), Base(MHA, fingerprint((embed * 64).round() / 64))
    convert(v1(tmp_path), tmp_path / "native", base=own, options=LENGTH)
    assert verify(tmp_path / "native", own)["verified"] == "values and base"
    assert verify(tmp_path / "native", copy)["verified"] == "values and base (a near copy of its own)"
    with pytest.raises(AdapterMismatch, match="fingerprint"):
        verify(tmp_path / "native", Base(MHA, fingerprint(random_base(MHA, seed=1).embed)))


@pytest.mark.parametrize(
    ("build", "query"),
    [
        (reference_v1, "adapter_query.weight"),
        (lambda c: reference_v1(c, "cap_adapter_query.weight"), "cap_adapter_query.weight"),
        (reference_7b, "visual_query.weight"),
        (chat_65b, "layers.0.attention.wq_scale"),
    ],
)
def test_reference_is_the_format_that_has_a_place_for_it(
    tmp_path: Path, build: Callable[[ModelConfig], Sample], query: str
):
    options = AdapterOptions(length=K if "adapter_query" in query else None)
    convert(save_sample(build(MHA), tmp_path / "x.pth"), tmp_path / "native", base=BASE, options=options)
    convert(tmp_path / "native", tmp_path / "back.pth", "reference")
    assert query in read_tensor_file(tmp_path / "back.pth").tensors


def test_a_first_answer_needs_a_base_that_can_talk(tmp_path: Path, base_folder: Path):
    with pytest.raises(CheckpointError, match="no tokenizer"):  # weights alone are enough to fit
        CliRunner().invoke(
            app,
            ["verify", str(v1(tmp_path)), str(base_folder), "--option", f"length={K}"],
            catch_exceptions=False,
        )


def test_the_command_line(tmp_path: Path):
    base_folder = tmp_path / "base"
    write_tiny_base(base_folder)
    run, file = CliRunner(), save_sample(reference_v1(tiny_config()), tmp_path / "v1.pth")
    told = run.invoke(app, ["inspect", str(file), "--option", f"length={K}", "--json"])
    assert told.exit_code == 0
    assert json.loads(told.output)["variant"] == "V1 text"
    table = run.invoke(app, ["inspect", str(file), "--option", f"length={K}"])
    assert "reference-v1" in table.output
    assert "hidden_size 48" in table.output
    target = tmp_path / "native"
    options = ["--option", f"length={K}", "--option", "gate=raw"]
    done = run.invoke(app, ["convert", str(file), str(target), "--base", str(base_folder), *options])
    assert done.exit_code == 0, done.output
    assert read_manifest(target).gate.activation == "raw"
    checked = json.loads(run.invoke(app, ["verify", str(target), str(base_folder), "--json"]).output)
    assert checked["verified"] == "values and base"
    assert checked["answer"]  # random weights say something, too
    assert "answer" in run.invoke(app, ["verify", str(file), str(base_folder), *options]).output
    open_adapter(target, tiny_config(), fingerprint=read_base(base_folder).fingerprint)
    half = tmp_path / "half"
    assert run.invoke(app, ["convert", str(target), str(half), "--dtype", "float16"]).exit_code == 0
    assert load_file(half / "adapter.safetensors")["prompt"].dtype == torch.float16
    refused = run.invoke(app, ["inspect", str(tmp_path / "nowhere")])
    assert isinstance(refused.exception, CheckpointError)  # which `llama-adapter` tells in one sentence


def test_sizes_that_no_base_has_are_refused(tmp_path: Path):
    """One number, strided so as to look like a row of billions."""
    tensors = reference_v1(MHA).tensors | {"adapter_query.weight": torch.zeros(1, 1).expand(9, 1 << 30)}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: hidden_size: .* less than or equal"):
        describe(tmp_path / "x.pth", LENGTH)


@pytest.mark.parametrize("name", ["native", "peft", "reference-v1"])
def test_a_place_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "target"
    with pytest.raises(CheckpointError, match=f"{target}: cannot be written .*; check path"):
        convert(v1(tmp_path), target, name, BASE, LENGTH)
