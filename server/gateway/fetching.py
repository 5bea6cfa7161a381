"""Fetching images from hosts that a stranger names, without becoming the stranger's hand inside.

A host name is resolved once, every address it has is checked, and the connection goes to the checked
address itself, while Host header and TLS still carry the name. Each redirect starts over.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import httpx

from server.errors import InvalidRequest
from server.gateway.limiter import Shares
from server.settings import ImageLimits

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_GLOBAL_IPV6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_TUNNELS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))  # 6to4, Teredo: an IPv4 address inside
_SHARED = ip_network("100.64.0.0/10")  # neither private nor global: pods, carriers and overlays live there
_METADATA = tuple(  # of clouds; those that no other rule covers, also for `image_allow_private`
    ip_network(net)
    for net in (
        "168.63.129.16/32",
        "100.100.100.200/32",
        "192.0.0.192/32",
        "fd00:ec2::/32",
        "fd20:ce::254/128",
        "fd00:c1::a9fe:a9fe/128",
        "fd00:42::42/128",
    )
)
_HOST_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,252})")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_ADDRESSES = 4  # of one host, tried in turn
# Of names that are looked up, and of images that are fetched: all at once, and of one caller. Whoever names a
# host can have it say nothing for long, and shall hold up nobody else by that.
_LOOKUPS = _FETCHES = (128, 32)
_READERS = 4  # images that are unpacked and looked at, at once


class FetchRefused(InvalidRequest):
    """An image's URL is against the rules, or its host did not deliver."""


class Allowance:
    """How many bytes the images that are fetched for one request may have together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise InvalidRequest(
                f"The images to fetch are over {self._limit} bytes together (max_body_bytes).",
                code="image_too_large",
            )


async def resolve(threads: Executor, shares: Shares, host: str, port: int) -> list[str]:
    """The system's resolver, on one of `threads`. Raises `OSError` for an unknown name.

    Not the loop's own few threads: the names of workers and experts are looked up there. A lookup cannot be
    broken off, so its place in `shares` is taken until its thread is done, also where nobody waits for it
    any more: ten seconds and longer, if the name servers of its host say nothing.
    """
    give_back = await shares.take()
    loop = asyncio.get_running_loop()
    lookup = threads.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)

    def ended(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits for a place
            loop.call_soon_threadsafe(give_back)

    lookup.add_done_callback(ended)
    infos = await asyncio.wrap_future(lookup)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def is_allowed_address(address: str, allow_private: bool = False) -> bool:
    """Whether to connect to `address`: a public unicast one, or a private one with `allow_private`.

    Link-local, multicast, unspecified and metadata addresses are never allowed.
    """
    ip = _unwrapped(ip_address(address))
    if ip.is_multicast or ip.is_unspecified or ip.is_link_local or any(ip in net for net in _METADATA):
        return False
    if isinstance(ip, IPv6Address) and (ip.scope_id or any(ip in net for net in _TUNNELS)):
        return False
    if allow_private and (ip.is_private or ip.is_loopback or ip in _SHARED):
        return True
    if isinstance(ip, IPv6Address) and ip not in _GLOBAL_IPV6:
        return False
    return ip.is_global and not ip.is_reserved


def _unwrapped(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for (mapped, NAT64), else `ip`."""
    if isinstance(ip, IPv4Address):
        return ip
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip


