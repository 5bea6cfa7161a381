"""An OpenAI-compatible endpoint: greedy answers and scored tokens, a bounded number at once."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import openai
from rich.console import Console
from rich.progress import Progress

from train.errors import EvaluationError
from train.evaluation.results import Kept, Prediction

_RETRIES = 4  # of what the client takes for passing: 408, 409, 429, 5xx, a broken connection
_MAX_MESSAGE = 300
_SIGNATURES = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"))

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Target:
    """What is evaluated. `body` is added to each request; `local`: on this machine, past any proxy."""

    url: str
    model: str
    api_key: str = "none"
    body: Mapping[str, object] = field(default_factory=dict)
    local: bool = False


class Endpoint(AbstractContextManager["Endpoint"]):
    """Asks one model. Every failure is an EvaluationError that says what to mend.

    On an event loop of its own, so that Ctrl-C, or a failure, cancels the requests under way. `kept`: the
    file that answers are written to as they come, so that neither loses those from before.
    """

    def __init__(
        self, target: Target, concurrency: int = 8, seconds: float = 600.0, kept: Path | None = None
    ) -> None:
        self._target = target
        self._kept = kept
        self._concurrency = concurrency
        self._runner = asyncio.Runner()
        self._client = openai.AsyncOpenAI(
            base_url=target.url,
            api_key=target.api_key,
            max_retries=_RETRIES,
            timeout=seconds,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not target.local),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._runner as runner:
            runner.run(self._client.close())

    async def ask(self, question: str, image: Path | None, max_tokens: int) -> str:
        """The model's greedy answer to one question, about an image file or none."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question}] if question else []
        if image is not None:
            content.append({"type": "image_url", "image_url": {"url": _data_url(image)}})
        messages: Any = [{"role": "user", "content": content if image is not None else question}]
        answer = await self._call(
            self._client.chat.completions.create(
                model=self._target.model,
                messages=messages,
                temperature=0,
                max_tokens=max_tokens,
                extra_body=dict(self._target.body),
            ),
            str(image) if image is not None else repr(question[:60]),
        )
        text = self._of_choice(answer, "message", "content")
        if not isinstance(text, str | None):
            raise self._unknown_answer()
        return text or ""

    async def score(self, token_ids: Sequence[int]) -> list[float | None]:
        """log p of each token after those before it; nothing is before the first one, which may have none."""
        answer = await self._call(
            self._client.completions.create(
                model=self._target.model,
                prompt=list(token_ids),
                echo=True,
                logprobs=1,
                max_tokens=0,
                temperature=0,
            ),
            f"{len(token_ids)} tokens",
        )
        values = getattr(self._of_choice(answer, "logprobs"), "token_logprobs", None)
        scored = len(values) if isinstance(values, list) else 0
        if not isinstance(values, list) or scored != len(token_ids):
            raise EvaluationError(
                f"{self._target.url}: scores {scored} of {len(token_ids)} tokens with `echo` and "
                "`logprobs`; the loss needs an endpoint that scores prompts token by token"
            )
        return list(values)

    def each(
        self,
        ask: Callable[[Item], Awaitable[Answer]],
        items: Sequence[Item],
        title: str,
        prediction: Callable[[Item, Answer], Prediction] | None = None,
    ) -> list[Answer]:
        """`ask` of every item, `concurrency` at once, with a progress bar; the first failure ends it.

        `prediction` is what is kept of an answer.
        """
        with ExitStack() as stack:
            kept = stack.enter_context(Kept(self._kept)) if self._kept else None
            progress = stack.enter_context(Progress(console=Console(stderr=True)))
            task = progress.add_task(title, total=len(items))

            def told(item: Item, answer: Answer) -> None:
                if kept is not None and prediction is not None:
                    kept.add(prediction(item, answer))
                progress.advance(task)

            return self._runner.run(self._each(ask, items, told))

    async def _each(
        self,
        ask: Callable[[Item], Awaitable[Answer]],
        items: Sequence[Item],
        told: Callable[[Item, Answer], None],
    ) -> list[Answer]:
        places = asyncio.Semaphore(self._concurrency)

        async def one(item: Item) -> Answer:
            async with places:
                answer = await ask(item)
            told(item, answer)
            return answer

        tasks = [asyncio.create_task(one(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, call: Awaitable[Any], subject: str) -> Any:
        url, model = self._target.url, self._target.model
        try:
            return await call
        except openai.APITimeoutError as error:
            raise EvaluationError(f"{url}: no answer in time; ask less at once (--concurrency)") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise EvaluationError(
                f"{url}: cannot be reached ({cause}); does a server run there, and does --url end as its API "
                "does, mostly with /v1?"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EvaluationError(
                f"{url}: refuses the key ({_told(error)}); set OPENAI_API_KEY or --api-key"
            ) from error
        except openai.NotFoundError as error:
            raise EvaluationError(
                f"{url}: has no model {model!r} or no such API ({_told(error)}); correct --model or --url"
            ) from error
        except openai.APIStatusError as error:
            raise EvaluationError(f"{subject}: {url} answers {error.status_code}: {_told(error)}") from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            raise self._unknown_answer() from error

    def _of_choice(self, answer: Any, *names: str) -> Any:
        """A field of the first choice. The client builds answers of whatever it is sent, unchecked."""
        try:
            return reduce(getattr, names, answer.choices[0])
        except (AttributeError, IndexError, TypeError) as error:
            raise self._unknown_answer() from error

    def _unknown_answer(self) -> EvaluationError:
        return EvaluationError(
            f"{self._target.url}: answers, but not as OpenAI's API does; --url ends mostly with /v1"
        )


def _told(error: openai.APIStatusError) -> str:
    """The endpoint's own sentence, if it has one."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error.message).split())[:_MAX_MESSAGE]


def _data_url(image: Path) -> str:
    try:
        data = image.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{image}: cannot be read ({error.strerror})") from error
    kind = next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
