"""Builds the images of deploy/Dockerfile without Docker, starts them as compose does, and asks them.

    make rehearse-images

Each stage's steps run in a Debian root that debootstrap makes, in layers. Then a tiny training runs, and
gateway, worker and expert start as their user, with a root that is read only, without capabilities, on a host
(`hosts.py`) each, with compose's environment and volumes; then once more with the worker on vLLM's CPU build.
Needs root, debootstrap and a Debian mirror; where pip finds packages on this machine alone, `--mount` shows
it those places.

What this is not: Debian's Python 3.11 stands in for the image of Python, and compose's limits of memory and
processors, its shared memory and its networks are not set.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from deploy.rehearsal.hosts import Host, enter_namespaces, make_switch
from deploy.rehearsal.stages import Builder, Image, call, mounted

_ROOT = Path(__file__).resolve().parents[2]
_BUILD = _ROOT / "build" / "rehearsal"
_WORKERS = {"worker": "worker", "worker-vllm": "worker-vllm-cpu"}  # in turn: target, and service of compose
_READY_SECONDS = 600.0
_ADMIN_KEY = "rehearsal"
# What a tiny training is told, and where compose's volumes then have it.
_TRAIN = (
    "train", "smollm2-text", "data.instruct.path=/data/instruct.jsonl", "optimizer.max_steps=2",
    "optimizer.batch_size=2",
)  # fmt: skip
_TRAINED = "smollm2-text/adapter"


def debian(mirror: str) -> Path:
    """A root with Debian and its Python, made once. Raises `RuntimeError`."""
    root = _BUILD / "debian"
    if not (root / "usr/include/python3.11/Python.h").exists():
        shutil.rmtree(root, ignore_errors=True)
        call(["debootstrap", "--variant=minbase", "bookworm", str(root), mirror])
        packages = "python3.11-venv python3.11-dev ca-certificates"  # with headers, as Python's image has
        install = f"apt-get update && apt-get install --yes --no-install-recommends {packages}"
        with mounted(root, [Path("/etc/resolv.conf"), Path("/dev"), Path("/proc")]):
            call(["chroot", str(root), "/bin/sh", "-c", install])
    python = root / "usr/local/bin/python"
    if not python.is_symlink():
        python.symlink_to("/usr/bin/python3.11")
    return root


def compose() -> dict[str, Any]:
    """The services as Docker Compose reads them."""
    program = _ROOT / ".venv-deploy" / "bin" / "docker-compose"
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    clean |= {"ADMIN_KEYS": json.dumps([_ADMIN_KEY]), "KV_CACHE_MIB": "256"}
    profiles = [f"--profile={name}" for name in ("cpu", "vllm-cpu", "train")]
    words = [str(program), *profiles, "config", "--format", "json"]
    done = subprocess.run(words, cwd=_ROOT, env=clean, capture_output=True, text=True, check=True)
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@dataclass
class Container:
    """A service of compose, started from its image."""

    name: str
    image: Image
    service: dict[str, Any]
    host: Host
    root: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def prepare(self, hosts: Path, volumes: Path) -> None:
        """Its file system: the image, read only, with /tmp, volumes, and the other hosts' names."""
        self.root.mkdir(parents=True)
        call(["mount", "--bind", str(self.image.root), str(self.root)])
        (self.image.root / "etc/hosts").touch()
        for folder in ("dev", "sys"):
            (self.image.root / folder).mkdir(exist_ok=True)
        for volume in self.service.get("volumes", ()):
            place = self.image.root / volume["target"].lstrip("/")
            if not place.is_dir():
                raise RuntimeError(f"{self.name}: the image has no folder {volume['target']} for its volume")
            source = volumes / volume["source"]
            if not source.exists():  # a new volume takes over the image's owner
                source.mkdir(parents=True)
                os.chown(source, place.stat().st_uid, place.stat().st_gid)
        call(["mount", "--options", "remount,bind,ro", str(self.root)])
        call(["mount", "--bind", str(hosts), str(self.root / "etc/hosts")])
        call(["mount", "--rbind", "/dev", str(self.root / "dev")])
        call(["mount", "--bind", "/sys", str(self.root / "sys")])  # vLLM asks lscpu for processors
        call(["mount", "--options", "remount,bind,ro", str(self.root / "sys")])
        for mount in self.service["tmpfs"]:
            path, _, options = mount.partition(":")
            options = f"noexec,nosuid,nodev,{options}"  # Docker's own, the last word counts
            call(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.root / path.lstrip("/"))])
        for volume in self.service.get("volumes", ()):
            place = str(self.root / volume["target"].lstrip("/"))
            call(["mount", "--bind", str(volumes / volume["source"]), place])
            if volume.get("read_only"):
                call(["mount", "--options", "remount,bind,ro", place])

    @property
    def environment(self) -> dict[str, str]:
        told = self.service.get("environment", {})
        return self.image.env | {name: value or "" for name, value in told.items()}

    def inside(self, *words: str) -> tuple[str, ...]:
        """The command that runs `words` in here, as the image's user and confined as compose says."""
        user, _, group = self.service["user"].partition(":")
        confined = ("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs")
        powerless = ("--bounding-set=-all", "--inh-caps=-all")
        namespaces = (
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        )
        root = (f"--root={self.root}", f"--wd={self.image.workdir}")
        return self.host.inside(*namespaces, *root, *confined, *powerless, *words)

    def start(self, *command: str) -> None:
        words = [*self.image.entrypoint, *(command or self.image.command)]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self.inside(*words), env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def run(self, *words: str) -> int:
        done = subprocess.run(self.inside(*words), env=self.environment, capture_output=True, check=False)
        return done.returncode

    def until_healthy(self) -> float:
        """Seconds until its own health check says so. Raises `RuntimeError`."""
        begun = time.monotonic()
        while self.run(*self.image.healthcheck):
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > begun + _READY_SECONDS:
                kept = shutil.copy(self.log, _BUILD / f"{self.name}.log")
                raise RuntimeError(
                    f"{self.name} does not become healthy; see {kept}: {self.log.read_text()[-4000:]}"
                )
            time.sleep(0.5)
        return time.monotonic() - begun

    def stop(self) -> int:
        """SIGTERM to its first process, as `docker stop` does; the exit code."""
        assert self.process is not None
        [first] = psutil.Process(self.process.pid).children()
        first.terminate()
        return self.process.wait(60)


