"""The page's start where something is in its way, its heat map and its composer, by mouse, touch and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from browser_tab import SIGN, Tab
from playwright.sync_api import Page, expect

from tests.page.speaker import Speaker

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

PHONE = {
    "viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2,
}  # fmt: skip
GATES = {
    "variant": "v1", "num_parameters": 12, "prompt_len": 2, "description": "", "layers": 3, "heads": 4,
    "gated_layers": [1, 2], "gates": [[0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]],
}  # fmt: skip


@pytest.fixture
def chat(speaker: Speaker, tab: Tab) -> Tab:
    tab.open_ready(speaker.url)
    return tab


def use_key(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("checkbox", name="Keep it").check()
    page.get_by_role("button", name="Use it").click()


@pytest.mark.parametrize("key", ["sk-of\u200b-alice", "ключ"])
def test_a_key_that_no_request_can_carry_is_refused(chat: Tab, speaker: Speaker, key: str) -> None:
    page = chat.page
    page.get_by_role("button", name="API key").click()
    use_key(page, key)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_role("status")).to_contain_text("This is no key")
    use_key(page, "sk-of-alice")
    expect(dialog).to_be_hidden()
    speaker.answer("Hello.")
    chat.ask("Hello!")  # the page looks around with the new key meanwhile
    expect(page.locator("article.answer")).to_have_count(1)
    assert chat.answer() == "Hello."


def test_what_somebody_writes_on_does_not_go_by_itself(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    page.route("**/health/ready", lambda route: route.abort())
    page.get_by_role("button", name="API key").click()
    use_key(page, "sk-of-alice")
    expect(page.locator("#notice")).to_contain_text("The server is not ready.")
    chat.ask("Hello!")
    page.get_by_label("Your message").press("End")
    page.get_by_label("Your message").press_sequentially(" And")
    page.unroute("**/health/ready")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.get_by_label("Your message")).to_have_value("Hello! And")
    speaker.answer("Hello.")
    page.get_by_label("Your message").press("Enter")
    assert chat.answer() == "Hello."
    expect(page.locator("article.answer")).to_have_count(1)


def test_a_new_chat_on_a_narrow_screen_is_seen(chat: Tab) -> None:
    page = chat.page
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator("#toggle-panel").click()
    expect(page.locator("#toggle-panel")).to_have_attribute("aria-expanded", "true")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#toggle-panel")).to_have_attribute("aria-expanded", "false")
    expect(page.get_by_label("Your message")).to_be_focused()


def test_the_page_does_without_storage(speaker: Speaker, tab: Tab) -> None:
    tab.context.add_init_script(
        """Object.defineProperty(window, "sessionStorage", {
            get() { throw new DOMException("Access is denied.", "SecurityError"); },
        });"""
    )
    page = tab.open_ready(speaker.url)
    page.get_by_role("button", name="API key").click()
    use_key(page, "sk-of-alice")
    expect(page.get_by_role("dialog", name="API key")).to_be_hidden()
    speaker.answer("Hello.")
    tab.ask("Hello!")
    expect(page.locator("article.answer")).to_have_count(1)
    assert tab.answer() == "Hello."


@pytest.mark.parametrize(
    "body", ["<p>Sign in to this network.</p>", '{"object": "list", "da', "null", '{"data": [{}]}']
)
def test_an_answer_from_elsewhere_is_tried_again(speaker: Speaker, tab: Tab, body: str) -> None:
    tab.page.route("**/v1/models", lambda route: route.fulfill(status=200, body=body))
    page = tab.open(speaker.url)
    expect(page.locator("#notice")).to_contain_text("Trying again")
    page.unroute("**/v1/models")
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    expect(page.locator("#notice")).to_be_hidden()


def show_gates(tab: Tab, url: str) -> Page:
    tab.page.route("**/v1/adapters/alpaca/gates", lambda route: route.fulfill(json=GATES))
    page = tab.open_ready(url)
    page.get_by_label("Model", exact=True).select_option("alpaca")
    return page


def test_a_click_moves_the_cursor_of_the_heat_map(speaker: Speaker, tab: Tab) -> None:
    page = show_gates(tab, speaker.url)
    readout = page.locator(".readout")
    page.locator("[data-layer='1'][data-head='2']").click()
    expect(readout).to_have_text("Layer 1, head 2: 0.30")
    page.locator("[data-layer='2'][data-head='0']").hover()
    expect(readout).to_have_text("Layer 2, head 0: 0.50")
    page.mouse.move(5, 5)
    expect(readout).to_have_text("Layer 1, head 2: 0.30")
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text("Layer 1, head 3: 0.40")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    expect(readout).to_have_text("Layer 2, head 3: 0.80")
    page.get_by_label("Your message").focus()
    expect(readout).to_have_text("Gate of each layer and head")


def test_a_tap_on_the_heat_map_tells_of_its_cell_for_good(
    speaker: Speaker, open_tab: Callable[..., Tab]
) -> None:
    page = show_gates(open_tab(**PHONE), speaker.url)
    page.get_by_role("button", name="Settings").tap()
    page.locator("[data-layer='1'][data-head='2']").tap()
    expect(page.locator(".gates")).to_be_focused()  # the last of what a tap brings about
    expect(page.locator(".readout")).to_have_text("Layer 1, head 2: 0.30")
    expect(page.locator(".looked-at")).to_have_attribute("data-told", "0.30")


def paste(page: Page, *kinds: str) -> bool:
    """Texts of these kinds beside a picture. Whether the page took them, so that the browser does not."""
    took: bool = page.evaluate(
        """(kinds) => {
            const clipboardData = new DataTransfer();
            for (const kind of kinds) clipboardData.setData(kind, "1\\t2");
            clipboardData.items.add(new File(["…"], "pasted.png", { type: "image/png" }));
            const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
            return !document.getElementById("question").dispatchEvent(event);
        }""",
        list(kinds),
    )
    return took


def test_cells_of_a_spreadsheet_are_pasted_as_text(chat: Tab) -> None:
    pictures = chat.page.locator("#pictures li")
    assert not paste(chat.page, "text/html", "text/plain")
    assert paste(chat.page, "text/html")  # a picture copied from a page
    expect(pictures).to_have_count(1)
    assert paste(chat.page, "text/plain")  # a picture's file, with its name
    expect(pictures).to_have_count(2)


def test_an_unreadable_file_drops_no_other(chat: Tab, tmp_path: Path) -> None:
    page = chat.page
    gone = tmp_path / "gone.png"
    gone.write_bytes(SIGN.read_bytes())
    page.evaluate(
        """() => {
            const own = Object.assign(document.createElement("input"), { type: "file", id: "own" });
            document.body.append(own);
        }"""
    )
    page.set_input_files("#own", gone)
    gone.unlink()
    page.evaluate(
        """() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(document.getElementById("own").files[0]);
            dataTransfer.items.add(new File(["…"], "here.png", { type: "image/png" }));
            dataTransfer.items.add(new File(["…"], "notes.txt", { type: "text/plain" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
        }"""
    )
    expect(page.locator("#pictures li")).to_have_count(1)
    expect(page.get_by_role("button", name="Remove here.png")).to_be_visible()
    expect(page.locator("#notice")).to_contain_text("gone.png: cannot be read.")
    expect(page.locator("#notice")).to_contain_text("notes.txt: only PNG")


def test_a_question_is_not_sent_without_its_pictures(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    page.evaluate(
        """() => {
            const read = FileReader.prototype.readAsDataURL;
            FileReader.prototype.readAsDataURL = function (file) {
                window.goOn = () => read.call(this, file);
            };
        }"""
    )
    page.set_input_files("#files", SIGN)
    chat.ask("What is it?")
    expect(page.locator("#notice")).to_contain_text("still being read")
    expect(page.get_by_label("Your message")).to_have_value("What is it?")
    page.evaluate("() => window.goOn()")
    expect(page.locator("#pictures li")).to_have_count(1)
    speaker.answer("A sign.")
    page.get_by_label("Your message").press("Enter")
    assert chat.answer() == "A sign."
    expect(page.locator("#notice")).to_be_hidden()
    assert [len(body["messages"][0]["content"]) for body in chat.bodies] == [2]


def test_enter_on_a_screens_keyboard_breaks_the_line(speaker: Speaker, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(**PHONE)
    page = tab.open_ready(speaker.url)
    tab.ask("Two")
    page.keyboard.type("lines")
    expect(page.get_by_label("Your message")).to_have_value("Two\nlines")
    speaker.answer("Yes.")
    page.get_by_role("button", name="Send").tap()
    assert tab.answer() == "Yes."


def test_enter_that_ends_a_composition_does_not_send(chat: Tab) -> None:
    question = chat.page.get_by_label("Your message")
    question.fill("日本")
    question.evaluate(
        """(question) => question.dispatchEvent(
            new KeyboardEvent("keydown", { key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))"""
    )
    expect(question).to_have_value("日本")
    assert chat.page.locator("article").count() == 0
