"""The typed adapter configuration: every option on which papers and released files differ.

`adapter.json` of the native format is this, as JSON. Whatever a file cannot say itself (tanh or raw
gates, colour order, template) is a field here and never a guess in code.

Layers are counted from the bottom, from 0. Linears carry LLaMA's names: wq, wk, wv, wo are the
attention's, w1 the feed-forward's gate, w2 its down-projection, w3 its up-projection.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from models.sampling_defaults import SamplingDefaults

LinearName = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
LINEARS: tuple[LinearName, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if list(layers) != sorted(set(layers)):
        raise ValueError("layers must ascend without repetition")
    return layers


def _in_order(targets: tuple[LinearName, ...]) -> tuple[LinearName, ...]:
    if len(set(targets)) != len(targets):
        raise ValueError("a linear is named twice")
    return tuple(name for name in LINEARS if name in targets)


# Bounds beyond any real model, so that no product of sizes overflows where shapes are computed.
Size = Annotated[int, Field(gt=0, le=1 << 24)]
Count = Annotated[int, Field(gt=0, le=1 << 12)]
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=1024)], ...], Field(min_length=1), AfterValidator(_ascending)
]
Targets = Annotated[tuple[LinearName, ...], AfterValidator(_in_order)]
ENCODER = r"efficientnet-lite0|open_clip:[A-Za-z0-9_.:/-]+"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSpec(_Strict):
    """The base an adapter was made for; another one is refused."""

    hidden_size: Size
    num_layers: int = Field(gt=0, le=1024)
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    intermediate_size: Size
    vocab_size: Size | None = None
    fingerprint: str | None = None  # of the embedding, where it is known: `models.fingerprint`


class PromptConfig(_Strict):
    """Static prompts P_l [K, C] (V1 eq. 1): `length` K rows in each of `layers`.

    projection  `wk_wv`: keys and values are wk P_l and wv P_l.
                `regrouped`: LitGPT 0.5.5 to 0.5.13 cut the rows of [wq; wk; wv] P_l into G groups of
                H/G + 2 heads and take each group's last two for its key and value, whichever of the
                three linears they come from; adapters trained so only work so
    """

    length: int = Field(gt=0, le=1024)
    layers: Layers
    projection: Literal["wk_wv", "regrouped"] = "wk_wv"


class GateConfig(_Strict):
    """The gate g of V1 eq. 7. One per head or one per layer, through tanh or raw, times `new_gate`."""

    per: Literal["head", "layer"] = "head"
    activation: Literal["tanh", "raw"] = "tanh"
    new_gate: bool = False


class ScaleBiasConfig(_Strict):
    """y = s(Wx + b) with `scale: output` (V2 eq. 1); y = W(x·s) + b with `input`; y = Wx + b with `none`.

    The prompts' keys and values go through the same wk and wv, scale and bias included.
    """

    scale: Literal["none", "input", "output"] = "none"
    scale_targets: Targets = ()
    bias_targets: Targets = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.scale == "none") != (not self.scale_targets):
            raise ValueError("`scale` and `scale_targets` must both be given or both be absent")
        return self


class LoraConfig(_Strict):
    """y += (alpha / rank) · B A x. The released 7B code keeps it off the prompts' keys and values."""

    rank: int = Field(gt=0, le=1024)
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # None: no scaling
    targets: Targets = Field(min_length=1)
    on_prompts: bool = False