def smoke(url: str) -> list[str]:
    """What is not as it should be with the service at `url`."""
    faults = []
    shipped = [folder.name for folder in (_ROOT / "models" / "shipped").iterdir() if folder.is_dir()]
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as http:
        admin = {"authorization": f"Bearer {_ADMIN_KEY}"}
        loaded = http.post("/v1/adapters", json={"id": "trained", "path": _TRAINED}, headers=admin)
        if loaded.status_code not in (201, 409):
            faults.append(f"what was trained is not loaded: {loaded.text}")
        models = [model["id"] for model in http.get("/v1/models").json()["data"]]
        if models != ["smollm2-135m", *sorted([*shipped, "trained"])]:
            faults.append(f"models: {models}")
        text = _chat(http, "What is the capital of France?")["choices"][0]["message"]["content"]
        if "Paris" not in text:
            faults.append(f"an answer: {text!r}")
        for adapter in (*shipped, "trained"):
            _chat(http, "What is the capital of France?", adapter)
        picture = base64.b64encode((_ROOT / "docs" / "sign.png").read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        answer = _chat(http, [{"type": "text", "text": "What does this sign say?"}, image])
        readings = {expert["name"]: (expert["outcome"], expert["text"]) for expert in answer["experts"]}
        if set(readings) != {"ocr", "classifier", "caption"} or "CITY LIBRARY" not in readings["ocr"][1]:
            faults.append(f"experts: {readings}")
        faults += [f"{name}: {r}" for name, r in readings.items() if r[0] not in ("ok", "empty")]
        if "<html" not in http.get("/").text:
            faults.append("there is no page")
    return faults


def _chat(http: httpx.Client, content: Any, model: str = "smollm2-135m") -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "max_tokens": 32, "temperature": 0}
    answer: dict[str, Any] = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer


