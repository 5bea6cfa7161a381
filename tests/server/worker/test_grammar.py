"""Answers that keep to a grammar: a random model, which knows nothing of JSON, writes valid JSON."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_base import write_tiny_base

from models.tokenizer import Tokenizer, load_tokenizer
from server.errors import InvalidRequest
from server.settings import WorkerSettings
from server.worker.build import build_engine
from server.worker.engine import NativeEngine
from server.worker.grammar import GrammarCompiler, GrammarError, constrain, vocabulary
from server.worker.messages import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    Grammar,
    SamplingParams,
    TextPrompt,
    ToolSchema,
)

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


def json_schema(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", schema)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_base(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def build(folder: Path, **changes: Any) -> NativeEngine:
    values = {"base": str(folder), "dtype": "float32", "kv_cache_mib": 1}
    return build_engine(WorkerSettings(**(values | changes)))


@pytest.fixture(scope="module")
def engine(folder: Path) -> NativeEngine:
    return build(folder)


@pytest.fixture(scope="module")
def closing(tokenizer: Tokenizer) -> dict[int, float]:
    """A bias for what ends strings, lists and objects: without it a random model seldom would."""
    return {i: 4.0 for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b'"', b"]", b"}")}


def request(id: str, grammar: Grammar | None, prompt: str = "JSON: ", **sampling: Any) -> GenerateRequest:
    params = {"temperature": 1.5, "max_tokens": 200, "seed": 1} | sampling
    return GenerateRequest(id, "tiny", TextPrompt(prompt), SamplingParams(grammar=grammar, **params))


def run(engine: NativeEngine, *requests: GenerateRequest) -> list[list[Event]]:
    """Each request's events, all in one batch, on this thread."""
    loop = engine._step_loop
    model = engine._frontend.find(engine._models, "tiny")
    answers: list[list[Event]] = [[] for _ in requests]
    for answer, wanted in zip(answers, requests, strict=True):
        loop.add(engine._frontend.prepare(model, wanted), answer.append)
    while loop.has_work:
        loop.step()
        loop.check_integrity()
    return answers


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def reason_of(events: list[Event]) -> str:
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1].finish_reason


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 6)),
    st.sampled_from(["^[a-c]{2,4}$", "^x[0-9]?$", "^(ja|nein)$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-5, 5), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.just({"type": "string", "format": "date"}),
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.text('abcé"\\ ', min_size=1, max_size=3)
    return st.dictionaries(names, inner, max_size=3).flatmap(
        lambda properties: (
            st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": required,
                    "additionalProperties": False,
                }
            )
            if properties
            else st.just({"type": "object", "additionalProperties": False})
        )
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(
            lambda item, low, span: {
                "type": "array", "items": item, "minItems": low, "maxItems": low + span
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)  # fmt: skip


def test_a_random_models_answers_fit_random_schemas(engine: NativeEngine, closing: dict[int, float]):
    reasons = []

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SCHEMAS, st.integers(0, 2**31))
    def check(schema: dict[str, Any], seed: int) -> None:
        top_p = 0.95 if seed % 2 else 1.0
        wanted = request("r", json_schema(schema), seed=seed, logit_bias=closing, top_p=top_p)
        (events,) = run(engine, wanted)
        reasons.append(reason_of(events))
        if reasons[-1] == "stop":
            jsonschema.validate(json.loads(text_of(events)), schema)

    check()
    assert reasons.count("stop") > len(reasons) / 2


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_any_object(engine: NativeEngine, closing: dict[int, float], temperature: float):
    bias = dict.fromkeys(closing, 8.0)
    wanted = request("r", Grammar("json_object"), temperature=temperature, logit_bias=bias)
    (events,) = run(engine, wanted)
    assert reason_of(events) == "stop"
    assert isinstance(json.loads(text_of(events)), dict)


def test_properties_come_in_the_schemas_order(engine: NativeEngine):
    for names in (["x", "on"], ["on", "x"]):
        schema = POINT | {"properties": {name: POINT["properties"][name] for name in names}}
        (events,) = run(engine, request("r", json_schema(schema)))
        assert list(json.loads(text_of(events))) == names


def test_who_shares_a_step_changes_nothing(engine: NativeEngine):
    def requests() -> list[GenerateRequest]:
        grammars = [None, json_schema(POINT), None, json_schema({"enum": ["yes", "no"]}), json_schema(POINT)]
        return [request(f"r{i}", g, seed=i, max_tokens=24) for i, g in enumerate(grammars)]

    together = [text_of(events) for events in run(engine, *requests())]
    alone = [text_of(run(engine, one)[0]) for one in requests()]
    assert together == alone
    assert together[1] != together[4]  # the seed still counts
    assert together[3] in ('"yes"', '"no"')
    for i in (1, 4):
        jsonschema.validate(json.loads(together[i]), POINT)


def test_a_preempted_answer_goes_on_where_it_was(engine: NativeEngine, folder: Path):
    schema = {"type": "array", "items": POINT, "minItems": 12, "maxItems": 12}
    requests = [
        request(f"r{i}", json_schema(schema), f"{i} word " * 25, seed=i, max_tokens=250) for i in range(10)
    ]
    before = engine._step_loop.stats().preemptions
    together = run(engine, *requests)
    assert engine._step_loop.stats().preemptions > before
    roomy = build(folder, kv_cache_mib=8)
    assert [text_of(events) for events in together] == [text_of(events) for events in run(roomy, *requests)]
    assert roomy._step_loop.stats().preemptions == 0
    for events in together:
        assert reason_of(events) == "stop"
        jsonschema.validate(json.loads(text_of(events)), schema)


def test_a_truncated_answer_says_so_and_a_complete_one_needs_no_end_token(engine: NativeEngine):
    (events,) = run(engine, request("r", json_schema(POINT)))
    tokens = [token for event in events if isinstance(event, Delta) for token in event.token_ids]
    usage = events[-1].usage
    assert reason_of(events) == "stop"
    assert usage.completion_tokens == len(tokens)  # the closing brace was the last
    (exact,) = run(engine, request("r", json_schema(POINT), max_tokens=len(tokens)))
    assert (reason_of(exact), text_of(exact)) == ("stop", text_of(events))
    (short,) = run(engine, request("r", json_schema(POINT), max_tokens=len(tokens) - 1))
    assert reason_of(short) == "length"
    assert text_of(events).startswith(text_of(short))


def test_an_answer_that_may_go_on_ends_with_the_end_token_only_where_it_may(
    engine: NativeEngine, tokenizer: Tokenizer
):
    # Never so early that a digit is lacking, however much the model wants to end.
    eos = dict.fromkeys(tokenizer.eos_ids, 100.0)
    schema = {"type": "integer", "minimum": 10}
    (events,) = run(engine, request("r", json_schema(schema), logit_bias=eos))
    assert reason_of(events) == "stop"
    assert 10 <= int(text_of(events)) <= 99
    assert events[-1].usage.completion_tokens == 3


def test_stop_strings_and_log_probabilities(engine: NativeEngine):
    (plain,) = run(engine, request("r", json_schema(POINT), logprobs=2))
    tokens = [token for event in plain if isinstance(event, Delta) for token in event.logprobs]
    assert "".join(token.token for token in tokens) == text_of(plain)
    assert all(len(token.top) == 2 and token.logprob < 0 for token in tokens)
    (cut,) = run(engine, request("r", json_schema(POINT), stop=('"on"',)))
    assert reason_of(cut) == "stop"
    assert text_of(cut) == text_of(plain).partition('"on"')[0]


TOOLS = (ToolSchema("move", POINT, strict=True), ToolSchema("wait", {"type": "object", "maxProperties": 0}))


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_name_a_tool_and_fit_its_schema(
    engine: NativeEngine, tokenizer: Tokenizer, parallel: bool
):
    grammar = Grammar("tool_calls", None, TOOLS, parallel)
    bias = dict.fromkeys(tokenizer.eos_ids, 0.0 if parallel else -100.0)
    answers = run(
        engine,
        *(request(f"r{i}", grammar, seed=i, max_tokens=300, logit_bias=bias) for i in range(6)),
    )
    seen = set()
    for events in answers:
        assert reason_of(events) == "tool_calls"
        assert text_of(events) == ""
        calls = calls_of(events)
        assert parallel or len(calls) == 1
        for name, arguments in calls:
            seen.add(name)
            schema = next(tool.parameters for tool in TOOLS if tool.name == name)
            jsonschema.validate(json.loads(arguments), schema)
    assert seen == {"move", "wait"}


def calls_of(events: list[Event]) -> list[tuple[str, str]]:
    pieces = [piece for event in events if isinstance(event, Delta) for piece in event.tool_calls]
    names = {piece.index: piece.name for piece in pieces if piece.name is not None}
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)
    assert sum(piece.name is not None for piece in pieces) == len(names), "a name came twice"
    return [
        (name, "".join(piece.arguments for piece in pieces if piece.index == index))
        for index, name in names.items()
    ]


