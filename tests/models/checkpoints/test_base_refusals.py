"""Damaged, hostile and foreign files are refused with a sentence that names file, key and remedy."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from base_files import (
    TINY,
    add_gguf_weights,
    close_gguf,
    gguf_writer,
    random_weights,
    to_interleaved,
    write_gguf,
    write_meta,
)
from enlarging_pickles import ENLARGING, nested
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoints.base import open_base
from models.checkpoints.huggingface import write_huggingface
from models.errors import CheckpointError

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound Hugging Face folder."""
    write_huggingface(tmp_path, TINY, random_weights().items())
    return tmp_path


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, change: Change) -> None:
    weights = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refuse(path: Path, *parts: str) -> None:
    """Opening or reading raises, and the message holds every part."""
    with pytest.raises(CheckpointError) as caught:
        list(open_base(path).tensors())
    for part in (path.name, *parts):
        assert part in str(caught.value)


def test_the_sound_folder_is_accepted(folder: Path) -> None:
    assert len(list(open_base(folder).tensors())) == 21


def test_no_such_path(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "no such file", "give the path")


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    refuse(tmp_path, "config.json", "params.json", ".gguf")
    refuse(tmp_path / "readme.txt", "not a base model")


QUERY = "model.layers.1.self_attn.q_proj.weight"


def test_missing_key(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(QUERY))
    refuse(folder, QUERY, "missing", "fetch")


def test_many_missing_keys_are_counted(folder: Path) -> None:
    change_weights(folder, lambda weights: [weights.pop(key) for key in list(weights) if "mlp" in key])
    refuse(folder, "mlp", "and 5 more")


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj.bias", "transformer.h.0.weight"])
def test_unexpected_key(folder: Path, key: str) -> None:
    change_weights(folder, lambda weights: weights.update({key: torch.ones(64)}))
    refuse(folder, key, "unexpected", "unmodified LLaMA")


