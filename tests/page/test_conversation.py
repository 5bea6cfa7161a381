"""The conversation while answers come piece by piece, break off or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from browser_tab import SIGN, Tab
from playwright.sync_api import Page, expect
from service import until

from server.errors import InvalidRequest
from tests.page.speaker import Speaker

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

CODE = "\n".join(f"line_{number}()" for number in range(60))


@pytest.fixture
def chat(speaker: Speaker, open_tab: Callable[..., Tab]) -> Tab:
    """Lower than what is said in it."""
    tab = open_tab(viewport={"width": 1280, "height": 400})
    tab.open_ready(speaker.url)
    return tab


def spoken(tab: Tab, speaker: Speaker, text: str) -> None:
    """`text` was said and is shown."""
    speaker.say(text)
    last_word = [word for word in text.split() if word != "```"][-1]
    expect(tab.page.locator(".answer .text").last).to_contain_text(last_word)


def contents(body: dict[str, Any]) -> list[Any]:
    return [message["content"] for message in body["messages"]]


def test_a_question_that_was_stopped_before_its_answer_is_not_sent_again(chat: Tab, speaker: Speaker) -> None:
    with chat.page.expect_response("**/v1/chat/completions"):  # its head comes before the first token
        chat.ask("One")
    chat.page.get_by_role("button", name="Stop").click()
    expect(chat.page.locator(".answer footer")).to_contain_text("stopped")
    expect(chat.page.locator(".answer .text")).to_contain_text("No text")
    until(speaker.worker.closed.is_set)  # or it would take what is said next
    speaker.answer("Second.")
    chat.ask("Two")
    assert chat.answer() == "Second."
    speaker.answer("Third.")
    chat.ask("Three")
    assert chat.answer() == "Third."
    assert [contents(body) for body in chat.bodies] == [["One"], ["Two"], ["Two", "Second.", "Three"]]


def frames(page: Page) -> None:
    """Until the browser has told of all scrolling so far."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def top(page: Page) -> float:
    frames(page)
    pixels: float = page.locator("#conversation").evaluate("(view) => view.scrollTop")
    return pixels


def is_at_end(page: Page) -> bool:
    frames(page)
    below: float = page.locator("#conversation").evaluate(
        "(view) => view.scrollHeight - view.scrollTop - view.clientHeight"
    )
    return below <= 1 and top(page) > 0


def scroll(page: Page, pixels: int) -> None:
    page.locator("#conversation").evaluate("(view, pixels) => view.scrollBy(0, pixels)", pixels)
    frames(page)


