"""Images from hosts that strangers name: what is refused, and that the checked address is the one used."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import httpx
import pytest
import pytest_asyncio
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from server.errors import InvalidRequest
from server.gateway import fetching
from server.gateway.fetching import FetchRefused, ImageFetcher, is_allowed_address, resolve
from server.gateway.keys import Caller
from server.gateway.limiter import Limiter, Shares
from server.gateway.rates import Quota
from server.settings import ImageLimits
from tests.server.gateway.scripted import picture, serving

PUBLIC = "93.184.215.14"


def fixed(*addresses: str) -> Callable[[str, int], Awaitable[list[str]]]:
    async def resolver(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolver


async def refused(fetcher: ImageFetcher, url: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await fetcher.fetch(url)
    await fetcher.close()
    return caught.value


INNER = """
    127.0.0.1 127.8.8.8 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 169.254.1.1
    0.0.0.0 0.1.2.3 100.64.0.1 100.100.100.200 168.63.129.16 192.0.0.192 192.0.2.1 198.18.0.1
    198.51.100.7 203.0.113.9 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1
    ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:7f00:1 ::127.0.0.1 fe80::1 fe80::1%eth0 fec0::1
    fc00::1 fd00:ec2::254 ff02::1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 2002:7f00:1::1
    2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 100::1
"""


@pytest.mark.parametrize("address", INNER.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_allowed_address(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_allowed_address(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.0.9", "fd12::1", "::1", "::ffff:10.0.0.1", "100.64.0.1"]
)
def test_private_addresses_may_be_allowed(address: str) -> None:
    assert is_allowed_address(address, allow_private=True)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fe80::1",
        "224.0.0.1",
        "0.0.0.0",
        "::",
        "ff02::1",
        "168.63.129.16",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:42::42",
        "100.100.100.200",
    ],
)
def test_metadata_link_local_and_multicast_are_never_allowed(address: str) -> None:
    assert not is_allowed_address(address, allow_private=True)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_mapping_an_address_changes_nothing(number: int) -> None:
    plain = IPv4Address(number)
    for mapped in (IPv6Address(f"::ffff:{plain}"), IPv6Address(f"64:ff9b::{plain}")):
        assert is_allowed_address(str(mapped)) == is_allowed_address(str(plain))
    if plain.is_private or plain.is_loopback or plain.is_multicast or plain.is_link_local:
        assert not is_allowed_address(str(plain))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "http://localhost/x", "http://[::1]/x", "http://[::ffff:127.0.0.1]/x",
        "http://2130706433/x", "http://0x7f000001/x", "http://0x7f.1/x", "http://0177.0.0.1/x", "http://127.1/x",
        "http://127.0.0.1./x", "http://①②⑦.0.0.1/x", "http://169.254.169.254/latest/meta-data", "http://0/x",
        "http://[fe80::1%25eth0]/x", "http://[64:ff9b::7f00:1]/",
    ],
)  # fmt: skip
async def test_every_spelling_of_an_inner_address_is_refused(url: str) -> None:
    """With the system's own resolver: what it makes of odd spellings is checked too."""
    error = await refused(ImageFetcher(ImageLimits()), url)
    assert error.status == 400
    assert error.code in ("image_host_refused", "invalid_image_url")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.com/x", "gopher://x/", "http://", "http:///x", "//example.com/x",
        "x", "", "javascript:alert(1)", "http://user:pw@example.com/", "http://example.com:99999/",
        "http://example.com:0/", "http://[::1", "http://exa mple.com/", "http://\x00/",
    ],
)  # fmt: skip
async def test_what_is_no_web_url_is_refused(url: str) -> None:
    transport = httpx.MockTransport(lambda request: pytest.fail(f"connected for {url}"))
    error = await refused(ImageFetcher(ImageLimits(), fixed(PUBLIC), transport), url)
    assert error.code in ("invalid_image_url", "image_host_refused")


