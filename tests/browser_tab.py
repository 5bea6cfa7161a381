"""A tab of a browser that shows the page, and a user in front of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Page, expect

SIGN = Path(__file__).parents[1] / "docs/sign.png"


@dataclass
class Tab:
    """A page, what it complained of and whom it called."""

    page: Page
    context: BrowserContext
    complaints: list[str] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of its chat requests

    def watch(self) -> None:
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.called.append(request.url))
        self.page.on("request", self._keep_body)

    def _note(self, kind: str, text: str) -> None:
        # A refused request is told there as well; tests ask what the page makes of it.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.complaints.append(text)

    def _keep_body(self, request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(request.post_data_json)

    def open(self, url: str) -> Page:
        self.page.goto(url)
        return self.page

    def open_ready(self, url: str) -> Page:
        """Opened, and ready to be asked."""
        self.open(url)
        expect(self.page.get_by_label("Model", exact=True)).to_be_enabled()
        expect(self.page.locator("#notice")).to_be_hidden()
        return self.page

    def drop(self, path: Path, kind: str = "image/png") -> None:
        """As if `path` was dragged there from a file manager. A picture is read then."""
        transfer = self.page.evaluate_handle(
            """([bytes, name, type]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
                return transfer;
            }""",
            [list(path.read_bytes()), path.name, kind],
        )
        self.page.dispatch_event("#conversation", "dragover", {"dataTransfer": transfer})
        self.page.dispatch_event("#conversation", "drop", {"dataTransfer": transfer})
        if kind.startswith("image/"):
            expect(self.page.get_by_role("button", name=f"Remove {path.name}").last).to_be_visible()

    def ask(self, text: str) -> None:
        self.page.get_by_label("Your message").fill(text)
        self.page.get_by_label("Your message").press("Enter")

    def wait_until_sent(self, requests: int) -> None:
        """Until the page has sent so many chat requests: the browser tells of them only while it is asked."""
        for _ in range(600):
            if len(self.bodies) >= requests:
                break
            self.page.wait_for_timeout(50)
        assert len(self.bodies) == requests

    def answer(self) -> str:
        """The text of the last answer, once it is whole."""
        self.page.get_by_role("button", name="Send").wait_for()
        return self.page.locator("article.answer .text").last.inner_text()
