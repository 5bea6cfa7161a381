"""An adapter's configuration is untrusted JSON: what it cannot mean is refused, naming the field."""

from __future__ import annotations

import json
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import MHA

from models.adapter import base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.checkpoints.native import native_shapes
from models.errors import CheckpointError

VISION: dict[str, Any] = {
    "encoder": "efficientnet-lite0",
    "features": "global",
    "projector": "linear",
    "fusion": "add",
    "layers": [1, 2],
    "num_tokens": 1,
    "feature_dim": 12,
    "hidden_size": 12,
}
VALID: dict[str, Any] = {
    "base": base_spec(MHA).model_dump(),
    "prompt": {"length": 4, "layers": [1, 2, 3]},
    "gate": {"per": "layer", "activation": "raw", "new_gate": True},
    "norms": True,
    "scale_bias": {"scale": "input", "scale_targets": ["wq"], "bias_targets": ["w2", "wq"]},
    "lora": {"rank": 2, "alpha": 4.0, "targets": ["wv"]},
    "vision": VISION,
}
EARLY = {**VISION, "fusion": "early", "layers": [0], "num_tokens": 7}


def changed(path: str, value: Any) -> dict[str, Any]:
    """VALID with one field, named by its dotted path, replaced."""
    config = deepcopy(VALID)
    *parents, last = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("base.hidden_size", 0, "greater than 0"),
        ("base.hidden_size", 10**30, "less than or equal"),
        ("base.num_layers", 3, "layer 3 does not exist in a base of 3 layers"),
        ("prompt.length", 0, "greater than 0"),
        ("prompt.length", 10**9, "less than or equal"),
        ("prompt.layers", [], "at least 1"),
        ("prompt.layers", [2, 1], "layers must ascend without repetition"),
        ("prompt.layers", [1, 1], "layers must ascend without repetition"),
        ("prompt.layers", [-1], "greater than or equal to 0"),
        ("prompt.layers", [1, 2, 4], "layer 4 does not exist in a base of 4 layers"),
        ("gate.per", "token", "'head' or 'layer'"),
        ("gate.activation", "sigmoid", "'tanh' or 'raw'"),
        ("scale_bias.scale", "none", "`scale` and `scale_targets` must both be given or both be absent"),
        ("scale_bias.scale_targets", [], "`scale` and `scale_targets` must both"),
        ("scale_bias.bias_targets", ["wq", "wq"], "a linear is named twice"),
        ("scale_bias.bias_targets", ["lm_head"], "'wq', 'wk'"),
        ("lora.rank", 0, "greater than 0"),
        ("lora.alpha", float("nan"), "greater than 0|finite"),
        ("lora.alpha", float("inf"), "finite"),
        ("lora.alpha", 0, "greater than 0"),
        ("lora.targets", [], "at least 1"),
        ("vision.encoder", "../../etc/passwd", "pattern"),
        ("vision.layers", [0, 1], "add fusion needs static prompts in each of its layers"),
        ("vision.num_tokens", 3, "3 visual tokens cannot be added to 4 prompt rows"),
        ("vision.fusion", "early", r"early fusion needs layers of its own; \[1, 2\] hold static prompts too"),
        ("prompt", None, "add fusion needs static prompts"),
        ("format_version", 2, "Input should be 1"),
        ("surprise", 1, "Extra inputs are not permitted"),
        ("gate.surprise", 1, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_meant_is_refused(path: str, value: Any, message: str):
    with pytest.raises(ValidationError, match=message):
        AdapterConfig.model_validate(changed(path, value))


def test_an_adapter_that_changes_nothing_is_refused():
    with pytest.raises(ValidationError, match="an adapter that changes nothing"):
        AdapterConfig.model_validate({"base": VALID["base"], "gate": VALID["gate"]})


def test_an_own_head_needs_to_know_the_vocabulary():
    base = {**VALID["base"], "vocab_size": None}
    with pytest.raises(ValidationError, match=r"`head` needs `base\.vocab_size`"):
        AdapterConfig.model_validate({"base": base, "head": True})


def test_json_round_trip_and_one_order_of_linears():
    config = AdapterConfig.model_validate(VALID)
    assert config.scale_bias.bias_targets == ("wq", "w2")  # LLaMA's order, whatever the file's
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("options", "layers", "rows", "variant"),
    [
        ({"prompt": VALID["prompt"]}, (1, 2, 3), 4, "V1 text"),
        ({"prompt": VALID["prompt"], "vision": VISION}, (1, 2, 3), 4, "V1 multimodal"),
        ({"prompt": VALID["prompt"], "vision": EARLY}, (0, 1, 2, 3), 7, "V2 multimodal"),
        ({"vision": EARLY}, (0,), 7, "V2 multimodal"),
        ({"norms": True}, (), 0, "V2 text"),
        ({"prompt": VALID["prompt"], "lora": VALID["lora"]}, (1, 2, 3), 4, "V2 text"),
    ],
)
def test_derived_facts(options: dict[str, Any], layers: tuple[int, ...], rows: int, variant: str):
    config = AdapterConfig.model_validate({"base": VALID["base"], **options})
    assert (config.gated_layers, config.max_prompt_len, config.variant) == (layers, rows, variant)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(LINEARS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PATHS = [*VALID] + [f"{k}.{inner}" for k, v in VALID.items() if isinstance(v, dict) for inner in v]


@settings(max_examples=300, deadline=None)
@given(ANYTHING)
def test_any_json_is_a_configuration_or_a_validation_error(value: Any):
    with suppress(ValidationError):
        AdapterConfig.model_validate(value)
    with suppress(ValidationError):
        AdapterConfig.model_validate_json(json.dumps(value))


NEAR = ANYTHING | st.lists(st.integers(-1, 5), max_size=4) | st.integers(-1, 10**25)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), NEAR, min_size=1, max_size=3))
def test_any_change_of_a_sound_one_gives_an_adapter_or_a_typed_error(changes: dict[str, Any]):
    """What validates also has shapes: nothing overflows, divides by zero or runs out of memory later."""
    config = deepcopy(VALID)
    for path, value in sorted(changes.items(), key=lambda item: item[0].count("."), reverse=True):
        *parents, last = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    with suppress(ValidationError, CheckpointError):
        shapes = native_shapes(AdapterConfig.model_validate(config))
        assert shapes
