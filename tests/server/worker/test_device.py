"""A GPU is waited for, so that it says what it has, and told apart from others; a processor is neither."""

from __future__ import annotations

import pytest
import torch

from server.worker.device import check_device, use_device


def test_only_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    for name in ("cpu", "cuda:1"):
        check_device(torch.device(name))
    assert asked == [torch.device("cuda:1")]


def test_a_thread_means_the_gpu_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without a number is the thread's own already."""
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for name in ("cpu", "cuda", "cuda:1"):
        use_device(torch.device(name))
    assert used == [torch.device("cuda:1")]
