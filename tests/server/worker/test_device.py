"""A GPU is waited for, so that it says what it has; a processor has nothing to say."""

from __future__ import annotations

import pytest
import torch

from server.worker.device import check_device


def test_only_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    for name in ("cpu", "cuda:1"):
        check_device(torch.device(name))
    assert asked == [torch.device("cuda:1")]
