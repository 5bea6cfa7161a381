"""Which worker gets a request: pure policy, no sockets.

Requests that begin alike go to the same worker, whose prefix cache then holds their beginning, by
rendezvous hashing: each worker has a place in a request's own order, and a worker that comes or goes
moves only the requests that it takes or had. Nobody gets more than `SPREAD` times the mean load, so
that a hot prefix runs over to the next in its order instead of holding one worker's queue ("Consistent
Hashing with Bounded Loads", Mirrokni, Thorup and Zadimoghaddam, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from hashlib import blake2b

from server.worker.messages import ChatPrompt, GenerateRequest, TextPrompt, TokenPrompt

SPREAD = 1.25

_HEAD_CHARS = 512  # of a prompt; what follows tells more requests apart than caches can join
_HEAD_TOKENS = 128
_IMAGE_BYTES = 4096  # of either end: enough to tell images apart, and no time spent on the rest


def load_bound(loads: Mapping[str, int]) -> int:
    """The load at which a worker takes no more, with one more request to place. At least one is below it."""
    return math.ceil(SPREAD * (sum(loads.values()) + 1) / len(loads))


def choose(key: bytes, loads: Mapping[str, int]) -> str:
    """The first worker in `key`'s order whose load is below the bound. `loads`: by name, not empty."""
    bound = load_bound(loads)
    order = sorted(loads, key=lambda name: _weight(key, name), reverse=True)
    return next(name for name in order if loads[name] < bound)


def prefix_key(request: GenerateRequest) -> bytes:
    """Equal for requests whose prompts begin alike: same model, image and head of the prompt.

    A conversation keeps its key from turn to turn, since its head ends with the first question; a long
    system prompt is a head by itself, so that all who share it meet.
    """
    digest = blake2b(digest_size=16)
    for part in (_utf8(request.model), *_image_parts(request), *_prompt_parts(request)):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


def _weight(key: bytes, name: str) -> bytes:
    return blake2b(name.encode(), key=key, digest_size=8).digest()


def _image_parts(request: GenerateRequest) -> Iterator[bytes]:
    """Of the last image, the one that an adapter is conditioned on."""
    for image in request.images[-1:]:
        yield str(len(image)).encode()
        yield image[:_IMAGE_BYTES]
        yield image[-_IMAGE_BYTES:]


def _prompt_parts(request: GenerateRequest) -> Iterator[bytes]:
    prompt = request.prompt
    match prompt:
        case TextPrompt():
            yield _utf8(prompt.text[:_HEAD_CHARS])
        case TokenPrompt():
            yield repr(prompt.token_ids[:_HEAD_TOKENS]).encode()
        case ChatPrompt():
            yield _utf8("\0".join(_chat_head(prompt))[:_HEAD_CHARS])


def _chat_head(prompt: ChatPrompt) -> Iterator[str]:
    """Messages up to the first question, then what experts read; each cut before they are joined."""
    for message in prompt.messages:
        yield message.role
        yield message.content[:_HEAD_CHARS]
        if message.role == "user":
            break
    for item in prompt.context:
        yield item.text[:_HEAD_CHARS]


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
