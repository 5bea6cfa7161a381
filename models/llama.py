"""The LLaMA architecture: one forward pass for training and serving.

Shapes: N tokens of a step (all sequences' tokens one after another), C hidden size, H query heads,
G key/value heads, D head size, I feed-forward size, V vocabulary.

The pass knows neither the KV cache nor the batch's layout: an `Attend` owns those. It knows of
adapters only what `Adaptation` tells: other norm weights, and what to do around a linear. With no
adaptation it is the plain base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapter_config import LinearName
from models.config import LinearRopeScaling, ModelConfig
from models.errors import CheckpointError
from models.functional import rms_norm, rotate
from models.kernels.linear_cpu import can_pack, num_panels, pack, packed_linear, packed_linears, packed_shape
from models.kernels.quantized_cpu import Bits
from models.kernels.tile_cpu import PANEL

Head = Literal["head"]
Product = Callable[[Tensor], Tensor]  # x [..., in] → [..., out]
_LINEARS = ("qkv", "wo", "gate_up", "w2")  # of a Layer, in the order of `Layer.linears`
_PACKED_DTYPES = {"int8": torch.int8, "int4": torch.uint8}


class Attend(Protocol):
    """Causal (and gated prompt) attention of one layer over the step's tokens."""

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        """Store the new keys and values where they belong and return [N, H, D]."""


