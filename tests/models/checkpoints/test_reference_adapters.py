"""Files of the reference code: read from the very keys, they mean what the oracle computes from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import K, Sample, base_weights, chat_65b, reference_7b, reference_v1, save_sample
from oracle import Oracle
from support import MHA, canonical_weights, random_base
from torch import Tensor

from models.adaptation import OneAdapter
from models.adapter import Adapter, base_spec
from models.attention import DenseAttend
from models.checkpoints.adapter_table import AdapterOptions
from models.checkpoints.adapters import export_adapter, open_adapter
from models.checkpoints.inspect import describe
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError
from models.llama import Llama

TOKENS = [5, 17, 3, 88, 42, 9]
CAPTION = "cap_adapter_query.weight"
RELEASED = "llama_adapter_len10_layer30_release.pth"
LENGTH = AdapterOptions(length=K)

SAMPLES: dict[str, tuple[str, Callable[[ModelConfig], Sample], str, AdapterOptions]] = {
    "V1": ("reference-v1", reference_v1, "adapter.pth", LENGTH),
    "V1, released": ("reference-v1", lambda c: reference_v1(c, activation="raw"), RELEASED, LENGTH),
    "V1, said to be raw": (
        "reference-v1",
        lambda c: reference_v1(c, activation="raw"),
        "adapter.pth",
        replace(LENGTH, gate="raw"),
    ),
    "V1 caption": ("reference-v1-caption", lambda c: reference_v1(c, CAPTION), "caption.pth", LENGTH),
    "BIAS-7B": ("reference-7b", reference_7b, "7fa55208_BIAS-7B.pth", AdapterOptions()),
    "LORA-BIAS-7B": ("reference-7b", lambda c: reference_7b(c, lora=2), "v21.pth", AdapterOptions()),
    "CAPTION-7B": ("reference-7b", lambda c: reference_7b(c, bias=False), "cap.pth", AdapterOptions()),
    "7B, first stage": (
        "reference-7b",
        lambda c: reference_7b(c, bias=False, norms=False),
        "first.pth",
        AdapterOptions(),
    ),
    "chat-65B": ("chat-65b", chat_65b, "chat.pth", AdapterOptions()),
    "chat-65B, no final norm": ("chat-65b", lambda c: chat_65b(c, False), "chat.pth", AdapterOptions()),
}


def half_rotated(weight: Tensor, D: int) -> Tensor:
    return torch.cat([head[[*range(0, D, 2), *range(1, D, 2)]] for head in weight.split(D)])


def meta_and_ours(config: ModelConfig) -> tuple[dict[str, Tensor], Llama]:
    """A base as Meta's file has it, and as we load it."""
    meta = canonical_weights(random_base(config))
    D = config.head_dim
    rows = {
        key: half_rotated(t, D) if key.endswith(("wq.weight", "wk.weight")) else t for key, t in meta.items()
    }
    return meta, Llama(config).load(rows.items())


