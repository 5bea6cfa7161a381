"""The accelerator: which one a thread means, and whether it computes at all, asked after it failed once."""

from __future__ import annotations

import torch


def use_device(device: torch.device) -> None:
    """For the calling thread. Triton, events and streams take the thread's own GPU, which is the first until
    told otherwise, wherever their tensors lie."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def check_device(device: torch.device) -> None:
    """Raises RuntimeError where a GPU has lost its context: all that it is given from then on fails as well.

    Waits for all that it was given. Any other failure, such as a lack of memory, was that one step's alone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