def test_more_layers_than_the_configuration_says(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    refuse(folder, "model.layers.1.", "1 layers", "belongs to these weights")


def test_wrong_shape(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({QUERY: torch.ones(64, 65)}))
    refuse(folder, QUERY, "[64, 65]", "[64, 64]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights[QUERY] = weights[QUERY].to(dtype)
        weights[QUERY][3, 5] = value

    change_weights(folder, damage)
    refuse(folder, QUERY, "NaN or infinity")


def test_integers(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({QUERY: torch.ones(64, 64, dtype=torch.int8)}))
    refuse(folder, QUERY, "int8", "unquantised")


@pytest.mark.parametrize("stored", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ"])
def test_floats_of_less_than_sixteen_bits(folder: Path, stored: str) -> None:
    """Some of them torch has no type for."""
    bits = int(stored[1])
    change_weights(folder, lambda weights: weights.update({QUERY: torch.ones(512 * bits, dtype=torch.uint8)}))
    file = folder / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header[QUERY] |= {"dtype": stored, "shape": [64, 64]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    refuse(folder, QUERY)


@pytest.mark.parametrize("size", [0, 7, 100, -1000])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    refuse(folder, "model.safetensors", "truncated", "fetch it again")


def test_weights_missing_altogether(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "holds no weights")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3_scaling_is_accepted(folder: Path) -> None:
    change_config(folder, rope_scaling=LLAMA3)
    assert open_base(folder).config.rope_scaling is not None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, ["Mistral", "only LLaMA"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "GGUF"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "dynamic"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "linear needs factor"]),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, ["factor < inf"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rope_scaling", "factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ["low < high"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": float("inf")}}, ["low < high"]),
        ({"rope_scaling": LLAMA3 | {"factor": float("inf")}}, ["factor < inf"]),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}},
            ["original_max_position_embeddings"],
        ),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps inf"]),
        ({"rope_theta": "many"}, ["rope_theta"]),
        ({"rope_theta": -1}, ["rope_theta"]),
        ({"rope_theta": 1e-300}, ["rope_theta 1e-300"]),
        ({"max_position_embeddings": 10**30}, ["max_position_embeddings", "over 16777216"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads 3"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
        ({"head_dim": 15}, ["head_dim 15"]),
        ({"vocab_size": 41}, ["model.embed_tokens.weight", "[41, 64]"]),
    ],
)
def test_config_json(folder: Path, values: dict[str, object], words: list[str]) -> None:
    change_config(folder, **values)
    refuse(folder, *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refuse(folder, "config.json", "fetch it again")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, ["weight_map"]),
        ({"weight_map": []}, ["weight_map"]),
        ({"weight_map": {"a": "../model.safetensors"}}, ["../model.safetensors", "no .safetensors file"]),
        ({"weight_map": {"a": "/etc/passwd"}}, ["/etc/passwd"]),
        ({"weight_map": {"a": "weights.bin"}}, ["weights.bin"]),
        ({"weight_map": {"a": 3}}, ["3"]),
        ({"weight_map": {"a": "gone.safetensors"}}, ["gone.safetensors", "missing"]),
    ],
)
def test_index(folder: Path, index: object, words: list[str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, *words)


def test_a_key_in_two_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({QUERY: torch.ones(64, 64)}, folder / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", QUERY: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, QUERY, "a.safetensors", "b.safetensors")


class Malicious:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_not_run(folder: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    mark = folder / "was here"
    torch.save({"w": Malicious(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refuse(folder, "pytorch_model.bin", "could run code", "safetensors")
    assert not mark.exists()


def test_zip_bomb_is_refused_before_it_is_unpacked(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    refuse(folder, "pytorch_model.bin", "archive/data/0 would unpack to more than the file holds")


@pytest.mark.parametrize("value", [[1], {"a": 1}, {1: torch.ones(1)}])
def test_pickle_of_something_else(folder: Path, value: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    refuse(folder, "pytorch_model.bin", "not")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "change",
    [Tensor.to_sparse, lambda w: w.to("meta"), lambda w: torch.nested.nested_tensor([w])],
    ids=["sparse", "meta", "nested"],
)
def test_tensors_of_a_pickle_that_are_not_dense(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    write_meta(tmp_path, random_weights(), TINY)
    file, key = tmp_path / "consolidated.00.pth", "tok_embeddings.weight"
    state = torch.load(file, weights_only=True)
    torch.save(state | {key: change(state[key])}, file)
    refuse(tmp_path, "consolidated.00.pth", "calls torch._utils._rebuild_", "dense")


@pytest.mark.parametrize("size", [0, 10, 2000, -1000])
def test_truncated_meta_shard(tmp_path: Path, size: int) -> None:
    write_meta(tmp_path, random_weights(), TINY, shards=2)
    file = tmp_path / "consolidated.01.pth"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    refuse(tmp_path, "consolidated.01.pth")


def test_missing_meta_shards(tmp_path: Path) -> None:
    write_meta(tmp_path, random_weights(), TINY, shards=2)
    (tmp_path / "consolidated.00.pth").unlink()
    refuse(tmp_path, "consolidated.00.pth is missing")
    (tmp_path / "consolidated.01.pth").unlink()
    refuse(tmp_path, "consolidated")


def test_last_meta_shard_missing_is_seen_in_the_shapes(tmp_path: Path) -> None:
    write_meta(tmp_path, random_weights(), TINY, shards=2)
    (tmp_path / "consolidated.01.pth").unlink()
    refuse(tmp_path, "has shape", "the configuration says")


def test_meta_shards_of_two_models(tmp_path: Path) -> None:
    write_meta(tmp_path, random_weights(), TINY, shards=2)
    file = tmp_path / "consolidated.01.pth"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"layers.0.attention.wq.weight": torch.ones(31, 64)}, file)
    refuse(tmp_path, "layers.0.attention.wq.weight", "other shapes")
    del state["layers.0.attention.wv.weight"]
    torch.save(state, file)
    refuse(tmp_path, "layers.0.attention.wv.weight", "not in every shard")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dim": "wide"}, ["params.json", "dim"]),
        ({"n_heads": 5}, ["multiple of n_heads"]),
        ({"n_layers": 10**8}, ["n_layers"]),
        ({"use_scaled_rope": True}, ["rope_scaling_factor", "8 for Llama 3.1"]),
        ({"n_kv_heads": 3}, ["num_kv_heads 3"]),
        ({"norm_eps": float("inf")}, ["rms_norm_eps inf"]),
        ({"max_position_embeddings": 10**30}, ["max_position_embeddings", "over 16777216"]),
        (
            {"use_scaled_rope": True, "rope_scaling_factor": 8, "high_freq_factor": 1},
            ["high_freq_factor=1.0", "low < high"],
        ),
    ],
)
def test_params_json(tmp_path: Path, params: dict[str, object], words: list[str]) -> None:
    write_meta(tmp_path, random_weights(), TINY, **params)
    refuse(tmp_path, *words)


@pytest.mark.parametrize("size", [0, 3, 20, 300, 1500, -500])
def test_truncated_gguf(tmp_path: Path, size: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, random_weights())
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    refuse(file, "fetch it again")


def test_two_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, random_weights())
    refuse(tmp_path, "a.gguf", "b.gguf", "one of them")


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf_writer(tmp_path / "q.gguf", TINY, architecture="qwen2")
    add_gguf_weights(writer, random_weights(), TINY)
    close_gguf(writer)
    refuse(tmp_path / "q.gguf", "qwen2", "only llama")


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda w: w.add_expert_count(8), ["mixture of experts"]),
        (lambda w: w.add_uint16("split.count", 3), ["one part of several"]),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), ["yarn"]),
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 3.0, np.float32)), ["rope_freqs.weight"]),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), ["blk.0.attn_q.bias"]),
        (lambda w: w.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32)), ["[8, 8]"]),
        (lambda w: w.add_tensor("blk.0.attn_q.weight", np.full((64, 64), np.nan, np.float32)), ["NaN"]),
    ],
)
def test_gguf_contents(tmp_path: Path, add: Callable[..., object], words: list[str]) -> None:
    file = tmp_path / "x.gguf"
    writer = gguf_writer(file, TINY)
    add(writer)
    added = {name for tensors in writer.tensors for name in tensors}
    weights = random_weights()
    if "blk.0.attn_q.weight" in added:
        del weights["layers.0.wq.weight"]
    add_gguf_weights(writer, weights, TINY)
    close_gguf(writer)
    refuse(file, *words)


