"""Tools as text: how a model is told of them, and how it calls them.

A call is written as Hermes and Qwen models were trained to:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

A base whose own chat template writes calls so is left to it. For any other template, tools become
system text, calls become text of the assistant and results text of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "}\n</tool_call>"
CALL_SEPARATOR = "\n"


def call_head(name: str) -> str:
    """What stands between `CALL_OPEN` and the arguments' JSON; `CALL_CLOSE` follows them."""
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


def call_text(name: str, arguments: str) -> str:
    return f"{CALL_OPEN}{call_head(name)}{arguments}{CALL_CLOSE}"


def speaks_calls(chat_template: str | None) -> bool:
    """Whether a template tells of tools, and writes calls, in just this form."""
    if chat_template is None or "<function=" in chat_template:
        return False
    return CALL_OPEN in chat_template and "tools" in chat_template


def preamble(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system says of `tools`, which are as OpenAI's requests have them; a line each."""
    # With a call required, SmolLM2-135M named the right one of three functions 6 of 6 times so; where the
    # example came without <tools> or before "composing functions", 5 times. Left to choose, it never calls.
    lines = [json.dumps(_function(tool), ensure_ascii=False) for tool in tools]
    return "\n".join(
        (
            "You are a helpful assistant. You can call functions to help the user. The functions are:",
            "<tools>",
            *lines,
            "</tools>",
            "If a function helps, answer with a call of it and nothing else:",
            call_text("<function-name>", "<args-json-object>"),
            "Otherwise answer in your own words.",
        )
    )


def response_text(content: str) -> str:
    """A tool's result, for a template without a role for it."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    return {key: function[key] for key in ("name", "description", "parameters") if function.get(key)}
