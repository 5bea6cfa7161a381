"""Adapter files are untrusted: every defect is a typed error that names the file, and nothing runs."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import K, chat_65b, reference_7b, reference_v1
from enlarging_pickles import ENLARGING, SHARING, nested, write_pickle
from support import MHA
from torch import Tensor

from models.checkpoints.adapter_table import AdapterOptions
from models.checkpoints.adapters import open_adapter
from models.checkpoints.inspect import describe
from models.checkpoints.torch_files import load_pickle
from models.errors import CheckpointError

LENGTH = AdapterOptions(length=K)
PROMPT = "adapter_query.weight"
GATE = "layers.1.attention.gate"


def tensors() -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in reference_v1(MHA).tensors.items()}


def saved(value: object, path: Path) -> Path:
    torch.save(value, path)
    return path


def refuse(path: Path, match: str, options: AdapterOptions = LENGTH) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_adapter(path, MHA, options)
    assert str(path) in str(caught.value)


class Payload:
    """Unpickling this makes a folder: proof that code ran."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._place),)


@pytest.mark.parametrize("where", ["beside", "inside", "args"])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path, where: str):
    proof = tmp_path / "ran"
    payload = Payload(proof)
    value = {
        "beside": {"model": tensors(), "extra": payload},
        "inside": {**tensors(), "evil": payload},
        "args": {"model": tensors(), "args": payload},
    }[where]
    path = saved(value, tmp_path / "x.pth")
    refuse(path, "could run code")
    assert not proof.exists()
    torch.load(saved({"extra": payload}, tmp_path / "alone.pth"), weights_only=False)
    assert proof.exists()  # the payload was a live one


def test_a_bare_pickle_is_no_adapter(tmp_path: Path):
    path, proof = tmp_path / "x.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"model": Payload(proof)}))
    refuse(path, "not a file of torch.save")
    assert not proof.exists()


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, 0.999])
def test_a_truncated_pth_is_refused(tmp_path: Path, keep: float):
    path = saved(tensors(), tmp_path / "x.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep == 10 else int(len(whole) * keep)])
    refuse(path, "truncated")


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.99])
def test_a_truncated_safetensors_is_refused(tmp_path: Path, keep: float):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep == 4 else int(len(whole) * keep)])
    refuse(path, "truncated")


