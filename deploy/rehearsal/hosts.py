"""Network namespaces as hosts on one switch, with links that can be cut and delayed.

    client ── switch ──┬── gateway
      (bridge)         ├── worker-0
                       └── …

All of it is made inside namespaces of the program's own (`enter_namespaces`), so that nothing is left when
it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

_NETWORK = "10.77.0"
_SWITCH = "switch"
_NAMESPACES = Path("/run/netns")
_INSIDE = "REHEARSAL_INSIDE"
_CLONE_NEWNET = 0x40000000
_FRAME_BYTES = 65536
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


class NoNamespaces(Exception):
    """This machine lets nobody make network namespaces; the message says what failed."""


def enter_namespaces(module: str) -> None:
    """Start `module` again in namespaces of mounts and processes, once; `make_switch` gives it a network.

    Whoever is not root becomes root inside a user namespace, where the kernel allows that.
    Raises `NoNamespaces`.
    """
    if os.environ.pop(_INSIDE, None):
        return
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    # It ends with us; mounts are not seen outside.
    unshare = ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise NoNamespaces(f"{' '.join(unshare)}: {tried.stderr.strip()}")
    os.execvpe(
        "unshare", [*unshare, sys.executable, "-m", module, *sys.argv[1:]], os.environ | {_INSIDE: "1"}
    )


def command(*words: str) -> None:
    """Raises `RuntimeError` with what it said if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def make_switch() -> None:
    """Leave the machine's network for one with nothing in it but the switch that hosts are connected to."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise NoNamespaces(f"unshare of the network: {os.strerror(ctypes.get_errno())}")
    command("mount", "-t", "tmpfs", "tmpfs", "/run")
    _NAMESPACES.mkdir()
    command("ip", "link", "set", "lo", "up")
    command("ip", "link", "add", "name", _SWITCH, "type", "bridge")
    command("ip", "address", "add", f"{_NETWORK}.1/24", "dev", _SWITCH)
    command("ip", "link", "set", _SWITCH, "up")


@dataclass
class Host:
    """A namespace with one link to the switch. `name` has up to 15 characters."""

    name: str
    number: int  # the last part of its address
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    wire: Wire | None = None  # in the place of a cable, where the link is to be delayed

    @property
    def address(self) -> str:
        return f"{_NETWORK}.{self.number}"

    def connect(self, *, delayable: bool = False) -> None:
        command("ip", "netns", "add", self.name)
        if delayable:
            self.wire = Wire(_tap(self.name), _tap("eth0"))
            command("ip", "link", "set", "eth0", "netns", self.name)
        else:
            pair = ("name", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            command("ip", "link", "add", *pair)
        command("ip", "link", "set", self.name, "master", _SWITCH, "up")
        for words in (
            ("address", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            command(*self.inside("ip", *words))
        if self.wire:
            self.wire.start()

    def inside(self, *words: str) -> tuple[str, ...]:
        """The command that runs `words` on this host."""
        return ("nsenter", f"--net={_NAMESPACES / self.name}", *words)

    def start(self, *words: str, log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a process here; its output goes to the end of `log`."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.inside(*words), env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self.processes.append(process)
        return process

    def cut(self) -> None:
        """Pull the plug at the switch: what is sent is lost, and nobody is told."""
        command("ip", "link", "set", self.name, "down")

    def mend(self) -> None:
        command("ip", "link", "set", self.name, "up")


def _tap(name: str) -> int:
    """A new TAP device: whoever holds the descriptor is the other end of its cable."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return device


class Wire(threading.Thread):
    """Carries Ethernet frames between two TAP devices, each `delay` seconds late.

    Does what `tc … netem delay` does, which many kernels are built without.
    """

    def __init__(self, one: int, other: int) -> None:
        super().__init__(daemon=True)
        self.delay = 0.0
        self._across = {one: other, other: one}
        self._under_way: deque[tuple[float, int, bytes]] = deque()  # when, where to, what

    def run(self) -> None:
        while True:
            now = time.monotonic()
            while self._under_way and self._under_way[0][0] <= now:
                _, end, frame = self._under_way.popleft()
                with contextlib.suppress(OSError):  # a link that is down loses what it is given
                    os.write(end, frame)
            wait = max(0.0, self._under_way[0][0] - now) if self._under_way else None
            for end in select.select(list(self._across), [], [], wait)[0]:
                with contextlib.suppress(BlockingIOError):
                    frame = os.read(end, _FRAME_BYTES)
                    self._under_way.append((time.monotonic() + self.delay, self._across[end], frame))
