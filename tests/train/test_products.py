"""Products with weights that were laid out once are the plain ones, forward and backward."""

import pytest
import torch
from support import CONFIGS, random_adapter, random_base
from torch.nn import functional as F
from train_passes import config_of, grads_of, make_pass

from models.adapter import Adapter
from models.adapter_config import ScaleBiasConfig
from models.config import ModelConfig
from models.llama import Layer, Llama
from train.forward import Forward
from train.products import FrozenProduct, pack_products


def packed_base(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Llama:
    base = random_base(config, dtype)
    if not pack_products(base):
        pytest.skip("this machine has no such products")
    return base


def loss_and_gradients(
    base: Llama, adapter: Adapter, checkpointing: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    adapter.zero_grad()
    batch = make_pass(base.config.vocab_size)
    loss = Forward(base, adapter, None, live=False, checkpointing=checkpointing).backward(batch, 1 / 12)
    return loss, grads_of(adapter)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 1), (0,), (2, 0), (300,)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_product_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, near: float):
    packed_base(CONFIGS["gqa"], dtype)
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (
        torch.randn(*dims, generator=generator).to(dtype) for dims in ((*shape, 40), (*shape, 56), (56, 40))
    )
    y = FrozenProduct(weight)(x.requires_grad_())
    y.backward(dy)
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    for ours, theirs in ((y, x.double() @ weight.double().T), (x.grad, dy.double() @ weight.double())):
        torch.testing.assert_close(ours.double(), theirs, atol=near * 40**0.5, rtol=near)


def test_rows_that_lie_apart():
    """Cuts of weights, inputs and gradients, as attention and the stacked linears give them."""
    packed_base(CONFIGS["gqa"])
    weight, x = torch.randn(3 * 8, 6)[8:16], torch.randn(6, 5).T
    y = FrozenProduct(weight)(x.requires_grad_())
    torch.testing.assert_close(y, F.linear(x, weight))
    [dx] = torch.autograd.grad(y, x, torch.ones(()).expand_as(y))
    torch.testing.assert_close(dx, torch.ones(5, 8) @ weight)


@pytest.mark.parametrize("scale", ["output", "input"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_every_parameter(config: ModelConfig, scale: str, checkpointing: bool):
    scales = ScaleBiasConfig(scale=scale, scale_targets=("wq", "wk", "w2"), bias_targets=("wv", "w1"))
    adapter = random_adapter(config_of(config, scale_bias=scales))
    expected, wanted = loss_and_gradients(random_base(config), adapter)
    loss, grads = loss_and_gradients(packed_base(config), adapter, checkpointing)
    torch.testing.assert_close(loss, expected)
    assert grads.keys() == wanted.keys() == dict(adapter.named_parameters()).keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_bfloat16_is_as_near_to_the_exact_gradient_as_plain_products():
    config = CONFIGS["gqa"]
    adapter = random_adapter(config_of(config))
    exact, plain, packed = (
        torch.cat([grad.flatten() for grad in loss_and_gradients(base, adapter)[1].values()])
        for base in (
            random_base(config),
            random_base(config, torch.bfloat16),
            packed_base(config, torch.bfloat16),
        )
    )
    assert (packed - exact).norm() < 1.2 * (plain - exact).norm()


def test_weights_are_not_kept_twice():
    """The embedding stays, whether the head shares it or not."""
    for config in CONFIGS.values():
        base = packed_base(config)
        assert base.embed.numel() == config.vocab_size * config.hidden_size
        assert base.lm_head is base.embed if config.tie_word_embeddings else not base.lm_head.numel()
        layers = [layer for layer in base.layers if isinstance(layer, Layer)]
        assert not any(linear.weight.numel() for layer in layers for linear in layer.linears)


def test_operators_that_are_gone_leave_the_base_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """They are private ones, so another PyTorch may have none, or others."""

    def gone(weight: torch.Tensor, rows: int) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", gone)
    base = random_base(CONFIGS["gqa"])
    assert not pack_products(base)
    layer = base.layers[0]
    assert isinstance(layer, Layer)
    assert layer.qkv.weight.numel()


def test_what_has_no_such_products_stays_as_it_is():
    for base in (random_base(CONFIGS["gqa"], torch.float64), random_base(CONFIGS["gqa"]).to("meta")):
        assert not pack_products(base)
        layer = base.layers[0]
        assert isinstance(layer, Layer)
        assert layer.qkv.weight.numel()