def test_the_view_follows_what_is_added_however_high(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    chat.drop(SIGN)
    chat.ask("What does it say?")
    expect(page.locator(".experts dd")).to_contain_text("Line 39")
    assert is_at_end(page)
    spoken(chat, speaker, f"So:\n```\n{CODE}\n```")
    assert is_at_end(page)
    spoken(chat, speaker, "\nThat is all.")
    speaker.finish()
    expect(page.locator(".answer footer")).to_contain_text("prompt of 5")
    assert is_at_end(page)


def test_the_view_leaves_a_user_who_scrolled_up(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    chat.ask("Tell me of it.")
    spoken(chat, speaker, f"```\n{CODE}\n```")
    assert is_at_end(page)
    scroll(page, -40)
    place = top(page)
    spoken(chat, speaker, "\nA word.")
    spoken(chat, speaker, "\n\nAnother.")
    assert top(page) == place
    scroll(page, 10_000)
    spoken(chat, speaker, f"\n```\n{CODE}\n```\nNearly done.")
    assert is_at_end(page)
    scroll(page, -100)
    place = top(page)
    speaker.finish()
    expect(page.locator(".answer footer")).to_contain_text("prompt of 5")
    assert top(page) == place
    speaker.answer("Yes.")
    chat.ask("Is that all?")
    assert chat.answer() == "Yes."
    assert is_at_end(page)


def test_no_experts_are_shown_where_none_read(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    page.get_by_label("Model", exact=True).select_option("org/sees")
    page.get_by_role("checkbox", name="ocr").uncheck()
    chat.drop(SIGN)
    speaker.answer("A sign.")
    chat.ask("What is it?")
    assert chat.answer() == "A sign."
    assert chat.bodies[0]["experts"] == []
    expect(page.locator(".experts")).to_have_count(0)


def heard(page: Page, id: str) -> Any:
    """A handle on all that a live region says from now on."""
    return page.evaluate_handle(
        """(id) => {
            const region = document.getElementById(id);
            const heard = [];
            new MutationObserver(() => heard.push(region.textContent)).observe(region, { childList: true });
            return heard;
        }""",
        id,
    )


def test_screen_readers_are_told_each_answer_once_and_whole(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    told = heard(page, "spoken")
    chat.ask("Count.")
    spoken(chat, speaker, "One,")
    quiet = """(text) => text.closest("[aria-live], [aria-busy], [role=log], [role=status]") === null"""
    assert page.locator(".answer .text").evaluate(quiet)
    spoken(chat, speaker, " two.")
    assert told.json_value() == []
    speaker.finish()
    chat.answer()
    expect(page.get_by_role("status").filter(has_text="One, two.")).to_have_count(1)
    chat.ask("And now?")
    spoken(chat, speaker, "Three")
    assert told.json_value() == ["One, two.", ""]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#spoken")).to_be_empty()


def test_a_server_that_is_not_ready_is_told_of_once(speaker: Speaker, tab: Tab) -> None:
    speaker.worker.is_ready = False
    until(lambda: httpx.get(f"{speaker.url}/health/ready").status_code == 503)
    page = tab.open(speaker.url)
    expect(page.locator("#notice")).to_contain_text("No worker is ready yet.")
    told = heard(page, "notice")
    for _ in range(2):
        page.wait_for_event("response", lambda response: response.url.endswith("/health/ready"))
    frames(page)
    assert told.json_value() == []


def test_what_is_finished_stays_while_the_answer_goes_on(
    speaker: Speaker, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    page = tab.open_ready(speaker.url)
    tab.ask("Some code?")
    spoken(tab, speaker, "Here:\n```\nfirst()\n```\nIt does")
    button = page.locator(".code button")
    button.focus()
    page.evaluate("() => getSelection().selectAllChildren(document.querySelector('.code pre'))")
    stays = page.evaluate_handle("() => document.activeElement")
    spoken(tab, speaker, " nothing")
    assert page.evaluate("() => getSelection().toString()").strip() == "first()"
    assert stays.evaluate("(button) => button === document.activeElement")
    button.click()
    expect(button).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "first()"
    spoken(tab, speaker, " yet:\n```\nsecond()")
    assert stays.evaluate("(button) => button === document.activeElement")
    speaker.answer("\n```")
    tab.answer()
    assert stays.evaluate("(button) => button === document.activeElement")
    page.locator(".code button").last.click()
    until(lambda: page.evaluate("navigator.clipboard.readText()") == "second()")


def test_a_refused_question_can_be_edited(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    speaker.worker.refusal = InvalidRequest("The picture is too large.")
    chat.drop(SIGN)
    chat.ask("What is this?")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("too large")
    page.get_by_label("Your message").fill("Be short.")
    alert.get_by_role("button", name="Edit").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.get_by_label("Your message")).to_be_focused()
    expect(page.get_by_label("Your message")).to_have_value("What is this?\nBe short.")
    expect(page.get_by_role("button", name="Remove sign.png")).to_have_count(1)
    speaker.worker.refusal = None
    speaker.answer("A sign.")
    page.get_by_label("Your message").press("Enter")
    assert chat.answer() == "A sign."
    [[words, picture]] = contents(chat.bodies[1])
    assert words["text"] == "What is this?\nBe short."
    assert picture == contents(chat.bodies[0])[0][1]


def test_what_is_asked_again_comes_last(chat: Tab, speaker: Speaker) -> None:
    page = chat.page
    speaker.worker.refusal = InvalidRequest("Not now.")
    chat.ask("First?")
    again = page.get_by_role("alert").get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    speaker.worker.refusal = None
    speaker.answer("Two.")
    chat.ask("Second?")
    assert chat.answer() == "Two."
    speaker.answer("One.")
    again.click()
    expect(page.locator(".answer .text").last).to_have_text("One.")
    chat.answer()
    speaker.answer("Three.")
    chat.ask("Third?")
    assert chat.answer() == "Three."
    shown = page.locator("article.question p, article.answer .text").all_inner_texts()
    assert shown == [*contents(chat.bodies[-1]), "Three."]
    assert shown == ["Second?", "Two.", "First?", "One.", "Third?", "Three."]
