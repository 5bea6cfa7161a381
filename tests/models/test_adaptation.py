"""A batch that mixes adapters gives each request what it would get alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CONFIGS, MHA, random_adapter, random_base
from torch import Tensor

from models.adaptation import AdapterBank, BatchAdaptation, OneAdapter
from models.adapter import Adapter, base_spec
from models.adapter_config import LINEARS, AdapterConfig
from models.attention import DenseAttend, Prompts
from models.config import ModelConfig
from models.kernels.panel_bank import PanelBank
from models.llama import Llama

V1 = {"prompt": {"length": 4, "layers": (1, 2, 3)}}
BIAS_NORM = {
    "prompt": {"length": 2, "layers": (0, 3)},
    "gate": {"per": "layer", "activation": "raw"},
    "norms": True,
    "final_norm": True,
    "scale_bias": {"bias_targets": ("wq", "wo", "w1", "w2", "w3")},
}
INPUT_SCALE = {
    "norms": True,
    "scale_bias": {"scale": "input", "scale_targets": LINEARS, "bias_targets": LINEARS},
}
OUTPUT_SCALE_LORA = {
    "prompt": {"length": 3, "layers": (2, 3)},
    "scale_bias": {"scale": "output", "scale_targets": ("wq", "wv", "w2"), "bias_targets": ("wv",)},
    "lora": {"rank": 3, "alpha": 2.0, "targets": ("wq", "wv", "wo", "w2")},
}
LORA = {"lora": {"rank": 5, "targets": LINEARS}}
HEAD = {"final_norm": True, "head": True}
# In the order of their slots; slot 0 is the base.
KINDS = {"v1": V1, "bias+norm": BIAS_NORM, "input scale": INPUT_SCALE, "output scale+lora": OUTPUT_SCALE_LORA}
KINDS |= {"lora": LORA, "head": HEAD}
SLOTS = range(len(KINDS) + 1)
MAX_PROMPT_LEN = 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make(config: ModelConfig, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    options = {"base": base_spec(config).model_dump(), **KINDS[kind]}
    return random_adapter(AdapterConfig.model_validate(options), dtype, seed)


@dataclass(frozen=True)
class Deployment:
    """A base with one adapter of each kind, and the bank that holds them all."""

    base: Llama
    adapters: list[Adapter | None]  # by slot
    bank: AdapterBank

    @torch.no_grad()
    def alone(self, slot: int, tokens_T: Tensor) -> Tensor:
        """[T, V] of one request with `OneAdapter`; the plain base for slot 0."""
        adapter = self.adapters[slot]
        prompts = adapter.prompts(self.base) if adapter else None
        adaptation = OneAdapter(adapter, self.base.dtype) if adapter else None
        x_NC = self.base(tokens_T, torch.arange(len(tokens_T)), DenseAttend(1, prompts), adaptation)
        return self.base.logits(x_NC, adaptation)

    @torch.no_grad()
    def together(self, slots: list[int], tokens_BT: Tensor) -> Tensor:
        """[B, T, V] of one flat batch, each request with the adapter in its slot."""
        B, T = tokens_BT.shape
        slots_N = torch.tensor(slots).repeat_interleave(T)
        adaptation = BatchAdaptation(self.bank, slots_N, sorted(set(slots)))
        attend = DenseAttend(B, self._prompts(slots))
        x_NC = self.base(tokens_BT.flatten(), torch.arange(T).repeat(B), attend, adaptation)
        return self.base.logits(x_NC, adaptation).unflatten(0, (B, T))

    def _prompts(self, slots: list[int]) -> Prompts:
        """The requests' prompts stacked; garbage in the padding must stay unseen."""
        c = self.base.config
        B, L = len(slots), c.num_layers
        rows = torch.full((B, L, MAX_PROMPT_LEN, c.num_kv_heads, c.head_dim), 7.0, dtype=self.base.dtype)
        k, v = rows.clone(), rows.clone()
        lens, gates = torch.zeros(B, L, dtype=torch.int32), torch.ones(B, L, c.num_heads, dtype=rows.dtype)
        for b, slot in enumerate(slots):
            adapter = self.adapters[slot]
            if adapter is None:
                continue
            own = adapter.prompts(self.base)
            lens[b], gates[b] = own.len_SL[0], own.gate_SLH[0]
            for layer, length in enumerate(lens[b].tolist()):
                k[b, layer, :length] = own.k_SLKGD[0, layer, :length]
                v[b, layer, :length] = own.v_SLKGD[0, layer, :length]
        return Prompts(k, v, lens, gates)


