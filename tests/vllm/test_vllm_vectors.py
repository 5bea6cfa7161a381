"""What a step's tokens read out of the adapters' vectors."""

from __future__ import annotations

import pytest
import torch

from models.vllm_plugin.vectors import Step, Tuned

pytestmark = pytest.mark.vllm

SPANS = {"bias.wq": (0, 2), "scale_out.wq": (2, 4), "scale_in.wq": (4, 6)}


def test_vectors_that_overflow_are_their_own_adapter_s_trouble() -> None:
    """A token without an adapter looks into the first slot, whose numbers may be beyond the base's type."""
    flat_SF = torch.full((1, 6), 1e5).to(torch.float16)
    assert flat_SF.isinf().all()
    own_N1 = torch.tensor([[True], [False]])
    step = Step(torch.zeros(2, dtype=torch.long), own_N1, None, torch.zeros(2, dtype=torch.long), None)
    x_NC = torch.ones(2, 2, dtype=torch.float16)
    tuned = Tuned(flat_SF, {}, SPANS, step)
    for changed in (tuned.before("wq", x_NC), tuned.after("wq", x_NC)):
        assert not changed[0].isfinite().any()
        assert torch.equal(changed[1], x_NC[1])
