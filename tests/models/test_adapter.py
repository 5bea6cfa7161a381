"""Adapter files that do not fit are refused by name; what fits gives the gates and prompts it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import GQA, MHA, random_adapter, random_base
from torch import Tensor

from models.adapter import Adapter, base_spec, check_fits
from models.adapter_config import AdapterConfig
from models.attention import DenseAttend, stack_layers
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError, ModelError
from models.fingerprint import fingerprint
from models.kv_cache import PromptCache

H, L, C = MHA.num_heads, MHA.num_layers, MHA.hidden_size
EARLY = {
    "encoder": "efficientnet-lite0",
    "features": "tokens",
    "projector": "linear",
    "fusion": "early",
    "layers": (0,),
    "num_tokens": 5,
    "feature_dim": 12,
    "hidden_size": 12,
}


def config_of(base: ModelConfig = MHA, **options: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"base": base_spec(base).model_dump(), **options})


V1 = config_of(prompt={"length": 3, "layers": (1, 3)})
V1_GQA = config_of(GQA, prompt={"length": 3, "layers": (1, 3)})


def sound() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in random_adapter(V1).state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_load_converts_any_floating_point_tensor(dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in sound().items()}
    loaded = Adapter(V1).load(tensors).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


def with_value(name: str, value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = sound()
    tensors[name] = tensors[name].to(dtype)
    tensors[name].flatten()[-1] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "missing tensors gate, prompt"),
        ({"prompt": sound()["prompt"]}, "missing tensors gate"),
        (sound() | {"new_gate": torch.ones(2)}, "unexpected tensors new_gate"),
        (sound() | {"bias.wq": torch.ones(1), "x": torch.ones(1)}, r"unexpected tensors bias\.wq, x"),
        (sound() | {"gate": torch.ones(2)}, r"gate has shape \[2\], its configuration asks for \[2, 6\]"),
        (sound() | {"gate": torch.ones(1, H, 1, 1)}, r"gate has shape \[1, 6, 1, 1\]"),
        (with_value("prompt", float("nan")), "prompt holds NaN or infinite values"),
        (with_value("gate", float("-inf")), "gate holds NaN or infinite values"),
        (with_value("gate", float("nan"), torch.bfloat16), "gate holds NaN or infinite values"),
        (with_value("gate", 1e300, torch.float64), "gate holds NaN or infinite values"),
        (sound() | {"gate": torch.ones(2, H, dtype=torch.int32)}, r"gate is torch\.int32, not a floating"),
        (sound() | {"gate": torch.ones(2, H, dtype=torch.bool)}, r"gate is torch\.bool, not a floating"),
        (sound() | {"gate": torch.ones(2, H, dtype=torch.complex64)}, r"gate is torch\.complex64, not a fl"),
        (sound() | {"gate": torch.ones(2, H).to(torch.float8_e4m3fn)}, r"gate is torch\.float8_e4m3fn, not"),
    ],
)
def test_load_names_what_does_not_fit(tensors: dict[str, Tensor], message: str):
    with pytest.raises(CheckpointError, match=rf"^here/a\.safetensors: {message}"):
        Adapter(V1).load(tensors, source="here/a.safetensors")


def test_load_sees_the_last_of_many_numbers():
    """Which are copied in pieces."""
    config = config_of(prompt={"length": 1000, "layers": (0, 1, 3)})
    tensors = dict(random_adapter(config).state_dict())
    loaded = Adapter(config).load(tensors)
    assert torch.equal(loaded.prompt, tensors["prompt"])
    tensors["prompt"] = tensors["prompt"].clone()
    tensors["prompt"][-1, -1, -1] = float("nan")
    with pytest.raises(CheckpointError, match="prompt holds NaN"):
        Adapter(config).load(tensors)


def test_a_fresh_adapter_starts_from_the_bases_norms():
    base = random_base(MHA)
    adapter = Adapter(config_of(norms=True, final_norm=True)).start_from(base)
    for i, layer in enumerate(base.layers):
        assert torch.equal(adapter.attention_norm[i], layer.attention_norm)
        assert torch.equal(adapter.feed_forward_norm[i], layer.feed_forward_norm)
    assert torch.equal(adapter.final_norm, base.norm)


@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("activation", ["tanh", "raw"])
@pytest.mark.parametrize("new_gate", [False, True])
def test_effective_gates(per: str, activation: str, new_gate: bool):
    """Rows of the prompts' layers, zero elsewhere; a layer's gate is every head's."""
    gate = {"per": per, "activation": activation, "new_gate": new_gate}
    adapter = random_adapter(config_of(prompt={"length": 3, "layers": (1, 3)}, gate=gate))
    gates_LH = adapter.gates()
    assert gates_LH.shape == (L, H)
    assert not gates_LH[[0, 2]].any()
    for row, layer in enumerate((1, 3)):
        value = adapter.gate[row].expand(H)
        value = value.tanh() if activation == "tanh" else value
        expected = value * adapter.new_gate[row] if new_gate else value
        torch.testing.assert_close(gates_LH[layer], expected)


def test_prompts_of_ragged_lengths_and_of_several_images():
    """Static rows for all, visual rows for each image; without an image the visual layers are empty."""
    base = random_base(GQA)
    adapter = random_adapter(config_of(GQA, prompt={"length": 3, "layers": (2, 3)}, vision=EARLY))
    with torch.no_grad():
        seen = adapter.prompts(base, adapter.see(torch.randn(2, 5, 12)))
        unseen = adapter.prompts(base)
    assert seen.k_SLKGD.shape == (2, L, 5, GQA.num_kv_heads, GQA.head_dim)
    assert seen.len_SL.tolist() == [[5, 0, 3, 3]] * 2
    assert unseen.len_SL.tolist() == [[0, 0, 3, 3]]
    assert not torch.equal(seen.k_SLKGD[0, 0], seen.k_SLKGD[1, 0])
    assert torch.equal(seen.v_SLKGD[0, 2], seen.v_SLKGD[1, 2])
    assert torch.equal(seen.v_SLKGD[0, 2], unseen.v_SLKGD[0, 2])
    assert not unseen.gate_SLH[0, :2].any()  # a gate of rows that are not there gates nothing
    assert seen.gate_SLH[:, 0].all()


