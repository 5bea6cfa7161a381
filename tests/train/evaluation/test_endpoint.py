"""An endpoint that is wrong is told in one sentence; a busy one is asked again."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scripted_endpoint import Reply, answering, said, scored

from train.errors import EvaluationError
from train.evaluation.endpoint import Endpoint, Target


def asked(endpoint: Endpoint, question: str, image: Path | None = None) -> str:
    """One answer."""
    return endpoint.each(lambda text: endpoint.ask(text, image, 7), [question], "questions")[0]


def tokens_scored(endpoint: Endpoint, ids: list[int]) -> list[float | None]:
    return endpoint.each(endpoint.score, [ids], "rows")[0]


def test_a_question_with_a_picture_is_asked_greedily(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.webp")
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> Reply:
        seen.append(body)
        return said("a cat")

    with answering(reply) as endpoint:
        assert asked(endpoint, "what?", tmp_path / "a.webp") == "a cat"
        assert asked(endpoint, "and now?") == "a cat"
    first, second = seen
    assert (first["path"], first["key"]) == ("/v1/chat/completions", "Bearer k")
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0, 7)
    assert first["experts"] == []
    text, picture = first["messages"][0]["content"]
    assert text == {"type": "text", "text": "what?"}
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/webp;base64"
    assert base64.b64decode(data) == (tmp_path / "a.webp").read_bytes()
    assert second["messages"] == [{"role": "user", "content": "and now?"}]


def test_nothing_said_is_an_empty_answer() -> None:
    with answering(lambda body: said(None)) as endpoint:
        assert asked(endpoint, "what?") == ""


def test_tokens_are_scored_without_writing_any() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        assert (body["path"], body["echo"], body["max_tokens"]) == ("/v1/completions", True, 0)
        return scored([None, *(-float(id) for id in body["prompt"][1:])])

    with answering(reply) as endpoint:
        assert tokens_scored(endpoint, [5, 6, 7]) == [None, -6, -7]


@pytest.mark.parametrize("logprobs", [None, [], [None, -1.0]])
def test_an_endpoint_that_scores_otherwise_is_refused(logprobs: list[float | None] | None) -> None:
    with (
        answering(lambda body: scored(logprobs)) as endpoint,
        pytest.raises(EvaluationError, match="of 3 tokens with `echo`"),
    ):
        tokens_scored(endpoint, [1, 2, 3])


@pytest.mark.parametrize("logprobs", ["x", {"token_logprobs": "abc"}])
def test_scores_that_are_no_numbers_are_refused(logprobs: object) -> None:
    with (
        answering(lambda body: (200, {"choices": [{"logprobs": logprobs}]})) as endpoint,
        pytest.raises(EvaluationError, match="scores 0 of 3 tokens"),
    ):
        tokens_scored(endpoint, [1, 2, 3])


def failure(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((401, failure("bad key")), r"refuses the key \(bad key\); set OPENAI_API_KEY"),
        ((404, failure("no such model")), r"no model 'm' or no such API \(no such model\); correct --model"),
        ((404, "<html>" + "x" * 5000), "correct --model or --url"),
        ((400, failure("too long")), r"'what\?': http.* answers 400: too long"),
        ((200, "<html>hello"), "not as OpenAI's API does"),
        ((200, {"choices": []}), "not as OpenAI's API does"),
        ((200, {"choices": [None]}), "not as OpenAI's API does"),
        ((200, {"choices": [{}]}), "not as OpenAI's API does"),
        ((200, {"choices": [{"message": "hello"}]}), "not as OpenAI's API does"),
        ((200, {"choices": [{"message": {"content": [{"text": "hello"}]}}]}), "not as OpenAI's API does"),
        ((200, []), "not as OpenAI's API does"),
        ((200, {"hello": 1}), "not as OpenAI's API does"),
    ],
)
def test_a_wrong_endpoint_is_told_in_one_sentence(reply: Reply, sentence: str) -> None:
    with (
        answering(lambda body: reply) as endpoint,
        pytest.raises(EvaluationError, match=sentence) as caught,
    ):
        asked(endpoint, "what?")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_nobody_at_home() -> None:
    with (
        Endpoint(Target("http://127.0.0.1:9/v1", "m", local=True)) as endpoint,
        pytest.raises(EvaluationError, match=r"127\.0\.0\.1:9/v1: cannot be reached .* --url"),
    ):
        asked(endpoint, "what?")


def test_a_busy_endpoint_is_asked_again() -> None:
    replies = [(503, failure("busy")), (429, failure("slowly")), said("now")]
    with answering(lambda body: replies.pop(0)) as endpoint:
        assert asked(endpoint, "what?") == "now"


def test_answers_come_in_order_and_no_more_are_asked_at_once_than_allowed() -> None:
    lock = threading.Lock()
    running, most = 0, 0

    def reply(body: dict[str, Any]) -> Reply:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return said(body["messages"][0]["content"])

    questions = [str(i) for i in range(20)]
    with answering(reply, concurrency=3) as endpoint:
        answers = endpoint.each(lambda question: endpoint.ask(question, None, 1), questions, "questions")
    assert answers == questions
    assert most == 3


def test_the_first_failure_ends_the_asking() -> None:
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> Reply:
        asked.append(body["messages"][0]["content"])
        return (400, failure("no")) if len(asked) == 3 else said("yes")

    with answering(reply, concurrency=1) as endpoint, pytest.raises(EvaluationError, match="answers 400"):
        endpoint.each(
            lambda question: endpoint.ask(question, None, 1), list(map(str, range(50))), "questions"
        )
    assert len(asked) < 50


@pytest.mark.parametrize("good", [0, 3])
def test_a_failure_keeps_the_answers_from_before(good: int, tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    file.write_text("of an earlier evaluation")
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> Reply:
        asked.append(body["messages"][0]["content"])
        return (400, failure("no")) if len(asked) > good else said("\ud800 yes")

    with answering(reply, 1, file) as endpoint, pytest.raises(EvaluationError, match="answers 400") as caught:
        endpoint.each(
            lambda question: endpoint.ask(question, None, 1),
            list(map(str, range(9))),
            "questions",
            lambda question, answer: {"question": question, "answer": answer},
        )
    if not good:
        assert file.read_text() == "of an earlier evaluation"
        assert "kept" not in str(caught.value)
        return
    assert str(caught.value).endswith(f"; 3 answers are kept in {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"question": question, "answer": "\ud800 yes"} for question in asked[:good]]


def test_answers_that_cannot_be_kept_are_told(tmp_path: Path) -> None:
    with (
        answering(lambda body: said("yes"), kept=tmp_path / "none" / "predictions.jsonl") as endpoint,
        pytest.raises(EvaluationError, match=r"predictions\.jsonl: cannot be written \(No such file"),
    ):
        endpoint.each(
            lambda question: endpoint.ask(question, None, 1), ["what?"], "questions", lambda *both: {"a": 1}
        )
