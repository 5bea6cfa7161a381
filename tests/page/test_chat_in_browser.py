"""The page in a real browser before the real service: default base, its experts, an adapter."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from browser_tab import SIGN, Tab
from playwright.sync_api import Page, expect
from service import Service, serving, until
from support import random_adapter

from models.adapter_config import AdapterConfig, BaseSpec, PromptConfig
from models.checkpoints.native import save_adapter

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.weights, pytest.mark.timeout(300)]

BASE = "smollm2-135m"
SMOLLM2 = BaseSpec(
    hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536
)
STORY = "Tell me a very long story about a llama."


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    poet = tmp_path_factory.mktemp("adapters") / "poet"
    write_poet(poet)
    with serving("--kv-cache-mib", "128", f"--adapter=poet={poet}") as service:
        yield service


def write_poet(folder: Path) -> None:
    """An adapter whose gates grow from layer to layer, as those of trained ones do."""
    config = AdapterConfig(
        base=SMOLLM2, prompt=PromptConfig(length=10, layers=tuple(range(2, 30))), description="For tests."
    )
    adapter = random_adapter(config, seed=3)
    with torch.no_grad():
        adapter.prompt.mul_(0.02)
        adapter.gate.mul_(torch.linspace(0.005, 0.08, 28)[:, None])
    save_adapter(adapter, folder)


@pytest.fixture
def chat(tab: Tab, service: Service) -> Tab:
    """The page, ready to be asked, with short and certain answers."""
    return opened(tab, service)


def opened(tab: Tab, service: Service, max_tokens: int = 32) -> Tab:
    tab.open_ready(service.url).get_by_label("Max tokens").fill(str(max_tokens))
    return tab


def test_a_dropped_picture_is_read_and_the_answer_streams(
    chat: Tab, shoot: Callable[[Page, str], None]
) -> None:
    page = chat.page
    lengths = page.evaluate_handle(
        """() => {
            const lengths = new Set();
            new MutationObserver(() => {
                lengths.add(document.querySelector(".answer .text")?.textContent.length ?? 0);
            }).observe(document.getElementById("conversation"), { childList: true, subtree: true });
            return lengths;
        }"""
    )
    chat.drop(SIGN)
    expect(page.locator("#drop-here")).to_be_hidden()
    waiting = page.get_by_role("list", name="Pictures to send").get_by_role("img")
    expect(waiting).to_have_accessible_name("sign.png")
    chat.ask("What does this sign say?")
    expect(page.locator("article.question img")).to_be_visible()
    expect(page.locator(".experts dd").first).to_contain_text("CITY LIBRARY")
    assert "city library" in chat.answer().lower()
    assert page.evaluate("lengths => lengths.size", lengths) > 3
    assert page.locator(".experts dt").all_inner_texts()[0].startswith("ocr")
    measured = page.locator(".answer footer").inner_text()
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt of \d+", measured)
    expect(waiting).to_have_count(0)
    shoot(page, "chat")


def test_pictures_are_chosen_pasted_and_taken_away(chat: Tab, tmp_path: Path) -> None:
    page = chat.page
    waiting = page.locator("#pictures li")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files([SIGN, SIGN])
    expect(waiting).to_have_count(2)
    page.evaluate(
        """async (url) => {
            const blob = await (await fetch(url)).blob();
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([blob], "pasted.svg", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
        }""",
        "page/icon.svg",
    )
    expect(waiting).to_have_count(3)
    page.get_by_role("button", name="Remove pasted.svg").click()
    page.get_by_role("button", name="Remove sign.png").first.click()
    expect(waiting).to_have_count(1)
    notes = tmp_path / "notes.txt"
    notes.write_text("no picture")
    chat.drop(notes, "text/plain")
    expect(page.get_by_role("status").filter(has_text="notes.txt: only PNG")).to_be_visible()
    expect(waiting).to_have_count(1)


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_answer_here_and_there(tab: Tab, service: Service, way: str) -> None:
    page = opened(tab, service, max_tokens=2000).page
    tab.ask(STORY)
    text = page.locator(".answer .text")
    expect(text).to_contain_text(re.compile(r"\w+ \w+ \w+"))
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".answer footer")).to_contain_text("stopped")
    said = text.inner_text()
    assert said
    until(lambda: running(service) == 0)
    assert text.inner_text() == said
    tab.ask("Thanks.")
    tab.wait_until_sent(2)
    roles = [message["role"] for message in tab.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.keyboard.press("Escape")


def running(service: Service) -> float:
    """Requests in the worker."""
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    [value] = [line.rsplit(" ", 1)[1] for line in lines if ":num_requests_running{" in line]
    return float(value)


def test_an_error_is_shown_and_can_be_mended(chat: Tab) -> None:
    page = chat.page
    page.get_by_label("Max tokens").fill("1000000")
    chat.ask("What is the capital of France?")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("maximum context length")
    page.get_by_label("Max tokens").fill("24")
    alert.get_by_role("button", name="Try again").click()
    assert "Paris" in chat.answer()
    expect(alert).to_have_count(0)
    assert [len(body["messages"]) for body in chat.bodies] == [1, 1]
    page.get_by_label("Temperature").fill("9")
    chat.ask("And of Spain?")
    expect(alert).to_contain_text("temperature")


def test_turns_and_settings_are_sent(chat: Tab) -> None:
    page = chat.page
    chat.ask("What is the capital of France?")
    first = chat.answer()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("7")
    chat.ask("Say it again.")
    chat.answer()
    body = chat.bodies[1]
    assert [message["content"] for message in body["messages"]][::2] == [
        "What is the capital of France?",
        "Say it again.",
    ]
    assert body["messages"][1]["content"].split() == first.split()
    settings = {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")}
    assert settings == {"model": BASE, "temperature": 0.5, "top_p": 0.9, "max_tokens": 32, "seed": 7}
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    chat.ask("Hello.")
    chat.answer()
    assert len(chat.bodies[2]["messages"]) == 1


def test_experts_are_switched(chat: Tab) -> None:
    page = chat.page
    chat.drop(SIGN)
    page.get_by_role("checkbox", name="ocr").uncheck()
    chat.ask("What does this sign say?")
    assert "city library" not in chat.answer().lower()
    assert "ocr" not in chat.bodies[0]["experts"]
    assert not [name for name in page.locator(".experts dt").all_inner_texts() if name.startswith("ocr")]


def test_the_gates_of_an_adapter_are_shown(
    chat: Tab, service: Service, shoot: Callable[[Page, str], None]
) -> None:
    page = chat.page
    expect(page.locator("#adapter")).to_contain_text("the base itself")
    page.get_by_label("Model", exact=True).select_option("poet")
    told = httpx.get(f"{service.url}/v1/adapters/poet/gates").json()
    table = page.get_by_role("table", name="Gate magnitude by layer and head")
    expect(table.locator("tbody tr")).to_have_count(30)
    expect(table.locator("tbody td")).to_have_count(270)
    expect(table.locator("td.empty")).to_have_count(18)  # layers 0 and 1 hold no prompts
    expect(page.locator("#adapter")).to_contain_text(f"{told['num_parameters']:,}")
    table.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    readout = page.locator(".readout").inner_text()
    layer, head, value = re.fullmatch(r"Layer (\d+), head (\d+): ([\d.e-]+)", readout).groups()  # type: ignore[union-attr]
    assert (layer, head) == ("28", "1")
    assert float(value) == pytest.approx(told["gates"][28][1], rel=0.05)
    strongest = max(((gate, f"[data-layer='{i}'][data-head='{j}']") for i, row in enumerate(told["gates"])
                     for j, gate in enumerate(row)))[1]  # fmt: skip
    colors = [color_of(page, cell) for cell in (strongest, "[data-layer='2'][data-head='0']")]
    assert brightness(colors[0]) < brightness(colors[1])
    chat.ask("Hello!")
    chat.answer()
    assert chat.bodies[0]["model"] == "poet"
    shoot(page, "adapter")


def color_of(page: Page, cell: str) -> list[int]:
    """The cell's colour in 0 … 255, as it is painted."""
    return page.locator(f".gates {cell}").evaluate(
        """(cell) => {
            const canvas = new OffscreenCanvas(1, 1).getContext("2d");
            canvas.fillStyle = getComputedStyle(cell).backgroundColor;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }"""
    )


def brightness(color: list[int]) -> int:
    return sum(color)


def test_the_request_runs_as_curl_and_as_python(
    open_tab: Callable[..., Tab], service: Service, shoot: Callable[[Page, str], None]
) -> None:
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    page = opened(tab, service).page
    tab.drop(SIGN)
    tab.ask("What does this sign say?\nIt's a \"quoted\" 'question' with $HOME and \\n.")
    answer = tab.answer()
    page.get_by_role("button", name="Request").click()
    snippet = page.locator("#snippet")
    expect(snippet).to_contain_text("curl --no-buffer")
    assert len(snippet.inner_text()) < 2000
    page.get_by_role("button", name="Python").click()
    expect(snippet).to_contain_text("from openai import OpenAI")
    shoot(page, "request")
    python = copied(page)
    assert run(sys.executable, "-c", python).split() == answer.split()
    page.get_by_role("button", name="curl").click()
    curl = copied(page)
    assert len(curl) > 2000  # the picture is whole
    streamed = run("bash", "-c", curl)
    assert "CITY LIBRARY" in streamed
    assert streamed.strip().endswith("data: [DONE]")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(page: Page) -> str:
    page.locator("#copy-snippet").click()
    expect(page.locator("#copy-snippet")).to_have_text("Copied")
    text: str = page.evaluate("navigator.clipboard.readText()")
    expect(page.locator("#copy-snippet")).to_have_text("Copy")
    return text


def test_what_is_said_stays_text(chat: Tab) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    chat.ask(hostile)
    chat.answer()
    assert chat.page.locator("article.question p").inner_text() == hostile
    made = chat.page.evaluate(
        """async (text) => {
            const { readable } = await import(new URL("page/text.js", location));
            const view = document.createElement("div");
            view.append(readable("Say:\\n```html\\n" + text + "\\n```\\nand `" + text + "` or " + text));
            const tags = [...view.querySelectorAll("*")].map((node) => node.localName);
            return { tags, text: view.textContent };
        }""",
        hostile,
    )
    assert set(made["tags"]) == {"p", "div", "pre", "code", "button"}
    assert made["text"].count(hostile) == 3


def test_by_keyboard_alone(tab: Tab, service: Service) -> None:
    page = opened(tab, service, max_tokens=2000).page
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("Tell me")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a long story.")
    page.keyboard.press("Enter")
    tab.wait_until_sent(1)
    assert tab.bodies[0]["messages"][0]["content"] == "Tell me\na long story."
    expect(page.locator(".answer .text p").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".answer footer")).to_contain_text("stopped")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Temperature")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("Tab")
    expect(page.get_by_role("checkbox").first).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_role("checkbox").first).not_to_be_checked()
    page.get_by_role("button", name="Request").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="The request")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="The request")).to_be_hidden()
    expect(page.get_by_role("button", name="Request")).to_be_focused()


