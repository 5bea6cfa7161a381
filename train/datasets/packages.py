"""Public packages as sources of data: fetched with their own clients, or given, and checked."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from train.errors import TrainError


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a package. `command` fetches it into the working folder; `option` gives the file."""

    name: str
    command: tuple[str, ...]
    option: str
    sha256: str
    size: int  # bytes


def package_file(package: Package, given: Path | None, folder: Path, progress: Progress) -> Path:
    """The package's file: the `given` one, or fetched into the empty `folder`.

    Raises TrainError where it cannot be had, or is not the very file that this project knows.
    """
    file = given or _fetch(package, folder, progress)
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise TrainError(f"{file}: cannot be read ({error.strerror}); correct {package.option}") from error
    if digest != package.sha256:
        raise TrainError(
            f"{file}: its SHA-256 is {digest}, that of {package.name} is {package.sha256}; "
            f"give that file with {package.option}"
        )
    return file


def _fetch(package: Package, folder: Path, progress: Progress) -> Path:
    """By the user's own client: sources, proxy and certificates are its settings."""
    client, *arguments = package.command
    program = shutil.which(client)
    if program is None:
        raise TrainError(
            f"{package.name}: {client} is not here to fetch it; give it with {package.option} FILE"
        )
    log = folder / ".log"
    task = progress.add_task(f"download {package.name}", total=package.size)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - a fixed command
            [program, *arguments], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                progress.update(task, completed=sum(file.stat().st_size for file in _files(folder)))
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait()
    found = _files(folder)
    if process.returncode != 0 or len(found) != 1:
        said = log.read_text(errors="replace").split("\n")
        reason = " ".join([line.strip() for line in said if line.strip()][-2:])
        raise TrainError(
            f"{package.name}: {client} could not fetch it ({reason}); fetch it elsewhere and give it with "
            f"{package.option} FILE"
        )
    progress.update(task, completed=package.size)
    return found[0]


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
