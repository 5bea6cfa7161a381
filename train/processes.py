"""The processes of one training: one alone, or several that torchrun started."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from types import FrameType

import torch
from torch import Tensor
from torch import distributed as dist

from train.errors import Interrupted, TrainError

_TIMEOUT = timedelta(hours=12)  # the first process may prepare data for long while the others wait


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's place among them."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over all processes, in one message."""
        if self.world == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten().to(torch.float32) for tensor in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise TrainError(
                "another process of this training has ended; its own message says why"
            ) from error
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process. None goes on before all have said."""
        [count] = self.sum([torch.tensor(float(flag), device=self.device)])
        return bool(count > 0)


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Meet the other processes, by the environment that torchrun sets. nccl on GPUs, gloo on CPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    # Imported when a group is there, as AdamW does, its functions keep it as a default argument: the group
    # would outlive its destruction, and its threads now and then abort a process that ends (torch 2.13).
    import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(rank, world, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index if device.index is not None else local_rank)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # A resumed run shall end with the same bits; kernels that cannot promise it say so.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainError(f"compute.device: {name!r} cannot be used: {reason}") from error
    return device


class StopSignal:
    """Whether SIGTERM or Ctrl-C has come. The step under way is finished, then all is saved."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """For stretches in which there is nothing to save. Raises Interrupted."""
        if self.requested:
            raise Interrupted

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:  # asked twice: at once, then
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Listen while in the context; the handlers from before are put back. In the main thread only."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
