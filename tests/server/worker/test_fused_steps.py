"""A step by the CPU's compiled layers gives the logits of the plain pass, whatever adapters it mixes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import CONFIGS, GQA, random_adapter, random_base

from models.adapter import base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.config import ModelConfig
from server.worker.runner import Runner, StepItem
from server.worker.sight import LoadedAdapter

PROMPT = {"prompt": {"length": 5, "layers": (1, 2, 3)}}
KINDS = {
    "v1": PROMPT,
    "v2": PROMPT
    | {
        "norms": True,
        "final_norm": True,
        "head": True,
        "scale_bias": {"scale": "output", "scale_targets": LINEARS, "bias_targets": LINEARS},
    },
    "biases": {"scale_bias": {"bias_targets": ("wk", "w1")}},
    "scales": {"scale_bias": {"scale": "output", "scale_targets": ("wv", "wo", "w3")}},
    "norms": {"norms": True},
    "low rank": {"lora": {"rank": 3, "targets": ("wq", "w2")}},
    "input scales": {"scale_bias": {"scale": "input", "scale_targets": ("wq", "w2")}},
}
SHAPES = CONFIGS | {
    "wide heads": replace(GQA, head_dim=64, num_heads=3, num_kv_heads=1),
    "several panels": replace(GQA, hidden_size=80, intermediate_size=144, vocab_size=149),
}
BLOCK = 4


def runner(config: ModelConfig, dtype: torch.dtype, fused: bool, num_blocks: int = 64) -> Runner:
    base = random_base(config, dtype)
    return Runner(
        base.pack() if fused else base,
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_hot_adapters=8,
        prompt_slots=8,
        kernels="cpu" if fused else "none",
    )


def two_steps(ours: Runner, adapters: list[LoadedAdapter | None]) -> torch.Tensor:
    """Prompts of ten, eleven, … tokens; then a decode of every second one, and chunks of the others."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 97, (len(adapters), 40), generator=generator).tolist()
    blocks = torch.randperm(64, generator=generator).tolist()

    def item(b: int, start: int, count: int) -> StepItem:
        table = blocks[b * 6 : b * 6 + 6]
        return StepItem(tokens[b][start : start + count], start, table, adapters[b], None, slice(None))

    first = ours.run([item(b, 0, 10 + b) for b in range(len(adapters))])
    order = sorted(range(len(adapters)), key=lambda b: b % 2)
    second = ours.run([item(b, 10 + b, 1 if b % 2 == 0 else 3) for b in order])
    return torch.cat([first, second])


