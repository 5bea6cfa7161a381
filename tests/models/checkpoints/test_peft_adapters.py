"""PEFT is the reference for its own format: a folder that it saved gives its own logits here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import CONFIGS, random_base, transformers_twin
from torch import Tensor

from models.adaptation import OneAdapter
from models.adapter import Adapter
from models.attention import DenseAttend
from models.checkpoints.adapters import export_adapter, open_adapter
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError
from models.llama import Llama

# PEFT still asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([5, 17, 3, 88, 42, 9])


def peft_model(base: Llama):
    from peft import AdaptionPromptConfig, get_peft_model

    model = get_peft_model(
        transformers_twin(base), AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def our_logits(base: Llama, adapter: Adapter) -> Tensor:
    adaptation = OneAdapter(adapter, base.dtype)
    attend = DenseAttend(1, adapter.prompts(base))
    return base.logits(base(TOKENS, torch.arange(len(TOKENS)), attend, adaptation), adaptation)


@pytest.fixture(params=["mha", "gqa"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """PEFT tells grouped heads by the sizes of k_proj, which needs H·D = C."""
    return CONFIGS[request.param]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_a_folder_that_peft_saved_gives_peft_s_logits(config: ModelConfig, tmp_path: Path, safe: bool):
    base = random_base(config)
    model = peft_model(base)
    model.save_pretrained(tmp_path)
    if not safe:  # as older versions of PEFT wrote it
        from safetensors.torch import load_file

        torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    adapter = open_adapter(tmp_path, config)
    theirs = model(TOKENS[None]).logits[0]
    torch.testing.assert_close(our_logits(base, adapter), theirs, atol=1e-4, rtol=0)
    assert (theirs - transformers_twin(base)(TOKENS[None]).logits[0]).abs().amax() > 0.1


@torch.no_grad()
def test_a_folder_that_we_exported_gives_peft_our_logits(config: ModelConfig, tmp_path: Path):
    from peft import PeftModel

    base = random_base(config)
    peft_model(base).save_pretrained(tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs", config)
    export_adapter(adapter, "peft", tmp_path / "ours")
    model = PeftModel.from_pretrained(transformers_twin(base), tmp_path / "ours").eval()
    torch.testing.assert_close(model(TOKENS[None]).logits[0], our_logits(base, adapter), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"adapter_len": 4}, "adapter_len is 4"),
        ({"adapter_layers": 3}, "adapter_layers is 3"),
        ({"target_modules": "mlp"}, "target_modules is 'mlp'"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    config: ModelConfig, tmp_path: Path, change: dict[str, object], match: str
):
    peft_model(random_base(config)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {match}"):
        open_adapter(tmp_path, config)


def test_a_base_with_more_layers_is_refused(config: ModelConfig, tmp_path: Path):
    peft_model(random_base(config)).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatch, match=r"num_layers 4 \(the base has 5\)"):
        open_adapter(tmp_path, replace(config, num_layers=5))