class VisionConfig(_Strict):
    """How an image becomes prompts.

    encoder    `efficientnet-lite0`, or `open_clip:MODEL[:PRETRAINED]` such as `open_clip:ViT-L-14:openai`
    features   `global`: multi-scale pooled features, concatenated to one vector (V1 eq. 9);
               `tokens`: the encoder's token sequence (patches and class token)
    projector  `linear`: one Linear; `mlp`: Linear-GELU-Linear. Of a global vector they give all
               `num_tokens` rows at once, of a token sequence one row per token;
               `query_blocks`: learned queries through transformer blocks (the released 7B code)
    fusion     `add`: onto the static prompts of `layers` (V1 eq. 10, released 7B code);
               `early`: visual tokens are prompts of their own in `layers`, disjoint from the static
               ones (V2, section 4.3)
    num_tokens rows the projector gives: 1 is repeated over the static prompts; else it must equal
               their length for `add`
    feature_dim F, the width of the encoder's features; an encoder of another width is refused
    no_image   a request without an image sees an all-zero pixel tensor (`zero`, as the released 7B
               recipe trains text rows) or no visual tokens at all (`none`)
    """

    encoder: str = Field(pattern=f"^({ENCODER})$")
    features: Literal["global", "tokens"]
    projector: Literal["linear", "mlp", "query_blocks"]
    fusion: Literal["add", "early"]
    layers: Layers
    num_tokens: int = Field(gt=0, le=1024)
    feature_dim: Size
    hidden_size: Size  # width inside the projector; for `linear` the features' own
    input_norm: bool = False  # LayerNorm on the features first; query_blocks has its own
    num_blocks: int = Field(default=0, ge=0, le=64)  # query_blocks only
    num_heads: int = Field(default=0, ge=0, le=1 << 12)  # query_blocks only
    color: Literal["rgb", "bgr"] = "rgb"
    no_image: Literal["zero", "none"] = "none"


class AdapterConfig(_Strict):
    format: Literal["llama-adapter"] = "llama-adapter"
    format_version: Literal[1] = 1
    base: BaseSpec
    prompt: PromptConfig | None = None
    gate: GateConfig = GateConfig()
    norms: bool = False  # attention and feed-forward norms of every layer are the adapter's own
    final_norm: bool = False
    head: bool = False  # logits are s(Wx + b) with the adapter's own s and b (LitGPT's V2)
    scale_bias: ScaleBiasConfig = ScaleBiasConfig()
    lora: LoraConfig | None = None
    vision: VisionConfig | None = None
    template: str = Field(default="chat", max_length=64)  # a name in `models.prompts`
    sampling: SamplingDefaults | None = None  # for requests that do not say; before the base's
    description: str = Field(default="", max_length=2000)

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """Layers that hold prompts of either kind, ascending; a row of `gate` each."""
        static = self.prompt.layers if self.prompt else ()
        visual = self.vision.layers if self.vision else ()
        return tuple(sorted({*static, *visual}))

    @property
    def max_prompt_len(self) -> int:
        static = self.prompt.length if self.prompt else 0
        visual = self.vision.num_tokens if self.vision and self.vision.fusion == "early" else 0
        return max(static, visual)

    @property
    def variant(self) -> str:
        """A short name for people: V1, V2, with or without sight."""
        tuned = self.norms or self.scale_bias.bias_targets or self.scale_bias.scale_targets or self.lora
        early = self.vision is not None and self.vision.fusion == "early"
        name = "V2" if tuned or early else "V1"
        return f"{name} multimodal" if self.vision else f"{name} text"

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        top = max([*self.gated_layers, -1])
        if top >= self.base.num_layers:
            raise ValueError(f"layer {top} does not exist in a base of {self.base.num_layers} layers")
        if self.head and self.base.vocab_size is None:
            raise ValueError("`head` needs `base.vocab_size`")
        tuned = self.scale_bias.bias_targets or self.scale_bias.scale_targets or self.lora
        if not (self.gated_layers or self.norms or self.final_norm or self.head or tuned):
            raise ValueError(
                "an adapter that changes nothing; give it prompts, norms, biases, scales or LoRA"
            )
        if self.vision is None:
            return self
        static = set(self.prompt.layers) if self.prompt else set()
        visual = set(self.vision.layers)
        if self.vision.fusion == "early" and static & visual:
            shared = sorted(static & visual)
            raise ValueError(f"early fusion needs layers of its own; {shared} hold static prompts too")
        if self.vision.fusion == "add":
            if self.prompt is None or not visual <= static:
                raise ValueError("add fusion needs static prompts in each of its layers")
            visual_len, static_len = self.vision.num_tokens, self.prompt.length
            if visual_len not in (1, static_len):
                raise ValueError(f"{visual_len} visual tokens cannot be added to {static_len} prompt rows")
        return self
