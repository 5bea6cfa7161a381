"""What every worker process of a DataLoader does first."""

from __future__ import annotations

import signal

import torch


def quiet_worker(_: int) -> None:
    """Leave signals to the training process, which ends its workers itself; one thread each.

    A terminal sends Ctrl-C, and torchrun SIGTERM, to the whole process group: workers that died of it
    would break the step that is to be finished.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
