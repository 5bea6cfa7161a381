"""A request's way: validate → images → experts → generate → stream."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace

from pydantic_core import to_json

from server.errors import InvalidRequest, TooLarge
from server.gateway.clients.pool import WorkerPool
from server.gateway.context import ExpertPanel, ExpertReport, context_items
from server.gateway.images import Image, ImageLoader
from server.gateway.keys import Caller
from server.gateway.limiter import Limiter, Spending
from server.gateway.metrics import GatewayMetrics
from server.gateway.responses.schemas import ResponseRequest
from server.gateway.schemas import ChatRequest, CompletionRequest
from server.gateway.tasks import all_or_none, merged
from server.settings import GatewaySettings
from server.worker.messages import (
    ChatPrompt,
    Event,
    GenerateRequest,
    ModelInfo,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    Usage,
)

log = logging.getLogger(__name__)

Conversation = ChatRequest | ResponseRequest

_CHARACTERS_PER_TOKEN = 4
_UNLIMITED_ANSWER = 256  # tokens reckoned with where a request names no limit


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a client: an answer's id and a generation for each of its choices."""

    id: str
    created: int
    model: str
    choices: tuple[GenerateRequest, ...]
    choices_per_prompt: int = 1
    reports: tuple[ExpertReport, ...] | None = None  # None: no expert was concerned
    arrived: float = field(default_factory=time.monotonic)

    @property
    def estimated_tokens(self) -> int:
        """What it may take, before a worker has counted: prompts by their length, answers by their limit."""
        prompts = self.choices[:: self.choices_per_prompt]
        answers = (choice.sampling.max_tokens for choice in self.choices)
        return sum(_estimate(choice.prompt) for choice in prompts) + sum(
            _UNLIMITED_ANSWER if limit is None else limit for limit in answers
        )

    def usage(self, usages: Sequence[Usage]) -> Usage:
        """The sum over choices (in their order), each prompt counted once."""
        firsts = usages[:: self.choices_per_prompt]
        return Usage(
            sum(usage.prompt_tokens for usage in firsts),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in firsts),
        )


