"""Norms, scales and biases by slot against the formulas in float64."""

import pytest
import torch

from models.functional import rms_norm
from models.kernels.slot_vectors import slot_rms_norm, slot_scale_bias

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SLOTS = (2, 0, 1, 2, 0)


def randn(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("features", [48, 1100])
def test_norm(device: str, features: int, dtype: torch.dtype):
    """The residual stream is float32, whatever the weights are."""
    x_NC = 10 * randn(len(SLOTS), features, seed=0, device=device)
    weight_SC = 1 + randn(3, features, seed=1, device=device, dtype=dtype)
    slots_N = torch.tensor(SLOTS, device=device)
    y_NC = slot_rms_norm(x_NC, weight_SC, slots_N, 1e-5)
    expected = rms_norm(x_NC.double(), weight_SC.double()[slots_N], 1e-5)
    assert y_NC.dtype == dtype
    torch.testing.assert_close(y_NC.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("scaled", "biased"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("features", [48, 1100])
def test_scale_and_bias(device: str, features: int, scaled: bool, biased: bool, dtype: torch.dtype):
    """x is a part of several linears' product: its rows are apart."""
    wide = randn(len(SLOTS), 3 * features, seed=0, device=device, dtype=dtype)
    x_NC = wide[:, features : 2 * features]
    scale_SC, bias_SC = (randn(3, features, seed=i, device=device, dtype=dtype) for i in (1, 2))
    slots_N = torch.tensor(SLOTS, device=device)
    y_NC = slot_scale_bias(x_NC, scale_SC if scaled else None, bias_SC if biased else None, slots_N)
    expected = x_NC.double()
    if biased:
        expected = expected + bias_SC.double()[slots_N]
    if scaled:
        expected = expected * scale_SC.double()[slots_N]
    assert y_NC.dtype == dtype
    torch.testing.assert_close(y_NC.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_empty_slot_changes_nothing(device: str):
    x_NC = randn(4, 48, seed=0, device=device)
    scale_SC, bias_SC = torch.ones(2, 48, device=device), torch.zeros(2, 48, device=device)
    scale_SC[1], bias_SC[1] = torch.nan, torch.nan
    slots_N = torch.zeros(4, dtype=torch.int32, device=device)
    assert torch.equal(slot_scale_bias(x_NC, scale_SC, bias_SC, slots_N), x_NC)


def test_wrong_shapes_are_our_bug(device: str):
    x_NC, slots_N = torch.ones(4, 48, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(AssertionError):
        slot_rms_norm(x_NC, torch.ones(2, 47, device=device), slots_N, 1e-5)
    with pytest.raises(AssertionError):
        slot_scale_bias(x_NC, torch.ones(2, 48, device=device), None, slots_N[:3])
    with pytest.raises(AssertionError):
        slot_scale_bias(x_NC, None, None, slots_N)
