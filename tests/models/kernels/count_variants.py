"""Steps of a small base on a GPU that is not here: the kernels' variants that are compiled beforehand, and
those that the steps need besides; a JSON object. A program of its own, as `absent_gpu` wants it.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from absent_gpu import compile_only

from models.config import ModelConfig
from models.kernels import paged_decode, paged_prefill
from models.kernels.paged_attend import TritonPagedAttend, compile_kernels
from models.kernels.slot_vectors import _rms_norm, _scale_bias, slot_rms_norm, slot_scale_bias
from models.kv_cache import KVCache, PromptCache, StepLayout

CPU = torch.device("cpu")
config = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
)


def variants() -> dict[str, int]:
    kernels = (paged_decode._decode, paged_decode._add_up, paged_prefill._prefill, _rms_norm, _scale_bias)
    return {kernel.__name__: len(kernel.device_caches[0][0]) for kernel in kernels}


def step(lens: list[int], new: list[int]) -> None:
    layout = StepLayout(
        num_single=new.count(1),
        starts=[0, *np.cumsum(new).tolist()],
        lens_B=np.array(lens, np.int32),
        blocks_BM=np.zeros((len(lens), max(lens) // 16 + 1), np.int32),
        prompt_slots_B=np.zeros(len(lens), np.int32),
        block_size=16,
    )
    attend = TritonPagedAttend(cache, prompts, layout)
    q_NHD = torch.zeros(sum(new), 3, 32, dtype=torch.bfloat16)
    k_NGD = torch.zeros(sum(new), 1, 32, dtype=torch.bfloat16)
    for layer in range(config.num_layers):
        attend(layer, q_NHD, k_NGD, k_NGD)


compile_only()
cache = KVCache(config, 4, 16, torch.bfloat16, CPU)
prompts = PromptCache(config, 128, torch.bfloat16, CPU)
compile_kernels(cache, prompts, config.num_heads)
x_NC, weight_SC = torch.zeros(3, 64), torch.ones(2, 64)
ints = torch.zeros(9, dtype=torch.int32)
slot_rms_norm(x_NC, weight_SC, ints[:3], 1e-5)
slot_scale_bias(x_NC, weight_SC, weight_SC, ints[:3])
before = variants()
for prompt_rows in (0, 10, 25):
    prompts.room_for(prompt_rows)()
    step([5, 17, 33], [1, 1, 1])
    step([40, 7, 30, 19], [1, 1, 30, 19])
    step([400, 300], [400, 299])
for start in range(1, 5):  # parts of a step's integers, aligned or not
    slot_rms_norm(x_NC, weight_SC, ints[start : start + 3], 1e-5)
    slot_scale_bias(x_NC, weight_SC, weight_SC, ints[start : start + 3])
print(json.dumps({"before": before, "after": variants()}))
