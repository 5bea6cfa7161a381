"""What schemathesis is told of this service: random names of models would never get past the first check."""

from __future__ import annotations

import zlib
from typing import Any

import schemathesis

MODELS = ("tiny", "poet")
FOLDER = "poet"  # below the adapter root
# What is answered; a random body of many fields has hardly ever a right value in each.
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Say hello."}]},
    "/v1/responses": {"model": "tiny", "input": "Say hello."},
    "/v1/completions": {"model": "tiny", "prompt": "The sky is"},
    "/tokenize": {"model": "tiny", "prompt": "The sky is"},
    "/detokenize": {"model": "tiny", "tokens": [5, 9]},
    "/v1/adapters": {"id": "late", "path": FOLDER},
}
MOST_TOKENS = 8  # of an answer: this is to find failures, not to generate text


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Three of four bodies name a model or a folder that there is, and one of four asks for an answer in a
    right way but for one field, which is left as it was made; none asks for a long answer.
    """
    body = case.body
    if not isinstance(body, dict):
        return
    luck = zlib.crc32(repr(body).encode())
    if isinstance(body.get("model"), str) and luck % 4:
        body["model"] = MODELS[luck % 4 == 1]
    if isinstance(body.get("path"), str) and luck % 4:
        body["path"] = FOLDER
    if luck % 4 == 3 and case.path in RIGHT:
        others = sorted(map(str, body.keys() - RIGHT[case.path].keys()))
        kept = {name: body[name] for name in others[luck // 4 % len(others) :][:1]} if others else {}
        body.clear()
        body.update(RIGHT[case.path] | kept)
    if case.path.startswith("/v1/") and "adapters" not in case.path:
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"):
            if isinstance(body.get(name), int) and body[name] > MOST_TOKENS:
                body[name] = MOST_TOKENS
        body.setdefault("max_output_tokens" if "responses" in case.path else "max_tokens", MOST_TOKENS)
