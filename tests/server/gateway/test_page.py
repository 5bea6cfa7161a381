"""The page as files: how it is served, and that it trusts nothing and calls nobody else.

`tests/page` uses it in a browser.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from server.gateway.routes.page import read_page
from tests.server.gateway.scripted import Launch, ScriptedExpert, ScriptedWorker, Stack

FOLDER = Path(__file__).parents[3] / "server/gateway/page"
FILES = {path: file.content.decode() for path, file in read_page().items()}
SCRIPTS = [path for path in FILES if path.endswith(".js")]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def test_every_file_of_the_folder_is_served() -> None:
    served = {path.removeprefix("/page/") for path in FILES} - {"/"}
    assert served | {"index.html"} == {path.name for path in FOLDER.iterdir()}
    assert len(SCRIPTS) > 5


@pytest.mark.parametrize("path", FILES)
async def test_each_file_has_its_type_and_the_strict_policy(gateway: Stack, path: str) -> None:
    response = await gateway.http.get(path)
    kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "/": "text/html"}
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == kind[path.rpartition(".")[2]]
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    assert response.text == FILES[path]
    head = await gateway.http.head(path)
    assert (head.status_code, head.content) == (200, b"")


async def test_an_unchanged_file_is_not_sent_again(gateway: Stack) -> None:
    etag = (await gateway.http.get("/")).headers["etag"]
    for tags in (etag, f"W/{etag}", f'"other", {etag}'):
        again = await gateway.http.get("/", headers={"if-none-match": tags})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert again.headers["content-security-policy"] == POLICY
    assert (await gateway.http.get("/", headers={"if-none-match": '"other"'})).status_code == 200


async def test_the_page_needs_no_key_and_what_it_calls_does(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, api_keys=("one",))
    for path in FILES:
        assert (await gateway.http.get(path)).status_code == 200
    for path in ("/v1/models", "/v1/experts", "/page", "/page/", "/page/../v1/models", "/index.html"):
        assert (await gateway.http.get(path)).status_code == 401, path


async def test_it_can_be_switched_off(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, page=False)
    for path in FILES:
        assert (await gateway.http.get(path)).json()["error"]["code"] == "not_found"
    keyed = await launch(ScriptedWorker(), page=False, api_keys=("one",))
    assert (await keyed.http.get("/")).status_code == 401


@pytest.mark.parametrize("path", ["/page/", "/page/none.js", "/page/..%2fauth.py", "/page/index.html"])
async def test_nothing_else_is_served(gateway: Stack, path: str) -> None:
    assert (await gateway.http.get(path)).status_code == 404


async def test_posting_to_the_page_is_refused(gateway: Stack) -> None:
    assert (await gateway.http.post("/")).json()["error"]["code"] == "method_not_allowed"


async def test_experts_are_listed(launch: Launch, worker: ScriptedWorker) -> None:
    gateway = await launch(worker, experts={"ocr": ScriptedExpert("ocr"), "b": ScriptedExpert("b")})
    listed = (await gateway.http.get("/v1/experts")).json()
    assert listed == {
        "object": "list",
        "data": [{"id": "ocr", "object": "expert"}, {"id": "b", "object": "expert"}],
    }


class _Markup(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def markup() -> list[tuple[str, dict[str, str | None]]]:
    parser = _Markup()
    parser.feed(FILES["/"])
    return parser.tags


def test_the_markup_holds_no_script_and_no_style() -> None:
    for tag, attributes in markup():
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag


def test_what_is_referred_to_is_served() -> None:
    for _, attributes in markup():
        for name in ("src", "href"):
            if (target := attributes.get(name)) and target != "openapi.json":
                assert f"/{target}" in FILES
    for path in SCRIPTS:
        for target in re.findall(r'from "(.*?)"', FILES[path]):
            assert target.startswith("./")
            assert f"/page/{target[2:]}" in FILES


@pytest.mark.parametrize("path", FILES)
def test_nothing_comes_from_elsewhere(path: str) -> None:
    text = FILES[path].replace("http://www.w3.org/2000/svg", "")  # a name, no address
    assert not re.search(r"\b(https?|wss?):|[\"'(]//|@import|\burl\(", text)


@pytest.mark.parametrize("path", SCRIPTS)
def test_no_text_becomes_markup_or_code(path: str) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|javascript:"
    assert not re.search(ways, FILES[path])


def test_every_control_has_a_name() -> None:
    labelled = {attributes["for"] for tag, attributes in markup() if tag == "label" and "for" in attributes}
    for tag, attributes in markup():
        if tag in ("select", "textarea"):
            assert attributes["id"] in labelled
    for tag, attributes in markup():
        if tag == "dialog":
            assert "aria-labelledby" in attributes


# (text, what it stands on) of page.css
PAIRS = [
    ("ink", "ground"), ("ink", "surface"), ("ink", "sunken"), ("quiet", "ground"), ("quiet", "surface"),
    ("quiet", "sunken"), ("on-accent", "accent"), ("error", "error-ground"), ("ink", "error-ground"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\n\s*\}", FILES["/page/page.css"], re.DOTALL)
    light, dark = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    assert light.keys() == dark.keys()
    colors = light if scheme == "light" else dark
    for text, ground in PAIRS:
        assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    for line in ("control", "accent"):  # what shows where controls and the focus are
        assert contrast(colors[line], colors["ground"]) >= 3, line


def contrast(one: str, other: str) -> float:
    """WCAG's ratio, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
