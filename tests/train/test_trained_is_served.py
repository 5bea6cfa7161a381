"""A trained folder, loaded by the worker's engine, gives the log-probabilities that training saw."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_base import write_tiny_base
from train_files import text_recipe, train, write_captions, write_instructions, write_recipe

from models.checkpoints.base import load_base
from models.checkpoints.native import load_adapter
from models.vision.encoder import load_encoder
from server.settings import WorkerSettings
from server.worker.build import build_engine
from server.worker.messages import GenerateRequest, PromptScored, SamplingParams, TokenPrompt, join_scores
from train.data.batches import make_passes
from train.data.features import live_pixels
from train.data.store import Store
from train.forward import Forward

pytestmark = pytest.mark.long

VISION = {
    "encoder": "efficientnet-lite0",
    "features": "global",
    "feature_dim": 1752,
    "projector": "mlp",
    "hidden_size": 16,
    "input_norm": True,
}
EARLY = VISION | {"num_tokens": 5, "fusion": "early", "layers": "first 1"}
ADD = VISION | {"num_tokens": 1, "fusion": "add", "layers": "last 3"}
LINEARS = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
KINDS = {
    "v1": {"template": "alpaca"},
    "v2": {
        "norms": True,
        "final_norm": True,
        "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
    },
    "lora": {"prompt": None, "lora": {"rank": 2, "alpha": 4, "targets": LINEARS}},
    "v1-sight": {"vision": ADD, "template": "caption"},
    "v2-sight": {"vision": EARLY, "norms": True, "prompt": {"length": 4, "layers": "last 2"}},
    "zero-sight": {"vision": ADD | {"no_image": "zero"}},
}


async def served_logprobs(
    base: Path, adapter: Path, tokens: Sequence[int], images: tuple[bytes, ...]
) -> list[float]:
    """Of each token but the first, through the worker's engine."""
    engine = build_engine(
        WorkerSettings(base=str(base), dtype="float32", kv_cache_mib=1, adapters=(f"trained={adapter}",))
    )
    await engine.start()
    try:
        request = GenerateRequest(
            "r",
            "trained",
            TokenPrompt(tuple(tokens)),
            SamplingParams(max_tokens=1, prompt_logprobs=0),
            images,
        )
        events = [event async for event in engine.generate(request)]
    finally:
        await engine.stop()
    scored = join_scores([event for event in events if isinstance(event, PromptScored)])
    return [token.logprob for token in scored.logprobs if token.logprob is not None]


def trained_loss(base: Path, adapter: Path, store: Store, row: int) -> float:
    """The summed loss of a row's targets, as a training step computes it."""
    model, print_ = load_base(base, torch.float32)
    loaded = load_adapter(adapter, model.config, print_)
    vision = loaded.config.vision
    encoder = load_encoder(vision.encoder) if vision else None

    def read(store: Store, image: int, seed: int) -> torch.Tensor:
        assert encoder is not None
        assert vision is not None
        return live_pixels(store.image_paths[image], encoder, vision, None)

    [batch] = make_passes(store, [row], read, 4096)
    return float(Forward(model, loaded, encoder, live=True, checkpointing=False).loss(batch))


@pytest.mark.parametrize("kind", KINDS)
async def test_served_logprobs_are_the_trained_ones(kind: str, tmp_path: Path):
    write_tiny_base(tmp_path / "tiny")
    adapter = {"prompt": {"length": 4, "layers": "last 3"}} | KINDS[kind]
    recipe = text_recipe(tmp_path / "tiny", tmp_path / "run", write_instructions(tmp_path / "i.jsonl"))
    recipe |= {"adapter": adapter}
    recipe["optimizer"] |= {"lr": 0.05, "warmup": 0.1}
    if "vision" in adapter:
        captions = write_captions(tmp_path / "c")
        recipe["data"]["captions"] = {
            "format": "captions",
            "path": str(captions),
            "images": str(captions.parent),
            "question": "What?",
        }
    train(write_recipe(tmp_path / "r.yaml", recipe))
    for name in recipe["data"]:
        store = Store(tmp_path / "run" / "data" / name)
        row = int(store.train[3])
        tokens, generated = store.tokens(row)
        image = int(store.image_R[row])
        images = (store.image_paths[image].read_bytes(),) if image >= 0 else ()
        served = await served_logprobs(
            tmp_path / "tiny", tmp_path / "run" / "adapter", tokens.tolist(), images
        )
        ours = -sum(logprob for logprob, target in zip(served, generated[1:], strict=True) if target)
        theirs = trained_loss(tmp_path / "tiny", tmp_path / "run" / "adapter", store, row)
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert int(generated.sum()) > 3