def test_free_text_turns_into_a_call_where_the_model_opens_one(engine: NativeEngine, tokenizer: Tokenizer):
    (free,) = run(engine, request("r", Grammar("text", None, TOOLS), max_tokens=40))
    assert text_of(free)
    assert reason_of(free) in ("stop", "length")
    opening = tokenizer.encode("<tool_call>", add_special_tokens=False)
    assert run_through(tokenizer, Grammar("text", None, TOOLS), [*opening]) == tokenizer.encode("\n")[:1]


def run_through(tokenizer: Tokenizer, grammar: Grammar, tokens: list[int]) -> list[int]:
    """What may come after `tokens`."""
    state = compiler(tokenizer).compile(grammar)
    for token in tokens:
        state.take(token)
    logits = torch.zeros(1, tokenizer.vocab_size)
    constrain(logits, [state])
    return logits[0].isfinite().nonzero().flatten().tolist()


def test_an_answer_by_schema_or_a_call(engine: NativeEngine):
    grammar = Grammar("json_schema", POINT, TOOLS, parallel_calls=False)
    answers = {
        reason_of(events): (text_of(events), calls_of(events))
        for events in run(engine, *(request(f"r{i}", grammar, seed=i) for i in range(12)))
    }
    text, calls = answers["stop"]
    jsonschema.validate(json.loads(text), POINT)
    assert not calls
    text, calls = answers["tool_calls"]
    assert not text
    assert calls


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth else {}


