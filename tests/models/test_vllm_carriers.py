"""Adapters as LoRA folders for vLLM, as far as that goes without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import GQA, random_adapter

from models.adapter import base_spec
from models.adapter_config import AdapterConfig, GateConfig, PromptConfig
from models.errors import AdapterMismatch
from models.vllm_plugin.carriers import (
    EVERYTHING,
    GATES,
    LENGTH,
    LOW_RANK,
    ROWS,
    SEES,
    Room,
    check_carried,
    layer_vectors,
)
from models.vllm_plugin.export import carried, export_adapter
from models.vllm_plugin.limits import UnsupportedByPlugin, check_config
from models.vllm_plugin.sharing import SharedAdapters, packed

SPEC = base_spec(GQA)
LOOK = {
    "encoder": "efficientnet-lite0",
    "features": "global",
    "projector": "linear",
    "feature_dim": 8,
    "hidden_size": 8,
}
LORA = {"rank": 2, "targets": ("wq", "w2"), "alpha": 6.0}
V2 = {
    "norms": True,
    "final_norm": True,
    "scale_bias": {"scale": "output", "scale_targets": ("wq",), "bias_targets": ("w2",)},
}


def config(**changes: Any) -> AdapterConfig:
    values = {"base": SPEC, "prompt": PromptConfig(length=5, layers=(1, 3))}
    return AdapterConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": PromptConfig(length=33, layers=(1,))}, "longer than 32 rows"),
        (
            {"vision": {"fusion": "early", "layers": (0,), "num_tokens": 3, **LOOK}},
            "static and its visual prompts differ in length",
        ),
        ({"prompt": PromptConfig(length=5, layers=(1,), projection="regrouped")}, "regrouped"),
        ({"lora": {"rank": 33, "targets": ("wq",)}}, "a rank over 32"),
        (
            {"lora": LORA, "scale_bias": {"scale": "output", "scale_targets": ("wq",)}},
            "LoRA terms beside scales",
        ),
        ({"head": True}, "output head"),
    ],
)
def test_what_vllm_cannot_do_is_refused_and_the_native_engine_named(changes: dict, sentence: str) -> None:
    with pytest.raises(AdapterMismatch, match=rf"^poet: .*{sentence}.*serve it with --engine native$"):
        check_carried(config(**changes), "poet", EVERYTHING)


@pytest.mark.parametrize(
    ("changes", "missing", "sentence"),
    [
        (V2, "vectors", "norms, biases or scales"),
        ({"scale_bias": {"scale": "input", "scale_targets": ("wq",)}}, "input_scales", "linears' inputs"),
        ({"lora": LORA}, "low_rank", "LoRA terms"),
        ({"vision": {"fusion": "add", "layers": (1,), "num_tokens": 1, **LOOK}}, "images", "eye for images"),
    ],
)
def test_an_adapter_needs_room_made_at_the_start(changes: dict, missing: str, sentence: str) -> None:
    check_carried(config(**changes), "poet", Room.needed([config(), config(**changes)]))
    with pytest.raises(AdapterMismatch, match=rf"it has .*{sentence}.*--vllm-adapters all"):
        check_carried(config(**changes), "poet", replace(EVERYTHING, **{missing: False}))


def test_prompts_alone_need_no_room() -> None:
    assert Room.needed([config()]) == Room.needed([]) == Room()


def test_the_prompt_carrier_holds_rows_gates_and_their_number() -> None:
    seeing = {"fusion": "add", "layers": (3,), "num_tokens": 1, **LOOK}
    adapter = random_adapter(config(vision=seeing, gate=GateConfig(per="layer", new_gate=True)))
    tensors = carried(adapter, EVERYTHING)
    gates_LH = adapter.gates()
    for layer in range(GQA.num_layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.adapter_prompt"
        a_RC, facts = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"].flatten()
        assert a_RC.shape == (ROWS, GQA.hidden_size)
        assert torch.equal(facts[GATES : GATES + GQA.num_heads], gates_LH[layer])
        assert facts[LENGTH] == 5
        assert facts[SEES] == (layer == 3)
        rows = adapter.prompt[(1, 3).index(layer)] if layer in (1, 3) else torch.zeros(5, GQA.hidden_size)
        assert torch.equal(a_RC[:5], rows)
        assert not a_RC[5:].any()


def test_the_vector_carrier_holds_all_vectors_and_zero_for_what_is_not_there() -> None:
    adapter = random_adapter(config(**V2))
    tensors = carried(adapter, EVERYTHING)
    spans = layer_vectors(SPEC, input_scales=True)
    for layer in range(GQA.num_layers):
        flat = tensors[f"base_model.model.model.layers.{layer}.adapter_vectors.lora_A.weight"].flatten()
        held = {name: flat[start:end] for name, (start, end) in spans.items()}
        assert held.pop("has_norms") == 1
        assert torch.equal(held.pop("attention_norm"), adapter.attention_norm[layer])
        assert torch.equal(held.pop("feed_forward_norm"), adapter.feed_forward_norm[layer])
        assert torch.equal(held.pop("scale_out.wq"), adapter.scale["wq"][layer] - 1)
        assert torch.equal(held.pop("bias.w2"), adapter.bias["w2"][layer])
        assert not any(value.any() for value in held.values())


def test_low_rank_terms_go_scaled_and_padded_under_vllms_names() -> None:
    adapter = random_adapter(config(lora=LORA | {"on_prompts": True}))
    tensors = carried(adapter, EVERYTHING)
    x = torch.randn(3, GQA.hidden_size)
    for layer in range(GQA.num_layers):
        prefix = f"base_model.model.model.layers.{layer}"
        assert tensors[f"{prefix}.self_attn.adapter_prompt.lora_B.weight"][0, LOW_RANK] == 1
        a_Ri, b_oR = (tensors[f"{prefix}.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
        assert a_Ri.shape[0] == b_oR.shape[1] == ROWS
        a, b = adapter.lora["wq"]["a"][layer], adapter.lora["wq"]["b"][layer]
        torch.testing.assert_close(x @ a_Ri.T @ b_oR.T, 6.0 / 2 * (x @ a.T @ b.T))
        assert f"{prefix}.mlp.down_proj.lora_A.weight" in tensors


def test_a_text_adapter_takes_no_vectors_along() -> None:
    assert {name.split(".")[-3] for name in carried(random_adapter(config()), EVERYTHING)} == {
        "adapter_prompt"
    }


def test_a_folder_is_written_whole_and_left_alone_when_it_is_there(tmp_path: Path) -> None:
    adapter = random_adapter(config())
    export_adapter(adapter, tmp_path / "out" / "poet", EVERYTHING)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["poet"]
    peft = json.loads((tmp_path / "out" / "poet" / "adapter_config.json").read_text())
    assert peft["r"] == peft["lora_alpha"] == ROWS
    saved = load_file(tmp_path / "out" / "poet" / "adapter_model.safetensors")
    assert saved.keys() == carried(adapter, EVERYTHING).keys()
    export_adapter(random_adapter(config(), seed=1), tmp_path / "out" / "poet", EVERYTHING)
    again = load_file(tmp_path / "out" / "poet" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in saved.items())


def vllm_config(**changes: Any) -> SimpleNamespace:
    """As much of vLLM's configuration as is looked at."""
    values = {
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "lora_config": SimpleNamespace(max_lora_rank=32, target_modules=["adapter_prompt"]),
        "cache_config": SimpleNamespace(block_size=32),
        "speculative_config": None,
        "model_config": SimpleNamespace(hf_config=SimpleNamespace(llama_adapter={})),
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline parallelism"),
        (
            {"parallel_config": SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=2)},
            "context parallelism",
        ),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": None}, "start with LoRA enabled"),
        (
            {"lora_config": SimpleNamespace(max_lora_rank=16, target_modules=["adapter_prompt"])},
            "a rank of 32",
        ),
        (
            {"lora_config": SimpleNamespace(max_lora_rank=64, target_modules=["adapter_prompt"])},
            "a rank of 32",
        ),
        ({"lora_config": SimpleNamespace(max_lora_rank=32, target_modules=None)}, "adapter_prompt"),
        ({"cache_config": SimpleNamespace(block_size=128)}, "a block size that divides 32, not 128"),
        ({"model_config": SimpleNamespace(hf_config=SimpleNamespace())}, "lacks `llama_adapter`"),
    ],
)
def test_a_start_that_would_compute_nonsense_is_refused(changes: dict, sentence: str) -> None:
    check_config(vllm_config())
    with pytest.raises(UnsupportedByPlugin, match=sentence):
        check_config(vllm_config(**changes))


