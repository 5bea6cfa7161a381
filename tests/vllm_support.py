"""A tiny base in vLLM with the plugin, and the native step loop that its answers are compared with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_adapter
from tiny_base import tiny_config
from torch import Tensor
from vllm import LLM
from vllm import SamplingParams as VllmParams
from vllm.lora.request import LoRARequest

from models.adaptation import OneAdapter
from models.adapter import Adapter, base_spec
from models.adapter_config import (
    LINEARS,
    AdapterConfig,
    GateConfig,
    LoraConfig,
    PromptConfig,
    ScaleBiasConfig,
)
from models.attention import DenseAttend
from models.checkpoints.base import load_base
from models.llama import Llama
from models.tokenizer import load_tokenizer
from models.vision.encoder import load_encoder
from models.vllm_plugin import register
from models.vllm_plugin.carriers import EVERYTHING, ROWS, Room, check_carried
from models.vllm_plugin.export import export_adapter
from models.vllm_plugin.options import engine_options, placeholders
from models.vllm_plugin.sight import seeing_prompt, visual_rows
from server.worker.blocks import BlockManager
from server.worker.messages import Delta, SamplingParams
from server.worker.request import Prepared
from server.worker.runner import Runner
from server.worker.scheduler import Scheduler
from server.worker.sight import ImageInput, LoadedAdapter
from server.worker.step_loop import StepLoop

HEAD_DIM = 32  # the smallest of the CPU's attention in vLLM
TOLERANCE = 1e-4  # of log-probabilities in float32: sums are taken in another order

ROOM = replace(EVERYTHING, images=False)

LIMITS = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "disable_log_stats": False,
}


def scaled_inputs() -> AdapterConfig:
    """As the chat-65B adapter, with prompts besides."""
    tuned = ScaleBiasConfig(scale="input", scale_targets=LINEARS, bias_targets=LINEARS)
    spec = base_spec(tiny_config(head_dim=HEAD_DIM))
    prompt = PromptConfig(length=7, layers=(0, 3))
    return AdapterConfig(base=spec, prompt=prompt, norms=True, final_norm=True, scale_bias=tuned)


def low_rank() -> AdapterConfig:
    """As the released 7B adapter with LoRA, whose terms do not act on the prompts."""
    spec = base_spec(tiny_config(head_dim=HEAD_DIM))
    return AdapterConfig(
        base=spec,
        prompt=PromptConfig(length=3, layers=(1, 2, 3)),
        gate=GateConfig(new_gate=True),
        norms=True,
        final_norm=True,
        scale_bias=ScaleBiasConfig(bias_targets=("wq", "wo", "w1", "w2", "w3")),
        lora=LoraConfig(rank=4, targets=LINEARS, alpha=8),
    )


@dataclass(frozen=True)
class Asked:
    """A prompt, and which adapter answers it: a key of `adapters`, or the base."""

    tokens: list[int]
    adapter: str | None = None
    max_tokens: int = 12
    image: int | None = None  # the seed of its pixels


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    cached: int = 0


@dataclass
class Deployment:
    """A base and its adapters, served by both engines."""

    path: Path
    exports: Path
    room: Room = ROOM
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base, _ = load_base(self.path, torch.float32)
        self.encoder = load_encoder("efficientnet-lite0")
        self._seen: dict[tuple[str, int], Tensor] = {}

    def add(self, name: str, config: AdapterConfig, seed: int) -> None:
        adapter = random_adapter(config, seed=seed)
        check_carried(config, name, self.room)
        export_adapter(adapter, self.exports / name, self.room)
        self.adapters[name] = adapter

    def vllm(self, **changes: Any) -> LLM:
        register()
        limits = {"max_model_len": 256, "max_adapters": 6}
        options = engine_options(self.path, self.base.config, room=self.room, **limits)
        return LLM(**options | LIMITS | changes)

    def ask(self, llm: LLM, requests: Sequence[Asked]) -> list[Answer]:
        return answers(llm, [self._prompt(r) for r in requests], requests, [self._lora(r) for r in requests])

    def pixels(self, seed: int) -> Tensor:
        size = self.encoder.image_size
        return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))

    def _prompt(self, request: Asked) -> Any:
        before = placeholders(self.base.config)
        if request.image is None:
            return {"type": "token", "prompt_token_ids": before + request.tokens}
        assert request.adapter
        key = (request.adapter, request.image)
        if key not in self._seen:  # the encoder's last bits are not the same each time, and blocks go by them
            pixels = self.pixels(request.image)
            self._seen[key] = visual_rows(self.adapters[request.adapter], self.encoder, pixels)
        return seeing_prompt(before, request.tokens, self._seen[key], torch.float32)

    def _lora(self, request: Asked) -> LoRARequest | None:
        name = request.adapter
        if name is None:
            return None
        return LoRARequest(name, list(self.adapters).index(name) + 1, str(self.exports / name))

    def native(self, requests: Sequence[Asked]) -> list[Answer]:
        """The same from the native engine's steps."""
        blocks = BlockManager(64, 16, True)
        scheduler = Scheduler(blocks, max_num_seqs=8, max_num_batched_tokens=256, max_model_len=256)
        runner = Runner(self.base, num_blocks=64, block_size=16, max_hot_adapters=8, prompt_slots=8)
        loop = StepLoop(runner, scheduler, load_tokenizer(self.path))
        events: list[list[Any]] = [[] for _ in requests]
        for i, request in enumerate(requests):
            loaded = None
            if request.adapter is not None:
                loaded = LoadedAdapter((request.adapter, 1), self.adapters[request.adapter], self.encoder)
            seed = request.image
            image = None if seed is None else ImageInput(str(seed), self.pixels(seed))
            params = SamplingParams(temperature=0, logprobs=0, ignore_eos=True)
            prepared = Prepared(str(i), request.tokens, params, request.max_tokens, (), loaded, image)
            loop.add(prepared, events[i].append)
        while loop.has_work:
            loop.step()
        deltas = [[event for event in own if isinstance(event, Delta)] for own in events]
        return [
            Answer(
                [token for delta in own for token in delta.token_ids],
                [item.logprob for delta in own for item in delta.logprobs],
            )
            for own in deltas
        ]

    @torch.no_grad()
    def exact(self, request: Asked, generated: Sequence[int]) -> list[float]:
        """Log-probabilities of the generated tokens by the training-time pass in float64."""
        base = Llama(self.base.config, torch.float64).load(
            (name, tensor.double()) for name, tensor in self.base._places()
        )
        prompts = adaptation = None
        if request.adapter is not None:
            adapter, visual_SnC = self.adapters[request.adapter], None
            if request.image is not None:
                features = self.encoder.global_features(self.pixels(request.image)[None])
                visual_SnC = adapter.see(features).double()
            adapter.double()
            prompts, adaptation = adapter.prompts(base, visual_SnC), OneAdapter(adapter, torch.float64)
        tokens = torch.tensor([*request.tokens, *generated])
        hidden = base(tokens, torch.arange(len(tokens)), DenseAttend(1, prompts), adaptation)
        logprobs: Tensor = base.logits(hidden, adaptation).log_softmax(-1)
        if request.adapter is not None:
            self.adapters[request.adapter].float()
        first = len(request.tokens) - 1
        return [logprobs[first + i, token].item() for i, token in enumerate(generated)]


