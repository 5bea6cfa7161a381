"""What an answer to POST /v1/responses consists of, put together, and the events that tell of it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from server.gateway.answers import experts_body, new_call_id, scored_tokens
from server.gateway.pipeline import Job
from server.gateway.responses.schemas import ResponseRequest
from server.worker.messages import Delta, Finished, SamplingParams, TokenLogprob, ToolCallDelta, Usage

Status = Literal["in_progress", "completed", "incomplete"]
# One event of a stream, but for its number.
Told = dict[str, Any]


@dataclass(slots=True)
class _Message:
    """Text: an item of one part."""

    index: int
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    texts: list[str] = field(default_factory=list)
    scored: list[dict[str, Any]] = field(default_factory=list)  # its tokens, where they are asked for

    def body(self, status: Status) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {
            "id": self.id, "type": "message", "status": status, "role": "assistant", "content": content
        }  # fmt: skip

    def begin(self) -> list[Told]:
        return [
            _added(self.index, self.body("in_progress")),
            {"type": "response.content_part.added", **self._place(), "part": self._part()},
        ]

    def add(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Told]:
        self.texts.append(text)
        scored = scored_tokens(logprobs)
        self.scored += scored
        return [{"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": scored}]

    def end(self, status: Status) -> list[Told]:
        part = self._part()
        said = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            {"type": "response.output_text.done", **self._place(), **said},
            {"type": "response.content_part.done", **self._place(), "part": part},
            _done(self.index, self.body(status)),
        ]

    def _part(self) -> dict[str, Any]:
        text = "".join(self.texts)
        # A list of its own: what was told must not change as the answer grows.
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.scored)}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}


@dataclass(slots=True)
class _Call:
    """A call of a function."""

    index: int
    name: str
    id: str = field(default_factory=lambda: f"fc_{uuid.uuid4().hex}")
    call_id: str = field(default_factory=new_call_id)
    arguments: list[str] = field(default_factory=list)

    def body(self, status: Status) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self.arguments),
        }

    def begin(self) -> list[Told]:
        return [_added(self.index, self.body("in_progress"))]

    def add(self, arguments: str) -> list[Told]:
        self.arguments.append(arguments)
        return [{"type": "response.function_call_arguments.delta", **self._place(), "delta": arguments}]

    def end(self, status: Status) -> list[Told]:
        item = self.body(status)
        whole = {"name": self.name, "arguments": item["arguments"]}
        return [
            {"type": "response.function_call_arguments.done", **self._place(), **whole},
            _done(self.index, item),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}


def _added(index: int, item: dict[str, Any]) -> Told:
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def _done(index: int, item: dict[str, Any]) -> Told:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


class Output:
    """The items of one answer. What changes them gives the events that say so."""

    def __init__(self, scores_tokens: bool) -> None:
        self._scores_tokens = scores_tokens
        self._unsaid: list[TokenLogprob] = []  # tokens whose text is yet to come
        self._items: list[_Message | _Call] = []
        self.finished: Finished | None = None

    def take(self, delta: Delta) -> list[Told]:
        told: list[Told] = []
        if self._scores_tokens:
            self._unsaid += delta.logprobs
        if delta.text:
            told += self._say(delta.text)
        for piece in delta.tool_calls:
            told += self._call(piece)
        return told

    def finish(self, event: Finished) -> list[Told]:
        """Without any item there was an empty text."""
        told = [] if self._items else self._say("")
        self.finished = event
        last = self._items[-1]
        if isinstance(last, _Message):
            last.scored += scored_tokens(self._unsaid)
        return told + last.end(self.status)

    @property
    def status(self) -> Status:
        if self.finished is None:
            return "in_progress"
        return "incomplete" if self.finished.finish_reason == "length" else "completed"

    def bodies(self) -> list[dict[str, Any]]:
        """The items of a finished answer; the last is where it was cut off, if it was."""
        if self.finished is None:
            return []
        return [
            *(item.body("completed") for item in self._items[:-1]),
            *(item.body(self.status) for item in self._items[-1:]),
        ]

    def _say(self, text: str) -> list[Told]:
        told: list[Told] = []
        if not self._items or not isinstance(message := self._items[-1], _Message):
            message = _Message(len(self._items))
            told = self._begin(message)
        told += message.add(text, self._unsaid)
        self._unsaid = []
        return told

    def _call(self, piece: ToolCallDelta) -> list[Told]:
        self._unsaid = []  # calls have no log-probabilities here
        told: list[Told] = []
        if piece.name is not None:
            told = self._begin(_Call(len(self._items), piece.name))
        call = self._items[-1]
        assert isinstance(call, _Call), "a call's first piece has its name"
        return told + call.add(piece.arguments) if piece.arguments else told

    def _begin(self, item: _Message | _Call) -> list[Told]:
        ended = self._items[-1].end("completed") if self._items else []
        self._items.append(item)
        return ended + item.begin()


def response_body(job: Job, request: ResponseRequest, output: Output) -> dict[str, Any]:
    """The response object, finished or at its beginning: what was asked for, and what has come of it."""
    usage = output.finished and job.usage([output.finished.usage])
    return {
        "id": job.id,
        "object": "response",
        "created_at": job.created,
        "status": output.status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if output.status == "incomplete" else None,
        "model": job.model,
        "output": output.bodies(),
        "usage": usage and _usage_body(usage),
        **_asked(request, job.choices[0].sampling),
        **experts_body(job),
    }


def _asked(request: ResponseRequest, sampling: SamplingParams) -> dict[str, Any]:
    """The request's settings, defaults filled in: clients' types require them."""
    choice, text = request.tool_choice, request.text
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature,
        "text": text.model_dump(by_alias=True, exclude_none=True)
        if text and text.format
        else {"format": {"type": "text"}},
        "tool_choice": choice.model_dump() if choice and not isinstance(choice, str) else choice or "auto",
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampling.top_p if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


def _usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