def compiler(tokenizer: Tokenizer, max_bytes: int = 65536, cache_entries: int = 4) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, max_bytes=max_bytes, cache_entries=cache_entries)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "strin"}, "strin"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"$ref": "https://example.com/x.json"}, "example.com"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(a{1000}){1000}"}, "repetitions"),
        ({"type": "string", "pattern": "a" * 2000}, "2000 characters"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
        ({"type": "integer", "minimum": 10**400}, "number out of range"),
        (nested(150), "recursion"),
        ({"properties": {f"p{i}": {} for i in range(1500)}}, "1500 properties"),
        ({"patternProperties": {f"^{i}$": {} for i in range(50)}}, "50 patternProperties"),
        ({"enum": ["x" * 70000]}, "max_grammar_bytes"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    engine: NativeEngine, tokenizer: Tokenizer, schema: dict[str, Any], word: str
):
    with pytest.raises(InvalidRequest, match=word) as caught:
        run(engine, request("r", json_schema(schema)))
    assert caught.value.param == "response_format"
    assert len(caught.value.message) < 600
    lenient = Grammar("json_schema", schema, strict=False)
    if word in ("not", "uniqueItems"):
        assert compiler(tokenizer).compile(lenient)
    else:
        with pytest.raises(GrammarError, match=word):
            compiler(tokenizer).compile(lenient)
    strict = Grammar("tool_calls", None, (ToolSchema("f", schema, strict=True),))
    with pytest.raises(GrammarError, match=word) as refused:
        compiler(tokenizer).compile(strict)
    assert refused.value.param == "tools"


KEYWORDS = [
    *("type", "properties", "required", "additionalProperties", "patternProperties", "items", "prefixItems"),
    *("minItems", "maxItems", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs", "$id", "$schema"),
    *("$anchor", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum"),
    *("multipleOf", "minProperties", "not", "title", "x-guidance", "a"),
]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=3),
        st.sampled_from(
            ["object", "array", "string", "integer", "#", "#/$defs/a", "a{2,1}", "[a-", "date", "a"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=5))
def test_whatever_is_sent_as_a_schema_is_compiled_or_refused(tokenizer: Tokenizer, schema: dict[str, Any]):
    for strict in (True, False):
        with suppress(GrammarError):
            state = compiler(tokenizer).compile(Grammar("json_schema", schema, strict=strict))
            constrain(torch.zeros(1, tokenizer.vocab_size), [state])


@pytest.mark.parametrize("before", ["", "a"])
def test_a_schema_whose_fault_the_library_cannot_print_is_refused(tokenizer: Tokenizer, before: str):
    with pytest.raises(GrammarError, match="cannot be followed"):
        compiler(tokenizer).compile(json_schema({"$ref": {"a": before + "é" * 60}}))


TAGS = {
    "type": "object",
    "properties": {"tags": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}},
    "required": ["tags"],
    "additionalProperties": False,
    "if": {"properties": {"tags": {"contains": {"const": "a"}}}},
}


def test_of_what_is_not_strict_the_unknown_is_passed_over_and_the_rest_followed(tokenizer: Tokenizer):
    with pytest.raises(GrammarError, match=r"uniqueItems|if"):
        compiler(tokenizer).compile(Grammar("json_schema", TAGS))
    call = '<tool_call>\n{"name": "f", "arguments": '
    for grammar, head in (
        (Grammar("json_schema", TAGS, strict=False), ""),
        (Grammar("tool_calls", None, (ToolSchema("f", TAGS),)), call),
    ):
        for text, fits in (('{"tags": ["a", "b", "a"]', True), ('{"tags": ["c', False), ('{"other', False)):
            state = compiler(tokenizer).compile(grammar)
            for token in tokenizer.encode(head + text, add_special_tokens=False):
                state.take(token)
            assert (state.error is None) == fits


def test_a_tool_that_is_not_strict_falls_back_to_any_object(tokenizer: Tokenizer):
    tool = ToolSchema("f", {"type": "object", "properties": {"id": {"type": "strin"}}})
    head = tokenizer.encode('<tool_call>\n{"name": "f", "arguments": {"other', add_special_tokens=False)
    assert run_through(tokenizer, Grammar("tool_calls", None, (tool,)), head)


@pytest.mark.parametrize(("param", "value"), [("min_tokens", 3), ("ignore_eos", True)])
def test_what_contradicts_a_grammar_is_refused(engine: NativeEngine, param: str, value: Any):
    with pytest.raises(InvalidRequest) as caught:
        run(engine, request("r", json_schema(POINT), **{param: value}))
    assert caught.value.param == param


def test_a_grammar_that_breaks_on_the_way_ends_its_request_alone(engine: NativeEngine):
    loop, model = engine._step_loop, engine._frontend.find(engine._models, "tiny")
    broken, whole = [], []
    prepared = engine._frontend.prepare(model, request("a", json_schema(POINT)))
    prepared.grammar.take(0)  # no schema allows it: as if a limit had been reached
    loop.add(prepared, broken.append)
    loop.add(engine._frontend.prepare(model, request("b", json_schema(POINT))), whole.append)
    while loop.has_work:
        loop.step()
    assert isinstance(broken[-1], Failed)
    assert (broken[-1].status, broken[-1].param) == (400, "response_format")
    jsonschema.validate(json.loads(text_of(whole)), POINT)
    loop.check_integrity()


def test_grammars_are_compiled_once_while_they_are_kept(tokenizer: Tokenizer):
    compiling = compiler(tokenizer, cache_entries=2)
    grammars = [json_schema({"const": i}) for i in range(3)]
    for grammar in (*grammars, grammars[1], grammars[2]):
        compiling.compile(grammar)
    assert len(compiling._compiled) == 2
    kept = list(compiling._compiled.values())
    compiling.compile(grammars[1])
    assert set(map(id, compiling._compiled.values())) == set(map(id, kept))
    # Two answers by one grammar do not meet.
    first, second = compiling.compile(grammars[2]), compiling.compile(grammars[2])
    (digit,) = tokenizer.encode("2", add_special_tokens=False)
    first.take(digit)
    assert first.is_complete
    assert not second.is_complete


def test_logits_wider_than_the_vocabulary(tokenizer: Tokenizer):
    width = tokenizer.vocab_size + 45
    state = GrammarCompiler(tokenizer, width, max_bytes=999, cache_entries=1).compile(Grammar("json_object"))
    logits = torch.zeros(3, width)
    constrain(logits, [None, state, None])
    assert logits[0].isfinite().all()
    assert logits[2].isfinite().all()
    allowed = logits[1].isfinite().nonzero().flatten().tolist()
    assert allowed == [i for i in allowed if tokenizer.token_bytes(i).startswith(b"{")]
    assert allowed


def test_every_byte_of_every_token_is_known_to_the_grammar(tokenizer: Tokenizer):
    known = vocabulary(tokenizer, tokenizer.vocab_size)
    # 0xFF is in no UTF-8; with it llguidance marks what is not text.
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) not in (b"", b"\xff")]
    assert len(ids) > 300
    assert all(known.decode_bytes([i]) == tokenizer.token_bytes(i) for i in ids)