def answers(
    llm: LLM, prompts: list[Any], requests: Sequence[Asked], loras: Sequence[LoRARequest | None] = ()
) -> list[Answer]:
    """All requests arrive before the first step."""
    engine = llm.llm_engine
    for i, request in enumerate(requests):
        params = VllmParams(
            temperature=0, max_tokens=request.max_tokens, logprobs=0, detokenize=False, ignore_eos=True
        )
        engine.add_request(str(i), prompts[i], params, lora_request=loras[i] if loras else None)
    found: dict[str, Answer] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = _answer(output)
    return [found[str(i)] for i in range(len(requests))]


def _answer(output: Any) -> Answer:
    (one,) = output.outputs
    scores = [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
    return Answer(list(one.token_ids), scores, max((output.num_cached_tokens or 0) - ROWS, 0))


KINDS = (None, "poet", "cook", "tuned", "scaled", "low")


def mixed(seed: int, count: int = 12) -> list[Asked]:
    """Requests for the base and all adapters in turn, short and long."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 300) for _ in range(40)]
    return [
        Asked(
            shared[: rng.choice((0, 0, 40))] + [rng.randrange(3, 300) for _ in range(rng.randrange(1, 50))],
            KINDS[i % len(KINDS)],
        )
        for i in range(count)
    ]


def check(
    deployment: Deployment, requests: list[Asked], found: list[Answer], tolerance: float = TOLERANCE
) -> None:
    for request, ours, native in zip(requests, found, deployment.native(requests), strict=True):
        assert ours.tokens == native.tokens, request
        assert ours.logprobs == pytest.approx(native.logprobs, abs=tolerance)
        assert ours.logprobs == pytest.approx(deployment.exact(request, ours.tokens), abs=tolerance)