def features_of(sample: Sample) -> Tensor | None:
    if sample.config.vision is None:
        return None
    return torch.randn(5, sample.config.vision.feature_dim, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def our_logits(base: Llama, adapter: Adapter, tokens: list[int], features: Tensor | None) -> Tensor:
    visual = None if features is None else adapter.see(features[None])
    adaptation = OneAdapter(adapter, base.dtype)
    attend = DenseAttend(1, adapter.prompts(base, visual))
    hidden = base(torch.tensor(tokens), torch.arange(len(tokens)), attend, adaptation)
    return base.logits(hidden, adaptation)


def oracle_of(config: ModelConfig, meta: dict[str, Tensor], sample: Sample) -> Oracle:
    base, own = ({k: t.double().numpy() for k, t in weights.items()} for weights in (meta, sample.own))
    return Oracle(config, base, sample.config, own, rope="interleaved")


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_are_the_oracle_s_of_the_raw_file(config: ModelConfig, name: str, tmp_path: Path):
    _, build, file, options = SAMPLES[name]
    sample = build(config)
    adapter = open_adapter(save_sample(sample, tmp_path / file), config, options)
    assert adapter.config == sample.config
    meta, base = meta_and_ours(config)
    features = features_of(sample)
    oracle = oracle_of(config, meta, sample)
    array = None if features is None else features.double().numpy()
    truth = oracle.logits(TOKENS, array)
    ours = our_logits(base, adapter, TOKENS, features)
    np.testing.assert_allclose(ours.numpy(), truth, atol=1e-4, rtol=0)
    plain = replace(oracle, adapter=None, own={}).logits(TOKENS)
    assert np.abs(truth - plain).max() > 0.1  # an adapter that does nothing would prove nothing


@pytest.mark.parametrize("name", SAMPLES)
def test_greedy_tokens_are_the_oracle_s(config: ModelConfig, name: str, tmp_path: Path):
    _, build, file, options = SAMPLES[name]
    sample = build(config)
    adapter = open_adapter(save_sample(sample, tmp_path / file), config, options)
    meta, base = meta_and_ours(config)
    features = features_of(sample)
    array = None if features is None else features.double().numpy()
    oracle = oracle_of(config, meta, sample)
    ours, theirs = list(TOKENS[:2]), list(TOKENS[:2])
    for _ in range(5):
        ours.append(int(our_logits(base, adapter, ours, features)[-1].argmax()))
        theirs.append(int(oracle.logits(theirs, array)[-1].argmax()))
    assert ours == theirs


@pytest.mark.parametrize("name", SAMPLES)
def test_export_gives_back_the_file(config: ModelConfig, name: str, tmp_path: Path):
    form, build, file, options = SAMPLES[name]
    sample = build(config)
    adapter = open_adapter(save_sample(sample, tmp_path / file), config, options)
    export_adapter(adapter, form, tmp_path / "again" / file)
    value = torch.load(tmp_path / "again" / file, weights_only=True)
    tensors = value.get("model", value)
    unused = "layers.0.attention."  # the bottom layer has a gate that nothing reads
    assert tensors.keys() == sample.tensors.keys()
    for key, tensor in sample.tensors.items():
        if unused not in key or not key.endswith("gate"):
            assert torch.equal(tensors[key], tensor), key
    again = open_adapter(tmp_path / "again" / file, config, options)
    assert again.config == adapter.config


def test_a_scalar_gate_is_one_gate_per_layer(config: ModelConfig, tmp_path: Path):
    sample = reference_v1(config)
    for i in range(config.num_layers):
        sample.tensors[f"layers.{i}.attention.gate"] = torch.tensor([0.5 + i])
    adapter = open_adapter(save_sample(sample, tmp_path / "v1.pth"), config, LENGTH)
    assert adapter.config.gate.per == "layer"
    assert torch.equal(adapter.gate, 0.5 + torch.arange(1.0, config.num_layers))


def test_ten_rows_are_assumed_where_nothing_is_said(tmp_path: Path, config: ModelConfig):
    sample = reference_v1(config)
    sample.tensors["adapter_query.weight"] = torch.randn(20, config.hidden_size)
    trained_from(config.num_layers - 2, sample)
    adapter = open_adapter(save_sample(sample, tmp_path / "v1.pth"), config)
    assert adapter.config.prompt is not None
    assert adapter.config.prompt.length == 10
    assert adapter.config.prompt.layers == (config.num_layers - 2, config.num_layers - 1)


def trained_from(first: int, sample: Sample, scalar: bool = False) -> None:
    """Gates begin at 0, and those of the layers without prompts stay there."""
    for i in range(sample.config.base.num_layers):
        key = f"layers.{i}.attention.gate"
        gate = sample.tensors[key][:, 0, 0, 0] if scalar else sample.tensors[key]
        sample.tensors[key] = gate if i >= first else torch.zeros_like(gate)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("length", [5, 10, 20])
def test_gates_tell_that_an_assumed_length_is_wrong(length: int, scalar: bool, tmp_path: Path):
    """40 rows of a base of eight layers are prompts of 5 in all of them, or of 20 in two."""
    config = replace(MHA, num_layers=8)
    count = 40 // length
    sample = reference_v1(config)
    sample.tensors["adapter_query.weight"] = torch.randn(40, config.hidden_size)
    trained_from(8 - count, sample, scalar)
    path = save_sample(sample, tmp_path / "v1.pth")
    if length != 10:
        wrong = rf"v1\.pth: .* begin in layer 4, .* trained from layer {8 - count} on; .*length=ROWS"
        for look in (lambda: open_adapter(path, config), lambda: describe(path)):
            with pytest.raises(CheckpointError, match=wrong):
                look()
    for options in (None, AdapterOptions(length=length))[length != 10 :]:
        prompt = open_adapter(path, config, options).config.prompt
        assert prompt is not None
        assert prompt.length == length
        assert prompt.layers == tuple(range(8 - count, 8))


def test_gates_that_nothing_has_trained_tell_nothing(config: ModelConfig, tmp_path: Path):
    sample = reference_v1(config)
    sample.tensors["adapter_query.weight"] = torch.randn(20, config.hidden_size)
    trained_from(config.num_layers, sample)
    adapter = open_adapter(save_sample(sample, tmp_path / "v1.pth"), config)
    assert not adapter.gate.any()


def test_the_layers_of_a_training_checkpoint_are_compared(config: ModelConfig, tmp_path: Path):
    layers = config.num_layers - 1

    def saved(**args: object) -> Path:
        return training_checkpoint(reference_v1(config), config, "", tmp_path / "checkpoint-4.pth", **args)

    assert open_adapter(saved(adapter_len=K, adapter_layer=layers), config).config.prompt
    with pytest.raises(
        CheckpointError, match=r"prompts of 3 for 3 layers, and args\.adapter_layer is 9; say"
    ):
        open_adapter(saved(adapter_len=K, adapter_layer=9), config)
    with pytest.raises(
        CheckpointError, match=r"prompts of 9 for 1 layers, and args\.adapter_layer is 3; say"
    ):
        open_adapter(saved(adapter_len=K, adapter_layer=layers), config, AdapterOptions(length=9))


def test_rows_that_make_no_whole_prompts_ask_for_the_length(tmp_path: Path, config: ModelConfig):
    path = save_sample(reference_v1(config), tmp_path / "v1.pth")
    with pytest.raises(CheckpointError, match=r"v1\.pth: adapter_query\.weight has 9 rows.*length=10"):
        open_adapter(path, config)


def training_checkpoint(sample: Sample, config: ModelConfig, prefix: str, path: Path, **args: object) -> Path:
    """{model, optimizer, epoch, scaler, args}, the base with `prefix` inside, as the training loops save."""
    model = {key: tensor.clone() for key, tensor in sample.tensors.items()}
    model = {key.replace("llama.", "llma."): tensor for key, tensor in model.items()}
    model |= base_weights(config, prefix)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": []}
    torch.save(
        {
            "model": model,
            "optimizer": optimizer,
            "epoch": 4,
            "scaler": {"scale": 65536.0, "_growth_tracker": 3},
            "args": argparse.Namespace(batch_size=4, output_dir="./output", **args),
        },
        path,
    )
    return path


def test_a_v1_training_checkpoint_brings_its_length_and_no_base(config: ModelConfig, tmp_path: Path):
    sample = reference_v1(config)
    sample.tensors["norm.weight"] = torch.full((config.hidden_size,), float("nan"))
    path = training_checkpoint(sample, config, "", tmp_path / "checkpoint-4.pth", adapter_len=K)
    adapter = open_adapter(path, config)
    assert adapter.config == sample.config
    assert torch.equal(adapter.prompt, sample.own["prompt"])


def test_a_7b_training_checkpoint_is_read_past_base_and_clip(config: ModelConfig, tmp_path: Path):
    sample = reference_7b(config)
    sample.tensors["clip.visual.conv1.weight"] = torch.zeros(2, 3, 4, 4)
    path = training_checkpoint(sample, config, "llma.", tmp_path / "checkpoint-0.pth")
    adapter = open_adapter(path, config)
    assert adapter.config == sample.config
    assert torch.equal(adapter.get_parameter("vision.query"), sample.own["vision.query"])
    assert torch.equal(adapter.attention_norm, sample.own["attention_norm"])


def test_colour_order_of_a_7b_file_can_be_said(config: ModelConfig, tmp_path: Path):
    path = save_sample(reference_7b(config), tmp_path / "x.pth")
    vision = open_adapter(path, config, AdapterOptions(color="rgb")).config.vision
    assert vision is not None
    assert vision.color == "rgb"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("BIAS-7B", "llama.layers.1.attention.wo.bias"),
        ("BIAS-7B", "visual_blocks.1.mlp.fc2.weight"),
        ("LORA-BIAS-7B", "llama.layers.2.feed_forward.lora_w3_l2.weight"),
        ("LORA-BIAS-7B", "llama.layers.1.feed_forward.w2.bias"),
        ("CAPTION-7B", "llama.layers.1.attention_norm.weight"),
        ("chat-65B", "layers.3.feed_forward.w2_scale"),
        ("V1", "layers.3.attention.gate"),
    ],
)
def test_a_missing_key_is_named(config: ModelConfig, name: str, key: str, tmp_path: Path):
    _, build, file, options = SAMPLES[name]
    sample = build(config)
    del sample.tensors[key]
    if key == "layers.3.attention.gate":  # the file now looks as if made for three layers
        with pytest.raises(AdapterMismatch, match="num_layers 3"):
            open_adapter(save_sample(sample, tmp_path / file), config, options)
        return
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.") + " missing"):
        open_adapter(save_sample(sample, tmp_path / file), config, options)