class ImageFetcher:
    """Downloads images under `limits`. `resolver` and `transport` are the system's unless given."""

    def __init__(
        self,
        limits: ImageLimits,
        resolver: Resolver | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._limits = limits
        self._places = Shares(*_FETCHES)
        self._threads = ThreadPoolExecutor(_LOOKUPS[0], thread_name_prefix="image-host")
        self._resolver = resolver or partial(resolve, self._threads, Shares(*_LOOKUPS))
        # For who reads the images. Work that is cancelled keeps its thread until it is done.
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="image")
        # The bare transport: no cookies, proxies, netrc or redirects of httpx's own. No connection is
        # kept, since one that was opened for a host must not serve another at the same address.
        self._transport = transport or httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._allowed_hosts = {host.lower().rstrip(".") for host in limits.image_allowed_hosts}

    async def close(self) -> None:
        for threads in (self._threads, self.readers):
            threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.aclose()

    async def fetch(self, url: str, allowance: Allowance | None = None) -> bytes:
        """The body behind `url`, within `allowance` too. Raises `InvalidRequest`, which says which limit."""
        parsed = _parse(url)
        give_back = await self._places.take()
        try:
            async with asyncio.timeout(self._limits.image_total_seconds):
                return await self._follow(parsed, allowance or Allowance(self._limits.max_image_bytes))
        except TimeoutError:
            raise FetchRefused(
                f"The image did not arrive within {self._limits.image_total_seconds:g} s.",
                code="image_fetch_timeout",
            ) from None
        finally:
            give_back()

    async def _follow(self, url: httpx.URL, allowance: Allowance) -> bytes:
        for _ in range(self._limits.image_max_redirects + 1):
            async with self._get(url, await self._checked_addresses(url)) as response:
                if response.status_code not in _REDIRECTS:
                    return await self._body(response, allowance)
                url = _redirected(url, response.headers.get("location", ""))
        raise FetchRefused(
            f"The image's URL redirects more than {self._limits.image_max_redirects} times.",
            code="image_fetch_failed",
        )

    async def _checked_addresses(self, url: httpx.URL) -> list[str]:
        """Where `url`'s host is, all of it allowed."""
        host = _host(url)
        if self._allowed_hosts and host not in self._allowed_hosts:
            raise _refused_host(host, "is not on this server's list of image hosts")
        if not _is_address(host) and (_looks_numeric(host) or not _HOST_NAME.fullmatch(host)):
            raise _refused_host(host, "is not a host name, nor an address in its usual form")
        try:
            addresses = [host] if _is_address(host) else list(await self._resolver(host, _port(url)))
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise _refused_host(host, "cannot be resolved")
        # One bad address condemns the name: it is how a name is made to point both ways.
        if not all(is_allowed_address(address, self._limits.image_allow_private) for address in addresses):
            raise _refused_host(host, "is not at a public address")
        return addresses[:_MAX_ADDRESSES]

    @asynccontextmanager
    async def _get(self, url: httpx.URL, addresses: list[str]) -> AsyncIterator[httpx.Response]:
        try:
            response = await self._connect(url, addresses)
            try:
                yield response
            finally:
                await response.aclose()
        except httpx.ConnectTimeout:
            seconds = self._limits.image_connect_seconds
            raise _failed(
                f"did not accept a connection within {seconds:g} s", "image_fetch_timeout"
            ) from None
        except httpx.ReadTimeout:
            seconds = self._limits.image_read_seconds
            raise _failed(f"sent nothing for {seconds:g} s", "image_fetch_timeout") from None
        except httpx.HTTPError:
            raise _failed("could not be reached, or broke off") from None

    async def _connect(self, url: httpx.URL, addresses: list[str]) -> httpx.Response:
        for address in addresses[:-1]:
            try:
                return await self._transport.handle_async_request(self._pinned(url, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._transport.handle_async_request(self._pinned(url, addresses[-1]))

    def _pinned(self, url: httpx.URL, address: str) -> httpx.Request:
        """A request to `address` that is still meant for `url`'s host."""
        connect, read = self._limits.image_connect_seconds, self._limits.image_read_seconds
        return httpx.Request(
            "GET",
            url.copy_with(host=address),
            headers={
                "Host": url.netloc.decode("ascii"),
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "llama-adapter-server",
            },
            extensions={
                "sni_hostname": _host(url),
                "timeout": {"connect": connect, "read": read, "write": read, "pool": connect},
            },
        )

    async def _body(self, response: httpx.Response, allowance: Allowance) -> bytes:
        limit = self._limits.max_image_bytes
        if response.status_code != 200:
            raise _failed(f"answered with status {response.status_code}")
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise _failed("sent a compressed body, which was not asked for")
        too_large = InvalidRequest(
            f"The image is over {limit} bytes (max_image_bytes).", code="image_too_large"
        )
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > limit:
                raise too_large
            allowance.take(len(piece))
        return bytes(body)


def _parse(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        known = parsed.scheme in ("http", "https") and bool(parsed.host) and 0 < _port(parsed) < 65536
    except (httpx.InvalidURL, ValueError):
        known = False
    if not known:
        raise FetchRefused("The image's URL must be a data:, http: or https: URL.", code="invalid_image_url")
    if parsed.userinfo:
        raise FetchRefused(
            "The image's URL must not carry a user name or password.", code="invalid_image_url"
        )
    return parsed


def _redirected(url: httpx.URL, location: str) -> httpx.URL:
    try:
        return _parse(str(url.join(location)))
    except (httpx.InvalidURL, ValueError):
        raise _failed("redirects to what is not a URL") from None


def _port(url: httpx.URL) -> int:
    default = 443 if url.scheme == "https" else 80
    return default if url.port is None else url.port


def _host(url: httpx.URL) -> str:
    """The host's name as resolvers and certificates have it: in ASCII, without a final dot."""
    return url.raw_host.decode("ascii").lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _looks_numeric(host: str) -> bool:
    """Whether the last label is a number: resolvers read 2130706433, 0x7f.1 and 0177.1 as addresses."""
    last = host.rpartition(".")[2]
    return (
        ":" in host
        or last.isdecimal()
        or (last.startswith("0x") and all(c in "0123456789abcdef" for c in last[2:]))
    )


def _refused_host(host: str, why: str) -> FetchRefused:
    return FetchRefused(f"The image's host {host[:200]!r} {why}.", code="image_host_refused")


def _failed(why: str, code: str = "image_fetch_failed") -> FetchRefused:
    return FetchRefused(f"The image's host {why}.", code=code)