@cache
def deployment(name: str, dtype: torch.dtype = torch.float32) -> Deployment:
    base = random_base(CONFIGS[name], dtype)
    bank = AdapterBank(base, len(KINDS))
    adapters: list[Adapter | None] = [None]
    for slot, kind in enumerate(KINDS, start=1):
        adapters.append(make(base.config, kind, dtype, seed=slot))
        bank.place(slot, adapters[-1])
    return Deployment(base, adapters, bank)


def some_tokens(B: int, T: int) -> Tensor:
    return torch.randint(0, MHA.vocab_size, (B, T), generator=torch.Generator().manual_seed(B * 100 + T))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_all_kinds_in_one_batch_equal_each_alone(name: str, dtype: torch.dtype):
    ours, slots = deployment(name, dtype), [3, 0, 1, 5, 2, 4, 6, 0, 5]
    tokens_BT = some_tokens(1, 9).repeat(len(slots), 1)  # one text: only the adapters differ
    mixed = ours.together(slots, tokens_BT)
    for b, slot in enumerate(slots):
        alone = ours.alone(slot, tokens_BT[b])
        torch.testing.assert_close(mixed[b], alone, atol=TOLERANCE[dtype], rtol=0)
        for other in set(SLOTS) - {slot}:
            assert (mixed[b] - ours.alone(other, tokens_BT[b])).abs().amax() > 0.05


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    requests=st.lists(st.tuples(st.sampled_from(SLOTS), st.integers(1, 12)), min_size=1, max_size=7),
)
def test_any_mix_equals_each_alone(name: str, requests: list[tuple[int, int]]):
    """Ragged lengths: a shorter text is padded behind its end, where causality hides the padding."""
    ours, slots = deployment(name), [slot for slot, _ in requests]
    tokens_BT = some_tokens(len(requests), max(length for _, length in requests))
    mixed = ours.together(slots, tokens_BT)
    for b, (slot, length) in enumerate(requests):
        alone = ours.alone(slot, tokens_BT[b, :length])
        torch.testing.assert_close(mixed[b, :length], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neighbours", [[slot] for slot in SLOTS[1:]] + [list(SLOTS[1:])], ids=str)
def test_base_rows_stay_the_base_bit_for_bit(name: str, neighbours: list[int], dtype: torch.dtype):
    """Identity rows multiply by one and add zero, so nothing rounds, whoever sits beside them.

    Compared with the plain base on the same flat batch: with other tokens beside them, BLAS may add up
    a row's products in another order.
    """
    ours, slots = deployment(name, dtype), [0, *neighbours, 0]
    tokens_BT = some_tokens(len(slots), 9)
    mixed = ours.together(slots, tokens_BT)
    plain = ours.together([0] * len(slots), tokens_BT)
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[-1], plain[-1])
    assert not torch.equal(mixed[1], plain[1])


