"""How worker processes of a DataLoader begin."""

from __future__ import annotations

import signal
import sys

import torch


def quiet_worker(_: int) -> None:
    """Leave signals to the training process, which ends its workers itself; one thread each.

    A terminal sends Ctrl-C, and torchrun SIGTERM, to the whole process group: workers that died of it
    would break the step that is to be finished.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def worker_start(workers: int) -> str | None:
    """How this many workers are started: by a fork where that is safe, else as Python does by itself.

    A forked one has the data set at hand, stores and features that are mapped files among it. Since Python
    3.14 the default on Linux sends it all through a pipe, which functions inside of functions cannot go.
    """
    return "fork" if workers and sys.platform == "linux" else None