def test_biases_are_all_there_or_all_missing_without_a_word(config: ModelConfig, tmp_path: Path):
    """A caption file has no biases; one that has some of a linear is damaged."""
    sample = reference_7b(config)
    del sample.tensors["llama.layers.1.attention.wq.bias"]
    torch.save({"model": sample.tensors}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wq\.bias missing"):
        open_adapter(tmp_path / "x.pth", config)


@pytest.mark.parametrize("name", SAMPLES)
def test_an_unexpected_key_is_named(config: ModelConfig, name: str, tmp_path: Path):
    _, build, file, options = SAMPLES[name]
    sample = build(config)
    sample.tensors["surprise.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=rf"{file}: surprise\.weight unexpected"):
        open_adapter(save_sample(sample, tmp_path / file), config, options)


@pytest.mark.parametrize("name", SAMPLES)
def test_another_base_is_refused_by_name(config: ModelConfig, name: str, tmp_path: Path):
    _, build, file, options = SAMPLES[name]
    path = save_sample(build(config), tmp_path / file)
    for field, other in (("hidden_size", 24), ("num_layers", 5)):
        with pytest.raises(AdapterMismatch, match=rf"{field} \d+ \(the base has {other}\)"):
            open_adapter(path, replace(config, **{field: other}), options)


def test_the_released_files_full_shapes():
    """Keys and shapes of the released 7B and 65B files, on the meta device."""
    from models.checkpoints.chat65b import CHAT_65B
    from models.checkpoints.reference_7b import REFERENCE_7B
    from models.checkpoints.reference_v1 import REFERENCE_V1
    from models.checkpoints.tensor_file import TensorFile

    seven = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-6, 1e4, 2048)
    big = replace(
        seven, hidden_size=8192, intermediate_size=22016, num_layers=80, num_heads=64, num_kv_heads=64
    )

    def count(form, config: ModelConfig, shapes: dict[str, tuple[int, ...]], options: AdapterOptions) -> int:
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        file = TensorFile(Path("x.pth"), 1 << 40, tensors)
        spec = base_spec(config)
        assert all(getattr(spec, name) == size for name, size in form.dimensions(file).items())
        table = form.table(form.config(file, spec, options))
        for entry in table.entries:
            for key in entry.file_keys():
                assert shapes.pop(key) == entry.shape, key
        assert shapes.keys() == {unused.key for unused in table.unused}
        return sum(torch.Size(e.shape).numel() * len(e.file_keys()) for e in table.entries)

    gates = {f"layers.{i}.attention.gate": (1, 32, 1, 1) for i in range(32)}
    v1 = {"adapter_query.weight": (300, 4096), **gates}
    assert count(REFERENCE_V1, seven, v1, AdapterOptions(length=10)) == 1_229_760  # as the paper's 1.2 M
    assert abs(count(REFERENCE_7B, seven, _seven_shapes(), AdapterOptions()) - 63.1e6) < 0.05e6
    assert abs(count(CHAT_65B, big, _sixty_five_shapes(), AdapterOptions()) - 13.8e6) < 0.05e6


def _seven_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_query.weight": (310, 4096),
        "visual_query.weight": (10, 768),
        "clip_proj.weight": (768, 768),
        "visual_proj.weight": (4096, 768),
        "llama.norm.weight": (4096,),
    }
    vectors = {"clip_proj.bias": 768, "visual_proj.bias": 4096}
    for part in ("weight", "bias"):
        vectors |= {f"clip_proj_norm.{part}": 768, f"visual_proj_norm.{part}": 4096}
    for i in range(8):
        block = f"visual_blocks.{i}"
        for name, shape in (
            ("attn.qkv", (2304, 768)),
            ("attn.proj", (768, 768)),
            ("mlp.fc1", (3072, 768)),
            ("mlp.fc2", (768, 3072)),
        ):
            shapes[f"{block}.{name}.weight"] = shape
            vectors[f"{block}.{name}.bias"] = shape[0]
        vectors |= {f"{block}.norm{n}.{part}": 768 for n in (1, 2) for part in ("weight", "bias")}
    for i in range(32):
        layer = f"llama.layers.{i}"
        shapes[f"{layer}.attention.gate"] = (1, 32, 1, 1)
        vectors |= {f"{layer}.attention.{name}.bias": 4096 for name in ("wq", "wo")}
        vectors |= {f"{layer}.feed_forward.{name}.bias": 11008 for name in ("w1", "w3")}
        vectors[f"{layer}.feed_forward.w2.bias"] = 4096
        vectors |= {f"{layer}.{name}.weight": 4096 for name in ("attention_norm", "ffn_norm")}
    return shapes | {key: (size,) for key, size in vectors.items()}


def _sixty_five_shapes() -> dict[str, tuple[int, ...]]:
    C, I = 8192, 22016
    sizes = {"norm.weight": C}
    for i in range(80):
        layer = f"layers.{i}"
        sizes |= {f"{layer}.{name}.weight": C for name in ("attention_norm", "ffn_norm")}
        for part in ("bias", "scale"):
            sizes |= {f"{layer}.attention.{name}_{part}": C for name in ("wq", "wk", "wv", "wo")}
            sizes |= {
                f"{layer}.feed_forward.{name}_{part}": I if (name == "w2") == (part == "scale") else C
                for name in ("w1", "w2", "w3")
            }
    return {key: (size,) for key, size in sizes.items()}