def test_bytes_flipped_anywhere_never_give_another_error(tmp_path: Path):
    """Damage is either refused or hits a value; it never escapes as a foreign exception."""
    path = saved(tensors(), tmp_path / "x.pth")
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for position in torch.randint(0, len(whole), (300,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            open_adapter(path, MHA, LENGTH)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 0


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path):
    path = saved(tensors(), tmp_path / "x.pth")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
        bad.writestr("archive/data/99", bytes(50_000_000))
    assert bomb.stat().st_size < 100_000
    refuse(bomb, "would unpack to more than the file holds")


def test_overlapping_records_are_refused(tmp_path: Path):
    """Many directory entries of one record: each is honest, their sum is not."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(10_000))
        first = archive.infolist()[0]
        for number in range(1, 50):
            again = zipfile.ZipInfo(f"archive/data/{number}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(again, field, getattr(first, field))
            archive.filelist.append(again)
    refuse(path, "would unpack to more")


def test_a_small_storage_cannot_pose_as_a_large_tensor(tmp_path: Path):
    """Zero strides make any shape of one number; laid out it would fill the memory."""
    value = tensors() | {PROMPT: torch.zeros(1, 1).expand(300_000_000, MHA.hidden_size)}
    refuse(saved(value, tmp_path / "x.pth"), "declares .* bytes of tensors in a file of|rows")
    sample = reference_7b(MHA)
    sample.tensors["clip_proj.weight"] = torch.zeros(1, 1).expand(32, 16_000_000)
    path = saved({"model": sample.tensors}, tmp_path / "y.pth")
    refuse(path, "declares .* bytes of tensors in a file of", AdapterOptions())


def test_a_storage_that_claims_more_than_its_record_is_refused(tmp_path: Path):
    """The pickle's own element count is not believed: reading past the record would leak memory."""
    count = 1000
    path = saved({**tensors(), GATE: torch.zeros(count)}, tmp_path / "x.pth")
    lying = tmp_path / "lying.pth"
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(lying, "w", zipfile.ZIP_STORED) as bad:
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("data.pkl"):
                honest, lie = (b"M" + n.to_bytes(2, "little") for n in (count, 65000))
                assert honest in data
                data = data.replace(honest, lie)
            bad.writestr(name, data)
    refuse(lying, "damaged or truncated")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        (PROMPT, torch.zeros(9, 48, dtype=torch.int64), r"adapter_query\.weight is torch\.int64"),
        (PROMPT, torch.zeros(9, 48, dtype=torch.complex64), "complex64"),
        (PROMPT, torch.full((9, 48), float("nan")), r"adapter_query\.weight holds NaN"),
        (GATE, torch.full((1, 6, 1, 1), float("inf")), r"layers\.1\.attention\.gate holds NaN or inf"),
        (GATE, torch.zeros(1, 1, 6, 1), r"gate has shape \[1, 1, 6, 1\], expected \[1, 6, 1, 1\]"),
        (PROMPT, torch.zeros(9, 4, 12), "has shape .* not 2 axes"),
        (PROMPT, torch.zeros(0, 48), "has shape .* at least 1"),
        (PROMPT, torch.zeros(9, 48).to_sparse(), r"calls .*_rebuild_sparse_tensor.*dense tensors"),
        (PROMPT, torch.zeros(9, 48, device="meta"), r"calls .*_rebuild_meta_tensor.*dense tensors"),
        (PROMPT, [1.0, 2.0], "is a list, not a tensor"),
        (7, torch.zeros(1), "7 is a Tensor"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, key: str, value: object, match: str):
    refuse(saved({**tensors(), key: value}, tmp_path / "x.pth"), match)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_named(tmp_path: Path):
    nested = torch.nested.nested_tensor([torch.zeros(9, 48)])
    refuse(saved({**tensors(), PROMPT: nested}, tmp_path / "x.pth"), r"calls .*_rebuild_nested_tensor.*dense")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([1, 2], "holds a list"),
        ({"model": 3}, "model is a int"),
        ({"model": {"a": torch.zeros(1)}, "config": [1]}, "config is a list"),
        ({"state_dict": torch.zeros(1)}, "no adapter of a known format"),
        ({}, "no adapter of a known format"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}, "LoRA"),
    ],
)
def test_other_files_are_told_from_adapters(tmp_path: Path, value: object, match: str):
    path = saved(value, tmp_path / "x.pth")
    refuse(path, match, AdapterOptions())
    with pytest.raises(CheckpointError, match=match):
        describe(path)


def test_two_adapters_in_one_file_are_ambiguous(tmp_path: Path):
    value = {**tensors(), "cap_adapter_query.weight": torch.zeros(9, 48)}
    refuse(saved(value, tmp_path / "x.pth"), r"several kinds \(reference-v1, reference-v1-caption\)")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_not_there_is_said_so(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / name, "there is no such file" if name == "nowhere" else "holds no adapter")


def test_layer_numbers_are_plain_and_bounded(tmp_path: Path):
    """A number like 007, -1 or a million is no layer; such keys are unexpected, not counted."""
    for odd in ("007", "-1", "1000000", "²"):
        path = saved(
            {**tensors(), f"layers.{odd}.attention.gate": torch.zeros(1, 6, 1, 1)}, tmp_path / "x.pth"
        )
        refuse(path, "unexpected")


@pytest.mark.parametrize("length", [0, -3, "3", 2000])
def test_a_hostile_prompt_length_in_args_is_refused(tmp_path: Path, length: object):
    value = {"model": tensors(), "args": argparse.Namespace(adapter_len=length)}
    refuse(saved(value, tmp_path / "x.pth"), r"args\.adapter_len", AdapterOptions())


@pytest.mark.parametrize("count", [1, 2])
def test_a_tensor_where_a_word_belongs_is_named(tmp_path: Path, count: int):
    """Two numbers are neither true nor false, which Python says with a traceback."""
    odd = torch.zeros(count)
    path = saved({"model": tensors(), "config": odd}, tmp_path / "x.pth")
    refuse(path, "config is a Tensor, not a dict")
    path = saved({"model": tensors(), "args": argparse.Namespace(adapter_len=odd)}, tmp_path / "x.pth")
    refuse(path, r"args\.adapter_len is tensor", AdapterOptions())
    prompts = {
        f"base_model.model.model.layers.{i}.self_attn.adaption_{name}": torch.zeros(shape)
        for i in range(1, MHA.num_layers)
        for name, shape in (("prompt", (1, K, MHA.hidden_size)), ("gate", (1,)))
    }
    for wrong in ({"peft_type": odd}, {"peft_type": "ADAPTION_PROMPT", "adapter_len": odd}):
        path = saved({"model": prompts, "config": wrong}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=f"{list(wrong)[-1]} is tensor"):
            open_adapter(path, MHA)
    stated = {"w_bias": odd, "w_lora": odd}  # as good as not said: the tensors tell
    path = saved({"model": reference_7b(MHA).tensors, "config": stated}, tmp_path / "x.pth")
    assert open_adapter(path, MHA).config == reference_7b(MHA).config