def test_the_plugin_imports_without_vllm() -> None:
    import models.vllm_plugin.options
    import models.vllm_plugin.sight  # noqa: F401

    assert "vllm" not in sys.modules


def test_a_folder_is_handed_to_a_machine_that_lacks_it(tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "1-poet", tmp_path / "there" / "1-poet"
    here.mkdir(parents=True)
    (here / "weights").write_bytes(b"\0\1")
    (here / "config").write_bytes(b"{}")
    machine = SharedAdapters()
    machine.hold_adapter(str(there), packed(here))
    machine.hold_adapter(str(there), {"weights": b"of another call"})
    assert packed(there) == packed(here)
    assert [path.name for path in there.parent.iterdir()] == ["1-poet"]
    machine.drop_adapter(str(there))
    machine.drop_adapter(str(there))
    assert not there.exists()


_FOLLOWER = """
import multiprocessing, os, sys, time
from models.vllm_plugin import _end_with_parent
from models.vllm_plugin.sharing import SharedAdapters

def hold(held, ending):
    _end_with_parent()
    SharedAdapters().hold_adapter(sys.argv[1], {"weights": b"of the leader"})
    held.set()
    ending.wait()

fork = multiprocessing.get_context("fork")
held, ending = fork.Event(), fork.Event()
process = fork.Process(target=hold, args=(held, ending))
process.start()
held.wait()
print(os.path.isdir(sys.argv[1]), flush=True)
if sys.argv[2] == "leader gone":
    os._exit(1)
ending.set()
process.join()
"""


@pytest.mark.parametrize("end", ["told to end", "leader gone"])
def test_a_follower_that_ends_leaves_no_adapters_behind(tmp_path: Path, end: str) -> None:
    folder = tmp_path / "exports" / "1-poet"
    command = [sys.executable, "-c", _FOLLOWER, str(folder), end]
    # Its output ends when both of its processes have.
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    assert found.stdout == "True\n"
    assert list(tmp_path.iterdir()) == []
