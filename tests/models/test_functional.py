"""Norm and rotation: their gradients, and that those change no value."""

import pytest
import torch

from models.functional import rms_norm, rotate


@pytest.mark.parametrize("rows", [False, True])
def test_the_norm_gradient_is_that_of_its_values(rows: bool):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(*((5, 8) if rows else (8,)), dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight.requires_grad_()))


@pytest.mark.parametrize("heads", [1, 3])
def test_the_gradient_of_rotation(heads: int):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(5, heads, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    angles = torch.rand(5, 1, 4, dtype=torch.float64, generator=generator).repeat(1, 1, 2)
    rotary = (angles.cos(), angles.sin())
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotary), x)
    first, second = x.chunk(2, dim=-1)
    torch.testing.assert_close(rotate(x, rotary), x * rotary[0] + torch.cat((-second, first), -1) * rotary[1])
    assert torch.equal(rotate(x, rotary), rotate(x.detach(), rotary))
