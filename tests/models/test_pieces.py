"""Work in pieces gives what work at once gives, and pauses on the way."""

from __future__ import annotations

import pytest
import torch

from models.pieces import copy_finite, spread


@pytest.mark.parametrize("shape", [(1, 3), (3, 40_000), (2, 0), (4, 31_999)])
@pytest.mark.parametrize("count", [1, 5, 70])
def test_rows_are_spread_over_slots(shape: tuple[int, int], count: int):
    row_LF = torch.randn(shape).bfloat16()
    pauses: list[int] = []
    all_LSF = spread(row_LF, count, lambda: pauses.append(1))
    assert torch.equal(all_LSF, row_LF[:, None].expand(-1, count, -1))
    assert all_LSF.is_contiguous()
    assert len(pauses) <= all_LSF.numel() // (32_000 * 8)
    assert len(pauses) >= all_LSF.numel() // (32_000 * 16)


@pytest.mark.parametrize("bad", [None, 0, 299_999])
def test_what_is_copied_is_finite(bad: int | None):
    source = torch.randn(3, 100_000).double()
    if bad is not None:
        source.view(-1)[bad] = 1e300  # finite here, not in the place it goes to
    place, pauses = torch.empty(3, 100_000), []
    assert copy_finite(place, source, lambda: pauses.append(1)) == (bad is None)
    if bad is None:
        assert torch.equal(place, source.float())
        assert len(pauses) == 2