def train(image: Image, service: dict[str, Any], folder: Path) -> list[str]:
    """Run a tiny training as compose does; what is not as it should be."""
    host = Host("train", 9)
    host.connect()
    host.cut()  # `network_mode: none`
    data = folder / "volumes" / "data"
    data.mkdir(parents=True)
    rows = [
        {"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(2, 12)
    ]
    (data / "instruct.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = folder / "hosts-train"
    names.write_text("127.0.0.1 localhost\n")
    container = Container("train", image, service, host, folder / "running" / "train", folder / "train.log")
    container.prepare(names, folder / "volumes")
    begun = time.monotonic()
    container.start(*_TRAIN)
    assert container.process is not None
    code = container.process.wait(_READY_SECONDS)
    print(f"train ended with {code} after {time.monotonic() - begun:.1f} s", flush=True)
    adapter = folder / "volumes" / "runs" / _TRAINED / "adapter.json"
    if code or not adapter.is_file():
        return [f"train: {code}, {container.log.read_text()[-4000:]}"]
    return []


def rehearse(images: dict[str, Image], services: dict[str, Any], worker: str, folder: Path) -> list[str]:
    """Start the service with this worker as compose does, ask, and stop it; what is not as it should be."""
    started = (worker, "expert", "gateway")
    first = 10 * (1 + list(_WORKERS).index(worker))
    hosts = {name: Host(f"{name[:8]}-{first + i}", first + i) for i, name in enumerate(started)}
    names = folder / f"hosts-{worker}"
    aliases = {name: "worker" if name == worker else name for name in started}
    lines = ["127.0.0.1 localhost", *(f"{host.address} {aliases[name]}" for name, host in hosts.items())]
    names.write_text("\n".join(lines) + "\n")
    containers = []
    for name, host in hosts.items():
        host.connect()
        root, log = folder / "running" / worker / name, folder / f"{worker}-{name}.log"
        service = services[_WORKERS.get(name, name)]
        containers.append(Container(name, images[name], service, host, root, log))
    for container in containers:
        container.prepare(names, folder / "volumes")
        container.start()
    for container in containers:
        print(f"{container.name} is healthy after {container.until_healthy():.1f} s", flush=True)
    faults = smoke(f"http://{hosts['gateway'].address}:8000")
    for container in containers:
        if container.run("touch", "/opt/venv/written") == 0 or container.run("touch", "/written") == 0:
            faults.append(f"{container.name}: its root can be written to")
        if container.run("touch", "/tmp/written"):
            faults.append(f"{container.name}: /tmp cannot be written to")
    for container in reversed(containers):
        with suppress(ValueError):
            begun = time.monotonic()
            code = container.stop()
            print(f"{container.name} ended with {code} after {time.monotonic() - begun:.1f} s", flush=True)
            if code or "Traceback" in container.log.read_text():
                faults.append(f"{container.name}: {code}, {container.log.read_text()[-2000:]}")
    return faults


def _clean(folder: Path) -> None:
    """Take away what is mounted below `folder`, and it."""
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed([place for place in places if place.startswith(f"{folder}/")]):
        call(["umount", "--lazy", place])
    shutil.rmtree(folder)


def main(
    mount: Annotated[list[Path] | None, typer.Option(help="of this machine, for pip to see")] = None,
    mirror: Annotated[str, typer.Option(help="of Debian")] = "http://deb.debian.org/debian",
    torch_index: Annotated[str | None, typer.Option(help="the build argument")] = None,
    workers: Annotated[str, typer.Option(help="with which the service is started in turn")] = " ".join(
        _WORKERS
    ),
) -> None:
    """Exit code 1 if anything is not as it should be. The images are gone afterwards."""
    if os.geteuid():
        sys.exit("error: this needs root: debootstrap makes devices, and files of several owners.")
    if not shutil.which("debootstrap"):
        sys.exit("error: debootstrap is not installed; apt-get install debootstrap.")
    enter_namespaces("deploy.rehearsal.images")
    args = {"VLLM": "cpu"} | ({} if torch_index is None else {"TORCH_INDEX": torch_index})
    _BUILD.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=_BUILD))
    try:
        file = _ROOT / "deploy" / "Dockerfile"
        builder = Builder(file, _ROOT, debian(mirror), folder / "stages", mount or [], args)
        targets = ("train", "expert", "gateway", *workers.split())
        images, services = {target: builder.build(target) for target in targets}, compose()
        make_switch()
        faults = train(images["train"], services["train"], folder)
        for worker in workers.split():
            faults += rehearse(images, services, worker, folder)
    finally:
        _clean(folder)
    print("\n".join(faults) or "Built, started, asked and stopped: all as it should be.")
    sys.exit(bool(faults))


if __name__ == "__main__":
    typer.run(main)
