"""vLLM's LLaMA with zero-init gated attention (V1 eq. 5 to 8) and V2's norms, biases and scales.

A request's first ROWS tokens are placeholders. In each layer an adapter's prompt rows stand in for their
hidden states before the ordinary projection: what it writes into the KV cache is then the prompt's keys
and values, sharded, quantised and paged like all others. Positions start after them; at position 0, where
they lie, rotary embeddings change nothing. Adapters come through LoRA's slots (`carriers`).

Shapes: N tokens of a step, P placeholders, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel

from models.vllm_plugin.attention import token_slots
from models.vllm_plugin.attention_cpu import Placeholders, step_of, step_placeholders
from models.vllm_plugin.carriers import FINAL, PROMPT, ROWS, VECTORS, Room, final_vectors
from models.vllm_plugin.compilation import settle_compilation
from models.vllm_plugin.layers import AdapterLayer
from models.vllm_plugin.limits import check_config, check_heads
from models.vllm_plugin.vectors import Step, Tuned, base_spec, flat, vector_carrier


class AdapterModel(LlamaModel):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type = AdapterLayer) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.tuned = Room(**self.config.llama_adapter).vectors
        if self.tuned:
            self.spans = final_vectors(base_spec(self.config))
            self.add_module(FINAL, vector_carrier(self.spans, f"{prefix}.{FINAL}"))
        self.text_alone = self.layers[0].self_attn.prompt_attn is None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Placeholders have an id of their own, the first beyond the vocabulary, and no embedding."""
        known_N = input_ids < self.vocab_size
        embedded: Tensor = self.embed_tokens(input_ids.where(known_N, 0)) * known_N[..., None]
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            assert input_ids is not None
            embed = self.embed_tokens if self.text_alone else self.embed_input_ids
            hidden, step = embed(input_ids), self._step(positions, None)
        else:
            hidden, step = inputs_embeds, self._step(positions, inputs_embeds)
        residual = None
        if not self.text_alone:  # else positions are of the text
            positions = (positions - ROWS).clamp(min=0)
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual, step)
        hidden, residual = self.norm(hidden, residual)
        if self.tuned and step.own_N1 is not None:
            tuned = Tuned(flat(getattr(self, FINAL)), self.spans, {}, step)
            hidden = tuned.norm("final_norm", "has_norm", hidden, residual, self.norm.variance_epsilon)
        return hidden

    def _step(self, positions_N: Tensor, visual_NC: Tensor | None) -> Step:
        slots_N = token_slots(self.layers[0].self_attn.carrier)[: positions_N.shape[0]]
        own_N = slots_N >= 0
        placeholder_N1 = positions_N[:, None] < ROWS
        # Asking a GPU would wait for it; what is compiled or in a CUDA graph must not depend on the answer.
        asks = positions_N.device.type == "cpu" and self.do_not_compile
        has_prompts = not self.text_alone and (not asks or bool(placeholder_N1.any()))
        if visual_NC is not None:  # a copy: the layers add up their residuals in the original's place
            visual_NC = visual_NC.where(placeholder_N1, 0) if has_prompts else None
        return Step(
            slot_N=slots_N.clamp(min=0),
            own_N1=own_N[:, None] if not asks or own_N.any() else None,
            placeholder_N1=placeholder_N1 if has_prompts else None,
            row_N=positions_N.clamp(max=ROWS - 1),
            visual_NC=visual_NC,
        )


class LlamaAdapterForCausalLM(LlamaForCausalLM):
    """The model class that the plugin registers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_config(vllm_config)
        check_heads(vllm_config.model_config.get_head_size())
        settle_compilation(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=AdapterLayer)
        self._dtype = vllm_config.model_config.dtype

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type = AdapterLayer
    ) -> AdapterModel:
        return AdapterModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Quicker than the model's where there are no placeholders, on a CPU, which may be asked."""
        model = self.model
        known = model.text_alone and input_ids.numpy().max() < model.vocab_size
        embedded: Tensor = model.embed_tokens(input_ids) if known else model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        if not self.model.text_alone:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        placeholders = step_placeholders()
        given = (input_ids, (positions - ROWS).clamp_(min=0), intermediate_tensors, inputs_embeds)
        if placeholders is None:
            return super().forward(*given)
        self._write_prompts(placeholders, inputs_embeds)
        hidden_NC = torch.zeros(len(positions), self.config.hidden_size, dtype=self._dtype)
        if len(text_N := placeholders.text_N):
            context = get_forward_context()
            context.slot_mapping = dict.fromkeys(context.slot_mapping, placeholders.text_cache_N)
            with step_of(self._punica(), placeholders.text_slots_N):
                hidden_NC[text_N] = super().forward(*(x if x is None else x[text_N] for x in given))
        return hidden_NC

    def _write_prompts(self, placeholders: Placeholders, inputs_embeds: Tensor | None) -> None:
        """Of a step's placeholders, which then go through no layer."""
        slots_P, tokens_P = placeholders.slots_P, placeholders.tokens_P
        if not len(tokens_P):
            return
        all_P1 = torch.ones(len(tokens_P), 1, dtype=torch.bool)
        visual_PC = None if inputs_embeds is None else inputs_embeds[tokens_P]
        step = Step(slots_P, all_P1, all_P1, placeholders.rows_P, visual_PC)
        with step_of(self._punica(), slots_P):
            for layer in self.model.layers:
                layer.write_prompts(step, placeholders.cache_P)

    def _punica(self) -> Any:
        return self.model.layers[0].self_attn.carrier.punica_wrapper

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)
        carriers = (PROMPT, VECTORS, FINAL)  # no checkpoint has them, and nobody reads them
        return loaded | {name for name, _ in self.named_parameters() if name.split(".")[-2] in carriers}
