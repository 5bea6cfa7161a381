"""The page where the server asks for keys, and where it is not there yet; on a tiny base."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from browser_tab import Tab
from playwright.sync_api import Page, expect
from service import Service, serving, until
from tiny_base import write_tiny_base

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.timeout(180)]

KEY = "of-alice"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_base(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def keyed(base: Path) -> Iterator[Service]:
    options = (f"--base={base / 'tiny'}", f"--cache-dir={base / 'cache'}", "--experts=", f"--api-key={KEY}")
    with serving(*options) as service:
        yield service


def give(page: Page, key: str, keep: bool = False) -> None:
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key", exact=True).fill(key)
    if keep:
        dialog.get_by_role("checkbox").check()
    dialog.get_by_label("Key", exact=True).press("Enter")


def stored(page: Page) -> list[str]:
    keys: list[str] = page.evaluate("[...Object.values(sessionStorage), ...Object.values(localStorage)]")
    return keys


def test_a_key_is_asked_for_and_not_kept(tab: Tab, keyed: Service) -> None:
    page = tab.open(keyed.url)
    give(page, "wrong")
    give(page, KEY)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    page.get_by_label("Max tokens").fill("8")
    tab.ask("Hello!")
    tab.answer()
    expect(page.locator(".answer footer")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Request").click()
    snippet = page.locator("#snippet").inner_text()
    assert "Bearer $OPENAI_API_KEY" in snippet
    assert KEY not in snippet
    assert stored(page) == []
    page.reload()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()


def test_a_key_is_kept_for_the_tab_on_request(tab: Tab, keyed: Service) -> None:
    page = tab.open(keyed.url)
    give(page, KEY, keep=True)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    assert stored(page) == [KEY]
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    expect(page.get_by_role("dialog", name="API key")).to_be_hidden()


def test_without_a_key_the_page_says_what_it_needs(tab: Tab, keyed: Service) -> None:
    page = tab.open(keyed.url)
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#notice")).to_contain_text("wants an API key")
    page.get_by_role("button", name="API key").click()
    give(page, KEY)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    expect(page.locator("#notice")).to_be_hidden()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live").status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-m", "server.cli", *arguments)
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def test_it_waits_for_a_server_that_is_not_ready(
    open_tab: Callable[..., Tab], base: Path, free_port: int
) -> None:
    socket = base / "w.sock"
    url = f"http://127.0.0.1:{free_port}"
    with process("gateway", f"--worker=unix:{socket}", f"--port={free_port}", "--worker-poll-seconds=0.2"):
        tab = open_tab()
        until(lambda: answers(url))
        page = tab.open(url)
        expect(page.locator("#notice")).to_contain_text("The server is not ready. No worker is ready yet.")
        page.get_by_label("Max tokens").fill("8")
        tab.ask("Hello!")
        expect(page.get_by_label("Your message")).to_have_value("Hello!")
        worker = ("worker", f"--base={base / 'tiny'}", f"--cache-dir={base / 'cache'}", f"--uds={socket}")
        with process(*worker, "--kv-cache-mib=8"):
            expect(page.locator("#notice")).to_be_hidden()
            expect(page.locator(".answer footer")).to_contain_text("tokens/s")
            expect(page.get_by_label("Your message")).to_have_value("")
        tab.ask("Still there?")
        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.locator("#notice")).to_contain_text("The server is not ready.")
