"""A headless Chromium, and pages in it that must load without an error and from nowhere else."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from browser_tab import Tab
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.page.speaker import Speaker, speaking

SECONDS = 60  # a busy machine is no failure
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed; `make chromium` does so where it may")
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """`open_tab(**options of the browser's context)`."""
    tabs: list[Tab] = []

    def open_one(**options: Any) -> Tab:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(SECONDS * 1000)
        tab = Tab(context.new_page(), context)
        tab.watch()
        tabs.append(tab)
        return tab

    yield open_one
    for tab in tabs:
        origin = "/".join(tab.page.url.split("/")[:3])
        tab.context.close()
        assert tab.complaints == []
        assert {url for url in tab.called if not url.startswith((origin, "data:", "blob:"))} == set()


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab()


@pytest.fixture
def speaker() -> Iterator[Speaker]:
    with speaking() as speaker:
        yield speaker


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[[Page, str], None]:
    """`shoot(page, name)` keeps a small PNG below PAGE_SCREENSHOTS, or for the test alone."""
    folder = Path(os.environ.get("PAGE_SCREENSHOTS") or tmp_path)

    def keep(page: Page, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(BytesIO(page.screenshot(animations="disabled", caret="hide"))).convert("RGB")
        image.quantize(128).save(folder / f"{name}.png", optimize=True)

    return keep


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
