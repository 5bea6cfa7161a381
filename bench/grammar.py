"""Libraries for constrained decoding, on the default base's vocabulary: `python bench/grammar.py`.

Each library that is installed (llguidance, xgrammar, outlines-core) follows the same documents, token
by token, in a process of its own. Times are medians over a document's tokens, then over the rounds. The
second table says what each does with keywords of JSON Schema: honour, refuse, or ignore.

compile   schema → something that can fill masks, nothing cached.      mask   one step of so many rows:
every row's mask is filled and its token taken.      worst   the slowest step of one row.
memory    resident, with what was compiled, over what the process had before the library was imported.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import psutil
import torch
import typer

from models.pull import resolve_base
from models.tokenizer import Tokenizer, load_tokenizer
from server.settings import WorkerSettings

Schema = dict[str, Any]

_ITEM: Schema = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "price": {"type": "number"},
        "gift": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["sku", "count", "price", "gift"],
    "additionalProperties": False,
}
# name → schema, and a document that fits it
CASES: dict[str, tuple[Schema, Any]] = {
    "person": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer"},
                "member": {"type": "boolean"},
            },
            "required": ["name", "age", "member"],
            "additionalProperties": False,
        },
        {"name": "Ada Lovelace, Countess of Lovelace", "age": 36, "member": True},
    ),
    "order": (
        {
            "type": "object",
            "properties": {
                "status": {"enum": ["open", "paid", "shipped", "returned"]},
                "date": {"type": "string", "format": "date"},
                "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1, "maxItems": 8},
            },
            "required": ["status", "date", "items"],
            "additionalProperties": False,
            "$defs": {"item": _ITEM},
        },
        {
            "status": "paid",
            "date": "2026-01-05",
            "items": [
                {"sku": "ABC-1234", "count": 2, "price": 12.5, "gift": None},
                {"sku": "XYZ-0001", "count": 1, "price": 35.7, "gift": "For the best of all uncles"},
            ],
        },
    ),
    "tree": (
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "string"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["value", "children"],
                    "additionalProperties": False,
                }
            },
        },
        {"value": "root", "children": [{"value": "left", "children": [{"value": "leaf", "children": []}]}]},
    ),
    "any object": (
        {"type": "object"},
        {"a": [1, 2.5, None, True], "b": {"text": "some text of some length"}},
    ),
}

# keyword → schema, and a document that it forbids
KEYWORDS: dict[str, tuple[Schema, Any]] = {
    "not": ({"enum": ["a", "b"], "not": {"const": "a"}}, "a"),
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [1, 1]),
    "if": ({"type": "string", "if": {"minLength": 1}, "then": {"minLength": 3}}, "ab"),
    "format: uuid4": ({"type": "string", "format": "uuid4"}, "no"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, {"a": 1}),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, 8),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 4}]}, 3),
}


class Matcher(Protocol):
    def fill(self, mask_W: torch.Tensor) -> None:
        """Write the mask of the next token, a bit for each; int32 [V / 32]."""

    def take(self, token: int) -> bool:
        """False if the token does not fit."""


Compile = Callable[[Schema], Callable[[], Matcher]]


def llguidance(tokenizer: Tokenizer) -> Compile:
    from llguidance import LLMatcher

    from server.worker.grammar import vocabulary

    class Guided:
        def __init__(self, matcher: LLMatcher) -> None:
            self._matcher = matcher

        def fill(self, mask_W: torch.Tensor) -> None:
            self._matcher.unsafe_compute_mask_ptr(mask_W.data_ptr(), mask_W.numel() * 4)

        def take(self, token: int) -> bool:
            return self._matcher.consume_token(token)

    known = vocabulary(tokenizer, tokenizer.vocab_size)

    def compile(schema: Schema) -> Callable[[], Matcher]:
        options: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
        matcher = LLMatcher(known, LLMatcher.grammar_from_json_schema(schema, overrides=options))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return lambda: Guided(matcher.deep_copy())

    return compile


def xgrammar(tokenizer: Tokenizer) -> Compile:
    import xgrammar as xgr

    class Guided:
        def __init__(self, matcher: Any) -> None:
            self._matcher = matcher

        def fill(self, mask_W: torch.Tensor) -> None:
            self._matcher.fill_next_token_bitmask(mask_W[None])

        def take(self, token: int) -> bool:
            return bool(self._matcher.accept_token(token))

    info = xgr.TokenizerInfo(
        [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)],
        xgr.VocabType.RAW,
        stop_token_ids=sorted(tokenizer.eos_ids),
    )

    def compile(schema: Schema) -> Callable[[], Matcher]:
        compiler = xgr.GrammarCompiler(info, cache_enabled=False)
        grammar = compiler.compile_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
        return lambda: Guided(xgr.GrammarMatcher(grammar))

    return compile


def outlines_core(tokenizer: Tokenizer) -> Compile:
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.outlines_core import json_schema

    class Guided:
        def __init__(self, guide: Any) -> None:
            self._guide = guide

        def fill(self, mask_W: torch.Tensor) -> None:
            self._guide.write_mask_into(mask_W.data_ptr(), mask_W.numel(), mask_W.element_size())

        def take(self, token: int) -> bool:
            self._guide.advance(token, return_tokens=False)
            return True

    ids: dict[bytes, list[int]] = {}
    for id in range(tokenizer.vocab_size):
        if text := tokenizer.token_bytes(id):
            ids.setdefault(text, []).append(id)
    known = Vocabulary(min(tokenizer.eos_ids), ids)

    def compile(schema: Schema) -> Callable[[], Matcher]:
        index = Index(json_schema.build_regex_from_schema(json.dumps(schema), " ?"), known)
        return lambda: Guided(Guide(index))

    return compile


LIBRARIES = {"llguidance": llguidance, "xgrammar": xgrammar, "outlines-core": outlines_core}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    limit: Annotated[float, typer.Option(help="seconds that one library may take with one schema")] = 60,
    only: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the table. What is not installed, or takes too long, says so in its row."""
    if only:
        library, case = only.split("/")
        print(json.dumps(_measure(library, case, rounds) if case else _keywords(library)))
        return
    print("| library | schema | compile ms | mask µs, 1 row | worst µs | mask µs, 16 rows | memory MiB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for library in LIBRARIES:
        for case in CASES:
            print(_row(library, case, rounds, limit), flush=True)
    print("", f"| library | {' | '.join(KEYWORDS)} |", f"|---|{'---|' * len(KEYWORDS)}", sep="\n")
    for library in LIBRARIES:
        answer = _ask(library, "", rounds, limit)
        words = [answer] if isinstance(answer, str) else answer.values()
        print(f"| {library} | {' | '.join(words)} |", flush=True)


def _row(library: str, case: str, rounds: int, limit: float) -> str:
    r = _ask(library, case, rounds, limit)
    if isinstance(r, str):
        return f"| {library} | {case} | {r} | | | | |"
    return (
        f"| {library} {importlib.metadata.version(library)} | {case} | {r['compile']:.1f} | {r['one']:.1f} "
        f"| {r['worst']:.0f} | {r['sixteen']:.0f} | {r['memory']:.0f} |"
    )


def _ask(library: str, case: str, rounds: int, limit: float) -> dict[str, Any] | str:
    """The figures of one process, or why there are none."""
    try:
        importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    command = [sys.executable, __file__, "--rounds", str(rounds), "--only", f"{library}/{case}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s"
    except subprocess.CalledProcessError as error:
        return error.stderr.strip().splitlines()[-1][:60]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _tokenizer() -> Tokenizer:
    settings = WorkerSettings()
    return load_tokenizer(resolve_base(settings.base, settings.cache_dir))


def _keywords(library: str) -> dict[str, str]:
    tokenizer = _tokenizer()
    compile = LIBRARIES[library](tokenizer)
    answers = {}
    for keyword, (schema, forbidden) in KEYWORDS.items():
        tokens = tokenizer.encode(json.dumps(forbidden), add_special_tokens=False)
        try:
            matcher = compile(schema)()
        except Exception:  # each library has its own
            answers[keyword] = "refuses"
            continue
        try:
            _follow([matcher], tokens, tokenizer.vocab_size)
        except ValueError:
            answers[keyword] = "honours"
            continue
        mask_W = torch.zeros(-(-tokenizer.vocab_size // 32), dtype=torch.int32)
        matcher.fill(mask_W)
        ends = _has(mask_W, min(tokenizer.eos_ids))  # honoured too if the document may not end here
        answers[keyword] = "ignores" if ends else "honours"
    return answers


def _measure(library: str, case: str, rounds: int) -> dict[str, float]:
    tokenizer = _tokenizer()
    gc.collect()
    before = psutil.Process().memory_info().rss
    compile = LIBRARIES[library](tokenizer)
    schema, document = CASES[case]
    tokens = tokenizer.encode(json.dumps(document), add_special_tokens=False)
    compiling, one, sixteen = [], [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        new = compile(schema)
        compiling.append(time.perf_counter() - begun)
        one.append(_follow([new()], tokens, tokenizer.vocab_size))
        sixteen.append(_follow([new() for _ in range(16)], tokens, tokenizer.vocab_size))
    return {
        "compile": 1e3 * statistics.median(compiling),
        "one": 1e6 * statistics.median(map(statistics.median, one)),
        "worst": 1e6 * statistics.median(map(max, one)),
        "sixteen": 1e6 * statistics.median(map(statistics.median, sixteen)),
        "memory": (psutil.Process().memory_info().rss - before) / 2**20,
    }


def _follow(matchers: Sequence[Matcher], tokens: Sequence[int], vocab_size: int) -> list[float]:
    """Seconds of each step. Raises ValueError if a mask does not have the document's token."""
    mask_MW = torch.zeros(len(matchers), -(-vocab_size // 32), dtype=torch.int32)
    seconds = []
    for token in tokens:
        begun = time.perf_counter()
        for matcher, mask_W in zip(matchers, mask_MW, strict=True):
            matcher.fill(mask_W)
            if not (_has(mask_W, token) and matcher.take(token)):
                raise ValueError(f"token {token} of a document that fits its schema is refused")
        seconds.append(time.perf_counter() - begun)
    return seconds


def _has(mask_W: torch.Tensor, token: int) -> bool:
    return bool(mask_W[token // 32] >> token % 32 & 1)


if __name__ == "__main__":
    typer.run(main)