class Pipeline:
    def __init__(
        self,
        settings: GatewaySettings,
        pool: WorkerPool,
        images: ImageLoader,
        experts: ExpertPanel,
        limiter: Limiter,
        metrics: GatewayMetrics,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._images = images
        self._experts = experts
        self._limiter = limiter
        self._metrics = metrics

    async def prepare_chat(self, body: Conversation, caller: Caller) -> Job:
        """Fetch the images, hear the experts, and say what to generate. Raises `ApiError`."""
        arrived = time.monotonic()
        caller.check_model(body.model)
        model = self._pool.model(body.model)
        self._check_n(body.n)
        names = self._experts.choose(body.experts, model.id)
        images = await self._images.load(body.image_urls)
        self._refuse_blindness(body, model, names, images)
        reports = await self._experts.read(model.id, names, images)
        prompt = ChatPrompt(body.for_worker(), context_items(reports), body.tools_for_template)
        seen = tuple(image.data for image in images) if model.reads_images else ()
        concerned = bool(images) or bool(body.experts and body.experts != "auto")
        return self._job(body, model, [prompt], arrived, seen, reports if concerned else None)

    def prepare_completion(self, body: CompletionRequest, caller: Caller) -> Job:
        """Say what to generate. Raises `ApiError`."""
        arrived = time.monotonic()
        caller.check_model(body.model)
        model = self._pool.model(body.model)
        self._check_n(body.n)
        if len(body.prompts) > self._settings.max_prompts:
            raise InvalidRequest(
                f"prompt: at most {self._settings.max_prompts} prompts are allowed (max_prompts).",
                param="prompt",
            )
        special = body.add_special_tokens is not False
        prompts: list[Prompt] = [
            TextPrompt(prompt, special) if isinstance(prompt, str) else TokenPrompt(prompt)
            for prompt in body.prompts
        ]
        return self._job(body, model, prompts, arrived)

    def _check_n(self, n: int | None) -> None:
        if n is not None and n > self._settings.max_n:
            raise InvalidRequest(f"n: at most {self._settings.max_n} choices are allowed (max_n).", param="n")

    def _refuse_crowd(self, model: str, choices: int, param: str) -> None:
        """Choices run together or not at all: more than fit into empty queues would be a 429 for ever."""
        most = self._pool.capacity(model)
        if most is not None and choices > most:
            raise InvalidRequest(
                f"{param}: {choices} choices of all prompts are more than the {most} that this model's "
                "workers take at once (max_num_seqs, max_waiting); ask for fewer.",
                param=param,
            )

    def _refuse_bulk(self, prompts: Sequence[Prompt], sampling: SamplingParams, n: int, param: str) -> None:
        """Each choice travels with all that it is asked for: n times a large body would be many of them."""
        choices = n * len(prompts)
        if choices == 1:
            return
        size = choices * len(to_json(sampling)) + n * sum(len(to_json(prompt)) for prompt in prompts)
        if size > self._settings.max_body_bytes:
            raise TooLarge(
                f"{param}: {choices} choices of this request are {size} bytes together, of at most "
                f"{self._settings.max_body_bytes} (max_body_bytes); ask for fewer.",
                param=param,
            )

    def _refuse_blindness(
        self, body: Conversation, model: ModelInfo, names: Sequence[str], images: Sequence[Image]
    ) -> None:
        """A picture that nobody would look at is a mistake, unless the caller asked for just that."""
        if images and not names and not model.reads_images and body.experts != []:
            raise InvalidRequest(
                f"The model {model.id!r} does not read images and this server has no experts; "
                "send `experts: []` to have the images ignored.",
                param=body.CONVERSATION,
                code="images_not_supported",
            )

    def _job(
        self,
        body: Conversation | CompletionRequest,
        model: ModelInfo,
        prompts: Sequence[Prompt],
        arrived: float,
        images: tuple[bytes, ...] = (),
        reports: tuple[ExpertReport, ...] | None = None,
    ) -> Job:
        id = body.ID_BEGINS + uuid.uuid4().hex  # never the client's request id: that may come twice
        n = body.n or 1
        sampling = body.sampling(model.sampling)
        many = "n" if len(prompts) == 1 else "prompt"
        self._refuse_crowd(body.model, n * len(prompts), many)
        self._refuse_bulk(prompts, sampling, n, many)
        remaining = max(0.001, arrived + self._settings.request_seconds - time.monotonic())
        choices = tuple(
            GenerateRequest(
                f"{id}-{p * n + i}", body.model, prompt, _reseeded(sampling, i), images, remaining
            )
            for p, prompt in enumerate(prompts)
            for i in range(n)
        )
        fields = {"id": id, "model": body.model, "user": body.user, "choices": len(choices)}
        log.info("generation", extra=fields)
        return Job(id, int(time.time()), body.model, choices, n, reports, arrived)

    async def run(self, job: Job, caller: Caller) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all choices, each with its choice's index; their tokens are `caller`'s.

        Nothing is yielded before a worker has accepted every choice. Raises `ApiError` at whatever point
        something fails; closing the generator aborts every choice.
        """
        try:
            async with (
                self._limiter.spending(caller, job.estimated_tokens) as spending,
                aclosing(self._events(job)) as events,
            ):
                try:
                    async for index, event in events:
                        spending.see(index, event, counts_prompt=index % job.choices_per_prompt == 0)
                        yield index, event
                finally:
                    self._account(job, caller, spending)
        except InvalidRequest as error:
            _tell_of_readings(error, job.reports or ())
            raise

    def _account(self, job: Job, caller: Caller, spending: Spending) -> None:
        """Write down what `job` took, whatever ended it; nothing, if no worker accepted it."""
        if not spending.tokens:
            return
        prompt, completion = spending.prompt_tokens, spending.completion_tokens
        self._metrics.charge(caller.name, job.model, prompt, completion)
        whose = {"id": job.id, "model": job.model, "key": caller.name}
        taken = {"prompt_tokens": prompt, "completion_tokens": completion}
        log.info("generation ended", extra={**whose, **taken})

    async def _events(self, job: Job) -> AsyncGenerator[tuple[int, Event], None]:
        async with AsyncExitStack() as stack:
            observers = [self._metrics.observe(job.model, job.arrived) for _ in job.choices]
            sources = [self._pool.generate(choice) for choice in job.choices]
            for source in sources:
                await stack.enter_async_context(aclosing(source))
            firsts = await all_or_none(_next(source) for source in sources)
            for index, event in enumerate(firsts):
                if index % job.choices_per_prompt == 0:  # the prompt is counted once, not for each choice
                    observers[index].see(event)
                yield index, event
            rest = await stack.enter_async_context(aclosing(merged(sources)))
            async for index, event in rest:
                observers[index].see(event)
                yield index, event


def _tell_of_readings(error: InvalidRequest, reports: Sequence[ExpertReport]) -> None:
    """Whoever sent one line and a picture cannot know otherwise what made the prompt too long."""
    read = sum(len(item.text) for item in context_items(reports))
    if error.code == "context_length_exceeded" and read:
        error.message += (
            f" {read} characters of the prompt are what experts read in the images; name fewer in "
            "`experts`, or none by []."
        )


def _estimate(prompt: Prompt) -> int:
    match prompt:
        case TokenPrompt(token_ids=ids):
            return len(ids)
        case TextPrompt(text=text):
            return -(-len(text) // _CHARACTERS_PER_TOKEN)
        case ChatPrompt(messages=messages, context=context):
            texts = [message.content for message in messages] + [item.text for item in context]
            return sum(-(-len(text) // _CHARACTERS_PER_TOKEN) for text in texts)


async def _next(source: AsyncGenerator[Event, None]) -> Event:
    return await anext(source)


def _reseeded(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choices of one prompt must differ, and must do so again with the same seed."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)
