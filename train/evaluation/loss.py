"""The held-out loss: mean −log p of the tokens that a model is to write, rendered as it is served.

Of a folder it is computed as a training computes its own; of an endpoint by the log-probabilities that it
gives the same tokens. Both read the same prepared rows.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from models.adapter import Adapter, base_spec
from models.adapter_config import AdapterConfig, VisionConfig
from models.checkpoints.adapters import open_adapter, parse_adapter_argument
from models.checkpoints.base import load_base
from models.llama import Llama
from models.prompts import template_names
from models.pull import resolve_base
from models.tokenizer import load_tokenizer
from models.vision.encoder import VisionEncoder, check_features, load_encoder
from train.data.formats import Sample
from train.data.images import Images
from train.data.store import Encoder, ReadImages, Store, prepare
from train.errors import EvaluationError, RowError
from train.evaluation.endpoint import Endpoint
from train.evaluation.results import Result
from train.evaluation.samples import Wanted
from train.forward import Forward
from train.processes import StopSignal, join
from train.recipe import ComputeRecipe, SourceRecipe
from train.trainer import HeldOut, held_out_loss

_PASS_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class LossData:
    """Which rows: those of `source` that are `wanted`, cut at `max_tokens`; the first `limit` of them."""

    source: SourceRecipe
    wanted: Wanted
    max_tokens: int = 512
    limit: int | None = None


def folder_loss(
    data: LossData, base_name: str, adapter: str | None, template: str | None, device: str, cache_dir: Path
) -> Result:
    """Of a base with an adapter (`PATH[,option=value …]`) or alone, in float32.

    Without `template` the adapter's own is used, `chat` of a base. Raises ModelError.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(join(device))
        path = resolve_base(base_name, cache_dir)
        base, print_ = load_base(path, torch.float32, processes.device)
        loaded = _adapter(base, print_, adapter).to(processes.device)
        vision = loaded.config.vision
        encoder = _image_encoder(vision, processes.device) if vision else None
        used = template or loaded.config.template
        stop = StopSignal()  # nobody listens for one: Ctrl-C ends an evaluation as it ends any command
        images = Images(ComputeRecipe(workers=0), vision, encoder, cache_dir, stop)
        tokens = _encoder(path, used, data, base.config.vocab_size, sees=vision is not None)
        store = _prepare(data, tokens, images.read_all, data.wanted, stack)
        forward = Forward(base, loaded, encoder, live=False, checkpointing=False)
        part = HeldOut("evaluation", store, store.train.tolist())
        loss = held_out_loss(forward, part, images.reader([store]), _PASS_TOKENS, processes, stop)
        assert loss is not None
    return _result(loss, store, used)


def endpoint_loss(
    data: LossData, endpoint: Endpoint, base_name: str, template: str, cache_dir: Path
) -> Result:
    """Of what an endpoint serves on a base whose tokenizer is that of `base_name`; rows of text only.

    Prompts are sent as token ids, so that nothing can be cut into tokens in another way. Raises ModelError.
    """
    with ExitStack() as stack:
        path = resolve_base(base_name, cache_dir)
        tokenizer_size = load_tokenizer(path).vocab_size
        tokens = _encoder(path, template, data, tokenizer_size, sees=False)
        store = _prepare(data, tokens, _no_images, _without_images(data.wanted), stack)
        sums = endpoint.each(lambda row: _score(endpoint, store, row), store.train.tolist(), "rows")
    return _result(sum(sums) / store.summary.targets, store, template)


async def _score(endpoint: Endpoint, store: Store, row: int) -> float:
    """Summed −log p of a row's targets."""
    ids, generated = store.tokens(row)
    logprobs = await endpoint.score([int(id) for id in ids])
    targets = [logprob for logprob, target in zip(logprobs[1:], generated[1:], strict=True) if target]
    scored = [logprob for logprob in targets if logprob is not None]
    if len(scored) < len(targets):
        raise EvaluationError(f"row {row}: the endpoint gives no log-probability of a token in the answer")
    return -math.fsum(scored)


def _adapter(base: Llama, fingerprint: str, argument: str | None) -> Adapter:
    if argument is None:  # the base's own norm in the place of the base's norm: nothing is changed
        config = AdapterConfig(base=base_spec(base.config, fingerprint), final_norm=True)
        return Adapter(config).start_from(base).requires_grad_(False)
    _, path, options = parse_adapter_argument(f"evaluated={argument}")
    return open_adapter(path.expanduser(), base.config, options, fingerprint).requires_grad_(False)


def _image_encoder(vision: VisionConfig, device: torch.device) -> VisionEncoder:
    encoder = load_encoder(vision.encoder, device)
    check_features(vision, encoder)
    return encoder


def _encoder(path: Path, template: str, data: LossData, vocab_size: int, sees: bool) -> Encoder:
    if template not in template_names():
        raise EvaluationError(f"template {template!r} is unknown; use one of {', '.join(template_names())}")
    captioned = data.source.format in ("captions", "coco")
    if captioned and not data.source.question and template != "caption":
        raise EvaluationError(
            f"the template {template!r} needs a question to put before a caption; give --question, as the "
            "adapter's recipe has it"
        )
    return Encoder(load_tokenizer(path), template, data.max_tokens, vocab_size, sees)


def _prepare(
    data: LossData, encoder: Encoder, read_images: ReadImages, wanted: Wanted, stack: ExitStack
) -> Store:
    """The rows in a folder that lives as long as `stack`."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="llama-adapter-eval-")))
    left = data.limit

    def chosen(sample: Sample) -> bool:
        nonlocal left
        if left == 0 or not wanted(sample):
            return False
        left = None if left is None else left - 1
        return True

    return prepare("evaluation", data.source, encoder, folder, read_images, lambda count: None, chosen)


def _without_images(wanted: Wanted) -> Wanted:
    def text_only(sample: Sample) -> bool:
        if not wanted(sample):
            return False
        if sample.image:
            raise RowError(
                "has an image, which an endpoint's completions cannot be given; evaluate the folder with "
                "--adapter"
            )
        return True

    return text_only


def _no_images(paths: list[Path]) -> list[bytes | str]:
    assert not paths
    return []


def _result(loss: float, store: Store, template: str) -> Result:
    summary = store.summary
    scores: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "answer tokens": summary.targets,
        "rows": summary.used,
    }
    about = {"template": template, "cut": summary.truncated, "bad rows": summary.bad}
    return Result("loss", scores, about, digits=4)
