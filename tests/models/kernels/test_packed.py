"""A training pass's attention against the formula in float64, values and gradients of all inputs."""

import pytest
import torch

from bench.kernel_cases import PackedCase
from models.kernels.packed import Packing, packed_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LENS = (5, 1, 40, 33)
PROMPT_LENS = (0, 1, 10, 20)
SLOTS = (3, 0, 2, 3)  # one slot is nobody's, one is shared


def random_case(
    device: str,
    lens: tuple[int, ...] = LENS,
    prompt_lens: tuple[int, ...] = PROMPT_LENS,
    slots: tuple[int, ...] = SLOTS,
    **changes,
) -> PackedCase:
    options = {"heads": (3, 1), "head_dim": 64, "dtype": torch.float32} | changes
    return PackedCase.random(lens, prompt_lens, slots, device=device, **options)


def attend(case: PackedCase, *leaves: torch.Tensor) -> torch.Tensor:
    q, k, v, prompt_k, prompt_v, gate = leaves
    packing = Packing.of(case.lens_B, case.slots_B, q.device)
    return packed_attention(q, k, v, prompt_k, prompt_v, case.prompt_lens_S, gate, packing)


def assert_plain(case: PackedCase) -> None:
    """Values, and every input's gradient of a random functional of them."""
    dtype = case.q_NHD.dtype
    mine = [x.clone().requires_grad_() for x in case.leaves]
    exact = [x.double().requires_grad_() for x in case.leaves]
    actual, expected = attend(case, *mine), case.plain(*exact)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(
        expected.device, dtype
    )
    (actual * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for x, y in zip(mine, exact, strict=True):
        wanted = torch.zeros_like(y) if y.grad is None else y.grad  # None: the formula never read it
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        atol = TOLERANCE[dtype] * max([1.0, *wanted.abs().flatten().tolist()])
        torch.testing.assert_close(x.grad.double(), wanted, atol=atol, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1), (6, 2)])
def test_groups_of_heads(device: str, heads: tuple[int, int]):
    assert_plain(random_case(device, heads=heads))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128, 24])
def test_precisions_and_head_sizes(device: str, head_dim: int, dtype: torch.dtype):
    assert_plain(random_case(device, lens=(33, 2), slots=(3, 1), head_dim=head_dim, dtype=dtype))


def test_sequences_longer_than_a_tile(device: str):
    assert_plain(random_case(device, lens=(70, 150), slots=(2, 3), heads=(2, 1), dtype=torch.float16))


def test_more_prompt_rows_than_one_block(device: str):
    assert_plain(random_case(device, prompt_lens=(70, 3), slots=(0, 1, 0, 0)))


def test_without_any_prompts(device: str):
    assert_plain(random_case(device, prompt_lens=(0,), slots=(0, 0, 0, 0)))


def test_one_slot_for_all(device: str):
    case = random_case(device, prompt_lens=(10,), slots=(0, 0, 0, 0))
    packing = Packing.of(case.lens_B, None, case.q_NHD.device)
    out = packed_attention(*case.leaves[:5], case.prompt_lens_S, case.gate_SH, packing)
    assert torch.equal(out, attend(case, *case.leaves))


def test_gradients_of_the_prompts_alone(device: str):
    """As in the lowest layer that has prompts: nothing below it is trained."""
    case = random_case(device)
    alone = [x.clone().requires_grad_(i >= 3) for i, x in enumerate(case.leaves)]
    together = [x.clone().requires_grad_() for x in case.leaves]
    for leaves in (alone, together):
        attend(case, *leaves).square().sum().backward()
    assert alone[0].grad is alone[1].grad is alone[2].grad is None
    for x, y in zip(alone[3:], together[3:], strict=True):
        assert torch.equal(x.grad, y.grad)


def test_parts_of_larger_tensors(device: str):
    """Queries and values are parts of one product, prompts are one layer of many."""
    case = random_case(device)
    q, k, v, prompt_k, prompt_v, gate = case.leaves
    apart = (
        torch.cat([q, q], dim=1)[:, :3],
        torch.cat([k, k], dim=1)[:, :1],
        torch.cat([v, v], dim=1)[:, :1],
        torch.stack([prompt_k, prompt_k], dim=1)[:, 1, :],
        torch.cat([prompt_v, prompt_v], dim=1)[:, :20],
        gate.double(),
    )
    assert torch.equal(attend(case, *apart), attend(case, *case.leaves))


def test_scores_beyond_the_range_of_exp(device: str):
    case = random_case(device)
    case.q_NHD.mul_(1e3)
    leaves = [x.clone().requires_grad_() for x in case.leaves]
    out = attend(case, *leaves)
    torch.testing.assert_close(
        out.double(), case.plain(*(x.double() for x in case.leaves)), atol=1e-3, rtol=1e-3
    )
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_wrong_shapes_are_our_bug(device: str):
    case = random_case(device)
    q, k, v, prompt_k, prompt_v, gate = case.leaves
    for wrong in ((q, k[1:], v), (q, k, v[:, :0]), (q[1:], k, v)):
        with pytest.raises(AssertionError):
            attend(case, *wrong, prompt_k, prompt_v, gate)
    with pytest.raises(AssertionError):
        attend(case, q, k, v, prompt_k, prompt_v[:1], gate)
    with pytest.raises(AssertionError):
        attend(case, q, k, v, prompt_k, prompt_v, gate[:, :1])
