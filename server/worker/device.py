"""Whether the accelerator can compute at all, asked after it failed once."""

from __future__ import annotations

import torch


def check_device(device: torch.device) -> None:
    """Raises RuntimeError where a GPU has lost its context: all that it is given from then on fails as well.

    Waits for all that it was given. Any other failure, such as a lack of memory, was that one step's alone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
