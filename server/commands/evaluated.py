"""What an evaluation asks: somebody's endpoint, or a service of our own for as long as it takes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.child import ERROR_PREFIX
from server.options import load
from server.processes import ANNOUNCED
from server.serving import StartupError
from server.settings import EvaluationSettings, WorkerSettings
from server.supervisor import settings_environment
from train.evaluation.endpoint import Endpoint, Target

DEFAULT_BASE = "smollm2-135m"

_ADAPTER_ID, _BASE_ID = "evaluated", "base"
_COMMAND = (sys.executable, "-m", "server.cli", "serve", "--supervised", "--experts", "")
_ADDRESS = ("--host", "127.0.0.1", "--port", "0", "--log-level", "warning")
_NO_EXPERTS: dict[str, object] = {"experts": []}  # a field of our own API: other endpoints may refuse it
_LOOK_SECONDS = 0.1
_STOP_SECONDS = 20.0


@contextmanager
def evaluated(settings: EvaluationSettings, no_experts: bool = False) -> Iterator[tuple[Endpoint, str]]:
    """The endpoint to ask, and how to call what it serves; our own service never has experts.

    Raises `StartupError`.
    """
    check_choice(settings)
    if settings.url is not None:
        assert settings.model is not None
        key = settings.api_key.get_secret_value() if settings.api_key else os.environ.get("OPENAI_API_KEY")
        body = _NO_EXPERTS if no_experts else {}
        target = Target(settings.url, settings.model, key or "none", body)
        with Endpoint(target, settings.concurrency, kept=_kept(settings)) as endpoint:
            yield endpoint, settings.model
        return
    base = settings.base or DEFAULT_BASE
    with (
        _service(base, settings.adapter) as (url, model),
        Endpoint(
            Target(url, model, body=_NO_EXPERTS, local=True), settings.concurrency, kept=_kept(settings)
        ) as endpoint,
    ):
        yield endpoint, settings.adapter or base


def check_choice(settings: EvaluationSettings) -> None:
    """One thing to evaluate, wholly named. Raises `StartupError`."""
    if settings.url is not None and settings.adapter is not None:
        raise StartupError("--url and --adapter are two things to evaluate; give one of them.")
    if settings.url is not None and settings.model is None:
        raise StartupError("--url needs --model, the id by which that API calls what is to be evaluated.")
    if settings.url is None and settings.adapter is None and settings.base is None:
        raise StartupError(
            "nothing to evaluate is named; give --adapter FOLDER, --url URL --model ID, or --base for the "
            "base alone."
        )


def _kept(settings: EvaluationSettings) -> Path | None:
    """Where answers are written as they come: a pipe or a terminal gets them once, at the end."""
    file = settings.predictions
    return file if file is not None and (file.is_file() or not file.exists()) else None


@contextmanager
def _service(base: str, adapter: str | None) -> Iterator[tuple[str, str]]:
    """`llama-adapter serve` as a child, without experts: its API's address and the model's id.

    It takes the worker's settings (device, dtype, cache and so on) from our environment and nothing else
    of it. Ours is the only adapter: shipped ones would be loaded for nothing.
    """
    with tempfile.TemporaryDirectory(prefix="llama-adapter-") as name:
        output, no_adapters = Path(name) / "output", Path(name) / "adapters"
        no_adapters.mkdir()
        adapters = () if adapter is None else (f"{_ADAPTER_ID}={adapter}",)
        given = {"base": base, "base_id": _BASE_ID, "adapters": adapters, "adapter_dir": no_adapters}
        with (
            output.open("w") as file,
            subprocess.Popen(  # noqa: S603
                [*_COMMAND, *_ADDRESS],
                stdin=subprocess.PIPE,  # held open and never written to: see `exit_with_parent`
                stdout=file,
                stderr=subprocess.STDOUT,
                env=settings_environment(load(WorkerSettings, given)),
                start_new_session=True,  # a Ctrl-C at the terminal is ours to handle
            ) as process,
        ):
            try:
                yield f"{_address(process, output)}/v1", _BASE_ID if adapter is None else _ADAPTER_ID
            finally:
                _stop(process)


def _address(process: subprocess.Popen[bytes], output: Path) -> str:
    """Where the service is, once it says so. Raises `StartupError` with its own words if it ends before."""
    while True:
        ended = process.poll() is not None
        lines = output.read_text(errors="replace").splitlines(keepends=True)
        for line in lines:
            if line.startswith(ANNOUNCED) and line.endswith("\n"):
                return line.removeprefix(ANNOUNCED).strip()
        if ended:
            errors = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
            raise StartupError(
                errors[-1].strip() if errors else "the service did not start: " + "".join(lines)
            )
        time.sleep(_LOOK_SECONDS)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    process.kill()