async def test_a_name_in_any_script_is_looked_up_in_ascii() -> None:
    asked = []

    async def resolver(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return [PUBLIC]

    async def body() -> AsyncIterator[bytes]:
        yield picture()

    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body()))
    fetcher = ImageFetcher(ImageLimits(), resolver, transport)
    assert await fetcher.fetch("https://MÜNCHEN.example./x") == picture()
    assert asked == [("xn--mnchen-3ya.example", 443)]


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40) | st.builds("http://{}".format, st.text(max_size=30)))
async def test_any_text_is_a_url_or_refused(url: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(404))
    with pytest.raises(InvalidRequest):
        await ImageFetcher(ImageLimits(), fixed(PUBLIC), transport).fetch(url)


async def test_one_inner_address_condemns_a_name() -> None:
    error = await refused(
        ImageFetcher(ImageLimits(), fixed(PUBLIC, "10.0.0.1")), "http://two-faced.example/x"
    )
    assert error.code == "image_host_refused"
    assert "10.0.0.1" not in error.message  # what is inside stays untold


async def test_unknown_names_and_empty_answers() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    for resolver in (unknown, fixed()):
        assert (
            await refused(ImageFetcher(ImageLimits(), resolver), "http://x.example/")
        ).code == "image_host_refused"


class Recorder(httpx.AsyncBaseTransport):
    """Notes where connections would go, and sends them to `server` instead."""

    def __init__(self, server: str) -> None:
        self.server = httpx.URL(server)
        self.asked: list[httpx.Request] = []
        self.inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        url = request.url.copy_with(scheme="http", host=self.server.host, port=self.server.port)
        headers = request.headers.raw
        moved = httpx.Request(
            "GET", url, headers=headers, extensions={"timeout": request.extensions["timeout"]}
        )
        return await self.inner.handle_async_request(moved)

    async def aclose(self) -> None:
        await self.inner.aclose()


