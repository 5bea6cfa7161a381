"""What both engines stand in: the base's tokenizer, the adapters' loader, what requests pass at first."""

from __future__ import annotations

from pathlib import Path

import torch

from models.config import ModelConfig
from models.errors import CheckpointError
from models.sampling_defaults import read_sampling_defaults
from models.tokenizer import Tokenizer, load_tokenizer
from models.vision.images import ImageLimits
from server.settings import WorkerSettings
from server.worker.adapter_loading import AdapterLoader
from server.worker.frontend import Frontend, Room
from server.worker.grammar import GrammarCompiler


def tokenizer_of(base: Path, config: ModelConfig) -> Tokenizer:
    """Raises `CheckpointError` for one with tokens that the model does not know."""
    tokenizer = load_tokenizer(base)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{base}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            "they belong to different models"
        )
    return tokenizer


def loader_of(
    settings: WorkerSettings,
    base: Path,
    config: ModelConfig,
    fingerprint: str,
    *,
    device: torch.device,
    max_model_len: int,
) -> AdapterLoader:
    """Of adapters on `base`, whose embedding has this fingerprint. Raises `CheckpointError`."""
    return AdapterLoader(
        settings.base_id or _id(settings.base),
        config,
        fingerprint,
        device=device,
        max_model_len=max_model_len,
        adapter_root=settings.adapter_root,
        max_encoders=settings.max_encoders,
        sampling=read_sampling_defaults(base) if settings.sampling_defaults == "model" else None,
    )


def frontend_of(settings: WorkerSettings, tokenizer: Tokenizer, config: ModelConfig, room: Room) -> Frontend:
    """What prepares requests for an engine that has this `room`."""
    grammars = GrammarCompiler(
        tokenizer,
        config.vocab_size,
        max_bytes=settings.max_grammar_bytes,
        cache_entries=settings.grammar_cache_entries,
    )
    limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    return Frontend(tokenizer, room, config.vocab_size, limits, grammars)


def _id(base: str) -> str:
    """`smollm2-135m` of that name, of a folder of that name, and of a file `smollm2-135m.gguf`."""
    path = Path(base)
    return path.stem if path.suffix == ".gguf" else path.name
