"""Builds the stages of a Dockerfile without Docker: each in a folder, as layers over a Debian root.

Knows what deploy/Dockerfile uses of the language: ARG, ENV, WORKDIR, COPY, RUN, USER, ENTRYPOINT, CMD,
HEALTHCHECK, LABEL, EXPOSE. Anything else is refused, rather than left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

Instruction = tuple[str, str]  # its name, its arguments


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    parent: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """A built stage. `root` is its whole file system, for as long as its mounts are there."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()


def parse(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """The ARGs before the first stage with their defaults, and the stages by name."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    before: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    name, parent, body = "", "", []  # type: str, str, list[Instruction]
    for line in [*re.sub(r"\s*\\\n\s*", " ", text).splitlines(), "FROM "]:
        word, _, rest = line.strip().partition(" ")
        if word == "FROM" or line == "FROM ":
            if name:
                stages[name] = Stage(name, parent, tuple(body))
            parent, _, name = rest.partition(" AS ")
            body = []
        elif word == "ARG" and not name:
            before |= dict([rest.split("=", 1)])
        elif word:
            body.append((word, rest))
    return before, stages


class Builder:
    """`mounts` are paths of this machine that RUN sees too, read only: what pip needs to find packages."""

    def __init__(
        self,
        dockerfile: Path,
        context: Path,
        debian: Path,
        folder: Path,
        mounts: list[Path],
        args: dict[str, str],
    ) -> None:
        before, self.stages = parse(dockerfile.read_text())
        self._before = before | {name: value for name, value in args.items() if name in before}
        self._ignored = (context / ".dockerignore").read_text().split()
        self._context = context
        self._debian = debian
        self._folder = folder
        self._mounts = mounts
        self._args = args
        self._built: dict[str, Image] = {}
        self._layers: dict[str, list[Path]] = {}  # by stage, the uppermost first

    def build(self, name: str) -> Image:
        """Raises `RuntimeError` with what a step said."""
        if name not in self._built:
            print(f"building {name}", flush=True)
            stage = self.stages[name]
            parent = _expanded(stage.parent, self._before)
            if parent in self.stages:
                below = self.build(parent)
                layers = self._layers[parent]
            else:
                below, layers = Image(self._debian, _PYTHON_ENV), [self._debian]
            image = replace(below, root=self._overlay(name, layers))
            for word, rest in stage.instructions:
                image = self.apply(image, word, rest)
            self._built[name] = image
        return self._built[name]

    def _overlay(self, name: str, layers: list[Path]) -> Path:
        root, upper, work = (self._folder / name / part for part in ("root", "upper", "work"))
        for path in (root, upper, work):
            path.mkdir(parents=True)
        self._layers[name] = [upper, *layers]
        lower = ":".join(map(str, layers))
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        call(["mount", "-t", "overlay", "overlay", "-o", options, str(root)])
        return root

    def apply(self, image: Image, word: str, rest: str) -> Image:
        """What the instruction makes of `image`. Raises `RuntimeError`."""
        match word:
            case "ARG":
                name, _, default = rest.partition("=")
                return replace(image, env=image.env | {name: self._args.get(name, default)})
            case "ENV":
                pairs = [pair.split("=", 1) for pair in shlex.split(rest)]
                new = {name: _expanded(value, image.env) for name, value in pairs}
                return replace(image, env=image.env | new)
            case "WORKDIR":
                (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
                return replace(image, workdir=rest)
            case "USER":
                return replace(image, user=rest)
            case "ENTRYPOINT":
                return replace(image, entrypoint=tuple(json.loads(rest)))
            case "CMD":
                return replace(image, command=tuple(json.loads(rest)))
            case "HEALTHCHECK":
                _, _, check = rest.partition("CMD ")
                return replace(image, healthcheck=tuple(json.loads(check)) if check else ())
            case "COPY":
                self._copy(image, rest)
            case "RUN":
                self._run(image, rest)
            case "LABEL" | "EXPOSE":
                pass
            case _:
                raise RuntimeError(f"{word} {rest}: this is not understood here")
        return image

    def _copy(self, image: Image, rest: str) -> None:
        words = shlex.split(rest)
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        origin = self.build(options["from"]).root if "from" in options else self._context
        place = Path(image.workdir, target)
        for source in sources:
            if origin is self._context and f"!{source}" not in self._ignored:
                raise RuntimeError(f"COPY {source}: .dockerignore leaves it out")
            inside = image.root / str(place).lstrip("/")
            if target.endswith("/"):
                inside /= Path(source).name
            inside.parent.mkdir(parents=True, exist_ok=True)
            _copy_tree(origin / source.lstrip("/"), inside)
            if "chown" in options:
                call(["chown", "--recursive", options["chown"], str(inside)])

    def _run(self, image: Image, shell: str) -> None:
        paths = [*self._mounts, Path("/etc/resolv.conf"), Path("/dev"), Path("/proc")]
        with mounted(image.root, paths):
            command = ["chroot", str(image.root), "/bin/sh", "-c", f"cd {image.workdir} && {shell}"]
            # What tells pip where packages are comes from outside, as Docker's own proxies do.
            pip = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
            call(command, pip | image.env)


_PYTHON_ENV = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


@contextlib.contextmanager
def mounted(root: Path, paths: Sequence[Path]) -> Iterator[None]:
    """`paths` of this machine at the same places below `root`; taken away again afterwards."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            place = root / str(path).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            elif not place.exists():
                place.touch()
                stack.callback(place.unlink)
            call(["mount", "--rbind" if path.is_dir() else "--bind", str(path), str(place)])
            call(["mount", "--make-rslave", str(place)])
            stack.callback(call, ["umount", "--recursive", "--lazy", str(place)])
        yield


def _copy_tree(source: Path, target: Path) -> None:
    if source.is_dir():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignore)
    else:
        shutil.copy2(source, target)


def _expanded(value: str, env: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: env.get(found[1], ""), value)


def call(words: list[str], env: dict[str, str] | None = None) -> None:
    """Raises `RuntimeError` with what it said if it fails."""
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
