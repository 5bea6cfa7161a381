"""A command without its packages says which extras bring them; a fault of our own stays one."""

from __future__ import annotations

import pytest

from server.commands.installed import installed
from server.serving import StartupError


def test_a_missing_package_is_named_with_its_extras() -> None:
    with (
        pytest.raises(StartupError, match=r"^matplotlib is not installed; .*server\[worker,train\]\.$"),
        installed("worker,train"),
    ):
        raise ModuleNotFoundError(name="matplotlib")


@pytest.mark.parametrize("ours", ["train.main", "models", "experts.app", "server.cli"])
def test_a_missing_module_of_ours_is_our_fault(ours: str) -> None:
    with pytest.raises(ModuleNotFoundError), installed("worker"):
        raise ModuleNotFoundError(name=ours)