def test_gguf_type_without_dequantisation(tmp_path: Path) -> None:
    file = tmp_path / "int.gguf"
    weights = random_weights()
    writer = gguf_writer(file, TINY)
    add_gguf_weights(writer, {n: w for n, w in weights.items() if n != "layers.0.wq.weight"}, TINY)
    integers = to_interleaved("wv.weight", weights["layers.0.wq.weight"], TINY).to(torch.int32).numpy()
    writer.add_tensor("blk.0.attn_q.weight", integers, raw_dtype=GGMLQuantizationType.I32)
    close_gguf(writer)
    refuse(file, "blk.0.attn_q.weight", "I32", "Q8_0")


def test_gguf_metadata_missing(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    writer = gguf_writer(file, TINY)
    del writer.kv_data[0]["llama.attention.head_count"]
    add_gguf_weights(writer, random_weights(), TINY)
    close_gguf(writer)
    refuse(file, "llama.attention.head_count", "required")


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_damaged_headers_end_in_our_error(tmp_path: Path, kind: str) -> None:
    """Any byte of the headers changed: the file is still sound, or refused; nothing else is raised."""
    if kind == "gguf":
        write_gguf(tmp_path / "tiny.gguf", random_weights())
        file, path = tmp_path / "tiny.gguf", tmp_path / "tiny.gguf"
    else:
        write_huggingface(tmp_path, TINY, random_weights().items())
        file, path = tmp_path / "model.safetensors", tmp_path
    sound = file.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(sound)
        damaged[generator.integers(0, 2200)] = generator.integers(0, 256)
        file.write_bytes(damaged)
        try:
            list(open_base(path).tensors())
        except CheckpointError as error:
            refused += str(path) in str(error)
    assert refused > 75


@pytest.mark.parametrize("lie", ["a long array", "arrays in arrays"])
def test_gguf_metadata_that_claims_more_than_the_file_holds(tmp_path: Path, lie: str) -> None:
    """Without a look at the file's size an array's length is how long reading it takes."""
    array, uint8 = (9).to_bytes(4, "little"), (0).to_bytes(4, "little")
    value = uint8 + (1 << 60).to_bytes(8, "little")
    if lie == "arrays in arrays":
        value = (array + (1).to_bytes(8, "little")) * 3000 + value
    key = b"general.x"
    file = tmp_path / "x.gguf"
    file.write_bytes(
        b"GGUF"
        + (3).to_bytes(4, "little")
        + (0).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + len(key).to_bytes(8, "little")
        + key
        + array
        + value
    )
    refuse(file, "damaged, truncated or no GGUF file", "fetch it again")


@pytest.mark.parametrize("name", ENLARGING)
def test_a_pickle_that_makes_much_of_little(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"w": ENLARGING[name]}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refuse(folder, "pytorch_model.bin", f".{name}, which no tensor needs")


def test_a_key_that_is_short_in_the_file_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({nested(8, tuple): torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a Tensor, not a tensor") as caught:
        list(open_base(folder).tensors())
    assert len(str(caught.value)) < len(str(folder)) + 300


def test_what_the_system_refuses(tmp_path: Path) -> None:
    refuse(tmp_path / ("x" * 300), "cannot be read", "too long")
