"""Prompts in vLLM's blocks, attended to by the CPU's kernel, against the formula in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.kernels.prompt_block_cpu import add_prompts
from models.kernels.scalars_cpu import array

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROWS = 32
LENGTHS = (1, 10, 16, 17, 32, 0)  # of the slots' prompts
SLOTS = (0, 1, -1, 2, 3, 4, 1, 5, 0)  # of the tokens
BLOCKS = (6, 1, 2, 3, 4, 5, 1, 7, 6)


def found_and_expected(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, gap: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The output before, after, and by the formula. `gap`: heads between two tokens' queries."""
    H, G = heads
    torch.manual_seed(0)
    N, S = len(SLOTS), len(LENGTHS)
    q_NF = torch.randn(N, (H + gap) * head_dim).to(dtype)
    cache_PGF = torch.randn(8, G, 2, ROWS * head_dim).to(dtype)
    k_PGDs = cache_PGF[:, :, 0].unflatten(-1, (head_dim, ROWS))
    v_PsGD = cache_PGF[:, :, 1].unflatten(-1, (ROWS, head_dim)).transpose(1, 2)
    facts_SF = torch.cat([torch.tensor(LENGTHS)[:, None], torch.randn(S, H)], dim=1).to(dtype)
    before_NHD = torch.randn(N, H, head_dim).to(dtype)
    out_NHD = before_NHD.clone()
    q_NHD = q_NF[:, : H * head_dim].unflatten(-1, (H, head_dim)).double()
    expected_NHD = before_NHD.double()
    for n, (slot, p) in enumerate(zip(SLOTS, BLOCKS, strict=True)):
        K = LENGTHS[slot] if slot >= 0 else 0
        k_PGDs[p, :, :, K:] = v_PsGD[p, K:] = torch.nan  # as a request may have left the block
        if not K:
            continue
        k_HDK = k_PGDs[p, :, :, :K].double().repeat_interleave(H // G, 0)
        v_HKD = v_PsGD[p, :K].double().transpose(0, 1).repeat_interleave(H // G, 0)
        weights_HK = (q_NHD[n, :, None] @ k_HDK * head_dim**-0.5).softmax(-1)
        expected_NHD[n] += facts_SF[slot, 1:, None].double() * (weights_HK @ v_HKD)[:, 0]
    add_prompts(
        q_NF.data_ptr(),
        q_NF.stride(0) // head_dim,
        out_NHD.data_ptr(),
        H,
        head_dim**-0.5,
        array(k_PGDs),
        array(v_PsGD),
        np.array(BLOCKS, np.int32),
        np.array(SLOTS, np.int64),
        array(facts_SF),
        0,
        1,
    )
    return before_NHD, out_NHD, expected_NHD


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_precisions_and_head_sizes(head_dim: int, dtype: torch.dtype):
    before, found, expected = found_and_expected((3, 1), head_dim, dtype)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(found[2], before[2])
    assert torch.equal(found[7], before[7])


@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (7, 1), (8, 2)])
def test_groups_of_heads_and_queries_that_lie_apart(heads: tuple[int, int]):
    _, found, expected = found_and_expected(heads, 64, torch.float32, gap=2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
