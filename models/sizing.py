"""What a base and its adapters take of a device's memory and bandwidth, computed from shapes.

Shapes: L layers, C hidden size, H query heads, G key/value heads, D head size, I feed-forward size,
V vocabulary, K prompt rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from models.adapter_config import AdapterConfig, LinearName
from models.config import ModelConfig
from models.vllm_plugin.carriers import ROWS, Room, fact_rows

GIB = 1024**3


def _llama(C: int, I: int, L: int, H: int, context: int = 2048) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000,
        hidden_size=C,
        intermediate_size=I,
        num_layers=L,
        num_heads=H,
        num_kv_heads=H,
        head_dim=C // H,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=context,
    )


BASES: Mapping[str, ModelConfig] = {  # the first LLaMA's, which the papers use
    "7b": _llama(4096, 11008, 32, 32),
    "13b": _llama(5120, 13824, 40, 40),
    "65b": _llama(8192, 22016, 80, 64),
}


@dataclass(frozen=True, slots=True)
class Device:
    """By its maker's data sheet: memory in GiB, bandwidth in bytes per second."""

    memory_gib: float
    bandwidth: float


DEVICES: Mapping[str, Device] = {
    "a100": Device(80, 2.039e12),  # 80 GB, SXM
    "h100": Device(80, 3.35e12),  # SXM
    "h200": Device(141e9 / GIB, 4.8e12),
}


def linear_sizes(base: ModelConfig) -> dict[LinearName, tuple[int, int]]:
    """(out, in) features of a layer's linears."""
    C, I = base.hidden_size, base.intermediate_size
    q, kv = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    return {
        "wq": (q, C),
        "wk": (kv, C),
        "wv": (kv, C),
        "wo": (C, q),
        "w1": (I, C),
        "w2": (C, I),
        "w3": (I, C),
    }


def base_parameters(base: ModelConfig) -> int:
    C = base.hidden_size
    layer = sum(out * into for out, into in linear_sizes(base).values()) + 2 * C
    tables = base.vocab_size * C * (1 if base.tie_word_embeddings else 2)
    return base.num_layers * layer + C + tables


def read_parameters(base: ModelConfig) -> int:
    """Those that a decode step reads: all but the embedding table, of which it needs a row a token."""
    embedding = 0 if base.tie_word_embeddings else base.vocab_size * base.hidden_size
    return base_parameters(base) - embedding


def kv_bytes_per_token(base: ModelConfig, width: int) -> int:
    """`width` is that of a number in bytes, 2 in bfloat16."""
    return 2 * base.num_layers * base.num_kv_heads * base.head_dim * width


def vector_parameters(base: ModelConfig, config: AdapterConfig) -> int:
    """Numbers in an adapter's norms, biases, scales and low-rank terms, all layers together."""
    sizes, tuned = linear_sizes(base), config.scale_bias
    side = 1 if tuned.scale == "input" else 0
    layer = sum(sizes[name][0] for name in tuned.bias_targets)
    layer += sum(sizes[name][side] for name in tuned.scale_targets)
    layer += 2 * base.hidden_size if config.norms else 0
    if config.lora:
        layer += config.lora.rank * sum(sum(sizes[name]) for name in config.lora.targets)
    outside = (base.hidden_size if config.final_norm else 0) + (2 * base.vocab_size if config.head else 0)
    return base.num_layers * layer + outside


def prompt_slot_bytes(base: ModelConfig, rows: int, width: int) -> int:
    """A prompt's keys, values and gates in the native engine: per adapter, and per image it is shown.

    `rows` are those of the longest prompt that was placed, for which every slot has room.
    """
    return rows * kv_bytes_per_token(base, width) + base.num_layers * base.num_heads * 4


def native_adapter_bytes(base: ModelConfig, config: AdapterConfig, width: int) -> int:
    """A hot adapter in the native engine: its vectors in the bank, and one prompt slot."""
    rows = config.max_prompt_len
    return vector_parameters(base, config) * width + (prompt_slot_bytes(base, rows, width) if rows else 0)


def vllm_slot_bytes(base: ModelConfig, width: int, room: Room) -> int:
    """One of vLLM's adapter slots, whatever is in it; its prompt's keys and values lie in KV blocks."""
    C, R, sizes = base.hidden_size, ROWS, linear_sizes(base).values()
    layer = R * C + fact_rows(base.num_heads) * R
    outside = 0
    if room.vectors:
        numbers = 1 + 2 * C + 2 * sum(out for out, _ in sizes)
        numbers += sum(into for _, into in sizes) if room.input_scales else 0
        layer += _padded(numbers, R) + R
        outside = _padded(1 + C, R) + R
    if room.low_rank:
        layer += R * sum(out + into for out, into in sizes)
    return (base.num_layers * layer + outside) * width


def _padded(numbers: int, rows: int) -> int:
    return -(-numbers // rows) * rows


@dataclass(frozen=True, slots=True)
class Load:
    """What runs at once: sequences, their mean length in tokens, and how many adapters they name."""

    sequences: int
    context: int
    adapters: int


def decode_bytes(base: ModelConfig, config: AdapterConfig, load: Load, width: int) -> int:
    """Bytes that one decode step reads: the weights once, each sequence's keys and values and its
    adapter's prompt, and each adapter's vectors once."""
    per_sequence = (load.context + config.max_prompt_len) * kv_bytes_per_token(base, width)
    vectors = load.adapters * vector_parameters(base, config) * width
    return read_parameters(base) * width + load.sequences * per_sequence + vectors


Engine = Literal["native", "vllm"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A base on devices that share it. Bytes are of all of them together but for `step_seconds`."""

    devices: int
    weights: int
    kv_per_token: int
    kv_of_load: int
    adapter: int
    image: int
    adapters_that_fit: int
    step_bytes: int
    step_seconds: float  # at least: by bandwidth alone


def plan(
    base: ModelConfig, config: AdapterConfig, device: Device, load: Load, *, width: int, engine: Engine
) -> Plan:
    """`width`: bytes of a number. A tenth of each device is left to activations and the framework.

    The number of devices is the least power of two that holds the base, the load's keys and values and
    its adapters.
    """
    weights = base_parameters(base) * width
    kv_per_token = kv_bytes_per_token(base, width)
    if engine == "native":
        adapter = native_adapter_bytes(base, config, width)
        image = prompt_slot_bytes(base, config.max_prompt_len, width)
    else:
        image = ROWS * kv_per_token  # the block of the placeholders, of which each adapter has one too
        adapter = vllm_slot_bytes(base, width, Room.needed([config])) + image
    kv_of_load = load.sequences * load.context * kv_per_token
    needed = weights + kv_of_load + load.adapters * adapter
    devices = 1
    while needed > devices * _usable(device):
        devices *= 2
    step = decode_bytes(base, config, load, width)
    return Plan(
        devices=devices,
        weights=weights,
        kv_per_token=kv_per_token,
        kv_of_load=kv_of_load,
        adapter=adapter,
        image=image,
        adapters_that_fit=int((devices * _usable(device) - weights - kv_of_load) // max(adapter, 1)),
        step_bytes=step,
        step_seconds=step / (devices * device.bandwidth),
    )


def _usable(device: Device) -> float:
    return 0.9 * device.memory_gib * GIB
