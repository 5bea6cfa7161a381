"""Balances connections over gateways as a Service of Kubernetes does: the one host that clients know.

    python -m deploy.rehearsal.balancer ADDRESS:PORT ENDPOINTS

The file ENDPOINTS has a line ADDRESS:PORT for each gateway, and changes as gateways come and go. A new
connection goes to the next of them that is ready; one that stands stays where it is, whatever becomes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator
from pathlib import Path

_PROBE_SECONDS = 1.0
_PIECE = 65536


class Balancer:
    def __init__(self, endpoints: Path) -> None:
        self._endpoints = endpoints
        self.ready: set[str] = set()
        self._turn = itertools.count()

    async def probe_forever(self) -> None:
        """Look who is ready, as the kubelet does."""
        while True:
            named = self._named()
            answers = await asyncio.gather(*map(_is_ready, named))
            self.ready = {name for name, ready in zip(named, answers, strict=True) if ready}
            await asyncio.sleep(_PROBE_SECONDS)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, to whom its turn has come; closed where nobody is ready."""
        ready = [name for name in self._named() if name in self.ready]
        async with _closing(writer):
            if not ready:
                return
            there = await asyncio.open_connection(*_parts(ready[next(self._turn) % len(ready)]))
            async with _closing(there[1]):
                await asyncio.gather(_pass(reader, there[1]), _pass(there[0], writer))

    def _named(self) -> list[str]:
        return self._endpoints.read_text().split()


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """A connection that breaks is one that has ended."""
    with contextlib.suppress(OSError):
        try:
            yield
        finally:
            writer.close()
            await writer.wait_closed()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()
    writer.write_eof()


async def _is_ready(name: str) -> bool:
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(*_parts(name))
            async with _closing(writer):
                writer.write(b"GET /health/ready HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n")
                return (await reader.readline()).split()[1:2] == [b"200"]
    except (OSError, TimeoutError):
        pass
    return False


def _parts(name: str) -> tuple[str, int]:
    address, _, port = name.rpartition(":")
    return address, int(port)


async def main(listen: str, endpoints: Path) -> None:
    balancer = Balancer(endpoints)
    server = await asyncio.start_server(balancer.carry, *_parts(listen))
    async with server:
        await asyncio.gather(balancer.probe_forever(), server.serve_forever())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
