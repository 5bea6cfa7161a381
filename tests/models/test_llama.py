"""The base's logits are transformers' logits on the same weights."""

import copy
from dataclasses import replace

import pytest
import torch
from support import GQA, canonical_weights, random_base, transformers_twin

from models.attention import DenseAttend
from models.config import LinearRopeScaling, ModelConfig
from models.errors import CheckpointError
from models.kernels.linear_cpu import pack, packed_linear
from models.kernels.quantized_cpu import Bits
from models.llama import Llama


def test_logits_with_linear_scaling_equal_transformers():
    test_logits_equal_transformers(random_base(replace(GQA, rope_scaling=LinearRopeScaling(4.0))))


@torch.no_grad()
def test_logits_equal_transformers(base: Llama):
    tokens_BT = torch.randint(0, base.config.vocab_size, (3, 60), generator=torch.Generator().manual_seed(1))
    positions_N = torch.arange(60).repeat(3)
    hidden_NC = base(tokens_BT.flatten(), positions_N, DenseAttend(3))
    ours = base.logits(hidden_NC).unflatten(0, (3, 60))
    theirs = transformers_twin(base)(tokens_BT).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_load_names_what_does_not_fit(config: ModelConfig, base: Llama):
    weights = canonical_weights(base)
    fresh = Llama(config).load(weights.items())
    assert all(torch.equal(value, weights[name]) for name, value in canonical_weights(fresh).items())

    with pytest.raises(CheckpointError, match=r"missing.*layers\.2\.w3\.weight"):
        Llama(config).load((n, t) for n, t in weights.items() if n != "layers.2.w3.weight")
    with pytest.raises(CheckpointError, match=r"unexpected.*layers\.9\.wq"):
        Llama(config).load([*weights.items(), ("layers.9.wq.weight", torch.zeros(1))])
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[3\]"):
        Llama(config).load((n, t[:3] if n == "norm.weight" else t) for n, t in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_products_are_the_plain_ones(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 48, generator=generator).to(dtype) for rows in (96, 97, 5)]
    packed = pack(weights)
    for shape in [*((M,) for M in range(1, 70)), (3, 5), (1, 1), (2, 0)]:
        x = torch.randn(*shape, 48, generator=generator).to(dtype)
        y = packed_linear(x, packed)
        for weight, start in zip(weights, (0, 96, 240), strict=True):
            expected = torch.nn.functional.linear(x.double(), weight.double())
            ours = y[..., start : start + len(weight)].double()
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@torch.inference_mode()
def test_linears_of_some_layers_are_those_of_each(bits: Bits | None):
    config = replace(GQA, hidden_size=96, head_dim=16, intermediate_size=160)
    base = random_base(config, torch.float32)
    plain, packed = copy.deepcopy(base), base.pack(bits)
    dtype, layers = packed.dtype, [3, 1]
    x = torch.randn(2, 3, 5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours in (plain.to(dtype), packed):
        for names in (("wq", "wk", "wv"), ("wk", "wv"), ("w3",)):
            each = ours.apply_each(names, layers, x)
            for name, y in zip(names, each, strict=True):
                alone = torch.stack([ours.layers[i].apply_one(name, x[p]) for p, i in enumerate(layers)])
                assert torch.equal(y, alone), name
