"""The formulas of `models.sizing` against what the engine and the files really take."""

from __future__ import annotations

import pytest
from support import CONFIGS, random_adapter, random_base

from models.adapter import base_spec, linear_shape
from models.adapter_config import LINEARS, AdapterConfig, LoraConfig, PromptConfig, ScaleBiasConfig
from models.config import ModelConfig
from models.kv_cache import KVCache
from models.llama import Llama
from models.sizing import (
    BASES,
    DEVICES,
    GIB,
    Load,
    base_parameters,
    decode_bytes,
    kv_bytes_per_token,
    linear_sizes,
    native_adapter_bytes,
    plan,
    prompt_slot_bytes,
    vector_parameters,
    vllm_slot_bytes,
)
from models.vllm_plugin.carriers import Room
from models.vllm_plugin.export import carried
from server.worker.runner import Runner, StepItem
from server.worker.sight import LoadedAdapter

WIDTH = 4  # bytes of a float32


def v1(base: ModelConfig) -> AdapterConfig:
    return AdapterConfig(base=base_spec(base), prompt=PromptConfig(length=5, layers=(1, 3)))


def v2(base: ModelConfig) -> AdapterConfig:
    tuned = ScaleBiasConfig(scale="output", scale_targets=LINEARS, bias_targets=("wk", "w2"))
    prompt = PromptConfig(length=7, layers=(2, 3))
    return AdapterConfig(base=base_spec(base), prompt=prompt, norms=True, final_norm=True, scale_bias=tuned)


def scaled_inputs(base: ModelConfig) -> AdapterConfig:
    tuned = ScaleBiasConfig(scale="input", scale_targets=("wo", "w2"), bias_targets=LINEARS)
    return AdapterConfig(
        base=base_spec(base), scale_bias=tuned, lora=LoraConfig(rank=3, targets=("wq", "w2"))
    )


def low_rank(base: ModelConfig) -> AdapterConfig:
    """As the released 7B adapter with LoRA."""
    lora, tuned = LoraConfig(rank=3, targets=LINEARS), ScaleBiasConfig(bias_targets=("wq", "wo"))
    return AdapterConfig(base=base_spec(base), norms=True, final_norm=True, scale_bias=tuned, lora=lora)


def chat_65b(base: ModelConfig) -> AdapterConfig:
    tuned = ScaleBiasConfig(scale="input", scale_targets=LINEARS, bias_targets=LINEARS)
    return AdapterConfig(base=base_spec(base), norms=True, scale_bias=tuned)


def bytes_of(*tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_base_has_as_many_parameters(name: str) -> None:
    config = CONFIGS[name]
    places = {place.data_ptr(): place.numel() for _, place in Llama(config)._places()}
    assert base_parameters(config) == sum(places.values())
    for linear, sizes in linear_sizes(config).items():
        assert sizes == linear_shape(base_spec(config), linear)


def test_the_published_sizes() -> None:
    assert [round(base_parameters(BASES[name]) / 1e9, 2) for name in ("7b", "13b", "65b")] == [
        6.74,
        13.02,
        65.29,
    ]


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("kind", [v1, v2, scaled_inputs])
def test_an_adapter_takes_as_much_of_the_native_engine(name: str, kind) -> None:
    base = random_base(CONFIGS[name])
    config = kind(base.config)
    runner = Runner(base, num_blocks=4, block_size=4, max_hot_adapters=2, prompt_slots=3)
    loaded = LoadedAdapter(("a", 1), random_adapter(config), None)
    runner.run([StepItem([3], 0, [0], loaded, None, slice(0, 1))])

    lora = [term for terms in runner.bank.lora.values() for term in terms]
    a_slot = bytes_of(*runner.bank.stacks.values(), *lora) / 3  # two adapters and the identity
    assert a_slot == vector_parameters(base.config, config) * WIDTH
    cache, rows = runner.prompt_cache, config.max_prompt_len
    if rows:
        a_slot += bytes_of(cache.k_LSKGD, cache.v_LSKGD, cache.gate_LSH) / 4  # three, and the empty one
        assert (
            prompt_slot_bytes(base.config, rows, WIDTH) + vector_parameters(base.config, config) * WIDTH
            == a_slot
        )
    assert native_adapter_bytes(base.config, config, WIDTH) == a_slot


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_block_of_the_cache_holds_so_many_tokens(name: str) -> None:
    base = random_base(CONFIGS[name])
    assert KVCache.bytes_per_block(base.config, 16, base.dtype) == 16 * kv_bytes_per_token(base.config, WIDTH)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("kind", [v1, v2, low_rank, chat_65b])
def test_an_adapter_takes_as_much_of_vllm(name: str, kind) -> None:
    """vLLM's slot has the shapes of the carriers, which the exporter fills."""
    base = CONFIGS[name]
    config = kind(base)
    room = Room.needed([config])
    assert vllm_slot_bytes(base, WIDTH, room) == bytes_of(*carried(random_adapter(config), room).values())


def test_a_decode_step_reads_weights_caches_and_vectors() -> None:
    base = CONFIGS["gqa"]
    config = v2(base)
    load = Load(sequences=3, context=100, adapters=2)
    tables = base.vocab_size * base.hidden_size  # one, that is the output head too
    weights = sum(out * into for out, into in linear_sizes(base).values()) + 2 * base.hidden_size
    weights = (weights * base.num_layers + base.hidden_size + tables) * WIDTH
    keys_and_values = 3 * (100 + 7) * kv_bytes_per_token(base, WIDTH)
    vectors = 2 * vector_parameters(base, config) * WIDTH
    assert decode_bytes(base, config, load, WIDTH) == weights + keys_and_values + vectors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base", BASES)
def test_what_is_planned_fits(base: str, device: str) -> None:
    config, load = v1(BASES[base]), Load(sequences=16, context=1024, adapters=8)
    found = plan(BASES[base], config, DEVICES[device], load, width=2, engine="native")
    room = 0.9 * found.devices * DEVICES[device].memory_gib * GIB
    held = found.weights + found.kv_of_load
    assert (
        held + found.adapters_that_fit * found.adapter
        <= room
        < held + (found.adapters_that_fit + 1) * found.adapter
    )
    assert found.adapters_that_fit >= load.adapters
    assert (
        found.devices == 1
        or held > 0.9 * found.devices / 2 * DEVICES[device].memory_gib * GIB - 8 * found.adapter
    )
    assert found.step_seconds == found.step_bytes / (found.devices * DEVICES[device].bandwidth)