def test_prompts_are_made_and_kept_without_a_look_at_the_device():
    """A tensor of "meta" has no numbers: whoever reads one fails, as on a GPU it would wait."""
    base, adapter = random_base(GQA).to("meta"), random_adapter(V1_GQA).to("meta")
    with torch.no_grad():
        prompts = adapter.prompts(base)
    cache = PromptCache(GQA, 2, base.dtype, base.device)
    cache.place(1, prompts, 0)
    assert cache.lens_LS[:, 1].tolist() == [0, 3, 0, 3]
    assert DenseAttend(1, prompts)._gated == {1, 3}


@pytest.mark.parametrize(
    ("length", "vision"), [(3, EARLY), (1, EARLY | {"fusion": "add", "layers": (2, 3), "num_tokens": 1})]
)
def test_prompts_have_no_more_rows_than_the_adapter_says(length: int, vision: dict[str, Any]):
    """Kernels read as many as `len_SL` says, and others' lie behind them."""
    adapter = random_adapter(config_of(GQA, prompt={"length": length, "layers": (2, 3)}, vision=vision))
    rows = adapter.config.max_prompt_len
    with torch.no_grad():
        prompts = adapter.prompts(random_base(GQA), adapter.see(torch.randn(2, rows, 12)))
        assert prompts.len_SL.max() == prompts.k_SLKGD.shape[2] == rows
        with pytest.raises(ModelError, match=f"{rows + 4} prompt rows, more than the adapter's {rows}"):
            adapter.prompts(random_base(GQA), adapter.see(torch.randn(2, rows + 4, 12)))


def test_prompts_of_some_layers_are_those_of_all():
    base = random_base(GQA)
    own = {
        "norms": True,
        "scale_bias": {"scale": "output", "scale_targets": ("wk",), "bias_targets": ("wv",)},
    }
    adapter = random_adapter(config_of(GQA, prompt={"length": 3, "layers": (2, 3)}, vision=EARLY, **own))
    with torch.no_grad():
        visual_SnC = adapter.see(torch.randn(2, 5, 12))
        for visual in (None, visual_SnC):
            whole = adapter.prompts(base, visual)
            some = [adapter.prompts(base, visual, layers) for layers in (range(1), range(1, 3), range(3, L))]
            for name, joined in vars(stack_layers(some)).items():
                assert torch.equal(joined, getattr(whole, name)), name


def test_gradients_reach_every_parameter_through_gates_and_prompts():
    base = random_base(MHA)
    adapter = random_adapter(
        config_of(
            prompt={"length": 3, "layers": (2, 3)},
            gate={"new_gate": True},
            scale_bias={"scale": "input", "scale_targets": ("wk", "wv"), "bias_targets": ("wk", "wv")},
            lora={"rank": 2, "targets": ("wk", "wv"), "on_prompts": True},
            vision=EARLY,
        )
    )
    prompts = adapter.prompts(base, adapter.see(torch.randn(2, 5, 12)))
    (prompts.k_SLKGD.square().sum() + prompts.v_SLKGD.square().sum() + prompts.gate_SLH.sum()).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in base.parameters())


def test_check_fits_accepts_its_own_base():
    check_fits(base_spec(MHA, "abc"), MHA, "abc", "a")
    check_fits(base_spec(MHA, "abc"), MHA, None, "a")  # a base of unknown fingerprint is not refused
    check_fits(base_spec(MHA), MHA, "abc", "a")
    check_fits(base_spec(MHA).model_copy(update={"vocab_size": None}), MHA, None, "a")


@pytest.mark.parametrize("field", ["hidden_size", "num_layers", "num_heads", "head_dim", "vocab_size"])
def test_check_fits_names_each_difference(field: str):
    actual = getattr(MHA, field)
    spec = base_spec(MHA).model_copy(update={field: 1234})
    message = rf"^x/adapter\.json was made for another base: {field} 1234 \(the base has {actual}\); serve"
    with pytest.raises(AdapterMismatch, match=message):
        check_fits(spec, MHA, None, "x/adapter.json")


def test_check_fits_takes_a_near_copy_and_says_so(caplog: pytest.LogCaptureFixture):
    embed = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    print_, rounded = fingerprint(embed), fingerprint((embed * 16).round() / 16)
    assert print_ != rounded
    check_fits(base_spec(MHA, print_), MHA, print_, "a")
    assert not caplog.messages
    check_fits(base_spec(MHA, print_), MHA, rounded, "x/adapter.json")
    assert "x/adapter.json was made for a near copy of this base" in caplog.text
    with pytest.raises(AdapterMismatch, match="hidden_size 1234"):
        check_fits(base_spec(replace(MHA, hidden_size=1234), print_), MHA, rounded, "x")
    with pytest.raises(AdapterMismatch, match="fingerprint"):
        check_fits(base_spec(MHA, print_), MHA, fingerprint(embed.flip(0)), "x")


def test_check_fits_names_all_differences_at_once():
    message = r"num_kv_heads 2 \(the base has 6\), fingerprint abc \(the base has def\); serve it"
    with pytest.raises(AdapterMismatch, match=message):
        check_fits(base_spec(GQA, "abc"), MHA, "def", "x")
