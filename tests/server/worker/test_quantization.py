"""The engine's steps with weights in 8 and 4 bits, and where it refuses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import MHA, random_adapter, random_base
from tiny_base import write_tiny_base

from models.adapter import base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.attention import DenseAttend
from models.checkpoints.base import load_base
from models.config import ModelConfig
from models.kernels.quantized_cpu import Bits, dequantize, quantize
from models.llama import Layer, Llama
from server.serving import StartupError
from server.settings import WorkerSettings, default_cache_dir
from server.worker.build import build_engine
from server.worker.runner import LoadedAdapter, Runner, StepItem

WIDE = replace(MHA, hidden_size=64, num_heads=8, num_kv_heads=2)
TIED = replace(WIDE, tie_word_embeddings=True)
BITS: list[Bits] = ["int8", "int4"]
KINDS = {
    "v2": {
        "prompt": {"length": 5, "layers": (1, 2, 3)},
        "norms": True,
        "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
    },
    "low rank": {"lora": {"rank": 3, "targets": ("wq", "w2")}},
}


@torch.no_grad()
def dequantised(base: Llama, bits: Bits) -> Llama:
    """In plain float32, with the weights that the quantised stand for."""
    for layer in base.layers:
        assert isinstance(layer, Layer)
        for module in layer.linears:
            for name in module.names:
                part = module.part(name)
                part.copy_(dequantize(quantize(part, bits), len(part)))
    head = dequantize(quantize(base.lm_head, "int8"), len(base.lm_head))
    base.embed.copy_(base.embed.bfloat16())
    base.lm_head = torch.nn.Parameter(head, requires_grad=False)  # a tied one is quantised apart
    return base


def runner(base: Llama, fused: bool) -> Runner:
    return Runner(
        base,
        num_blocks=16,
        block_size=16,
        max_hot_adapters=4,
        prompt_slots=4,
        kernels="cpu" if fused else "none",
    )


def step(ours: Runner, config: ModelConfig, kinds: list[str]) -> torch.Tensor:
    spec = base_spec(config).model_dump()
    items = []
    for b, kind in enumerate(kinds):
        adapter = None
        if kind != "base":
            parsed = AdapterConfig.model_validate({"base": spec, **KINDS[kind]})
            adapter = LoadedAdapter((kind, 1), random_adapter(parsed, seed=len(kind)))
        tokens = [3 + b, 5, 7, 11, 13][: 1 if b < 2 else 5]
        items.append(StepItem(tokens, 0, [b], adapter, None, slice(None)))
    return ours.run(items)


@pytest.mark.parametrize("config", [WIDE, TIED], ids=["wide", "tied"])
@pytest.mark.parametrize("kinds", [["base", "v2", "base", "v2"], ["low rank", "base", "v2"]], ids="-".join)
@pytest.mark.parametrize("bits", BITS)
def test_a_step_is_that_of_the_dequantised_weights(bits: Bits, kinds: list[str], config: ModelConfig):
    plain = step(runner(dequantised(random_base(config), bits), fused=False), config, kinds)
    ours = step(runner(random_base(config).pack(bits), fused=True), config, kinds)
    torch.testing.assert_close(ours, plain, atol=0.02 * float(plain.amax() - plain.amin()), rtol=0)


@pytest.mark.weights
@pytest.mark.parametrize(("bits", "mean", "same"), [("int8", 0.25, 0.92), ("int4", 0.1, 0.94)])
@torch.inference_mode()
def test_the_embedded_base_keeps_its_logits(bits: Bits, mean: float, same: float):
    """Against float32: the mean difference of a logit, and how often the first token is the same."""
    from models.pull import pull
    from models.tokenizer import load_tokenizer

    folder = pull("smollm2-135m", default_cache_dir())
    ids = load_tokenizer(folder).encode(Path("docs/design.md").read_text())[:256]
    base = load_base(folder, torch.float32)[0]
    expected = base.logits(base(torch.tensor(ids), torch.arange(len(ids)), DenseAttend(1)))
    ours = runner(base.pack(bits), fused=True).run([StepItem(ids, 0, range(16), None, None, slice(None))])
    assert float((ours - expected).abs().mean()) < mean
    assert float((ours.argmax(1) == expected.argmax(1)).float().mean()) > same


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "computes in bfloat16, not in float32; set dtype to auto"),
        ({"attention": "torch"}, "goes without the compiled layers; set it to auto"),
        ({"device": "meta"}, "the device is 'meta'; choose cpu"),
    ],
)
def test_where_it_cannot_be_used(tmp_path: Path, options: dict[str, str], reason: str):
    settings = WorkerSettings.model_validate(
        {"base": str(tmp_path), "shipped_adapters": False, "quantization": "int8", **options}
    )
    with pytest.raises(StartupError, match=f"quantization 'int8' cannot be used: .*{reason}"):
        build_engine(settings)


@pytest.mark.parametrize("bits", BITS)
def test_a_base_that_does_not_fit_the_groups(bits: Bits, tmp_path: Path):
    write_tiny_base(tmp_path)
    settings = WorkerSettings(base=str(tmp_path), shipped_adapters=False, quantization=bits)
    with pytest.raises(StartupError, match="multiple of 32 inputs, and this base has others"):
        build_engine(settings)


def test_an_engine_starts_with_it(tmp_path: Path):
    """Its first steps are those that warm it up."""
    write_tiny_base(tmp_path, head_dim=32, hidden_size=64)
    settings = WorkerSettings(
        base=str(tmp_path), shipped_adapters=False, quantization="int8", kv_cache_mib=16
    )
    assert build_engine(settings).models()[0].id == tmp_path.name
