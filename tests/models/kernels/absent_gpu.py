"""Triton compiles for a GPU that is not here, and launches nothing. For programs of their own: Triton either
compiles or interprets for all of a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class AbsentGPU:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(tell: Callable[[str, Any], None] = lambda name, kernel: None) -> None:
    """From here on. `tell` is given the name of a kernel that is to be launched, and what it compiles to."""
    run = JITFunction.run

    def run_nothing(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tell(self.__name__, run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(AbsentGPU())
    JITFunction.run = run_nothing  # type: ignore[method-assign]
