"""One adapter: its parameters under their native names, and the prompts it makes.

Shapes: L layers of the base, P layers with static prompts, Q layers with prompts of either kind,
K prompt rows, n visual tokens, C hidden size, H query heads, G key/value heads, D head size, R rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapter_config import AdapterConfig, BaseSpec, LinearName
from models.attention import Prompts
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError, ModelError
from models.fingerprint import likeness
from models.llama import Layer, Llama
from models.pieces import copy_finite
from models.uploads import upload
from models.vision.encoder import EncoderDims
from models.vision.projector import build_projector

log = logging.getLogger(__name__)

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Adapter(nn.Module):
    """Trainable parameters; `state_dict()` has the native tensor names (docs/design.md).

    Fresh parameters change nothing: gates, biases and LoRA's B are zero, scales one. Norms of a fresh
    adapter must be copied from the base: `start_from`.
    """

    def __init__(
        self,
        config: AdapterConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        base = config.base
        L, C = base.num_layers, base.hidden_size
        options = {"dtype": dtype, "device": device}

        def full(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, **options))  # type: ignore[call-overload]

        def normal(std: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, **options) * std)  # type: ignore[call-overload]

        if config.prompt:
            self.prompt = normal(1.0, len(config.prompt.layers), config.prompt.length, C)
        if config.gated_layers:
            Q = len(config.gated_layers)
            self.gate = full(0.0, Q, base.num_heads) if config.gate.per == "head" else full(0.0, Q)
            if config.gate.new_gate:
                self.new_gate = full(1.0, Q)
        if config.norms:
            self.attention_norm, self.feed_forward_norm = full(1.0, L, C), full(1.0, L, C)
        if config.final_norm:
            self.final_norm = full(1.0, C)
        if config.head:
            assert base.vocab_size
            self.head_scale, self.head_bias = full(1.0, base.vocab_size), full(0.0, base.vocab_size)
        tuned = config.scale_bias
        self.bias = nn.ParameterDict(
            {name: full(0.0, L, linear_shape(base, name)[0]) for name in tuned.bias_targets}
        )
        side = 1 if tuned.scale == "input" else 0
        self.scale = nn.ParameterDict(
            {name: full(1.0, L, linear_shape(base, name)[side]) for name in tuned.scale_targets}
        )
        self.lora = nn.ModuleDict()
        if config.lora:
            for name in config.lora.targets:
                out_features, in_features = linear_shape(base, name)
                R = config.lora.rank
                self.lora[name] = nn.ParameterDict(
                    {"a": normal(in_features**-0.5, L, R, in_features), "b": full(0.0, L, out_features, R)}
                )
        if config.vision:
            F_, n = config.vision.feature_dim, config.vision.num_tokens
            dims = EncoderDims(token_dim=F_, num_tokens=n, global_dim=F_)
            self.vision = build_projector(config.vision, dims, C).to(**options)  # type: ignore[call-overload]

    @torch.no_grad()
    def start_from(self, base: Llama) -> Adapter:
        """Copy the base's norms into this adapter's own, where it has some."""
        if self.config.norms:
            for i, layer in enumerate(base.layers):
                assert isinstance(layer, Layer)
                self.attention_norm[i].copy_(layer.attention_norm)
                self.feed_forward_norm[i].copy_(layer.feed_forward_norm)
        if self.config.final_norm:
            self.final_norm.copy_(base.norm)
        return self

    def load(
        self,
        tensors: Mapping[str, Tensor],
        source: str = "adapter",
        pause: Callable[[], None] = lambda: None,
    ) -> Adapter:
        """Copy native tensors into place. Raises CheckpointError, naming keys, unless they fit exactly.

        `pause` is called now and then.
        """
        wanted = self.state_dict()
        for verdict, keys in (
            ("missing", wanted.keys() - tensors.keys()),
            ("unexpected", tensors.keys() - wanted.keys()),
        ):
            if keys:
                raise CheckpointError(f"{source}: {verdict} tensors {', '.join(sorted(keys)[:8])}")
        for name, place in wanted.items():
            tensor = tensors[name]
            if tensor.shape != place.shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {list(tensor.shape)}, "
                    f"its configuration asks for {list(place.shape)}"
                )
            if tensor.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{source}: {name} is {tensor.dtype}, not a floating-point tensor of 16 bits or more; "
                    "save it as float32"
                )
            if not copy_finite(place, tensor, pause):
                raise CheckpointError(
                    f"{source}: {name} holds NaN or infinite values; restore it from a sound checkpoint"
                )
        return self

    def gates(self) -> Tensor:
        """Effective gates [L, H]: activation and `new_gate` applied, zero in layers without prompts."""
        base, gate = self.config.base, self.config.gate
        gates_LH = torch.zeros(base.num_layers, base.num_heads, device=self._device, dtype=self._dtype)
        if not self.config.gated_layers:
            return gates_LH
        value = torch.tanh(self.gate) if gate.activation == "tanh" else self.gate
        if gate.per == "layer":
            value = value[:, None].expand(-1, base.num_heads)
        if gate.new_gate:
            value = value * self.new_gate[:, None]
        rows = upload(self.config.gated_layers, self._device)
        return gates_LH.index_copy(0, rows, value)

    def see(self, features: Tensor) -> Tensor:
        """Visual tokens [S, n, C] of encoder features [S, F] or [S, T, F]."""
        visual: Tensor = self.vision(features.to(self._dtype))
        return visual

    def prompts(self, base: Llama, visual_SnC: Tensor | None = None, layers: range | None = None) -> Prompts:
        """Keys and values of the prompts through the base's own wk and wv (V1 eq. 3, 4, 10).

        `visual_SnC` holds the visual tokens of S images; without it there is one slot, of the static
        prompts alone. The raw prompt rows bypass the attention norm. All layers, or `layers`.

        Raises `ModelError` for visual tokens of more rows than the configuration says.
        """
        config = self.config
        layers = range(config.base.num_layers) if layers is None else layers
        S = 1 if visual_SnC is None else visual_SnC.shape[0]
        L, K = len(layers), config.max_prompt_len
        G, D = config.base.num_kv_heads, base.config.head_dim
        k_LSKo = v_LSKo = torch.zeros(L, S, K, G * D, dtype=base.dtype, device=base.device)
        len_L = torch.zeros(L, dtype=torch.int32)
        for alike, rows_PSkC in self._rows(visual_SnC, layers):
            where_P = torch.tensor(alike) - layers.start
            where = upload(where_P, base.device)
            k = rows_PSkC.shape[2]
            if k > K:  # whose keys would be cut off, and kernels read as many as there are said to be
                raise ModelError(f"an image gives {k} prompt rows, more than the adapter's {K}")
            pad = (0, 0, 0, K - k)
            k_PSko, v_PSko = self._keys_and_values(base, alike, rows_PSkC)
            k_LSKo, v_LSKo = (
                all_LSKo.index_copy(0, where, F.pad(own_PSko, pad).expand(-1, S, -1, -1))
                for all_LSKo, own_PSko in ((k_LSKo, k_PSko), (v_LSKo, v_PSko))
            )
            len_L[where_P] = k
        k_SLKGD, v_SLKGD = (x.transpose(0, 1).unflatten(-1, (G, D)) for x in (k_LSKo, v_LSKo))
        gated_L = upload(len_L > 0, base.device)
        gate_LH = self.gates()[layers.start : layers.stop].to(base.device) * gated_L[:, None]
        return Prompts(k_SLKGD, v_SLKGD, len_L.expand(S, L), gate_LH.expand(S, L, -1))

    def _rows(self, visual_SnC: Tensor | None, layers: range) -> Iterator[tuple[list[int], Tensor]]:
        """Prompts of P layers at once: static ones alone [P, 1, K, C], and those of images [P, S, k, C]."""
        prompt, vision = self.config.prompt, self.config.vision
        rows = {layer: row for row, layer in enumerate(prompt.layers if prompt else ())}
        sees = vision is not None and visual_SnC is not None
        seeing = [layer for layer in vision.layers if layer in layers] if vision and sees else []
        if alone := [layer for layer in rows if layer in layers and layer not in seeing]:
            yield alone, _rows_of(self.prompt, [rows[layer] for layer in alone])[:, None]
        if seeing:
            assert vision is not None
            assert visual_SnC is not None
            visual_PSnC = visual_SnC.expand(len(seeing), -1, -1, -1)
            if vision.fusion == "add":  # one visual token is repeated over the K rows
                visual_PSnC = _rows_of(self.prompt, [rows[layer] for layer in seeing])[:, None] + visual_PSnC
            yield seeing, visual_PSnC

    def _keys_and_values(self, base: Llama, layers: list[int], rows_PSkC: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts' keys and values, each [P, S, k, G·D], by the configured projection."""
        prompt, spec = self.config.prompt, self.config.base
        if prompt is None or prompt.projection == "wk_wv":
            k, v = self._project(base, layers, ("wk", "wv"), rows_PSkC)
            return k, v
        qkv = torch.cat(self._project(base, layers, ("wq", "wk", "wv"), rows_PSkC), dim=-1)
        heads = qkv.unflatten(-1, (spec.num_kv_heads, spec.num_heads // spec.num_kv_heads + 2, spec.head_dim))
        return heads[..., -2, :].flatten(-2), heads[..., -1, :].flatten(-2)

    def _project(
        self, base: Llama, layers: list[int], names: tuple[LinearName, ...], rows_PSkC: Tensor
    ) -> list[Tensor]:
        """Rows through some of the base's linears, with the adapter's own scales, biases and LoRA."""
        rows, dtype = rows_PSkC.to(base.dtype), base.dtype
        scale_bias, lora = self.config.scale_bias, self.config.lora

        def own(stack: Tensor) -> Tensor:  # [P, 1, …]
            return _rows_of(stack, layers).to(dtype)[:, None]

        if scale_bias.scale == "input" and any(name in self.scale for name in names):
            scaled = [rows * own(self.scale[n])[:, None] if n in self.scale else rows for n in names]
            ys = [base.apply_each((n,), layers, x)[0] for n, x in zip(names, scaled, strict=True)]
        else:
            ys = base.apply_each(names, layers, rows)
        for i, name in enumerate(names):
            if name in self.bias:
                ys[i] = ys[i] + own(self.bias[name])[:, None]
            if name in self.scale and scale_bias.scale == "output":
                ys[i] = ys[i] * own(self.scale[name])[:, None]
            if lora and lora.on_prompts and name in lora.targets:
                a, b = (own(self.lora[name][side]) for side in ("a", "b"))  # type: ignore[index]
                ys[i] = ys[i] + lora_scaling(self.config) * (rows @ a.mT @ b.mT)
        return ys

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _rows_of(stack: Tensor, rows: list[int]) -> Tensor:
    """Some of its first dimension; where they follow one another, nothing is copied."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return stack[rows[0] : rows[0] + len(rows)]
    return stack[rows]


def lora_scaling(config: AdapterConfig) -> float:
    """alpha / rank, or 1 where the adapter states no alpha."""
    if config.lora is None or config.lora.alpha is None:
        return 1.0
    return config.lora.alpha / config.lora.rank


def linear_shape(base: BaseSpec, name: LinearName) -> tuple[int, int]:
    """(out, in) features of one linear of the base."""
    C, I = base.hidden_size, base.intermediate_size
    q, kv = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    shapes: dict[LinearName, tuple[int, int]] = {
        "wq": (q, C),
        "wk": (kv, C),
        "wv": (kv, C),
        "wo": (C, q),
        "w1": (I, C),
        "w2": (C, I),
        "w3": (I, C),
    }
    return shapes[name]


def base_spec(config: ModelConfig, fingerprint: str | None = None) -> BaseSpec:
    """What an adapter for this base says of it."""
    return BaseSpec(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        fingerprint=fingerprint,
    )


def check_fits(spec: BaseSpec, config: ModelConfig, fingerprint: str | None, source: str) -> None:
    """Raise AdapterMismatch, naming each difference, unless the adapter was made for this base.

    A near copy (`models.fingerprint`) fits, with a word in the log: quantised and float16 files of a base
    have values of their own.
    """
    alike = likeness(spec.fingerprint, fingerprint) if spec.fingerprint and fingerprint else "same"
    actual = base_spec(config, fingerprint).model_dump()
    wrong = [
        f"{name} {wanted} (the base has {actual[name]})"
        for name, wanted in spec.model_dump().items()
        if None not in (wanted, actual[name]) and wanted != actual[name]
        if name != "fingerprint" or alike == "other"
    ]
    if wrong:
        raise AdapterMismatch(
            f"{source} was made for another base: {', '.join(wrong)}; serve it on the base it was trained on"
        )
    if alike == "near":
        log.warning(
            "%s was made for a near copy of this base, whose values differ as after rounding, quantising or "
            "light fine-tuning; its answers may differ from those of its own base",
            source,
        )
