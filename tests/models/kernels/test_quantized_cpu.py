"""Weights in 8 and 4 bits: what they round to, and products as with the weights they stand for."""

import pytest
import torch
from input_rounding import input_rounding

from models.kernels.linear_cpu import pack, packed_linear, packed_shape
from models.kernels.quantized_cpu import Bits, dequantize, quantize
from models.kernels.quantized_tile_cpu import GROUP

BITS: list[Bits] = ["int8", "int4"]
ROWS = (96, 97, 5)


def weights(seed: int = 0, inputs: int = 3 * GROUP) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, inputs, generator=generator) for rows in ROWS]


def test_int8_is_off_by_half_a_step_at_most():
    for weight in weights():
        steps = weight.abs().amax(1, keepdim=True) / 127
        assert ((dequantize(quantize(weight, "int8"), len(weight)) - weight).abs() <= 0.5001 * steps).all()


def test_int4_is_off_by_half_a_step_at_most():
    """And by what float16 takes from a minimum and fifteen steps."""
    for weight in weights():
        groups = weight.unflatten(1, (-1, GROUP))
        least, most = groups.aminmax(dim=2, keepdim=True)
        bound = (most - least) / 30 + 2**-10 * (least.abs() + most - least)
        ours = dequantize(quantize(weight, "int4"), len(weight)).unflatten(1, (-1, GROUP))
        assert ((ours - groups).abs() <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_was_quantised_is_found_again(bits: Bits):
    """To the last bit in int4: a base that was quantised so in its file loses nothing more."""
    for weight in weights():
        once = dequantize(quantize(weight, bits), len(weight))
        twice = dequantize(quantize(once, bits), len(weight))
        torch.testing.assert_close(twice, once, atol=0, rtol=0 if bits == "int4" else 1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_equal_weights_and_zeros(bits: Bits):
    weight = torch.stack((torch.zeros(GROUP), torch.full((GROUP,), 0.5), torch.full((GROUP,), -3.0)))
    torch.testing.assert_close(dequantize(quantize(weight, bits), 3), weight)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
def test_what_scales_cannot_hold_is_refused(number: float):
    weight = torch.zeros(2, GROUP)
    weight[1, 3] = number
    with pytest.raises(ValueError, match="not finite, or too large"):
        quantize(weight, "int4")


@pytest.mark.parametrize("bits", BITS)
@torch.inference_mode()
def test_products_are_those_of_the_dequantised(bits: Bits):
    generator = torch.Generator().manual_seed(1)
    packed = pack(weights(), bits)
    assert packed.shape == packed_shape(weights(), bits)
    for rows in [*range(1, 26), 69]:
        x = torch.randn(rows, 3 * GROUP, generator=generator).bfloat16()
        y = packed_linear(x, packed)
        for weight, start in zip(weights(), (0, 96, 240), strict=True):
            exact = dequantize(quantize(weight, bits), len(weight)).double()
            off = (y[:, start : start + len(weight)].double() - x.double() @ exact.T).abs()
            assert (off <= 1e-4 + input_rounding(x, exact)).all()


@pytest.mark.parametrize("bits", BITS)
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others(bits: Bits):
    """To the last bit, whether a panel is unpacked for many rows or in registers for one."""
    x = torch.randn(69, 3 * GROUP, generator=torch.Generator().manual_seed(2)).bfloat16()
    packed = pack(weights(), bits)
    alone = torch.cat([packed_linear(row[None], packed) for row in x])
    assert torch.equal(packed_linear(x, packed), alone)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@torch.inference_mode()
def test_what_is_no_number_shows_in_its_row_alone(bits: Bits, number: float):
    x = torch.ones(9, 3 * GROUP, dtype=torch.bfloat16)
    x[4, 40] = number
    y = packed_linear(x, pack(weights(), bits))
    assert not y[4, :96].isfinite().any()
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-25, 1e30])
@torch.inference_mode()
def test_inputs_of_any_size(bits: Bits, size: float):
    """Groups below 1e-34 may become zero."""
    x = (size * torch.randn(3, 3 * GROUP, generator=torch.Generator().manual_seed(3))).bfloat16()
    for weight, start in zip(weights(), (0, 96, 240), strict=True):
        exact = dequantize(quantize(weight, bits), len(weight)).double()
        y = packed_linear(x, pack(weights(), bits))[:, start : start + len(weight)].double()
        bound = input_rounding(x, exact) + 1e-5 * size * exact.abs().sum(1) + 1e-31
        assert ((y - x.double() @ exact.T).abs() <= bound).all()
