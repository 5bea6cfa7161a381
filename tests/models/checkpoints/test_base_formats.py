"""Every format of a base yields the weights that were written, and the configuration."""

import json
from dataclasses import replace
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
from gguf import GGMLQuantizationType
from support import CONFIGS, canonical_weights, random_base, transformers_twin
from torch import Tensor

from models.checkpoints.base import BaseCheckpoint, open_base
from models.checkpoints.gguf import NAMES as GGUF_NAMES
from models.checkpoints.huggingface import NAMES as HF_NAMES
from models.checkpoints.huggingface import read_config, write_huggingface
from models.checkpoints.layout import NameTable, expected_shapes, half_rotated, interleaved
from models.checkpoints.meta import NAMES as META_NAMES
from models.config import LinearRopeScaling, ModelConfig, RopeScaling


def same(checkpoint: BaseCheckpoint, weights: dict[str, Tensor]) -> bool:
    read = dict(checkpoint.tensors())
    assert read.keys() == weights.keys()
    return all(torch.equal(read[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("names", [HF_NAMES, META_NAMES, GGUF_NAMES], ids=["huggingface", "meta", "gguf"])
def test_names_convert_both_ways(names: NameTable) -> None:
    originals = [names.original(name) for name in expected_shapes(TINY)]
    assert [names.canonical(key) for key in originals] == list(expected_shapes(TINY))
    assert len(set(originals)) == len(originals)
    assert names.canonical(originals[0] + "x") is None
    assert names.canonical(names.original("layers.0.wq.weight").replace("0", "00")) is None


def test_expected_shapes_are_the_models(config: ModelConfig) -> None:
    weights = canonical_weights(random_base(config))
    assert expected_shapes(config) == {name: tuple(weight.shape) for name, weight in weights.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_folder_that_transformers_saved(tmp_path: Path, name: str, shard: str) -> None:
    base = random_base(CONFIGS[name])
    transformers_twin(base).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    checkpoint = open_base(tmp_path)
    assert checkpoint.format == "huggingface"
    assert checkpoint.config == base.config
    assert same(checkpoint, canonical_weights(base))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_with_their_known_extras(tmp_path: Path, sharded: bool) -> None:
    weights = random_weights()
    state = {HF_NAMES.original(name): weight for name, weight in weights.items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_huggingface(tmp_path, TINY, weights.items())
    (tmp_path / "model.safetensors").unlink()
    if sharded:
        keys = list(state)
        files = {key: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, key in enumerate(keys)}
        for file in set(files.values()):
            torch.save({key: state[key] for key in keys if files[key] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert same(open_base(tmp_path), weights)


def test_bin_of_the_container_before_zip(tmp_path: Path) -> None:
    weights = random_weights()
    write_huggingface(tmp_path, TINY, weights.items())
    (tmp_path / "model.safetensors").unlink()
    state = {HF_NAMES.original(name): weight for name, weight in weights.items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(open_base(tmp_path), weights)


def test_a_tied_base_may_bring_its_head_again(tmp_path: Path) -> None:
    weights = random_weights()
    write_huggingface(tmp_path, replace(TINY, tie_word_embeddings=True), weights.items())
    checkpoint = open_base(tmp_path)
    del weights["lm_head.weight"]
    assert same(checkpoint, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_come_in_the_files_type(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: weight.to(dtype) for name, weight in random_weights().items()}
    write_huggingface(tmp_path, TINY, weights.items())
    assert same(open_base(tmp_path), weights)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_meta_shards(tmp_path: Path, shards: int) -> None:
    config = replace(TINY, num_kv_heads=4)
    weights = random_weights(config)
    write_meta(tmp_path, weights, config, shards, max_position_embeddings=128)
    checkpoint = open_base(tmp_path)
    assert checkpoint.format == "meta"
    assert checkpoint.config == config
    assert same(checkpoint, weights)


def test_meta_embedding_split_by_rows_as_llama3_has_it(tmp_path: Path) -> None:
    weights = random_weights()
    write_meta(tmp_path, weights, TINY, shards=2)
    for index, rows in enumerate(weights["embed.weight"].chunk(2)):
        file = tmp_path / f"consolidated.{index:02d}.pth"
        torch.save(torch.load(file, weights_only=True) | {"tok_embeddings.weight": rows.clone()}, file)
    assert same(open_base(tmp_path), weights)


def test_meta_scaled_rope(tmp_path: Path) -> None:
    params = {"use_scaled_rope": True, "rope_scaling_factor": 32, "rope_theta": 500000.0}
    write_meta(tmp_path, random_weights(), TINY, **params)
    config = open_base(tmp_path).config
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.max_position_embeddings) == (500000.0, 131072)


KINDS = GGMLQuantizationType


@pytest.mark.parametrize(
    "kind",
    [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q5_0, KINDS.Q5_1, KINDS.Q4_0, KINDS.Q4_1],
)
def test_gguf(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    weights = random_weights()
    write_gguf(tmp_path / "tiny.gguf", weights, TINY, kind)
    for path in (tmp_path, tmp_path / "tiny.gguf"):
        checkpoint = open_base(path)
        assert checkpoint.format == "gguf"
        assert checkpoint.config == TINY
    read = dict(checkpoint.tensors())
    assert read.keys() == weights.keys()
    # Half a step of the quantisation: 4 bits hold 16 values between a block's extremes, some 7 apart.
    tolerance = {KINDS.F32: 0, KINDS.F16: 2e-3, KINDS.BF16: 2e-2, KINDS.Q8_0: 2e-2}.get(kind, 0.45)
    for name, weight in weights.items():
        assert torch.allclose(read[name].float(), weight, rtol=0, atol=tolerance), name


_HALF, _NO_MINIMUM = np.float16(0.5).tobytes(), np.float16(0).tobytes()  # d and dmin of a block
_SCALES = bytes([1] * 4 + [0] * 4 + [1] * 4)  # of Q4_K and Q5_K: scales of 1 and minima of 0 in 6 bits each
_UPWARDS = bytes([0b11100100] * 64)  # of Q2_K and Q3_K: 32 times 0, 1, 2 and 3, and again
# Kind → a block of 256 weights, and what they are.
K_BLOCKS: dict[GGMLQuantizationType, tuple[bytes, list[float]]] = {
    # Scales of 1 and minima of 0, four bits each.
    KINDS.Q2_K: (
        bytes([1] * 16) + _UPWARDS + _HALF + _NO_MINIMUM,
        [step / 2 for step in range(4) for _ in range(32)] * 2,
    ),
    # High bits set, so that nothing is subtracted; scales of 33 - 32 in 4 and 2 bits.
    KINDS.Q3_K: (
        bytes([0xFF] * 32) + _UPWARDS + bytes([0x11] * 8 + [0b10101010] * 4) + _HALF,
        [step / 2 for step in range(4) for _ in range(32)] * 2,
    ),
    KINDS.Q4_K: (_HALF + _NO_MINIMUM + _SCALES + bytes([0x53] * 128), ([1.5] * 32 + [2.5] * 32) * 4),
    # The same with all fifth bits set: 16 steps more.
    KINDS.Q5_K: (
        _HALF + _NO_MINIMUM + _SCALES + bytes([0xFF] * 32) + bytes([0x53] * 128),
        ([9.5] * 32 + [10.5] * 32) * 4,
    ),
    # 128 + 64 bytes of low and high bits, 16 scales of 1: (0 - 32) / 2.
    KINDS.Q6_K: (bytes(192) + bytes([1] * 16) + _HALF, [-16.0] * 256),
}


@pytest.mark.parametrize("kind", K_BLOCKS)
def test_gguf_k_quants(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    config = replace(TINY, hidden_size=256, intermediate_size=256, head_dim=64, num_kv_heads=4)
    weights = random_weights(config)
    block, row = K_BLOCKS[kind]
    matrix = np.frombuffer(block * 256, dtype=np.uint8).reshape(256, -1).copy()
    writer = gguf_writer(tmp_path / "k.gguf", config)
    replaced = ("layers.0.wv.weight", "layers.1.w2.weight")
    add_gguf_weights(writer, {n: w for n, w in weights.items() if n not in replaced}, config)
    for name in replaced:
        writer.add_tensor(GGUF_NAMES.original(name), matrix, raw_dtype=kind)
    close_gguf(writer)
    read = dict(open_base(tmp_path).tensors())
    for name in replaced:
        assert torch.equal(read[name], torch.tensor([row] * 256))


def test_gguf_without_output_is_tied(tmp_path: Path) -> None:
    config = replace(TINY, tie_word_embeddings=True)
    weights = random_weights(config)
    write_gguf(tmp_path / "tied.gguf", weights, config)
    checkpoint = open_base(tmp_path)
    assert checkpoint.config == config
    assert same(checkpoint, weights)


def test_gguf_llama3_factors_become_rope_scaling(tmp_path: Path) -> None:
    """The factors of Llama 3.1, from their definition by wavelength."""
    config = replace(TINY, rope_theta=500000.0)
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / config.head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    writer = gguf_writer(tmp_path / "llama3.gguf", config)
    add_gguf_weights(writer, random_weights(config), config)
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    close_gguf(writer)
    assert open_base(tmp_path).config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_interleaving_there_and_back() -> None:
    weight = random_weights()["layers.0.wq.weight"]
    changed = interleaved(weight, TINY.num_heads)
    assert torch.equal(changed, to_interleaved("layers.0.wq.weight", weight, TINY))
    assert not torch.equal(changed, weight)
    assert torch.equal(half_rotated(changed, TINY.num_heads), weight)


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = random_base(CONFIGS["gqa"])
    write_huggingface(tmp_path, base.config, canonical_weights(base).items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, transformers_twin(base)(tokens).logits)


def test_gguf_reads_the_same_from_transformers(tmp_path: Path) -> None:
    """transformers' own GGUF reader undoes the same permutation."""
    from transformers import AutoModelForCausalLM

    weights = random_weights()
    writer = gguf_writer(tmp_path / "tiny.gguf", TINY)
    writer.add_vocab_size(TINY.vocab_size)
    add_gguf_weights(writer, weights, TINY)
    close_gguf(writer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").state_dict()
    for name, tensor in open_base(tmp_path).tensors():
        assert torch.equal(tensor, theirs[HF_NAMES.original(name)]), name


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MINIMAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            {"rope_theta": 1e4, "num_kv_heads": 32, "head_dim": 128},
        ),
        (
            {"model_type": "llama", "head_dim": 64, "num_key_value_heads": 8},
            {"head_dim": 64, "num_kv_heads": 8},
        ),
        (
            {
                "model_type": "llama",
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE},
            },
            {"rope_theta": 5e5, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)},
        ),
        (
            {"model_type": "llama", "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}},
            {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)},
        ),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE},
            },
            {"rope_theta": 5e5, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)},
        ),
        (  # Vicuna 1.5 of 16k tokens
            {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rope_scaling": {"factor": 4.0, "type": "linear"},
            },
            {"rope_scaling": LinearRopeScaling(4.0), "max_position_embeddings": 16384},
        ),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
            {"rope_theta": 1e5, "rope_scaling": None},
        ),
        ({"model_type": "llama", "rope_scaling": None, "rope_theta": 1e6}, {"rope_theta": 1e6}),
    ],
)
def test_config_json_of_every_generation(tmp_path: Path, values: dict, expected: dict) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(MINIMAL | {"architectures": ["LlamaForCausalLM"]} | values)
    )
    config = read_config(tmp_path / "config.json")
    assert {name: getattr(config, name) for name in expected} == expected
