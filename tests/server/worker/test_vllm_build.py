"""What of a start on vLLM fails in one sentence; there is no vLLM here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, field_validator
from tiny_base import tiny_config, write_tiny_base

from server.serving import StartupError
from server.settings import WorkerSettings
from server.worker import vllm_build
from server.worker.build import build, follow


class Strict(BaseModel):
    """Refuses as vLLM's configurations do."""

    devices: int

    @field_validator("devices")
    @classmethod
    def _check(cls, value: int) -> int:
        raise ValueError("of these there are\nnot so many")


def refusal() -> ValidationError:
    with pytest.raises(ValidationError) as refused:
        Strict(devices=2)
    return refused.value


def start(base: Path, **changes: Any) -> None:
    build(WorkerSettings(engine="vllm", base=str(base), shipped_adapters=False, **changes))


def test_a_step_must_hold_a_token_of_each_sequence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="max_num_batched_tokens must be max_num_seqs at least: raise"):
        start(tmp_path, max_num_seqs=600)


def test_devices_that_cannot_share_the_base_are_refused_with_those_that_can(tmp_path: Path) -> None:
    write_tiny_base(tmp_path)
    config = tiny_config()
    assert (config.num_heads, config.num_kv_heads) == (6, 2)
    for devices in (3, 4):
        sentence = rf"tensor_parallel {devices} cannot share the base's 6 heads .*; possible are 1, 2, 6\."
        with pytest.raises(StartupError, match=sentence):
            start(tmp_path, tensor_parallel=devices)
    shared = {"tensor_parallel": 4, "nnodes": 2, "master_addr": "a", "vllm_adapters": "all", "node_rank": 1}
    with pytest.raises(StartupError, match="tensor_parallel 4 cannot share"):
        follow(WorkerSettings(engine="vllm", base=str(tmp_path), **shared))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("Initialization failed. See above."), "Initialization failed. See above."),
        (ValueError("no\nroom"), "no room"),
        (refusal(), "of these there are not so many"),
    ],
)
def test_what_vllm_says_when_it_does_not_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    write_tiny_base(tmp_path)
    monkeypatch.setattr(vllm_build, "_import_vllm", lambda: SimpleNamespace(Vllm=fail, follow=fail))
    shared = {"tensor_parallel": 2, "nnodes": 2, "master_addr": "a", "vllm_adapters": "all", "node_rank": 1}
    follower = WorkerSettings(engine="vllm", base=str(tmp_path), **shared)  # type: ignore[arg-type]
    for begin in (lambda: start(tmp_path), lambda: follow(follower)):
        with pytest.raises(StartupError) as refused:
            begin()
        assert str(refused.value) == f"vLLM did not start: {sentence}"
