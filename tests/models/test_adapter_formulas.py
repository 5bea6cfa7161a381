"""Every variant's logits are the oracle's, PEFT's where PEFT has the variant, and the base's at zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import Oracle, RopeLayout
from support import CONFIGS, canonical_weights, random_adapter, random_base, transformers_twin
from torch import Tensor

from models.adaptation import OneAdapter
from models.adapter import Adapter, base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.attention import DenseAttend
from models.config import ModelConfig
from models.llama import Llama

K, F, T = 3, 10, 7
TOP = (1, 2, 3)
VISION = {"encoder": "open_clip:ViT-L-14:openai", "feature_dim": F, "hidden_size": F}
GLOBAL = VISION | {"features": "global", "fusion": "add", "layers": TOP}
TOKENS = VISION | {"features": "tokens"}
QUERY_BLOCKS = TOKENS | {
    "projector": "query_blocks",
    "hidden_size": 16,
    "num_blocks": 2,
    "num_heads": 4,
    "num_tokens": K,
    "fusion": "add",
    "layers": TOP,
    "color": "bgr",
    "no_image": "zero",
}
PROMPT = {"length": K, "layers": TOP}
NORMS = {"norms": True, "final_norm": True}
BIAS_7B = {"bias_targets": ("wq", "wo", "w1", "w2", "w3")}

VARIANTS: dict[str, dict[str, object]] = {
    "V1": {"prompt": PROMPT},
    "V1, as released": {"prompt": PROMPT, "gate": {"activation": "raw"}},
    "V1, a tanh gate per layer": {"prompt": PROMPT, "gate": {"per": "layer"}},
    "V1, as PEFT": {"prompt": PROMPT, "gate": {"per": "layer", "activation": "raw"}},
    "V1, layers apart": {"prompt": PROMPT | {"layers": (0, 2)}},
    "V1 multimodal": {"prompt": PROMPT, "vision": GLOBAL | {"projector": "linear", "num_tokens": 1}},
    "V1 multimodal, mlp": {
        "prompt": PROMPT,
        "vision": GLOBAL | {"projector": "mlp", "hidden_size": 6, "num_tokens": 1, "input_norm": True},
    },
    "V1 multimodal, a row per prompt row": {
        "prompt": PROMPT,
        "vision": GLOBAL | {"projector": "linear", "num_tokens": K, "layers": (2, 3), "input_norm": True},
    },
    "V2 text, the paper": {
        **NORMS,
        "prompt": PROMPT,
        "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
    },
    "V2 text, the chat code": {
        **NORMS,
        "scale_bias": {"scale": "input", "scale_targets": LINEARS, "bias_targets": LINEARS},
    },
    "V2 text, the chat code with prompts": {
        "norms": True,
        "prompt": PROMPT,
        "scale_bias": {"scale": "input", "scale_targets": LINEARS, "bias_targets": LINEARS},
    },
    "V2 text, scales on some linears": {
        "prompt": PROMPT,
        "scale_bias": {"scale": "input", "scale_targets": ("wk", "w1"), "bias_targets": ("wv",)},
    },
    "V2 multimodal, the paper": {
        **NORMS,
        "prompt": PROMPT,
        "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
        "vision": TOKENS | {"projector": "linear", "fusion": "early", "layers": (0,), "num_tokens": 5},
    },
    "V2 multimodal, visual tokens alone": {
        "vision": TOKENS
        | {"projector": "mlp", "hidden_size": 6, "fusion": "early", "layers": (0, 1), "num_tokens": 5},
    },
    "7B, bias": {**NORMS, "prompt": PROMPT, "scale_bias": BIAS_7B, "vision": QUERY_BLOCKS},
    "7B, bias and LoRA": {
        **NORMS,
        "prompt": PROMPT,
        "gate": {"new_gate": True},
        "scale_bias": BIAS_7B,
        "lora": {"rank": 2, "targets": LINEARS},
        "vision": QUERY_BLOCKS,
    },
    "LoRA with alpha, on prompts too": {
        "prompt": PROMPT,
        "lora": {"rank": 3, "alpha": 5.0, "targets": ("wq", "wk", "wv", "w2"), "on_prompts": True},
    },
    "LitGPT 0.5.13's prompts": {
        "prompt": PROMPT | {"projection": "regrouped"},
        "gate": {"activation": "raw"},
    },
    "LitGPT 0.5.13's V2": {
        **NORMS,
        "prompt": PROMPT | {"projection": "regrouped"},
        "head": True,
        "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
    },
    "everything, scales on outputs": {
        **NORMS,
        "prompt": PROMPT,
        "gate": {"per": "layer", "new_gate": True},
        "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
        "lora": {"rank": 3, "alpha": 1.5, "targets": LINEARS, "on_prompts": True},
        "vision": QUERY_BLOCKS,
    },
    "everything, scales on inputs": {
        **NORMS,
        "prompt": PROMPT,
        "scale_bias": {"scale": "input", "scale_targets": LINEARS, "bias_targets": LINEARS},
        "lora": {"rank": 3, "alpha": 1.5, "targets": LINEARS, "on_prompts": True},
        "vision": QUERY_BLOCKS | {"fusion": "early", "layers": (0,)},
    },
}


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, config: ModelConfig) -> AdapterConfig:
    return AdapterConfig.model_validate({"base": base_spec(config).model_dump(), **VARIANTS[request.param]})


def some_features(variant: AdapterConfig) -> Tensor | None:
    """Features [2, F] or [2, n, F] of two images; none for an adapter that sees no images."""
    if variant.vision is None:
        return None
    tokens = 5 if variant.vision.projector == "query_blocks" else variant.vision.num_tokens
    shape = (2, F) if variant.vision.features == "global" else (2, tokens, F)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def some_tokens(config: ModelConfig, B: int = 2) -> Tensor:
    return torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(base: Llama, tokens_BT: Tensor, adapter: Adapter | None = None, features: Tensor | None = None):
    """[B, T, V] of B sequences; with features, each sequence has an image of its own."""
    B, T = tokens_BT.shape
    adaptation, attend = None, DenseAttend(B)
    if adapter is not None:
        adaptation = OneAdapter(adapter, base.dtype)
        attend = DenseAttend(B, adapter.prompts(base, None if features is None else adapter.see(features)))
    positions_N = torch.arange(T).repeat(B)
    hidden_NC = base(tokens_BT.flatten(), positions_N, attend, adaptation)
    return base.logits(hidden_NC, adaptation).unflatten(0, (B, T))


def arrays(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in weights.items()}


def oracle_logits(
    base: dict[str, Tensor],
    config: ModelConfig,
    tokens_BT: Tensor,
    adapter: AdapterConfig | None = None,
    own: dict[str, Tensor] | None = None,
    features: Tensor | None = None,
    rope: RopeLayout = "half",
) -> Tensor:
    oracle = Oracle(config, arrays(base), adapter, arrays(own or {}), rope)
    images = [None] * len(tokens_BT) if features is None else list(features.double().numpy())
    rows = [oracle.logits(tokens.tolist(), image) for tokens, image in zip(tokens_BT, images, strict=True)]
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logits_equal_the_oracle(
    config: ModelConfig, variant: AdapterConfig, dtype: torch.dtype, tolerance: float
):
    base, adapter = random_base(config, dtype), random_adapter(variant, dtype)
    tokens_BT, features = some_tokens(config), some_features(variant)
    ours = logits(base, tokens_BT, adapter, features)
    truth = oracle_logits(canonical_weights(base), config, tokens_BT, variant, adapter.state_dict(), features)
    torch.testing.assert_close(ours.double(), truth, atol=tolerance, rtol=0)
    # The comparison would say nothing of an adapter that does next to nothing.
    assert (ours - logits(base, tokens_BT)).abs().amax() > 0.1


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if "vision" in v])
def test_a_request_without_an_image_sees_the_static_prompts_alone(config: ModelConfig, name: str):
    variant = AdapterConfig.model_validate({"base": base_spec(config).model_dump(), **VARIANTS[name]})
    base, adapter = random_base(config, torch.float64), random_adapter(variant, torch.float64)
    tokens_BT = some_tokens(config)
    ours = logits(base, tokens_BT, adapter)
    truth = oracle_logits(canonical_weights(base), config, tokens_BT, variant, adapter.state_dict())
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)
    assert not torch.allclose(ours, logits(base, tokens_BT, adapter, some_features(variant)), atol=1e-3)


def halved(x: Tensor, D: int, dim: int) -> Tensor:
    """Rows of wq's or wk's output from Meta's interleaved pairs to the half-rotated layout."""
    heads = x.unflatten(dim, (-1, D // 2, 2))  # pair i of each head is rows 2i and 2i + 1 …
    return heads.transpose(dim + 1, dim + 2).flatten(dim, dim + 2).contiguous()  # … and becomes i, i + D/2


@pytest.mark.parametrize("name", ["V1", "everything, scales on outputs", "everything, scales on inputs"])
def test_meta_files_mean_the_same_once_their_rows_are_reordered(config: ModelConfig, name: str):
    """Interleaved weights in the oracle are half-rotated ones in the model, adapter's included."""
    variant = AdapterConfig.model_validate({"base": base_spec(config).model_dump(), **VARIANTS[name]})
    meta_base, meta_own = canonical_weights(random_base(config, torch.float64)), random_adapter(variant)
    own = {key: tensor.double() for key, tensor in meta_own.state_dict().items()}
    tokens_BT, features = some_tokens(config), some_features(variant)
    truth = oracle_logits(meta_base, config, tokens_BT, variant, own, features, rope="interleaved")

    def reordered(key: str, tensor: Tensor) -> Tensor:
        if key.endswith(("wq.weight", "wk.weight")):
            return halved(tensor, config.head_dim, 0)
        on_output = ["bias.wq", "bias.wk", "lora.wq.b", "lora.wk.b"]
        if variant.scale_bias.scale == "output":
            on_output += ["scale.wq", "scale.wk"]
        return halved(tensor, config.head_dim, 1) if key in on_output else tensor

    base = Llama(config, torch.float64).load((key, reordered(key, t)) for key, t in meta_base.items())
    adapter = Adapter(variant, torch.float64).load({key: reordered(key, t) for key, t in own.items()})
    torch.testing.assert_close(logits(base, tokens_BT, adapter, features), truth, atol=1e-9, rtol=0)
    wrong = Llama(config, torch.float64).load(meta_base.items())
    assert (logits(wrong, tokens_BT, adapter, features) - truth).abs().amax() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_gives_the_base_bit_for_bit(
    config: ModelConfig, variant: AdapterConfig, dtype: torch.dtype
):
    base = random_base(config, dtype)
    adapter = Adapter(variant).start_from(base)
    tokens_BT, features = some_tokens(config), some_features(variant)
    features = None if features is None else features.float()
    assert torch.equal(logits(base, tokens_BT, adapter, features), logits(base, tokens_BT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if n.startswith("V1")])
def test_zero_gates_silence_any_prompt_bit_for_bit(config: ModelConfig, name: str, dtype: torch.dtype):
    variant = AdapterConfig.model_validate({"base": base_spec(config).model_dump(), **VARIANTS[name]})
    base, adapter = random_base(config, dtype), random_adapter(variant)
    tokens_BT, features = some_tokens(config), some_features(variant)
    spoken = logits(base, tokens_BT, adapter, features)
    with torch.no_grad():
        adapter.gate.zero_()
    silent = logits(base, tokens_BT, adapter, features)
    assert torch.equal(silent, logits(base, tokens_BT))
    assert not torch.equal(silent, spoken)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_peft_adaption_prompt_is_v1_with_a_raw_gate_per_layer(name: str, num_layers: int):
    """PEFT derives the number of KV heads from C, so it only knows bases with H·D = C."""
    from peft import AdaptionPromptConfig, get_peft_model

    config = replace(CONFIGS[name], head_dim=CONFIGS[name].hidden_size // CONFIGS[name].num_heads)
    layers = tuple(range(config.num_layers - num_layers, config.num_layers))
    variant = AdapterConfig.model_validate(
        {
            "base": base_spec(config).model_dump(),
            "prompt": {"length": K, "layers": layers},
            "gate": {"per": "layer", "activation": "raw"},
        }
    )
    base, adapter = random_base(config), random_adapter(variant)
    theirs = get_peft_model(
        transformers_twin(base),
        AdaptionPromptConfig(adapter_len=K, adapter_layers=num_layers, task_type="CAUSAL_LM"),
    ).eval()
    attentions = [m for m in theirs.modules() if hasattr(m, "adaption_prompt")]
    assert len(attentions) == num_layers
    with torch.no_grad():
        for row, attention in enumerate(attentions):  # modules come from the bottom up
            attention.adaption_prompt[0].copy_(adapter.prompt[row])
            attention.adaption_gate.copy_(adapter.gate[row])
        tokens_BT = some_tokens(config)
        expected = theirs(input_ids=tokens_BT).logits
    ours = logits(base, tokens_BT, adapter)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert (ours - logits(base, tokens_BT)).abs().amax() > 0.1


def count(adapter: Adapter, *prefixes: str) -> int:
    """Elements of the parameters with one of these prefixes; of all without any."""
    return sum(p.numel() for n, p in adapter.named_parameters() if n.startswith(prefixes or ("",)))


def on_meta(shape: dict[str, int], **options: object) -> Adapter:
    return Adapter(AdapterConfig.model_validate({"base": shape, **options}), device="meta")


LLAMA_7B = {
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
    "intermediate_size": 11008,
}
LLAMA_65B = {
    "hidden_size": 8192,
    "num_layers": 80,
    "num_heads": 64,
    "num_kv_heads": 64,
    "head_dim": 128,
    "intermediate_size": 22016,
}


def test_v1_on_7b_has_the_papers_number_of_parameters():
    v1 = on_meta(LLAMA_7B, prompt={"length": 10, "layers": tuple(range(2, 32))})
    assert count(v1) == 30 * 10 * 4096 + 30 * 32 == 1_229_760  # "1.2M"


def test_v2_chat_on_65b_has_the_papers_number_of_parameters():
    v2 = on_meta(
        LLAMA_65B,
        norms=True,
        final_norm=True,
        scale_bias={"scale": "input", "scale_targets": LINEARS, "bias_targets": LINEARS},
    )
    assert count(v2, "bias.") == 6_799_360
    assert count(v2, "scale.") == 5_693_440
    assert count(v2, "attention_norm", "feed_forward_norm", "final_norm") == 1_318_912
    assert count(v2) == 13_811_712  # "14M"


def test_the_released_7b_multimodal_files_have_our_number_of_parameters():
    """240.7 MiB in float32 (issue 131 shows 241M); LoRA adds 40.0M parameters."""
    vision = QUERY_BLOCKS | {
        "feature_dim": 768,
        "hidden_size": 768,
        "num_blocks": 8,
        "num_heads": 16,
        "num_tokens": 10,
        "layers": tuple(range(1, 32)),
    }
    bias = {
        "prompt": {"length": 10, "layers": tuple(range(1, 32))},
        "norms": True,
        "final_norm": True,
        "scale_bias": BIAS_7B,
        "vision": vision,
    }
    plain = on_meta(LLAMA_7B, **bias)
    unused_gate = 32  # the files hold a gate for layer 0 too, which has no prompts
    assert (count(plain) + unused_gate) * 4 / 2**20 == pytest.approx(240.7, abs=0.05)
    # What the finetuning stage trains: every norm and bias of the language model.
    assert count(plain, "bias.", "attention_norm", "feed_forward_norm", "final_norm") == pytest.approx(
        1.36e6, abs=5e3
    )
    with_lora = on_meta(LLAMA_7B, **bias, lora={"rank": 16, "targets": LINEARS}, gate={"new_gate": True})
    assert count(with_lora, "lora.") == pytest.approx(40.0e6, abs=5e4)
