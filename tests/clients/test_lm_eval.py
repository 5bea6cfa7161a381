"""Log-likelihoods by lm-eval's own client, against the base's plain forward pass."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from service import Service
from tokenizer_files import CORPUS, byte_level_backend
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

PAIRS = [
    ("The quick brown fox jumps over", " the lazy dog"),
    ("def main():\n", "    print('Hello, world')"),
    ("Straße, café,", " naïve"),
    ("The total is", " 49.30 EUR"),
    ("", "Hello"),  # no context: a first token takes its place
]
TEXTS = ["The quick brown fox", "你好，世界。"]


@pytest.fixture(scope="module")
def base(models: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32)


def scored(base: Any, prefix: list[int], rest: list[int]) -> tuple[float, bool]:
    """The sum of log p(rest | prefix), and whether argmax would have written `rest`."""
    with torch.inference_mode():
        logprobs_TV = base(torch.tensor([prefix + rest])).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(rest)
    greedy = bool((logprobs_TV.argmax(-1) == chosen).all())
    return logprobs_TV.gather(-1, chosen[:, None]).sum().item(), greedy


def what_argmax_writes(base: Any, tokenizer: Tokenizer) -> tuple[str, str]:
    """A text and its likeliest next token, where both together are the same tokens again."""
    words = " ".join(CORPUS[:4]).split()
    for end in range(1, len(words)):
        text = " ".join(words[:end])
        ids = tokenizer.encode(text).ids
        with torch.inference_mode():
            ids.append(base(torch.tensor([ids])).logits[0, -1].argmax().item())
        whole = tokenizer.decode(ids)
        if tokenizer.encode(whole).ids == ids and whole.startswith(text):
            return text, whole.removeprefix(text)
    raise AssertionError("no such text")


def by_lm_eval(
    clients: Path, service: Service, models: Path, pairs: list[tuple[str, str]], options: dict[str, Any]
) -> dict[str, Any]:
    asked = {
        "model": {
            "base_url": f"{service.url}/v1/completions",
            "model": "tiny",
            "tokenizer": str(models / "tiny"),
            "tokenizer_backend": "huggingface",
            "max_length": 512,
            **options,
        },
        "pairs": pairs,
        "texts": TEXTS,
        "generation": {"until": ["\n\n"], "max_gen_toks": 6},
    }
    done = subprocess.run(
        [clients / "python", Path(__file__).with_name("python") / "lm_eval_scores.py"],
        input=json.dumps(asked),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.clients
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_concurrent": 2, "batch_size": 3},
        {"tokenized_requests": False},
    ],
    ids=["token ids", "batches", "texts"],
)
def test_scores_are_those_of_the_plain_forward(
    clients: Path, service: Service, models: Path, base: Any, options: dict[str, Any]
) -> None:
    tokenizer = byte_level_backend()
    pairs = [*PAIRS, what_argmax_writes(base, tokenizer)]
    answers = by_lm_eval(clients, service, models, pairs, options)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    start = encode("<|im_start|>")  # the tokenizer's `bos_token`, put before what has no context
    for (prefix, rest), (logprob, greedy) in zip(pairs, answers["loglikelihood"], strict=True):
        whole = encode(prefix + rest) if prefix else [*start, *encode(rest)]
        cut = len(encode(prefix.rstrip())) if prefix else 1  # lm-eval counts a last space to the rest
        expected, argmax = scored(base, whole[:cut], whole[cut:])
        assert logprob == pytest.approx(expected, abs=2e-3), (prefix, rest)
        assert greedy == argmax
    assert [greedy for _, greedy in answers["loglikelihood"]] == [False] * len(PAIRS) + [True]
    for text, logprob in zip(TEXTS, answers["rolling"], strict=True):
        assert logprob == pytest.approx(scored(base, start, encode(text))[0], abs=2e-3)
    assert all(isinstance(text, str) for text in answers["generated"])
