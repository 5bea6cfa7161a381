"""Engines over a tiny base and its adapters, and what the tests ask of them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from adapter_files import reference_7b, save_sample
from PIL import Image
from support import random_adapter
from tiny_base import adapter_config, tiny_config, write_adapter, write_tiny_base
from vllm_support import HEAD_DIM

from models.adapter_config import AdapterConfig, PromptConfig, ScaleBiasConfig
from models.checkpoints.native import save_adapter
from models.vision.efficientnet import EfficientNetLite0
from server.settings import WorkerSettings
from server.worker.engine_api import Engine
from server.worker.messages import (
    ChatMessage,
    ChatPrompt,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Prompt,
    PromptScored,
    SamplingParams,
)


def write_models(folder: Path) -> None:
    write_tiny_base(folder / "tiny", head_dim=HEAD_DIM)
    for seed, (name, kind) in enumerate((("v1", "v1"), ("v2", "v2"), ("sees", "sight"), ("other", "v1"))):
        write_adapter(folder / "adapters" / name, kind, seed, HEAD_DIM)
    save_adapter(random_adapter(early(), seed=5), folder / "adapters" / "early")
    tokens = {"encoder": "efficientnet-lite0", "F": EfficientNetLite0.token_dim}
    save_sample(reference_7b(tiny_config(head_dim=HEAD_DIM), **tokens), folder / "adapters" / "7b.pth")


def early() -> AdapterConfig:
    """V2 multimodal: one visual token in lower layers, static prompts of another length above, and biases."""
    return adapter_config("sight", HEAD_DIM).model_copy(
        update={
            "prompt": PromptConfig(length=4, layers=(3,)),
            "vision": adapter_config("sight", HEAD_DIM).vision.model_copy(
                update={"fusion": "early", "layers": (1, 2)}
            ),
            "norms": True,
            "scale_bias": ScaleBiasConfig(
                scale="output", scale_targets=("wk", "wv"), bias_targets=("wk", "wv")
            ),
        }
    )


def settings(folder: Path, engine: str, **changes: Any) -> WorkerSettings:
    adapters = folder / "adapters"
    return WorkerSettings(
        engine=engine,  # type: ignore[arg-type]
        base=str(folder / "tiny"),
        dtype="float32",
        kv_cache_mib=16,
        max_num_seqs=8,
        max_hot_adapters=4,
        vllm_compile=False,
        adapters=(
            *(f"{name}={adapters / name}" for name in ("v1", "v2", "sees", "early")),
            f"7b={adapters / '7b.pth'},encoder=efficientnet-lite0",
        ),
        adapter_root=adapters,
        shipped_adapters=False,
        **changes,
    )


def picture(colour: str) -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").convert("RGB").point(lambda x: x // 2).save(file, "PNG")
    plain = Image.new("RGB", (80, 60), colour)
    plain.paste(Image.open(file).resize((40, 30)), (20, 10))
    file = BytesIO()
    plain.save(file, "PNG")
    return file.getvalue()


def ask(prompt: Prompt | str, model: str = "tiny", image: str | None = None, **sampling) -> GenerateRequest:
    if isinstance(prompt, str):
        prompt = ChatPrompt((ChatMessage("user", prompt),))
    params = {"temperature": 0, "max_tokens": 10, "ignore_eos": True} | sampling
    images = (picture(image),) if image else ()
    return GenerateRequest("r", model, prompt, SamplingParams(**params), images)


async def events_of(engine: Engine, request: GenerateRequest) -> list[Event]:
    return [event async for event in engine.generate(request)]


async def both(engines: tuple[Engine, Engine], request: GenerateRequest) -> tuple[list[Event], list[Event]]:
    ours, native = [await events_of(engine, request) for engine in engines]
    return ours, native


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def scores_of(events: list[Event]) -> list[tuple[int, float]]:
    found = [item for event in events if isinstance(event, Delta) for item in event.logprobs]
    scored = [item for event in events if isinstance(event, PromptScored) for item in event.logprobs]
    found += [item for item in scored if item.logprob is not None]  # nothing precedes the first
    pairs = [(item.token_id, item.logprob) for item in found]
    return pairs + [(top.token_id, top.logprob) for item in found for top in item.top]  # type: ignore[return-value]


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]
