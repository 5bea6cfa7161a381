"""Bases of every format in a real service, each with one V1 file on it, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import httpx
import numpy as np
import pytest
import torch
from adapter_files import K, reference_v1, save_sample
from base_files import (
    TINY,
    add_gguf_weights,
    close_gguf,
    gguf_writer,
    random_weights,
    to_interleaved,
    write_meta,
)
from gguf import GGMLQuantizationType
from oracle import Oracle
from service import Service, serving
from support import transformers_twin
from tokenizer_files import add_gguf_byte_level, write_byte_level, write_sentencepiece
from torch import Tensor

from models.checkpoints.adapter_table import AdapterOptions
from models.checkpoints.huggingface import NAMES, write_huggingface
from models.checkpoints.inspect import Base, convert
from models.fingerprint import fingerprint
from models.llama import Llama

pytestmark = pytest.mark.server

CONFIG = replace(TINY, vocab_size=420)
PROMPT = [3, 141, 59, 265, 358, 97]
ANSWER = 8


def whole(folder: Path, weights: dict[str, Tensor]) -> Path:
    write_huggingface(folder, CONFIG, weights.items())
    write_byte_level(folder)
    return folder


def sharded(folder: Path, weights: dict[str, Tensor]) -> Path:
    """As transformers saves it."""
    transformers_twin(Llama(CONFIG).load(weights.items())).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    write_byte_level(folder)
    return folder


def pickled(folder: Path, weights: dict[str, Tensor]) -> Path:
    whole(folder, weights)
    (folder / "model.safetensors").unlink()
    torch.save({NAMES.original(name): w for name, w in weights.items()}, folder / "pytorch_model.bin")
    return folder


def meta(shards: int, folder: Path, weights: dict[str, Tensor]) -> Path:
    """The tokenizer one level up, where Meta's releases have it."""
    write_meta(folder / "7B", weights, CONFIG, shards, max_position_embeddings=128)
    write_sentencepiece(folder / "tokenizer.model")
    return folder / "7B"


def gguf_file(kind: GGMLQuantizationType, folder: Path, weights: dict[str, Tensor]) -> Path:
    writer = gguf_writer(folder / "tiny.gguf", CONFIG)
    add_gguf_byte_level(writer)
    add_gguf_weights(writer, weights, CONFIG, kind)
    close_gguf(writer)
    return folder / "tiny.gguf"


def rounded(weights: dict[str, Tensor], kind: GGMLQuantizationType) -> dict[str, Tensor]:
    """What a GGUF file keeps of them; the norms stay as they are."""
    return {
        name: torch.from_numpy(
            gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind).astype(np.float32)
        ).view(weight.shape)
        if weight.dim() == 2
        else weight
        for name, weight in weights.items()
    }


F16, Q8_0 = GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        pytest.param(whole, None, id="huggingface"),
        pytest.param(sharded, None, id="huggingface-sharded"),
        pytest.param(pickled, None, id="huggingface-bin"),
        pytest.param(partial(meta, 1), None, id="meta-1-shard"),
        pytest.param(partial(meta, 2), None, id="meta-2-shards"),
        pytest.param(partial(gguf_file, F16), F16, id="gguf-f16"),
        pytest.param(partial(gguf_file, Q8_0), Q8_0, id="gguf-q8_0"),
    ],
)
def test_answers_are_the_oracle_s(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path], kind: GGMLQuantizationType | None
) -> None:
    weights = {
        name: weight * (0.15 if weight.dim() == 2 else 1) for name, weight in random_weights(CONFIG).items()
    }
    (tmp_path / "base").mkdir()
    path = write(tmp_path / "base", weights)
    sample = reference_v1(CONFIG)
    adapter = save_sample(sample, tmp_path / "v1.pth")
    kept = rounded(weights, kind) if kind else weights
    # In Meta's row order, as the adapter's file; half-rotated or not is one and the same model.
    rows = {name: to_interleaved(name, weight, CONFIG).double().numpy() for name, weight in kept.items()}
    plain = Oracle(CONFIG, rows, rope="interleaved")
    own = {name: tensor.double().numpy() for name, tensor in sample.own.items()}
    adapted = replace(plain, adapter=sample.config, own=own)
    # It remembers the base before rounding: of a GGUF file's base it knows a near copy, and says so.
    original = Base(CONFIG, fingerprint(weights["embed.weight"]))
    convert(adapter, tmp_path / "native", base=original, options=AdapterOptions(length=K))
    adapters = ("--adapter", f"v1={adapter},length={K}", "--adapter", f"native={tmp_path / 'native'}")
    settings = ("--base-id", "plain", "--dtype", "float32", "--experts", "")
    with serving("--base", str(path), *settings, *adapters) as service:
        assert check(service, "plain", plain) != check(service, "v1", adapted)
        check(service, "native", adapted)
        assert ("native was made for a near copy of this base" in service.text) == (kind is not None)


def check(service: Service, model: str, oracle: Oracle) -> list[int]:
    """The greedy answer, which must be the oracle's, scored as by the oracle."""
    ids, logprobs = list(PROMPT), []
    for _ in range(ANSWER):
        ids.append(int(oracle.logits(ids)[-1].argmax()))
    logits_TV = oracle.logits(ids)
    for t, id in enumerate(ids[1:]):
        logprobs.append(logits_TV[t, id] - np.log(np.exp(logits_TV[t]).sum()))
    asked = {"model": model, "prompt": PROMPT, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
    response = httpx.post(
        f"{service.url}/v1/completions", json=asked | {"echo": True, "logprobs": 0}, timeout=60
    )
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], logprobs, atol=1e-3, rtol=0)
    detokenized = httpx.post(f"{service.url}/detokenize", json={"model": model, "tokens": ids})
    assert choice["text"] == detokenized.json()["prompt"]
    return ids
