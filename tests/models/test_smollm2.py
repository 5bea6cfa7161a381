"""The embedded base on its real weights: transformers' logits, and sensible words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from models.attention import DenseAttend
from models.checkpoints.base import open_base
from models.llama import Llama
from models.prompts import Context, Turn, render
from models.pull import pull
from models.tokenizer import load_tokenizer
from server.settings import default_cache_dir

pytestmark = pytest.mark.weights

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome. " * 6,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好 😀",
]
CODE = "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull("smollm2-135m", default_cache_dir())


def logits(base: Llama, ids: list[int]) -> torch.Tensor:
    return base.logits(base(torch.tensor(ids), torch.arange(len(ids)), DenseAttend(1)))


@torch.no_grad()
def test_logits_equal_transformers(folder: Path):
    checkpoint = open_base(folder)
    base = Llama(checkpoint.config).load(checkpoint.tensors())
    twin = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    theirs_tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs_tokenizer(text)["input_ids"]
        torch.testing.assert_close(logits(base, ids), twin(torch.tensor([ids])).logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_in_float64_nothing_but_transformers_float32_rotation_is_left(folder: Path):
    """In float32 both are up to 1e-4 from the exact logits; in float64 they meet."""
    checkpoint = open_base(folder)
    base = Llama(checkpoint.config, dtype=torch.float64).load(checkpoint.tensors())
    twin = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    ids = load_tokenizer(folder).encode(CODE)
    torch.testing.assert_close(logits(base, ids), twin(torch.tensor([ids])).logits[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_it_reads_an_amount_from_context(folder: Path):
    checkpoint = open_base(folder)
    base = Llama(checkpoint.config).load(checkpoint.tensors())
    tokenizer = load_tokenizer(folder)
    context = [Context("ocr", "ACME Store INVOICE\nWidget A   $12.50\nWidget B   $35.70\nTotal   $48.20")]
    rendered = render("chat", [Turn("user", "What is the total?")], context, tokenizer)
    ids = tokenizer.encode_segments(rendered.segments).ids
    for _ in range(16):
        hidden = base(torch.tensor(ids), torch.arange(len(ids)), DenseAttend(1))
        ids.append(int(base.logits(hidden[-1:]).argmax()))
    assert "$48.20" in tokenizer.decode(ids[-16:])
