"""LitGPT is the reference for its own files: what its versions saved gives the logits they computed.

The fixtures were made by LitGPT itself (tests/fixtures/make_litgpt.py): the last version with grouped
query, key and value rows and the first without, and the ends of the range that is known.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.adaptation import AdapterBank, BatchAdaptation, OneAdapter
from models.adapter import Adapter
from models.attention import DenseAttend
from models.checkpoints.adapter_table import AdapterOptions
from models.checkpoints.adapters import export_adapter, open_adapter
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError
from models.llama import Llama

FIXTURES = Path(__file__).parents[2] / "fixtures" / "litgpt"
CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=16,
)
OLD, NEW = ("0.5.0", "0.5.4"), ("0.5.5", "0.5.13")


@pytest.fixture(scope="module")
def base() -> Llama:
    return Llama(CONFIG).load(load_file(FIXTURES / "base.safetensors").items())


def open_fixture(kind: str, version: str) -> Adapter:
    """By its folder for V2, by its file for V1; only a V1 file has to be told its version."""
    folder = FIXTURES / f"{kind}-{version}"
    if kind == "adapter_v2":
        return open_adapter(folder, CONFIG)
    return open_adapter(folder / "lit_model.pth.adapter", CONFIG, AdapterOptions(litgpt=version))


@torch.no_grad()
def our_logits(base: Llama, adapter: Adapter, tokens: Tensor) -> Tensor:
    adaptation = OneAdapter(adapter, base.dtype)
    attend = DenseAttend(1, adapter.prompts(base))
    return base.logits(base(tokens, torch.arange(len(tokens)), attend, adaptation), adaptation)


@pytest.mark.parametrize("version", OLD + NEW)
@pytest.mark.parametrize("kind", ["adapter", "adapter_v2"])
def test_logits_are_litgpt_s(base: Llama, kind: str, version: str):
    expected = load_file(FIXTURES / f"{kind}-{version}" / "expected.safetensors")
    ours = our_logits(base, open_fixture(kind, version), expected["tokens"])
    torch.testing.assert_close(ours, expected["logits"], atol=1e-4, rtol=0)
    assert torch.equal(ours.argmax(-1), expected["logits"].argmax(-1))


@pytest.mark.parametrize("kind", ["adapter", "adapter_v2"])
def test_a_batch_gives_litgpt_s_logits_too(base: Llama, kind: str):
    """The serving path: the adapter in a bank, head included, one of two tokens' adapters."""
    expected = load_file(FIXTURES / f"{kind}-0.5.13" / "expected.safetensors")
    adapter, tokens = open_fixture(kind, "0.5.13"), expected["tokens"]
    bank = AdapterBank(base, num_slots=2)
    bank.place(2, adapter)
    T = len(tokens)
    one = BatchAdaptation(bank, torch.full((T,), 2), [2])
    with torch.no_grad():
        hidden = base(tokens, torch.arange(T), DenseAttend(1, adapter.prompts(base)), one)
        torch.testing.assert_close(base.logits(hidden, one), expected["logits"], atol=1e-4, rtol=0)
        mixed = BatchAdaptation(bank, torch.tensor([2] * T + [0] * T), [0, 2])
        both = base.logits(torch.cat([hidden, hidden]), mixed)
        torch.testing.assert_close(both[:T], expected["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(both[T:], base.logits(hidden), atol=1e-5, rtol=0)


def test_the_versions_differ_on_one_and_the_same_file(base: Llama):
    """Hence the option: read as the other version reads it, a V1 file is another adapter."""
    tokens = load_file(FIXTURES / "adapter-0.5.4" / "expected.safetensors")["tokens"]
    file = FIXTURES / "adapter-0.5.4" / "lit_model.pth.adapter"
    right, wrong = (
        our_logits(base, open_adapter(file, CONFIG, AdapterOptions(litgpt=version)), tokens)
        for version in ("0.5.4", "0.5.5")
    )
    assert (right - wrong).abs().amax() > 0.1


@pytest.mark.parametrize("version", ["0.5.4", "0.5.13"])
@pytest.mark.parametrize("kind", ["adapter", "adapter_v2"])
def test_export_gives_back_litgpt_s_file(tmp_path: Path, kind: str, version: str):
    export_adapter(open_fixture(kind, version), "litgpt", tmp_path / "x.pth")
    theirs = torch.load(FIXTURES / f"{kind}-{version}" / f"lit_model.pth.{kind}", weights_only=True)["model"]
    ours = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        wanted = tensor[: CONFIG.vocab_size] if key.startswith("lm_head") else tensor  # padding is not kept
        assert torch.equal(ours[key], wanted), key


def test_older_gates_have_their_axes_swapped(tmp_path: Path):
    state = torch.load(FIXTURES / "adapter-0.5.4" / "lit_model.pth.adapter", weights_only=True)
    model = {
        key: tensor.permute(0, 2, 1, 3).contiguous() if "gating" in key else tensor
        for key, tensor in state["model"].items()
    }
    torch.save({"model": model}, tmp_path / "x.pth")
    older = open_adapter(tmp_path / "x.pth", CONFIG, AdapterOptions(litgpt="0.3.0"))
    assert torch.equal(older.gate, open_fixture("adapter", "0.5.4").gate)


def test_a_v1_file_needs_its_version():
    file = FIXTURES / "adapter-0.5.13" / "lit_model.pth.adapter"
    with pytest.raises(CheckpointError, match=r"lit_model\.pth\.adapter: .*litgpt=0\.5\.13"):
        open_adapter(file, CONFIG)
    for version in ("0.5.14", "0.6.0", "1.0", "newest", "0.5"):
        with pytest.raises(CheckpointError, match=rf"litgpt={version} is not known"):
            open_adapter(file, CONFIG, AdapterOptions(litgpt=version))


def test_a_version_that_contradicts_the_keys_is_refused():
    with pytest.raises(CheckpointError, match=r"its keys are not those of LitGPT 0\.5\.13"):
        open_adapter(FIXTURES / "adapter_v2-0.5.4", CONFIG, AdapterOptions(litgpt="0.5.13"))
    open_adapter(FIXTURES / "adapter_v2-0.5.4", CONFIG, AdapterOptions(litgpt="0.5.1"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_kv_heads": 4}, r"attn\.qkv\.adapter_bias has 32 rows, the base 48"),
        ({"vocab_size": 40}, r"lm_head\.adapter_bias has 32 rows, the base a vocabulary of 40"),
        ({"num_heads": 8, "head_dim": 2}, r"num_heads 4 \(the base has 8\)"),
    ],
)
def test_another_base_is_refused(changes: dict[str, int], match: str):
    with pytest.raises(AdapterMismatch, match=match):
        open_adapter(FIXTURES / "adapter_v2-0.5.13", replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "key",
    [
        "transformer.h.1.attn.qkv.adapter_scale",
        "transformer.h.0.mlp.fc_2.adapter_bias",
        "lm_head.adapter_scale",
        "transformer.ln_f.weight",
        "transformer.h.2.attn.gating_factor",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str):
    state = torch.load(FIXTURES / "adapter_v2-0.5.13" / "lit_model.pth.adapter_v2", weights_only=True)
    del state["model"][key]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.") + "( is)? missing"):
        open_adapter(tmp_path / "x.pth", CONFIG)