def test_on_a_phone_and_in_the_dark(
    open_tab: Callable[..., Tab], service: Service, shoot: Callable[[Page, str], None]
) -> None:
    phone = {"width": 360, "height": 740}
    tab = open_tab(viewport=phone, has_touch=True, is_mobile=True, color_scheme="dark", device_scale_factor=2)
    page = tab.open(service.url)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground))) < 150
    page.get_by_role("button", name="Settings").tap()
    page.get_by_label("Max tokens").fill("32")
    page.get_by_label("Model", exact=True).select_option("poet")
    expect(page.locator(".gates")).to_be_visible()
    assert fits(page)
    shoot(page, "phone-settings")
    page.get_by_role("button", name="Settings").tap()
    page.get_by_label("Model", exact=True).select_option(BASE)
    tab.drop(SIGN)
    page.get_by_label("Your message").fill("What does this sign say? " + "x" * 80)
    assert fits(page)
    page.get_by_label("Your message").fill("What does this sign say?")
    page.get_by_role("button", name="Send").tap()
    assert "city library" in tab.answer().lower()
    assert fits(page)
    shoot(page, "phone")


def fits(page: Page) -> bool:
    """Nothing reaches beyond the screen's width."""
    wide: bool = page.evaluate("document.scrollingElement.scrollWidth > innerWidth")
    return not wide


def test_on_a_desk_in_the_dark(
    open_tab: Callable[..., Tab], service: Service, shoot: Callable[[Page, str], None]
) -> None:
    tab = opened(open_tab(color_scheme="dark"), service)
    tab.page.get_by_label("Model", exact=True).select_option("poet")
    expect(tab.page.locator(".gates")).to_be_visible()
    tab.page.get_by_label("Model", exact=True).select_option(BASE)
    tab.ask("What is the capital of France?")
    assert "Paris" in tab.answer()
    shoot(tab.page, "dark")
