"""vLLM's LLaMA layer with zero-init gated attention and V2's norms, biases and scales (`model`).

Shapes: N tokens of a step, P placeholders, C hidden size, h a rank's query heads, D head size, S adapter
slots, R prompt rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.v1.attention.backend import AttentionBackend

from models.vllm_plugin.attention import facts, prompt_backend, text_backend
from models.vllm_plugin.attention_cpu import reads_blocks, text_alone_backend
from models.vllm_plugin.carriers import (
    GATES,
    LOW_RANK,
    PROMPT,
    SEES,
    STATIC,
    VECTORS,
    Room,
    fact_rows,
    layer_vectors,
)
from models.vllm_plugin.vectors import Step, Tuned, base_spec, flat, share, vector_carrier


class AdapterAttention(LlamaAttention):
    """`self.attn` over the text, `self.prompt_attn` over the prompt, both on one cache. Where that is None
    `self.attn` is for both, and the layer is given the text alone (`attention_cpu`)."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        vllm_config = get_current_vllm_config()
        layers = vllm_config.compilation_config.static_forward_context
        platform = layers.pop(f"{prefix}.attn").attn_backend

        def attention(name: str, backend: type[AttentionBackend], shares: str | None = None) -> Any:
            layer: Any = Attention(
                self.num_heads,
                self.head_dim,
                self.scaling,
                num_kv_heads=self.num_kv_heads,
                cache_config=kwargs.get("cache_config"),
                quant_config=kwargs.get("quant_config"),
                prefix=f"{prefix}.{name}",
                attn_backend=backend,
                kv_sharing_target_layer_name=shares,
            )
            # The builder of this layer's metadata asks it; the carrier is not wrapped yet.
            layer.carrier = lambda: self.carrier
            return layer

        self.prompt_attn: Any = None
        if reads_blocks(platform, vllm_config, self.head_dim):
            self.attn = attention("attn", text_alone_backend(platform))
        else:
            self.attn = attention("attn", text_backend(platform))
            self.prompt_attn = attention("prompt_attn", prompt_backend(platform), f"{prefix}.attn")
        rows = fact_rows(self.total_num_heads)
        carrier = ReplicatedLinear(self.hidden_size, rows, bias=False, prefix=f"{prefix}.{PROMPT}")
        self.add_module(PROMPT, carrier)
        self.low_rank = Room(**config.llama_adapter).low_rank
        first = GATES + get_tensor_model_parallel_rank() * self.num_heads
        self.own_gates = slice(first, first + self.num_heads)
        self.attn.first_gate = first

    @property
    def carrier(self) -> Any:
        return getattr(self, PROMPT)

    def forward(self, positions: Tensor, hidden_states: Tensor, step: Step, tuned: Tuned | None) -> Tensor:
        x_NC = hidden_states
        if step.placeholder_N1 is not None:
            x_NC = torch.where(step.placeholder_N1, self._prompt_rows(step), x_NC)
        q, k, v = self._qkv(x_NC, step, tuned)
        q, k = self.rotary_emb(positions, q, k)
        if self.prompt_attn is None or step.own_N1 is None:
            out = self.attn(q, k, v)
        else:
            out = self._attend(q, k, v, step, step.own_N1)
        out, _ = self.o_proj(out if tuned is None else tuned.before("wo", out))
        return out if tuned is None else tuned.after("wo", out)

    def write_prompts(self, step: Step, tuned: Tuned | None, cache_P: Tensor) -> None:
        """Keys and values of prompt rows into the cache, for a step of placeholders alone."""
        _, k, v = self._qkv(self._prompt_rows(step), step, tuned)
        k, v = (x.view(-1, self.num_kv_heads, self.head_dim) for x in (k, v))
        self.attn.impl.do_kv_cache_update(self.attn, k, v, self.attn.kv_cache, cache_P)

    def _qkv(self, x_NC: Tensor, step: Step, tuned: Tuned | None) -> Sequence[Tensor]:
        if tuned is None:
            q, k, v = self._projected(x_NC, step)
        else:
            q, k, v = tuned.linears(("wq", "wk", "wv"), x_NC, lambda x: self._projected(x, step))
        if step.placeholder_N1 is not None:
            v = torch.where(step.placeholder_N1 & ~self._has_rows(step), 0, v)
        return q, k, v

    def _projected(self, x_NC: Tensor, step: Step) -> Sequence[Tensor]:
        qkv, _ = self.qkv_proj(x_NC)
        if self.low_rank and step.placeholder_N1 is not None:
            plain, _ = self.qkv_proj.base_layer(x_NC)
            acts_N1 = facts(self.carrier)[step.slot_N, LOW_RANK, None] > 0
            qkv = torch.where(step.placeholder_N1 & ~acts_N1, plain, qkv)
        parts: Sequence[Tensor] = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return parts

    def _prompt_rows(self, step: Step) -> Tensor:
        """The raw prompt rows [N, C], which bypass the attention norm."""
        a_SRC = self.carrier.lora_a_stacked[0][:, 0]
        rows_NC: Tensor = a_SRC[step.slot_N, step.row_N]
        if step.visual_NC is not None:
            sees_N1 = facts(self.carrier)[step.slot_N, SEES, None]
            rows_NC = rows_NC + sees_N1 * step.visual_NC
        return rows_NC

    def _has_rows(self, step: Step) -> Tensor:
        """Whether the layer has prompt rows, [N, 1]: where only images bring them, what a bias makes of
        none must not be attended to."""
        facts_NF = facts(self.carrier)[step.slot_N]
        has_N1: Tensor = facts_NF[:, STATIC, None] > 0
        if step.visual_NC is not None:
            has_N1 = has_N1 | ((facts_NF[:, SEES, None] > 0) & (step.visual_NC != 0).any(-1, keepdim=True))
        return has_N1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, own_N1: Tensor) -> Tensor:
        """softmax(q·kᵀ/√D)·v + g · softmax(q·k_aᵀ/√D)·v_a, [N, h·D]."""
        text, prompt = self.attn(q, k, v), self.prompt_attn(q, None, None)
        gate_Nh1 = facts(self.carrier)[:, self.own_gates][step.slot_N].unsqueeze(-1)
        gated_NhD = prompt.unflatten(-1, (self.num_heads, self.head_dim)) * gate_Nh1
        # Where no request has an adapter nothing may have been written to `prompt`.
        attended: Tensor = text + torch.where(own_N1, gated_NhD.flatten(-2), 0)
        return attended


class AdapterLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, AdapterAttention)
        config = config or vllm_config.model_config.hf_config
        room = Room(**config.llama_adapter)
        self.tuned = room.vectors
        if self.tuned:
            spec = base_spec(config)
            self.spans = layer_vectors(spec, input_scales=room.input_scales)
            self.shares = {key: share(key, span, spec) for key, span in self.spans.items() if "." in key}
            self.add_module(VECTORS, vector_carrier(self.spans, f"{prefix}.{VECTORS}"))

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, step: Step
    ) -> tuple[Tensor, Tensor]:
        tuned = self._vectors(step)
        h, residual = self._norm("attention_norm", self.input_layernorm, hidden_states, residual, tuned)
        h = self.self_attn(positions, h, step, tuned)
        h, residual = self._norm("feed_forward_norm", self.post_attention_layernorm, h, residual, tuned)
        return self.mlp(h) if tuned is None else self._mlp(h, tuned), residual

    def write_prompts(self, step: Step, cache_P: Tensor) -> None:
        self.self_attn.write_prompts(step, self._vectors(step), cache_P)

    def _vectors(self, step: Step) -> Tuned | None:
        if not self.tuned or step.own_N1 is None:
            return None
        return Tuned(flat(getattr(self, VECTORS)), self.spans, self.shares, step)

    def _norm(
        self, name: str, module: Any, h: Tensor, residual: Tensor | None, tuned: Tuned | None
    ) -> tuple[Tensor, Tensor]:
        """The norm of h + residual, and that sum."""
        h, residual = (module(h), h) if residual is None else module(h, residual)
        if tuned is not None:
            h = tuned.norm(name, "has_norms", h, residual, module.variance_epsilon)
        return h, residual

    def _mlp(self, x: Tensor, tuned: Tuned) -> Tensor:
        gate_up = tuned.linears(("w1", "w3"), x, lambda x: self.mlp.gate_up_proj(x)[0].chunk(2, dim=-1))
        hidden = self.mlp.act_fn(torch.cat(gate_up, dim=-1))
        down, _ = self.mlp.down_proj(tuned.before("w2", hidden))
        return tuned.after("w2", down)