def test_a_batch_of_base_requests_changes_nothing():
    ours = deployment("gqa")
    assert BatchAdaptation(ours.bank, torch.zeros(6, dtype=torch.long), [0]).changes_nothing
    tokens_BT = some_tokens(2, 5)
    with torch.no_grad():
        x_NC = ours.base(tokens_BT.flatten(), torch.arange(5).repeat(2), DenseAttend(2))
        plain = ours.base.logits(x_NC).unflatten(0, (2, 5))
    assert torch.equal(ours.together([0, 0], tokens_BT), plain)


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("bank", [AdapterBank, PanelBank])
def test_placing_over_an_old_slot_leaves_nothing_behind(bank: type[AdapterBank], old: str, new: str):
    """A slot that held another adapter holds exactly what one holds that never did."""
    base, tokens_BT = random_base(MHA), some_tokens(3, 6)
    first, second, neighbour = make(MHA, old, seed=1), make(MHA, new, seed=2), make(MHA, "lora", seed=3)
    used, clean = bank(base, 2), bank(base, 2)
    for slot, adapter in ((1, first), (2, neighbour), (1, second)):
        used.place(slot, adapter)
    for slot, adapter in ((1, second), (2, neighbour)):
        clean.place(slot, adapter)
    assert used.keys_of([1]) == clean.keys_of([1])

    adapters = [None, second, neighbour]
    for slots in ([0, 1, 2], [1, 1, 1]):
        reused = Deployment(base, adapters, used).together(slots, tokens_BT)
        torch.testing.assert_close(
            reused, Deployment(base, adapters, clean).together(slots, tokens_BT), atol=1e-6, rtol=0
        )
    for key, stack in used.stacks.items():  # what only the old one had is the identity again
        expected = clean.stacks[key][:, 1] if key in clean.stacks else stack[:, 0]
        assert torch.equal(stack[:, 1], expected), key
    for name, stacks in used.lora.items():
        for used_LSRf, clean_LSRf in zip(stacks, clean.lora[name], strict=True):
            rank = clean_LSRf.shape[2]
            assert torch.equal(used_LSRf[:, 1, :rank], clean_LSRf[:, 1]), name
            assert not used_LSRf[:, 1, rank:].any(), name
            assert not used_LSRf[:, 0].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["a", "b", "alpha"])
def test_terms_that_overflow_are_their_own_adapter_s_trouble(side: str, dtype: torch.dtype):
    """They are finite in a file; what they make of a token is not, and infinity times zero is no zero."""
    base, tokens_BT = random_base(MHA, dtype), some_tokens(3, 6)
    sound, wild = make(MHA, "lora", seed=1), make(MHA, "lora", seed=2)
    with torch.no_grad():
        for terms in wild.lora.values():
            if side != "alpha":
                terms[side].fill_(3e38)  # type: ignore[index]
    if side == "alpha":
        lora = wild.config.lora.model_copy(update={"alpha": 1e300})  # type: ignore[union-attr]
        wild.config = wild.config.model_copy(update={"lora": lora})
    with_both, alone = AdapterBank(base, 2), AdapterBank(base, 2)
    for slot, adapter in ((1, sound), (2, wild)):
        with_both.place(slot, adapter)
    alone.place(1, sound)
    mixed = Deployment(base, [None, sound, wild], with_both).together([0, 1, 2], tokens_BT)
    expected = Deployment(base, [None, sound, None], alone).together([0, 1, 0], tokens_BT)
    tolerance = {"atol": 1e-5 if dtype == torch.float32 else 0.2, "rtol": 0.0}
    torch.testing.assert_close(mixed[:2], expected[:2], **tolerance)


def test_low_rank_terms_are_reckoned_before_they_are_placed():
    bank = AdapterBank(random_base(MHA), 3)
    few, many = make(MHA, "output scale+lora"), make(MHA, "lora")
    assert bank.low_rank_bytes(make(MHA, "v1")) == 0
    reckoned = bank.low_rank_bytes(many)
    bank.expect(few)
    assert bank.low_rank_bytes(make(MHA, "v1")) < bank.low_rank_bytes(many) == reckoned
    for slot, adapter in ((1, few), (2, many), (3, few)):
        bank.place(slot, adapter)
        taken = sum(term.nbytes for terms in bank.lora.values() for term in terms)
        assert taken == bank.low_rank_bytes(adapter)
    assert taken == reckoned