class ImageHost:
    def __init__(self) -> None:
        self.hosts: list[str] = []
        self.app = Starlette(
            routes=[
                Route("/image", self.image),
                Route("/to/{n:int}", self.redirect),
                Route("/away", lambda request: RedirectResponse(request.query_params["url"])),
                Route("/large", self.large),
                Route("/stall", self.stall),
                Route("/drip", self.drip),
                Route("/gzip", lambda _: Response(b"x", headers={"content-encoding": "gzip"})),
                Route("/lost", lambda _: Response(b"", status_code=302)),
            ]
        )

    async def image(self, request: Request) -> Response:
        self.hosts.append(request.headers["host"])
        assert "cookie" not in request.headers
        return Response(picture(), headers={"set-cookie": "a=b"})

    async def redirect(self, request: Request) -> Response:
        n = request.path_params["n"]
        return RedirectResponse("/image" if n == 1 else f"/to/{n - 1}", headers={"set-cookie": "a=b"})

    async def large(self, request: Request) -> Response:
        declared = {"content-length": "5000"} if "declared" in request.query_params else {}

        async def body() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b"x" * 1000

        return StreamingResponse(body(), headers=declared)

    async def stall(self, _: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.sleep(30)

        return StreamingResponse(body())

    async def drip(self, _: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            while True:
                yield b"x"
                await asyncio.sleep(0.02)

        return StreamingResponse(body())


@pytest_asyncio.fixture
async def host() -> AsyncIterator[tuple[ImageHost, str]]:
    images = ImageHost()
    async with serving(images.app) as url:
        yield images, url


async def test_the_checked_address_is_the_one_connected_to(host: tuple[ImageHost, str]) -> None:
    """A name that is resolved a second time would point inside by then."""
    images, server = host
    answers = [[PUBLIC], ["127.0.0.1"]]

    async def rebinding(name: str, port: int) -> list[str]:
        return answers.pop(0)

    transport = Recorder(server)
    fetcher = ImageFetcher(ImageLimits(), rebinding, transport)
    assert await fetcher.fetch("https://Pictures.example:8443/image?a=b") == picture()
    await fetcher.close()
    assert len(answers) == 1
    [request] = transport.asked
    assert (request.url.host, request.url.port, request.url.raw_path) == (PUBLIC, 8443, b"/image?a=b")
    assert request.extensions["sni_hostname"] == "pictures.example"
    assert images.hosts == ["pictures.example:8443"]


async def test_every_redirect_is_resolved_and_checked_again(host: tuple[ImageHost, str]) -> None:
    _, server = host
    answers = {"one.example": [PUBLIC], "inner.example": ["192.168.0.1"]}

    async def resolver(name: str, port: int) -> list[str]:
        return answers[name]

    for target in ("http://inner.example/image", "http://127.0.0.1/image", "http://169.254.169.254/"):
        error = await refused(
            ImageFetcher(ImageLimits(), resolver, Recorder(server)), f"http://one.example/away?url={target}"
        )
        assert error.code == "image_host_refused"
    for target in ("file:///etc/passwd", "http://u:p@one.example/image"):
        error = await refused(
            ImageFetcher(ImageLimits(), resolver, Recorder(server)), f"http://one.example/away?url={target}"
        )
        assert error.code == "invalid_image_url"


def local(**limits: Any) -> ImageFetcher:
    return ImageFetcher(ImageLimits(image_allow_private=True, **limits))


async def test_redirects_are_counted(host: tuple[ImageHost, str]) -> None:
    _, server = host
    fetcher = local()
    assert await fetcher.fetch(f"{server}/to/3") == picture()
    await fetcher.close()
    assert "3 times" in (await refused(local(), f"{server}/to/4")).message
    assert (await refused(local(image_max_redirects=0), f"{server}/to/1")).code == "image_fetch_failed"
    assert (await refused(local(), f"{server}/lost")).code in ("image_fetch_failed", "invalid_image_url")


async def test_limits_on_bytes_and_time(host: tuple[ImageHost, str]) -> None:
    _, server = host
    for path in ("/large", "/large?declared"):
        error = await refused(local(max_image_bytes=4999), server + path)
        assert error.code == "image_too_large"
        assert "max_image_bytes" in error.message
    fetcher = local(max_image_bytes=5000)
    assert len(await fetcher.fetch(f"{server}/large")) == 5000
    await fetcher.close()
    assert "0.2 s" in (await refused(local(image_read_seconds=0.2), f"{server}/stall")).message
    assert "0.3 s" in (await refused(local(image_total_seconds=0.3), f"{server}/drip")).message


async def test_a_host_that_accepts_nobody() -> None:
    """A listener with a full backlog answers no handshake."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        error = await refused(local(image_connect_seconds=0.2), f"http://127.0.0.1:{port}/")
        for filler in fillers:
            filler.close()
    assert "0.2 s" in error.message


async def test_what_hosts_do_wrong(host: tuple[ImageHost, str]) -> None:
    _, server = host
    assert "404" in (await refused(local(), f"{server}/nothing")).message
    assert "compressed" in (await refused(local(), f"{server}/gzip")).message

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"not http at all\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(garbage, "127.0.0.1", 0) as server_:
        port = server_.sockets[0].getsockname()[1]
        assert (await refused(local(), f"http://127.0.0.1:{port}/")).code == "image_fetch_failed"


async def test_hosts_can_be_listed(host: tuple[ImageHost, str]) -> None:
    _, server = host
    limits = ImageLimits(image_allowed_hosts=("Pictures.example",))
    fetcher = ImageFetcher(limits, fixed(PUBLIC), Recorder(server))
    assert await fetcher.fetch("http://PICTURES.example./image") == picture()
    for other in (
        "http://pictures.example.evil.example/image",
        "http://8.8.8.8/image",
        "http://sub.pictures.example/",
    ):
        error = await refused(ImageFetcher(limits, fixed(PUBLIC), Recorder(server)), other)
        assert error.code == "image_host_refused"
    await fetcher.close()


async def test_the_next_address_is_tried(host: tuple[ImageHost, str]) -> None:
    images, server = host
    port = httpx.URL(server).port
    fetcher = ImageFetcher(ImageLimits(image_allow_private=True), fixed("127.0.0.2", "127.0.0.1"))
    # Nobody listens at 127.0.0.2, since the server is bound to 127.0.0.1 alone.
    assert await fetcher.fetch(f"http://both.example:{port}/image") == picture()
    assert images.hosts == [f"both.example:{port}"]
    await fetcher.close()


async def test_tls_is_checked_against_the_name(
    host: tuple[ImageHost, str], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("pictures.example")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for part, pem in (("cert", certificate.cert_chain_pems[0]), ("key", certificate.private_key_pem)):
        pem.write_to_path(str(tmp_path / part))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    options = {"ssl_certfile": str(tmp_path / "cert"), "ssl_keyfile": str(tmp_path / "key")}

    def fetcher() -> ImageFetcher:
        transport = httpx.AsyncHTTPTransport(verify=context)
        return ImageFetcher(ImageLimits(image_allow_private=True), fixed("127.0.0.1"), transport)

    async with serving(host[0].app, **options) as url:
        port = httpx.URL(url).port
        good = fetcher()
        assert await good.fetch(f"https://pictures.example:{port}/image") == picture()
        await good.close()
        error = await refused(fetcher(), f"https://other.example:{port}/image")
        assert error.code == "image_fetch_failed"


async def test_the_systems_resolver() -> None:
    with ThreadPoolExecutor() as threads:
        assert set(await resolve(threads, Shares(1, 1), "localhost", 80)) <= {"127.0.0.1", "::1"}
        with pytest.raises(socket.gaierror):
            await resolve(threads, Shares(1, 1), "no-such-name.invalid", 80)
    assert issubclass(FetchRefused, InvalidRequest)


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of `.example` that were looked up; nobody answers for them."""
    answered = threading.Event()
    system = socket.getaddrinfo
    asked: list[str] = []

    def slow(host: str, *rest: Any, **more: Any) -> Any:
        if host.endswith(".example"):
            asked.append(host)
            answered.wait(30)
        return system("127.0.0.1" if host == "quick.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    yield asked
    answered.set()


async def codes(fetcher: ImageFetcher, count: int) -> list[str | None]:
    fetches = [fetcher.fetch(f"http://slow-{i}.example/") for i in range(count)]
    outcomes = await asyncio.gather(*fetches, return_exceptions=True)
    return [outcome.code for outcome in outcomes if isinstance(outcome, FetchRefused)]


async def test_names_that_nobody_answers_for_hold_up_no_other_lookup(silence: list[str]) -> None:
    """Of workers and experts, say, whose connections begin with one."""
    fetcher = ImageFetcher(ImageLimits(image_total_seconds=0.2))
    fetches = asyncio.create_task(codes(fetcher, 40))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        assert await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)
        assert await fetches == ["image_fetch_timeout"] * 40
    await fetcher.close()


async def test_names_that_nobody_answers_for_hold_up_no_other_caller(
    host: tuple[ImageHost, str], silence: list[str]
) -> None:
    limiter = Limiter("memory://")
    fetcher = ImageFetcher(ImageLimits(image_total_seconds=0.2, image_allow_private=True))
    async with limiter.admitted(Caller("mallory", Quota()), {}):
        for _ in range(2):  # threads of the first are still there in the second
            assert await codes(fetcher, 40) == ["image_fetch_timeout"] * 40
    assert len(silence) == 32
    async with limiter.admitted(Caller("alice", Quota()), {}):
        assert await fetcher.fetch(f"http://quick.test:{httpx.URL(host[1]).port}/image") == picture()
    await fetcher.close()


async def test_a_lookups_place_is_free_when_it_has_ended(
    host: tuple[ImageHost, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def system(name: str, port: int, **_: Any) -> list[Any]:
        if name == "unknown.test":
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(fetching, "_LOOKUPS", (1, 1))
    fetcher = local()
    monkeypatch.setattr(fetching.socket, "getaddrinfo", system)
    for _ in range(3):
        with pytest.raises(FetchRefused, match="cannot be resolved"):
            await fetcher.fetch("http://unknown.test/")
        assert await fetcher.fetch(f"http://known.test:{httpx.URL(host[1]).port}/image") == picture()
    await fetcher.close()
