"""Compile every kernel for a GPU that is not here, as its launcher asks for it; a JSON line for each.

The interpreter takes more than the compiler does. A program of its own, as `absent_gpu` wants it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from absent_gpu import compile_only

from bench.kernel_cases import PackedCase, PagedCase
from models.kernels.packed import Packing, packed_attention
from models.kernels.paged_decode import paged_decode
from models.kernels.paged_prefill import paged_prefill
from models.kernels.slot_vectors import slot_rms_norm, slot_scale_bias


def tell(name: str, kernel: Any) -> None:
    facts = {"name": name, "shared": kernel.metadata.shared, "bytes": len(kernel.asm["cubin"])}
    print(json.dumps(facts | {"tensor_cores": "mma" in kernel.asm["ptx"]}))


compile_only(tell)

shape = {"heads": (4, 2), "head_dim": 128, "dtype": torch.bfloat16}
c = PagedCase.random([100, 40], [1, 1], [0, 10], [1, 0], **shape)
paged = (c.prompt_k_SKGD, c.prompt_v_SKGD, c.slots_B, c.prompt_lens_S, c.gate_SH)
for num_splits in (1, 2):
    paged_decode(c.q_NHD, c.k_PsGD, c.v_PsGD, c.blocks_BM, c.lens_B, *paged, num_splits)
paged_prefill(c.q_NHD, c.k_PsGD, c.v_PsGD, c.blocks_BM, c.starts, c.lens_B, 1, *paged)

p = PackedCase.random([100, 40], [0, 10], [1, 0], **shape)
leaves = [x.requires_grad_() for x in p.leaves]
packing = Packing.of(p.lens_B, p.slots_B, torch.device("cpu"))
packed_attention(*leaves[:5], p.prompt_lens_S, leaves[5], packing).sum().backward()

slots_N, weight_SC = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4096, dtype=torch.bfloat16)
slot_rms_norm(torch.zeros(3, 4096), weight_SC, slots_N, 1e-5)
slot_scale_bias(weight_SC[slots_N], weight_SC, weight_SC, slots_N)
