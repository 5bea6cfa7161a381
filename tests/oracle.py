"""The numerical oracle: LLaMA with one adapter, for one sequence, slowly and in float64.

Written from the papers' equations alone and sharing no code with `models/`, which must agree with it.
Loops are explicit, nothing is batched, cached or fused. Weights come as arrays under the names of
docs/design.md; configurations are the plain dataclasses of `models`.

Shapes: T tokens, K prompt rows, n visual tokens, F visual features, C hidden size, H query heads,
G key/value heads, D head size.

`rope` says how the rows of wq and wk (and everything on their outputs) are laid out: `half` pairs
(i, i + D/2) as Hugging Face, `interleaved` pairs (2i, 2i + 1) as Meta's files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.adapter_config import AdapterConfig, VisionConfig
from models.config import ModelConfig, RopeScaling

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
RopeLayout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Oracle:
    """A base, and what one adapter makes of it. `own` are the adapter's tensors, if there is one."""

    config: ModelConfig
    base: Weights
    adapter: AdapterConfig | None = None
    own: Weights = field(default_factory=dict)
    rope: RopeLayout = "half"

    def logits(self, tokens: Sequence[int], features: Array | None = None) -> Array:
        """[T, V] for tokens at positions 0, 1, …; `features` [F] or [n, F] of the request's image."""
        visual_nC = None
        if features is not None:
            assert self.adapter is not None
            assert self.adapter.vision is not None
            visual_nC = visual_tokens(self.adapter.vision, self.own, features, self.config.hidden_size)
        x_TC = self.base["embed.weight"][np.asarray(tokens)]
        for layer in range(self.config.num_layers):
            x_TC = x_TC + self._attention(layer, self._norm(layer, "attention_norm", x_TC), visual_nC)
            x_TC = x_TC + self._feed_forward(layer, self._norm(layer, "feed_forward_norm", x_TC))
        weight_C = self.own.get("final_norm", self.base["norm.weight"])
        head = self.base["embed.weight" if self.config.tie_word_embeddings else "lm_head.weight"]
        y_TV = rms_norm(x_TC, weight_C, self.config.rms_norm_eps) @ head.T
        if self.adapter and self.adapter.head:
            y_TV = self.own["head_scale"] * (y_TV + self.own["head_bias"])
        return y_TV

    def _norm(self, layer: int, name: str, x_TC: Array) -> Array:
        weight_C = self.own[name][layer] if name in self.own else self.base[f"layers.{layer}.{name}.weight"]
        return rms_norm(x_TC, weight_C, self.config.rms_norm_eps)

    def _linear(self, layer: int, name: str, x: Array, of_prompt: bool = False) -> Array:
        """W x with the adapter's scale and bias, in one of their two readings, and its LoRA.

        `input`: y = W(x·s) + b, as the chat-65B code. `output`: y = s(Wx + b), V2 eq. 1.
        """
        own, adapter = self.own, self.adapter
        scaled = adapter.scale_bias.scale if adapter and f"scale.{name}" in own else "none"
        y = x * own[f"scale.{name}"][layer] if scaled == "input" else x
        y = y @ self.base[f"layers.{layer}.{name}.weight"].T
        if f"bias.{name}" in own:
            y = y + own[f"bias.{name}"][layer]
        if scaled == "output":
            y = y * own[f"scale.{name}"][layer]
        if adapter and adapter.lora and name in adapter.lora.targets:
            lora = adapter.lora
            factor = 1.0 if lora.alpha is None else lora.alpha / lora.rank
            if lora.on_prompts or not of_prompt:
                y = y + factor * (x @ own[f"lora.{name}.a"][layer].T @ own[f"lora.{name}.b"][layer].T)
        return y

    def _feed_forward(self, layer: int, x_TC: Array) -> Array:
        gate = self._linear(layer, "w1", x_TC)
        up = self._linear(layer, "w3", x_TC)
        return self._linear(layer, "w2", gate / (1 + np.exp(-gate)) * up)

    def _attention(self, layer: int, x_TC: Array, visual_nC: Array | None) -> Array:
        """softmax(q·kᵀ/√D + causal)·v + g · softmax(q·k_aᵀ/√D)·v_a, head by head, then wo."""
        D, group = self.config.head_dim, self.config.num_heads // self.config.num_kv_heads
        q, k, v = (self._linear(layer, name, x_TC) for name in ("wq", "wk", "wv"))
        rows_KC = self._prompt(layer, visual_nC)
        if rows_KC is not None:  # raw rows: neither normalised nor rotated
            k_a, v_a = self._prompt_keys_and_values(layer, rows_KC)
        out = np.zeros_like(q)
        for head in range(self.config.num_heads):
            mine, shared = (slice(h * D, (h + 1) * D) for h in (head, head // group))
            q_TD, k_TD = self._rotate(q[:, mine]), self._rotate(k[:, shared])
            for t in range(len(x_TC)):
                out[t, mine] = attend(q_TD[t], k_TD[: t + 1], v[: t + 1, shared])
                if rows_KC is not None:
                    gate = self._gate(layer, head)
                    out[t, mine] += gate * attend(q_TD[t], k_a[:, shared], v_a[:, shared])
        return self._linear(layer, "wo", out)

    def _rotate(self, x_TD: Array) -> Array:
        """Turn each pair of the row at position t by the angle t·θ, as a complex number."""
        half = self.config.head_dim // 2
        pairs = [(i, i + half) if self.rope == "half" else (2 * i, 2 * i + 1) for i in range(half)]
        turned = np.empty_like(x_TD)
        for t in range(len(x_TD)):
            for (a, b), theta in zip(pairs, rope_frequencies(self.config), strict=True):
                z = complex(x_TD[t, a], x_TD[t, b]) * complex(math.cos(t * theta), math.sin(t * theta))
                turned[t, a], turned[t, b] = z.real, z.imag
        return turned

    def _prompt(self, layer: int, visual_nC: Array | None) -> Array | None:
        """The layer's prompt rows, or None: P_l, P_l + Repeat(I_p) (V1 eq. 10), or I_p alone (V2)."""
        if self.adapter is None:
            return None
        prompt, vision = self.adapter.prompt, self.adapter.vision
        static_KC = None
        if prompt and layer in prompt.layers:
            static_KC = self.own["prompt"][prompt.layers.index(layer)]
        if visual_nC is None or vision is None or layer not in vision.layers:
            return static_KC
        if vision.fusion == "early":
            return visual_nC
        assert static_KC is not None
        repeated = [visual_nC[0] if len(visual_nC) == 1 else visual_nC[i] for i in range(len(static_KC))]
        return static_KC + np.stack(repeated)

    def _prompt_keys_and_values(self, layer: int, rows_KC: Array) -> tuple[Array, Array]:
        """wk A and wv A (V1 eq. 3), each [K, G·D]; or as LitGPT 0.5.5 to 0.5.13 cut the fused rows.

        There the heads of all queries, then all keys, then all values are dealt out to G groups in that
        order, H/G + 2 to each, and a group takes its last two for its key and its value.
        """
        assert self.adapter is not None
        q, k, v = (self._linear(layer, name, rows_KC, of_prompt=True) for name in ("wq", "wk", "wv"))
        if self.adapter.prompt is None or self.adapter.prompt.projection == "wk_wv":
            return k, v
        D, G = self.config.head_dim, self.config.num_kv_heads
        heads = [x[:, i : i + D] for x in (q, k, v) for i in range(0, x.shape[1], D)]
        size = len(heads) // G
        groups = [heads[g * size : (g + 1) * size] for g in range(G)]
        return np.concatenate([g[-2] for g in groups], axis=1), np.concatenate(
            [g[-1] for g in groups], axis=1
        )

    def _gate(self, layer: int, head: int) -> float:
        """g of one head (V1 eq. 7): raw or through tanh, the head's own or the layer's, times new_gate."""
        assert self.adapter is not None
        gated = sorted(
            {
                *(self.adapter.prompt.layers if self.adapter.prompt else ()),
                *(self.adapter.vision.layers if self.adapter.vision else ()),
            }
        )
        row = gated.index(layer)
        options = self.adapter.gate
        gate = float(self.own["gate"][row, head] if options.per == "head" else self.own["gate"][row])
        if options.activation == "tanh":
            gate = math.tanh(gate)
        return gate * float(self.own["new_gate"][row]) if options.new_gate else gate


def attend(q_D: Array, k_UD: Array, v_UD: Array) -> Array:
    """softmax(q·kᵀ/√D)·v of one query."""
    scores_U = np.array([float(q_D @ k_D) / math.sqrt(len(q_D)) for k_D in k_UD])
    weights_U = np.exp(scores_U - scores_U.max())
    return (weights_U / weights_U.sum()) @ v_UD


def rms_norm(x_TC: Array, weight_C: Array, eps: float) -> Array:
    return x_TC / np.sqrt((x_TC**2).mean(axis=-1, keepdims=True) + eps) * weight_C


def rope_frequencies(config: ModelConfig) -> list[float]:
    """θ_i = base^(-2i/D); Llama 3 slows long wavelengths by `factor` and blends the middle band."""
    D, scaling = config.head_dim, config.rope_scaling
    thetas = [config.rope_theta ** (-2 * i / D) for i in range(D // 2)]
    if scaling is None:
        return thetas
    assert isinstance(scaling, RopeScaling)
    context = scaling.original_max_position_embeddings
    scaled = []
    for theta in thetas:
        wavelength = 2 * math.pi / theta
        if wavelength < context / scaling.high_freq_factor:
            scaled.append(theta)
        elif wavelength > context / scaling.low_freq_factor:
            scaled.append(theta / scaling.factor)
        else:
            band = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (context / wavelength - scaling.low_freq_factor) / band
            scaled.append((1 - smooth) * theta / scaling.factor + smooth * theta)
    return scaled


def visual_tokens(vision: VisionConfig, own: Weights, features: Array, hidden_size: int) -> Array:
    """[n, C] of an encoder's features, [F] pooled or [T, F] tokens (V1 eq. 9, or the 7B query blocks)."""
    if vision.projector == "query_blocks":
        return _query_blocks(vision, own, features)
    x = features
    if vision.input_norm:
        x = _layer_norm(own, "vision.input_norm", np.atleast_2d(x)).reshape(x.shape)
    if vision.projector == "linear":
        x = _affine(own, "vision.proj", x)
    else:
        x = _affine(own, "vision.fc2", _gelu(_affine(own, "vision.fc1", x)))
    return x.reshape(-1, hidden_size)


def _query_blocks(vision: VisionConfig, own: Weights, features: Array) -> Array:
    """Queries before the projected tokens, through pre-norm ViT blocks; the queries' rows come out."""
    tokens = _layer_norm(own, "vision.input_norm", _affine(own, "vision.input_proj", features))
    x = np.concatenate([own["vision.query"], tokens])
    for i in range(vision.num_blocks):
        block = f"vision.blocks.{i}"
        x = x + _self_attention(vision, own, f"{block}.attn", _layer_norm(own, f"{block}.norm1", x))
        hidden = _gelu(_affine(own, f"{block}.mlp.fc1", _layer_norm(own, f"{block}.norm2", x)))
        x = x + _affine(own, f"{block}.mlp.fc2", hidden)
    x = _affine(own, "vision.output_proj", x[: vision.num_tokens])
    return _layer_norm(own, "vision.output_norm", x)


def _self_attention(vision: VisionConfig, own: Weights, name: str, x: Array) -> Array:
    """Every row sees every row; the rows of `qkv` are all of q's, then k's, then v's."""
    width = vision.hidden_size
    D = width // vision.num_heads
    qkv = _affine(own, f"{name}.qkv", x)
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    out = np.zeros_like(q)
    for head in range(vision.num_heads):
        mine = slice(head * D, (head + 1) * D)
        for t in range(len(x)):
            out[t, mine] = attend(q[t, mine], k[:, mine], v[:, mine])
    return _affine(own, f"{name}.proj", out)


def _affine(own: Weights, name: str, x: Array) -> Array:
    return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]


def _layer_norm(own: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / deviation * own[f"{name}.weight"] + own[f"{name}.bias"]


def _gelu(x: Array) -> Array:
    """x·Φ(x), exact."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))
