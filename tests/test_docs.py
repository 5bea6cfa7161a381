"""Every command and snippet of README and docs works as it is written, and every link leads somewhere."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from doc_pages import PAGES, ROOT, Reader, blocks, commands
from typer.testing import CliRunner

from server.cli import app
from server.precautions import unknown_variables
from server.settings import EvaluationSettings
from train.recipe import load_recipe
from train.study import load_study

# What cannot run here is checked for its options, files and names instead.
STATIC = {
    r"docker ": "needs Docker's engine",
    r".*(~/models/|http://10\.)": "names files and machines that are not here",
    r"(helm|kubectl) ": "need a cluster",
    r"torchrun ": "needs several processors or GPUs",
    r"make (?!serve\b)": "is run by itself: these install, test, build or break things for minutes",
    r"git clone|source |(.venv/bin/)?pip ": "changes the environment that the tests run in",
    r"llama-adapter (study|data|eval) ": "takes long, or data that no package holds",
    r"llama-adapter train (?!.*max_steps=)": "takes hours",
    r"[A-Z_]+=\S+ docker ": "needs Docker's engine",
    r"\.venv-vllm/": "needs the environment of `make vllm`, whose own tests serve over it",
}
ELSEWHERE = {"adapters.md": "tests/server/commands/test_adapters_guide.py"}

RUN = [page for page in PAGES if page.name not in ELSEWHERE]
CARDS = sorted((ROOT / "models" / "shipped").glob("*/README.md"))
NOTES = sorted(path for path in ROOT.glob("*.md") if path.name != "README.md")


def is_static(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in STATIC)


def lines(page: Path) -> list[str]:
    return [command for b in blocks(page) if b.language == "bash" for command in commands(b.text)]


@pytest.mark.server
@pytest.mark.weights
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in RUN
        if any(b.language == "python" for b in blocks(page)) or not all(map(is_static, lines(page)))
    ],
    ids=lambda page: page.stem,
)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    try:
        for block in blocks(page):
            if block.language == "python":
                reader.run_python(block.text)
            elif block.language == "bash":
                for command in commands(block.text):
                    if not is_static(command):
                        reader.run(command)
    finally:
        reader.close()


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_cannot_run_here_is_right_in_its_words(page: Path) -> None:
    for command in filter(is_static, lines(page)):
        check(command)
    for block in blocks(page):
        match block.language:
            case "yaml":
                assert yaml.safe_load(block.text), block.where
            case "toml":
                assert tomllib.loads(block.text), block.where
            case "json":
                assert json.loads(block.text), block.where
            case "python":
                assert ast.parse(block.text), block.where
            case "":  # how a command is called; drawings
                for line in re.findall(r"^llama-adapter .*", block.text, re.MULTILINE):
                    check_options(line)
            case language:
                assert language == "bash", f"{block.where}: who runs {language}?"


def test_what_is_not_run_is_a_short_list() -> None:
    told = [command for page in RUN for command in lines(page)]
    unused = {p for p in STATIC if not any(re.match(p, command) for command in told)}
    assert unused == set()
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


def check(command: str) -> None:
    """Its options, files, targets, profiles and recipes exist."""
    words = [w for w in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", w)]
    match words[0]:
        case "make":
            targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {word for word in words[1:] if "=" not in word} <= targets, command
        case "docker":
            check_docker(words, command)
        case "helm" | "kubectl":
            paths = [word for word in words if "/" in word and not re.search(r"[:=]", word)]
            assert [path for path in paths if not (ROOT / path).exists()] == [], command
        case "torchrun":
            check(shlex.join(words[words.index("llama-adapter") :]))
        case "llama-adapter":
            check_options(command)
            if words[1] == "study":
                load_study(words[2])
            elif words[1] == "train" and words[2] != "recipe.yaml":
                load_recipe(words[2], [word for word in words[3:] if "=" in word])
        case ".venv-vllm/bin/llama-adapter":
            check_options(shlex.join(["llama-adapter", *words[1:]]))
        case program:
            assert program in ("git", "pip", ".venv/bin/pip"), command
            for extras in re.findall(r"\[([a-z,]+)\]", command):
                project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
                assert set(extras.split(",")) <= set(project["optional-dependencies"]), command


def check_docker(words: list[str], command: str) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    known = {profile for service in compose["services"].values() for profile in service.get("profiles", ())}
    told = {word for before, word in itertools.pairwise(words) if before == "--profile"}
    assert words[1] == "compose", command
    assert told <= known, command
    if "run" in words:
        service, *rest = [word for word in words[words.index("run") + 1 :] if not word.startswith("-")]
        assert service in compose["services"], command
        check(shlex.join(["llama-adapter", *rest]))


def check_options(line: str) -> None:
    """Every option of `llama-adapter …` is one that its help tells."""
    names = re.match(r"llama-adapter ([\w|]+)(?: ([a-z|]+)\b)?", line)
    assert names, line
    command = names[1]
    for sub in (names[2] or "").split("|") if command == "eval" else ("",):
        assert set(re.findall(r"(?<!\S)\[?(--[a-z][a-z0-9-]*)", line)) <= options_of(command, sub), line


@functools.cache
def options_of(*names: str) -> set[str]:
    done = CliRunner().invoke(app, [*filter(None, names), "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, names
    return set(re.findall(r"--[a-z0-9-]+", done.output))


def every_command() -> Iterator[tuple[str, ...]]:
    """The words that come after `llama-adapter`."""
    yield ()
    for name, command in typer.main.get_command(app).commands.items():
        yield from [(name, sub) for sub in getattr(command, "commands", ())] or [(name,)]


# Options of other programs that pages name by themselves, without the command they belong to.
OTHERS = {"--mount"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_and_variables_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    options = set(re.findall(r"`(--[a-z][a-z0-9-]*)", text)) - OTHERS
    ours = set().union(*(options_of(*names) for names in every_command()))
    assert options - ours == set()
    variables = set(re.findall(r"LLAMA_ADAPTER_[A-Z_]+", text))
    known = {f"LLAMA_ADAPTER_{name.upper()}" for name in EvaluationSettings.model_fields}
    assert [*unknown_variables(dict.fromkeys(variables - known, ""))] == []


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *CARDS, *NOTES, ROOT / "bench" / "RESULTS.md"], ids=str)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in slugs(target)):
            broken.append(link)
    assert broken == []


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - linked == set()
