"""A step's tokens, and the norms, biases and scales of their adapters.

Shapes: N tokens of a step, C hidden size, S adapter slots, F numbers of a layer's vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ReplicatedLinear

from models.adapter_config import BaseSpec
from models.vllm_plugin.carriers import Span, columns


@dataclass(frozen=True)
class Step:
    """What a step's layers have to know of its tokens. `placeholder_N1` is None where there are none.

    `slot_N` is 0 where there is no adapter, which `own_N1` tells apart; it is None where no token has one.
    """

    slot_N: Tensor
    own_N1: Tensor | None
    placeholder_N1: Tensor | None
    row_N: Tensor  # of the prompt; ROWS - 1 for tokens of the text
    visual_NC: Tensor | None


@dataclass(frozen=True)
class Tuned:
    """One layer's vectors of a step's tokens, read out of its carrier where they are used."""

    flat_SF: Tensor
    spans: dict[str, Span]
    shares: dict[str, Span]  # of a tensor-parallel rank, in biases and scales
    step: Step

    def linears(
        self, names: Sequence[str], x: Tensor, compute: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Several linears on one input, which `compute` does at once: apart where inputs are scaled."""
        if f"scale_in.{names[0]}" in self.shares:
            ys: Sequence[Tensor] = [compute(self.before(name, x))[i] for i, name in enumerate(names)]
        else:
            ys = compute(x)
        return [self.after(name, y) for name, y in zip(names, ys, strict=True)]

    def before(self, name: str, x: Tensor) -> Tensor:
        """x ⊙ s, [N, in]; exactly x for tokens whose adapter scales no inputs."""
        share = self.shares.get(f"scale_in.{name}")
        return x if share is None else torch.addcmul(x, x, self._rows(*share))

    def after(self, name: str, y: Tensor) -> Tensor:
        """s ⊙ (y + b), [N, out]; exactly y for tokens whose adapter has neither."""
        y = y + self._rows(*self.shares[f"bias.{name}"])
        return torch.addcmul(y, y, self._rows(*self.shares[f"scale_out.{name}"]))

    def norm(self, name: str, flag: str, base_NC: Tensor, residual_NC: Tensor, eps: float) -> Tensor:
        """The residual's norm by the adapter's own weights; `base_NC` for tokens without their own."""
        has_N1 = self._rows(*self.spans[flag])
        weight_NC = self._rows(*self.spans[name]).float()
        x_NC = residual_NC.float()
        own_NC = x_NC * (x_NC.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_NC
        return torch.where(has_N1 > 0, own_NC.to(base_NC.dtype), base_NC)

    def _rows(self, start: int, end: int) -> Tensor:
        assert self.step.own_N1 is not None
        rows: Tensor = self.flat_SF[:, start:end][self.step.slot_N]
        # Chosen, not multiplied: another's may have overflowed, and infinity times 0 is NaN.
        return torch.where(self.step.own_N1, rows, 0)


def base_spec(config: Any) -> BaseSpec:
    """The base's shape, of its Hugging Face configuration."""
    return BaseSpec(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
    )


def vector_carrier(spans: dict[str, Span], prefix: str) -> ReplicatedLinear:
    return ReplicatedLinear(columns(spans), 1, bias=False, prefix=prefix)


def flat(carrier: Any) -> Tensor:
    """All slots' vectors, [S, F]; a view."""
    flat_SF: Tensor = carrier.lora_a_stacked[0].flatten(1)
    return flat_SF


def share(key: str, span: Span, base: BaseSpec) -> Span:
    """The part of a linear's vector that belongs to what this tensor-parallel rank computes."""
    rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    start, end = span
    kind, name = key.split(".")
    if (kind == "scale_in") != (name in ("wo", "w2")):
        return span  # inputs that every rank has, and outputs that are summed over the ranks
    if name in ("wk", "wv") and base.num_kv_heads < world:  # a head is on several ranks
        parts, part = base.num_kv_heads, rank * base.num_kv_heads // world
    else:
        parts, part = world, rank
    size = (end - start) // parts
    return start + part * size, start + (part + 1) * size