def assert_equal_steps(config: ModelConfig, kinds: list[str], dtype: torch.dtype) -> None:
    spec = base_spec(config).model_dump()
    loaded: dict[str, LoadedAdapter | None] = {
        kind: LoadedAdapter(
            (kind, 1), random_adapter(AdapterConfig.model_validate({"base": spec, **KINDS[kind]}), seed=i)
        )
        for i, kind in enumerate(KINDS)
    }
    adapters = [loaded.get(kind) for kind in kinds]
    plain, fused = (two_steps(runner(config, dtype, fused), adapters) for fused in (False, True))
    tolerance = 2e-5 if dtype == torch.float32 else 0.02 * float(plain.amax() - plain.amin())
    torch.testing.assert_close(fused, plain, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mixed_step(shape: str, dtype: torch.dtype):
    assert_equal_steps(SHAPES[shape], ["base", "v2", "v1", "biases", "scales", "norms", "v2", "base"], dtype)


@pytest.mark.parametrize("kind", ["base", *KINDS])
def test_one_adapter_for_all(kind: str):
    assert_equal_steps(GQA, [kind] * 3, torch.float32)


def test_what_the_layers_do_not_know_takes_the_plain_pass():
    assert_equal_steps(GQA, ["low rank", "v2", "input scales", "base"], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype):
    """To the last bit: what shares a step never changes a token."""
    ours = runner(SHAPES["wide heads"], dtype, fused=True)
    items = [StepItem([7 + b, 9, 11][: 1 if b < 3 else 3], 0, [b], None, None, slice(None)) for b in range(6)]
    together = ours.run(items)
    alone = torch.cat([ours.run([item]) for item in items])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_long_step_equals_short_ones(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Whose rows lie in another order, in parts by thread; to the last bit."""
    config = SHAPES["wide heads"]
    spec = base_spec(config).model_dump()
    v2 = LoadedAdapter(("v2", 1), random_adapter(AdapterConfig.model_validate({"base": spec, **KINDS["v2"]})))
    monkeypatch.setattr("numba.get_num_threads", lambda: threads)
    long, short = (runner(config, dtype, fused=True, num_blocks=256) for _ in range(2))
    tokens = torch.randint(2, 97, (900,), generator=torch.Generator().manual_seed(2)).tolist()
    adapters = (None, v2, None)
    bounds = ((0, 443), (443, 450), (450, 900))
    tables = (range(120), range(120, 124), range(124, 256))

    def step(b: int, first: int, last: int) -> StepItem:
        start = bounds[b][0]
        return StepItem(tokens[first:last], first - start, tables[b], adapters[b], None, slice(None))

    together = long.run([step(b, *bounds[b]) for b in range(3)])
    pieces = [
        short.run([step(b, first, min(first + 90, end))])
        for b, (start, end) in enumerate(bounds)
        for first in range(start, end, 90)
    ]
    assert torch.equal(together, torch.cat(pieces))
    wanted = (slice(440, 443), slice(0, 1), slice(449, 450))
    some = [replace(step(b, *bounds[b]), wants_logits=own) for b, own in enumerate(wanted)]
    assert torch.equal(long.run(some), together[[440, 441, 442, 443, 899]])


def test_only_the_rows_wanted():
    """Of a chunk none, some or all; of adapters whose head has vectors of its own, too."""
    ours = runner(GQA, torch.float32, fused=True)
    spec = base_spec(GQA).model_dump()
    v2 = LoadedAdapter(("v2", 1), random_adapter(AdapterConfig.model_validate({"base": spec, **KINDS["v2"]})))
    adapters = [None, v2, None, v2]

    def step(wanted: list[slice]) -> torch.Tensor:
        return ours.run(
            [
                StepItem([3 + b, 5, 7, 9, 11][: 1 if b < 2 else 5], 0, [2 * b, 2 * b + 1], adapter, None, own)
                for b, (adapter, own) in enumerate(zip(adapters, wanted, strict=True))
            ]
        )

    everything = step([slice(None)] * 4)
    some = step([slice(0, 0), slice(None), slice(2, 4), slice(4, 5)])
    assert torch.equal(some, everything[[1, 4, 5, 11]])
    assert step([slice(0, 0)] * 4).shape == (0, GQA.vocab_size)


def test_warm_adapters_have_their_slots():
    """As many as there are; what was filled before anybody came is what would have been filled for them."""
    spec = base_spec(GQA).model_dump()
    adapters = [
        LoadedAdapter(
            (f"a{i}", 1), random_adapter(AdapterConfig.model_validate({"base": spec, **KINDS[kind]}), seed=i)
        )
        for i, kind in enumerate(("v1", "v2", "biases", "low rank", "v1", "v1", "v1", "v2", "v1", "v1"))
    ]
    cold, warm = (runner(GQA, torch.float32, fused=True) for _ in range(2))
    warm.warm(adapters)
    assert [loaded.key in warm.adapter_slots for loaded in adapters] == [True] * 8 + [False] * 2
    chosen = [adapters[i] for i in (1, 4, 7, 9)]
    torch.testing.assert_close(two_steps(warm, chosen), two_steps(cold, chosen), atol=1e-6, rtol=0)
    warm.adapter_slots.check_integrity()
    warm.prompt_slots.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_comes_is_placed_between_steps(kind: str):
    """And changes nothing for those that run meanwhile, nor is it itself other than if it came in a step."""
    spec = base_spec(GQA).model_dump()
    here, new = (
        LoadedAdapter((name, 1), random_adapter(AdapterConfig.model_validate({"base": spec, **own}), seed=i))
        for i, (name, own) in enumerate((("here", KINDS["v2"]), ("new", KINDS[kind])))
    )
    ours, plain = (runner(GQA, torch.float32, fused=True) for _ in range(2))
    parts = 0
    for _ in ours.filling(new, ours.room_for(new, lambda: None)):
        parts += 1
        assert torch.equal(two_steps(ours, [here, None]), two_steps(plain, [here, None]))
        assert new.key not in ours.adapter_slots
    assert parts == (2 if "prompt" in KINDS[kind] else 0)
    assert new.key in ours.adapter_slots
    assert ((new.key, None) in ours.prompt_slots) == (parts > 0)
    assert torch.equal(two_steps(ours, [new, here]), two_steps(plain, [new, here]))
    ours.adapter_slots.check_integrity()
    ours.prompt_slots.check_integrity()


@pytest.mark.parametrize("first", KINDS)
def test_room_made_elsewhere_is_what_a_step_would_have_made(first: str):
    """For the first adapter of its kind; those that are there, or come meanwhile, stay what they are."""
    spec = base_spec(GQA).model_dump()
    here, new, other = (
        LoadedAdapter((name, 1), random_adapter(AdapterConfig.model_validate({"base": spec, **own}), seed=i))
        for i, (name, own) in enumerate(
            (
                ("here", PROMPT),
                ("new", KINDS[first] | {"prompt": {"length": 7, "layers": (0, 1)}}),
                ("other", {"prompt": {"length": 6, "layers": (2,)}, "scale_bias": {"bias_targets": ("wq",)}}),
            )
        )
    )
    ours, plain = (runner(GQA, torch.float32, fused=True) for _ in range(2))
    for each in (ours, plain):
        two_steps(each, [here, None])
    use = ours.room_for(new, lambda: None)
    two_steps(ours, [here, other])
    use()
    for adapters in ([here, new], [other, new]):
        assert torch.equal(two_steps(ours, adapters), two_steps(plain, adapters))


def test_an_adapter_that_comes_takes_nobody_s_place():
    spec = base_spec(GQA).model_dump()
    config = AdapterConfig.model_validate({"base": spec, **KINDS["v1"]})
    adapters = [LoadedAdapter((f"a{i}", 1), random_adapter(config, seed=i)) for i in range(9)]
    ours = runner(GQA, torch.float32, fused=True)
    first = ours.filling(adapters[8], lambda: None)
    next(first)
    ours.warm(adapters[:8])  # and fill all slots while it is on its way
    assert len(list(first)) == 1
    assert not list(ours.filling(adapters[8], lambda: None))
    assert [loaded.key in ours.adapter_slots for loaded in adapters] == [True] * 8 + [False]