class Adaptation(Protocol):
    """What the batch's adapters change in norms and linears; prompts are the `Attend`'s affair."""

    def norm(self, layer: int, name: str, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """`rms_norm` with the adapters' own weights in place of the base's, where they have any.

        `name` is attention_norm, feed_forward_norm or final_norm (layer -1).
        """

    def before(self, layer: int, name: LinearName, x: Tensor) -> Tensor:
        """The linear's input: x, or x·s for adapters that scale inputs."""

    def scales_input(self, names: Sequence[LinearName]) -> bool:
        """Whether `before` does anything for one of these linears in this batch."""

    def after(self, layer: int, name: LinearName | Head, x: Tensor, y: Tensor) -> Tensor:
        """The linear's output y = W·before(x), with bias, output scale and low-rank terms.

        The output head (layer -1) is asked about too; it knows bias and output scale only.
        """


def _frozen(dtype: torch.dtype, device: torch.device | str, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _let_go(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.new_empty(0), requires_grad=False)


class Linear(nn.Module):
    """Several linears on one input, their weights stacked row by row and multiplied at once."""

    def __init__(
        self,
        names: tuple[LinearName, ...],
        in_features: int,
        out_features: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.names = names
        self.out_features = out_features
        self.weight = _frozen(dtype, device, sum(out_features), in_features)
        self._packed: Tensor | None = None
        self._products: dict[LinearName, Product] = {}

    def part(self, name: LinearName) -> Tensor:
        """The rows of one linear, [out, in]; a view. Gone once the weights are packed or replaced."""
        parts: tuple[Tensor, ...] = self.weight.split(self.out_features)
        return parts[self.names.index(name)]

    def packed_shape(self, bits: Bits | None) -> tuple[int, int, int]:
        return packed_shape(self.weight.split(self.out_features), bits)

    def pack(self, place: Tensor, bits: Bits | None) -> None:
        """Keep the weights packed only, in `place`."""
        self._packed = place.copy_(pack(self.weight.split(self.out_features), bits))
        self.weight = _let_go(self.weight)

    def replace(self, make: Callable[[Tensor], Product]) -> None:
        """Multiply by what `make` gives for each linear's weight, which is let go."""
        self._products = {name: make(self.part(name)) for name in self.names}
        self.weight = _let_go(self.weight)

    def apply_one(self, name: LinearName, x: Tensor) -> Tensor:
        """One of the linears alone, x [..., in] → [..., out]."""
        if self._products:
            return self._products[name](x)
        if self._packed is None:
            return F.linear(x, self.part(name))
        i = self.names.index(name)
        panels = self._packed.split([num_panels(n) for n in self.out_features])[i]
        return packed_linear(x, panels)[..., : self.out_features[i]].to(x.dtype)

    def forward(self, x: Tensor, layer: int, adaptation: Adaptation | None) -> list[Tensor]:
        """x [N, in] → one [N, out] per name."""
        if adaptation is None:
            return self._apply_all(x)
        if adaptation.scales_input(self.names):
            ys = [self.apply_one(name, adaptation.before(layer, name, x)) for name in self.names]
        else:
            ys = self._apply_all(x)
        return [adaptation.after(layer, name, x, y) for name, y in zip(self.names, ys, strict=True)]

    def _apply_all(self, x: Tensor) -> list[Tensor]:
        if self._packed is None and not self._products:
            return list(F.linear(x, self.weight).split(self.out_features, dim=-1))
        return [self.apply_one(name, x) for name in self.names]


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU feed-forward."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.index = index
        self.config = config
        C, I = config.hidden_size, config.intermediate_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(("wq", "wk", "wv"), C, (q, kv, kv), dtype, device)
        self.wo = Linear(("wo",), q, (C,), dtype, device)
        self.gate_up = Linear(("w1", "w3"), C, (I, I), dtype, device)
        self.w2 = Linear(("w2",), I, (C,), dtype, device)
        self.attention_norm = _frozen(dtype, device, C)
        self.feed_forward_norm = _frozen(dtype, device, C)

    def forward(
        self, x_NC: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, adaptation: Adaptation | None
    ) -> Tensor:
        h_NC = self._norm("attention_norm", x_NC, adaptation)
        x_NC = x_NC + self._attention(h_NC, rotary, attend, adaptation)
        h_NC = self._norm("feed_forward_norm", x_NC, adaptation)
        gate_NI, up_NI = self.gate_up(h_NC, self.index, adaptation)
        down: list[Tensor] = self.w2(F.silu(gate_NI) * up_NI, self.index, adaptation)
        return x_NC + down[0]

    def _norm(self, name: str, x_NC: Tensor, adaptation: Adaptation | None) -> Tensor:
        weight: Tensor = getattr(self, name)
        if adaptation is None:
            return rms_norm(x_NC, weight, self.config.rms_norm_eps)
        return adaptation.norm(self.index, name, x_NC, weight, self.config.rms_norm_eps)

    def _attention(
        self, h_NC: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, adaptation: Adaptation | None
    ) -> Tensor:
        D = self.config.head_dim
        q, k, v = self.qkv(h_NC, self.index, adaptation)
        q_NHD = rotate(q.unflatten(-1, (-1, D)), rotary)
        k_NGD = rotate(k.unflatten(-1, (-1, D)), rotary)
        out_NHD = attend(self.index, q_NHD, k_NGD, v.unflatten(-1, (-1, D)))
        out: list[Tensor] = self.wo(out_NHD.flatten(-2), self.index, adaptation)
        return out[0]

    def apply_one(self, name: LinearName, x: Tensor) -> Tensor:
        """One linear by LLaMA's name, x [..., in] → [..., out]."""
        return next(m for m in self.linears if name in m.names).apply_one(name, x)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.wo, self.gate_up, self.w2


class Llama(nn.Module):
    """The frozen base. Weights come through `load`; a fresh model's are uninitialised."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        self.embed = _frozen(dtype, device, V, C)
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = _frozen(dtype, device, C)
        self.lm_head = self.embed if config.tie_word_embeddings else _frozen(dtype, device, V, C)
        self.inverse_frequencies_D2 = rope_frequencies(config)  # float64, a small constant
        self._head_product: Product | None = None
        self.packed: dict[str, Tensor] = {}  # a Layer's linears stacked [L, P, K, F], and lm_head [P, K, F]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    def forward(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attend: Attend,
        adaptation: Adaptation | None = None,
        wrap: Callable[[Layer], Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states [N, C] before the final norm.

        `wrap` replaces each layer's call, for gradient checkpointing.
        """
        # The residual stream is float32 at least: in bfloat16 each layer's sum would round it anew.
        x_NC = F.embedding(tokens_N, self.embed).to(torch.promote_types(self.dtype, torch.float32))
        rotary = self.rotary(positions_N)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            call = layer if wrap is None else wrap(layer)
            x_NC = call(x_NC, rotary, attend, adaptation)
        return x_NC

    def logits(self, x_MC: Tensor, adaptation: Adaptation | None = None) -> Tensor:
        """[M, V] of M chosen rows of the hidden states; `adaptation` must be that of those rows."""
        eps = self.config.rms_norm_eps
        if adaptation is None:
            h_MC = rms_norm(x_MC, self.norm, eps)
        else:
            h_MC = adaptation.norm(-1, "final_norm", x_MC, self.norm, eps)
        if self._head_product is not None:
            y_MV = self._head_product(h_MC)
        elif self.packed:
            y_MV = packed_linear(h_MC, self.packed["lm_head"])[:, : self.config.vocab_size]
        else:
            y_MV = F.linear(h_MC, self.lm_head)
        return y_MV if adaptation is None else adaptation.after(-1, "head", h_MC, y_MV)

    def apply_each(self, names: Sequence[LinearName], layers: Sequence[int], x: Tensor) -> list[Tensor]:
        """Linears of P layers, each layer's on its own of x [P, ..., in]; [P, ..., out] per name.

        The linears must follow one another in a `Linear`.
        """
        if not self.packed:
            own = [(self.layers[i], x[p]) for p, i in enumerate(layers)]
            return [torch.stack([layer.apply_one(name, rows) for layer, rows in own]) for name in names]  # type: ignore[operator]
        first = self.layers[0]
        assert isinstance(first, Layer)
        key, linear = next(
            (k, m) for k, m in zip(_LINEARS, first.linears, strict=True) if names[0] in m.names
        )
        w_LPKF, place = self.packed[key], linear.names.index(names[0])
        widths = linear.out_features[place : place + len(names)]
        before, *panels = (sum(map(num_panels, linear.out_features[:place])), *map(num_panels, widths))
        starts = [i * w_LPKF.shape[1] + before for i in layers]
        y = packed_linears(x, w_LPKF.flatten(0, 1), starts, sum(panels)).to(x.dtype)
        parts = y.split([count * PANEL for count in panels], dim=-1)
        return [part[..., :width] for part, width in zip(parts, widths, strict=True)]

    def can_pack(self, bits: Bits | None = None) -> bool:
        """Whether the kernels of `models.kernels.linear_cpu` know these weights, in `bits` where given."""
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        return all(can_pack(w, bits) for w in (*(m.weight for m in layer.linears), self.lm_head))

    def pack(self, bits: Bits | None = None) -> Llama:
        """Lay the weights out as the CPU multiplies them, once and for all. For serving; no way back.

        With `bits` the linears are quantised and the rest becomes bfloat16; of "int4" the output head has
        8 bits. Raises ValueError for weights that cannot be quantised.
        """
        for name in _LINEARS:
            modules: list[Linear] = [getattr(layer, name) for layer in self.layers]
            dtype = None if bits is None else _PACKED_DTYPES[bits]
            self.packed[name] = self.embed.new_empty(
                len(modules), *modules[0].packed_shape(bits), dtype=dtype
            )
            for module, place in zip(modules, self.packed[name], strict=True):
                module.pack(place, bits)
        self.packed["lm_head"] = pack([self.lm_head], None if bits is None else "int8")
        if self.lm_head is not self.embed:
            self.lm_head = _let_go(self.lm_head)
        return self if bits is None else self.to(torch.bfloat16)

    def replace_products(self, make: Callable[[Tensor], Product]) -> None:
        """Multiply by what `make` gives for each weight [out, in], which is let go.

        For training; no way back.
        """
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for linear in layer.linears:
                linear.replace(make)
        self._head_product = make(self.lm_head)
        if self.lm_head is not self.embed:
            self.lm_head = _let_go(self.lm_head)

    def rotary(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, D] of the positions, in the model's dtype."""
        if self.inverse_frequencies_D2.device != positions_N.device:  # once: no copy at each step
            self.inverse_frequencies_D2 = self.inverse_frequencies_D2.to(positions_N.device)
        angles = positions_N.double()[:, None] * self.inverse_frequencies_D2
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def load(self, weights: Iterable[tuple[str, Tensor]], source: str = "weights") -> Llama:
        """Copy canonical tensors (docs/design.md) into place, one at a time.

        Raises CheckpointError for a missing, unexpected or wrongly shaped tensor.
        """
        places = dict(self._places())
        for name, tensor in weights:
            place = places.pop(name, None)
            if place is None:
                raise CheckpointError(f"{source}: unexpected or repeated tensor {name!r}")
            if place.shape != tensor.shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {list(tensor.shape)}, "
                    f"the configuration asks for {list(place.shape)}"
                )
            with torch.no_grad():
                place.copy_(tensor)
        if places:
            some = ", ".join(sorted(places)[:5])
            raise CheckpointError(f"{source}: {len(places)} tensors are missing, such as {some}")
        return self

    def _places(self) -> Iterable[tuple[str, Tensor]]:
        yield "embed.weight", self.embed
        yield "norm.weight", self.norm
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self.lm_head
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            yield f"layers.{i}.attention_norm.weight", layer.attention_norm
            yield f"layers.{i}.feed_forward_norm.weight", layer.feed_forward_norm
            for module in layer.linears:
                for name in module.names:
                    yield f"layers.{i}.{name}.weight", module.part(name)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies [D/2] in float64, scaled where configured: all by `factor`, or as in Llama 3.

    There wavelengths beyond original/low_freq_factor are stretched by `factor`, those below
    original/high_freq_factor are kept, and between the two the stretch is interpolated.
    """
    D = config.head_dim
    inverse = config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if isinstance(scaling, LinearRopeScaling):
        return inverse / scaling.factor
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return inverse * (smooth + (1 - smooth) / scaling.factor)
