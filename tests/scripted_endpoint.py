"""An OpenAI-compatible endpoint that answers by a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from train.evaluation.endpoint import Endpoint, Target

Reply = tuple[int, Any]


@contextmanager
def listening(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[str]:
    """The address of an API that is a script: a request's body → status and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, answer = reply(body | {"path": self.path, "key": self.headers["authorization"]})
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "text/html" if isinstance(answer, str) else "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def answering(
    reply: Callable[[dict[str, Any]], Reply], concurrency: int = 8, kept: Path | None = None
) -> Iterator[Endpoint]:
    """An endpoint at such an address."""
    with (
        listening(reply) as url,
        Endpoint(Target(url, "m", "k", {"experts": []}, True), concurrency, kept=kept) as endpoint,
    ):
        yield endpoint


def said(text: str | None) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def scored(logprobs: list[float | None] | None) -> Reply:
    choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": {"token_logprobs": logprobs}}
    return 200, {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