def test_options_of_other_formats_are_refused(tmp_path: Path):
    path = saved({"model": chat_65b(MHA).tensors}, tmp_path / "x.pth")
    for options in (AdapterOptions(gate="raw"), AdapterOptions(color="rgb"), LENGTH):
        refuse(path, "does not apply to chat-65b adapters", options)


@pytest.mark.parametrize("name", ENLARGING)
def test_a_pickle_that_makes_much_of_little_is_refused(tmp_path: Path, name: str):
    """Calls that `weights_only` allows: a hundred bytes can ask for all memory there is."""
    path = saved({"model": tensors(), "extra": ENLARGING[name]}, tmp_path / "x.pth")
    assert path.stat().st_size < 100_000
    assert len(torch.load(path, weights_only=True)["extra"]) > 8_000_000
    refuse(path, rf"it calls [\w.]+\.{name}, which no tensor needs")


@pytest.mark.parametrize("name", SHARING)
def test_a_pickle_that_shares_what_no_tensors_do_is_refused(tmp_path: Path, name: str):
    """Printing, hashing or freeing such values takes all memory, or the whole stack, within torch itself."""
    stream, match = SHARING[name]
    refuse(write_pickle(tmp_path / "x.pth", stream), rf"x\.pth: refused; it {match}")


def test_what_a_key_holds_many_times_is_not_written_out(tmp_path: Path):
    path = saved({**tensors(), nested(8, tuple): torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="is a Tensor, not a tensor") as caught:
        open_adapter(path, MHA, LENGTH)
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize("times", [8, 20])
def test_nor_is_a_prompt_length_that_does(tmp_path: Path, times: int):
    value = {"model": tensors(), "args": argparse.Namespace(adapter_len=nested(times))}
    path = saved(value, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"args\.adapter_len" if times == 8 else "so often") as caught:
        open_adapter(path, MHA)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_what_files_of_tensors_do_share_is_read(tmp_path: Path):
    """State of modules and optimizers, tied tensors, views, one tuple for all groups, types and sizes."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(40)))
    optimizer = torch.optim.AdamW([{"params": [part]} for part in model.parameters()], betas=(0.9, 0.95))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    views = torch.arange(500.0)
    value = {
        "model": model.state_dict() | {"tied": model[0].weight, "again": model[0].weight},
        "views": {f"layers.{i}.attention.gate": views[i : i + 1] for i in range(500)},
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(dtype=torch.bfloat16, shape=torch.Size([2, 3]), betas=(0.9, 0.95)),
    }
    for new in (True, False):
        torch.save(value, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        again = load_pickle(tmp_path / "x.pth", legacy=True)
        assert str(again) == str(value)


def test_what_one_reader_of_zips_sees_another_does_not(tmp_path: Path):
    """Two directories: Python's reader takes the one before the end record, torch's the one it points to."""
    path = saved({"model": tensors(), "extra": "x" * 5_000_000}, tmp_path / "x.pth")
    hidden = tmp_path / "hidden.pth"
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(hidden, "w") as bad:
        for name in good.namelist():
            packed = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
            bad.writestr(name, good.read(name), packed)
    whole = hidden.read_bytes()
    end = whole[-22:]
    length, start = struct.unpack("<II", end[12:20])
    shown, at = bytearray(whole[start : start + length]), 0
    while at < length:  # as if all were stored
        shown[at + 10 : at + 12] = bytes(2)
        shown[at + 24 : at + 28] = shown[at + 20 : at + 24]
        at += 46 + sum(struct.unpack("<HHH", shown[at + 28 : at + 34]))
    hidden.write_bytes(whole[:-22] + shown + end)
    assert hidden.stat().st_size < 100_000
    assert len(torch.load(hidden, weights_only=True)["extra"]) == 5_000_000
    refuse(hidden, "its zip directory is not where torch.save puts it")


def test_what_the_system_refuses_is_said_in_a_sentence(tmp_path: Path):
    path = tmp_path / ("x" * 300)
    for look in (lambda: open_adapter(path, MHA), lambda: describe(path)):
        with pytest.raises(CheckpointError, match=r"cannot be read .*too long.*; check path"):
            look()
