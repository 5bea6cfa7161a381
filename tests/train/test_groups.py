"""What a step may change, down to rows of one tensor; and the papers' parameter counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import MHA, random_adapter, random_base

from models.adapter import Adapter, base_spec
from models.adapter_config import BaseSpec
from train.data.batches import Pass
from train.errors import RecipeError
from train.forward import Forward
from train.groups import Groups, gradients, set_gradients
from train.recipe import SHIPPED, load_recipe


def spec(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> BaseSpec:
    return BaseSpec(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
    )


LLAMA_7B = spec(4096, 32, 32, 32, 11008, 32000)
LLAMA_65B = spec(8192, 80, 64, 64, 22016, 32000)
SMOLLM2 = spec(576, 30, 9, 3, 1536, 49152)

_V1 = 30 * 10 * 4096 + 30 * 32
_NORMS_7B = (2 * 32 + 1) * 4096
_LATE_7B = 31 * 10 * 4096 + 31 * 32  # static prompts and their gates
_LINEARS_7B = 32 * (4 * 4096 + 2 * 11008 + 4096)  # their outputs
_PROJECTOR_V2 = (
    (768 * 448 + 448) + 2 * 448 + 20 * 448  # in, norm, queries
    + 3 * (12 * 448**2 + 13 * 448)  # pre-norm blocks
    + (448 * 4096 + 4096) + 2 * 4096  # out, norm
)  # fmt: skip
_LORA_16 = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
_NORMS_SMOL = (2 * 30 + 1) * 576
_SCALE_BIAS_SMOL = 2 * 30 * (576 + 2 * 192 + 576 + 2 * 1536 + 576)

COUNTS = {
    "v1-instruct": (LLAMA_7B, 1_229_760),
    "v1-scienceqa": (LLAMA_7B, _V1 + (4096 * 72 + 72) + (72 * 4096 + 4096)),
    "v1-caption": (LLAMA_7B, 1_823_752),
    "v2-joint": (LLAMA_7B, _LATE_7B + _NORMS_7B + 2 * _LINEARS_7B + 32 + _PROJECTOR_V2),
    "v2-joint-lora": (LLAMA_7B, _LATE_7B + _NORMS_7B + _LORA_16 + 32 + _PROJECTOR_V2),
    "v2-chat": (LLAMA_65B, 6_799_360 + 5_693_440 + (2 * 80 + 1) * 8192),
    "released-7b-pretrain": (LLAMA_7B, 61_731_552),
    "released-7b-finetune": (LLAMA_7B, _NORMS_7B + 32 * (2 * 4096 + 2 * 11008 + 4096)),
    "lora": (LLAMA_7B, 4_194_304),
    "smollm2-text": (SMOLLM2, 28 * 10 * 576 + 28 * 9 + _NORMS_SMOL + _SCALE_BIAS_SMOL),
    "smollm2-math": (SMOLLM2, 28 * 10 * 576 + 28 * 9 + _NORMS_SMOL + _SCALE_BIAS_SMOL),
    "smollm2-caption": (
        SMOLLM2,
        28 * 10 * 576 + 28 * 9 + 2 * 1752 + (1752 * 384 + 384) + (384 * 576 + 576),
    ),
    "smollm2-visual": (
        SMOLLM2,
        6 * 10 * 576 + (6 + 12) * 9 + _NORMS_SMOL + _SCALE_BIAS_SMOL
        + 2 * 1752 + (1752 * 384 + 384) + (384 * 576 + 576),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_trained_parameters_on_the_real_shapes(name: str):
    base, count = COUNTS[name]
    recipe = load_recipe(name)
    with torch.device("meta"):
        adapter = Adapter(recipe.adapter.config(base), device="meta")
    groups = Groups(adapter, [source.trains for source in recipe.data.values()])
    assert groups.num_trained == count


def test_the_counts_are_the_papers():
    """As the papers round them."""
    millions = {name: round(count / 1e6, 1) for name, (_, count) in COUNTS.items()}
    assert millions["v1-instruct"] == 1.2
    assert millions["v1-scienceqa"] == millions["v1-caption"] == 1.8
    assert round(millions["v2-joint"]) == round(millions["v2-chat"]) == 14
    assert millions["released-7b-pretrain"] == 61.7
    assert millions["lora"] == 4.2


def v2(**changes: Any) -> Adapter:
    """Every kind of parameter, early fusion."""
    recipe = load_recipe("v2-joint", ["adapter.prompt.layers=last 3", "adapter.gate.new_gate=true"])
    fields = recipe.adapter.model_dump()
    fields["vision"] |= {
        "feature_dim": 12,
        "hidden_size": 16,
        "num_heads": 2,
        "num_blocks": 1,
        "num_tokens": 5,
    }
    fields["vision"] |= {"encoder": "efficientnet-lite0"}
    fields |= {"lora": {"rank": 2, "targets": ["wq", "w2"]}} | changes
    return random_adapter(type(recipe.adapter).model_validate(fields).config(base_spec(MHA)))


def batch(with_images: bool) -> Pass:
    generator = torch.Generator().manual_seed(1)
    lens = (7, 4)
    return Pass(
        tokens_N=torch.randint(0, 97, (11,), generator=generator),
        positions_N=torch.cat([torch.arange(n) for n in lens]),
        lens_B=lens,
        predicting_M=torch.tensor([2, 3, 4, 8]),
        targets_M=torch.tensor([5, 6, 7, 8]),
        images=torch.randn(2, 9, 12, generator=generator) if with_images else None,
        image_B=(0, 1) if with_images else (-1, -1),
    )


def changed(act: Callable[[], None], adapter: Adapter) -> dict[str, set[int]]:
    """First indices at which each tensor differs after `act`."""
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    act()
    after = adapter.state_dict()
    return {
        name: {
            int(row) for row in (after[name] != before[name]).reshape(len(before[name]), -1).any(1).nonzero()
        }
        for name in before
        if not torch.equal(after[name], before[name])
    }


@pytest.mark.parametrize("source", [0, 1])
def test_image_steps_and_instruction_steps_touch_disjoint_parameters(source: int):
    """Gradients, values and moments: V2, section 4.2. Momentum of one kind must not leak into the other."""
    base, adapter = random_base(MHA), v2()
    groups = Groups(adapter, ["visual", "text"])
    optimizer = torch.optim.AdamW(groups.optimizer_groups(0.1), lr=0.01)
    forward = Forward(base, adapter, None, live=False, checkpointing=False)

    def step(kind: int) -> None:
        active = groups.activate(kind)
        forward.backward(batch(with_images=kind == 0), 1.0)
        set_gradients(active, gradients(active))
        optimizer.step()

    step(0), step(1)  # both have moments now
    touched = changed(lambda: step(source), adapter)
    late_rows, early_rows = {1, 2, 3}, {0}
    visual = {name for name in adapter.state_dict() if name.startswith("vision.")}
    if source == 0:
        assert set(touched) == visual | {"gate", "new_gate"}
        assert touched["gate"] == touched["new_gate"] == early_rows
    else:
        assert set(touched) == set(adapter.state_dict()) - visual
        assert touched["gate"] == touched["new_gate"] == late_rows


@pytest.mark.parametrize("source", [0, 1])
def test_only_the_group_has_gradients(source: int):
    base, adapter = random_base(MHA), v2()
    groups = Groups(adapter, ["visual", "text"])
    active = groups.activate(source)
    Forward(base, adapter, None, live=False, checkpointing=False).backward(batch(source == 0), 1.0)
    with_grad = {name for name, tensor in adapter.named_parameters() if tensor.grad is not None}
    assert with_grad == {leaf.name.removesuffix(".static").removesuffix(".visual") for leaf in active}
    assert all(grad.any() for grad in gradients(active))


def test_patterns():
    adapter = v2()

    def names(*patterns: str) -> set[str]:
        return {leaf.name for leaf in Groups(adapter, [patterns]).trained}

    assert names("gate") == {"gate.static", "gate.visual"}
    assert names("gate.visual", "bias.w?") == {"gate.visual", *(f"bias.w{x}" for x in "qkvo123")}
    assert names("*norm") == {"attention_norm", "feed_forward_norm", "final_norm"}
    with pytest.raises(
        RecipeError, match=r"trains: 'nothing' matches no tensor of the adapter: prompt, gate"
    ):
        names("prompt", "nothing")


def test_weight_decay_spares_vectors():
    groups = Groups(v2(), ["all"]).optimizer_groups(0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed = {leaf.name for leaf in Groups(v2(), ["all"]).trained if leaf.decays}
    assert {"prompt", "gate.static", "lora.wq.a", "vision.input_proj.weight", "vision.query"} <= decayed
    assert (
        not {"final_norm", "bias.wq", "scale.wq", "vision.input_proj.bias", "vision.input_norm.weight"}
        & decayed
    )
