"""What adapters change in norms and linears: for one adapter, and for a batch that mixes many.

    y = s_out ⊙ (W (s_in ⊙ x) + b) + (alpha / R) · B A x

Shapes: N tokens, L layers, S bank slots, A slots that are active in the batch, C hidden size, R rank.
A *vector* is any per-layer parameter that acts element by element: a norm, a scale, a bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.adapter import Adapter, base_spec, linear_shape, lora_scaling
from models.adapter_config import LINEARS, LinearName
from models.functional import rms_norm
from models.llama import Head, Layer, Llama
from models.pieces import spread
from models.uploads import upload

NORMS = ("attention_norm", "feed_forward_norm", "final_norm")


def is_elementwise(keys: frozenset[str]) -> bool:
    """Whether these, of `AdapterBank.keys_of`, are norms, and biases and scales of outputs, alone."""
    return not any(key.startswith(("lora.", "scale_in.")) for key in keys)


def vectors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's vectors by key, each [L, features]; those outside the layers are [1, features]."""
    side = "scale_in" if adapter.config.scale_bias.scale == "input" else "scale_out"
    found = {f"bias.{name}": value for name, value in adapter.bias.items()}
    found |= {f"{side}.{name}": value for name, value in adapter.scale.items()}
    if adapter.config.norms:
        found |= {"attention_norm": adapter.attention_norm, "feed_forward_norm": adapter.feed_forward_norm}
    if adapter.config.final_norm:
        found["final_norm"] = adapter.final_norm[None]
    if adapter.config.head:
        found |= {"scale_out.head": adapter.head_scale[None], "bias.head": adapter.head_bias[None]}
    return found


class _Adaptation(ABC):
    """The formula above, given where the vectors and low-rank terms come from."""

    @abstractmethod
    def vector(self, key: str, layer: int) -> Tensor | None:
        """[features] or [N, features]; None where no adapter of the batch has it."""

    @abstractmethod
    def low_rank(self, layer: int, name: LinearName | Head, x: Tensor) -> Tensor | None:
        """(alpha / R) · B A x, [N, out]; None where no adapter of the batch has it."""

    def norm(self, layer: int, name: str, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        own = self.vector(name, layer)
        return rms_norm(x_NC, weight_C if own is None else own, eps)

    def before(self, layer: int, name: LinearName, x: Tensor) -> Tensor:
        scale = self.vector(f"scale_in.{name}", layer)
        return x if scale is None else x * scale

    def scales_input(self, names: Sequence[LinearName]) -> bool:
        return any(self.vector(f"scale_in.{name}", 0) is not None for name in names)

    def after(self, layer: int, name: LinearName | Head, x: Tensor, y: Tensor) -> Tensor:
        bias, scale = self.vector(f"bias.{name}", layer), self.vector(f"scale_out.{name}", layer)
        if bias is not None:
            y = y + bias
        if scale is not None:
            y = y * scale
        low = self.low_rank(layer, name, x)
        return y if low is None else y + low


class OneAdapter(_Adaptation):
    """Every token has the same adapter; gradients flow into its parameters. Training's view."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        # Cut into layers once: the gradient of each cut by itself would be as large as the whole stack.
        self._vectors = {key: value.to(dtype).unbind() for key, value in vectors(adapter).items()}
        self._lora = {
            name: [terms[side].to(dtype).unbind() for side in ("a", "b")]  # type: ignore[index]
            for name, terms in adapter.lora.items()
        }
        self._lora_scaling = lora_scaling(adapter.config)

    def vector(self, key: str, layer: int) -> Tensor | None:
        value = self._vectors.get(key)
        return None if value is None else value[layer]

    def low_rank(self, layer: int, name: LinearName | Head, x: Tensor) -> Tensor | None:
        if name not in self._lora:
            return None
        a, b = (stack[layer] for stack in self._lora[name])
        return self._lora_scaling * F.linear(F.linear(x, a), b)


class AdapterBank:
    """The hot adapters' vectors and low-rank terms, stacked by slot; slot 0 is the untouched base.

    A parameter's tensor, [L, S, …], is made when the first adapter that has it is placed; the slots of
    adapters without it hold what changes nothing (the base's norms, ones, zeros).
    """

    def __init__(self, base: Llama, num_slots: int) -> None:
        """`num_slots` counts the adapters; the identity's slot comes on top."""
        self._base = base
        self._spec = base_spec(base.config)
        self._num_slots = num_slots + 1
        self.stacks: dict[str, Tensor] = {}
        self.lora: dict[LinearName, tuple[Tensor, Tensor]] = {}  # a [L,S,R,in], b [L,S,R,out], scaled
        self._ranks: dict[LinearName, int] = {}  # the greatest, also of adapters that are yet to be placed
        self._keys: list[frozenset[str]] = [frozenset()] * self._num_slots

    def keys_of(self, slots: Sequence[int]) -> frozenset[str]:
        """What the adapters in these slots have: vector keys, and `lora.<linear>`."""
        return frozenset().union(*(self._keys[slot] for slot in slots))

    @torch.no_grad()
    def place(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot, in place of whatever was there."""
        assert 0 < slot < self._num_slots
        self.room_for(adapter)()
        own = vectors(adapter)
        for key, stack in self.stacks.items():
            stack[:, slot] = own[key].to(stack.dtype) if key in own else self._identity(key)
        self._place_lora(slot, adapter)
        self._keys[slot] = frozenset(own) | {f"lora.{name}" for name in adapter.lora}

    @torch.no_grad()
    def room_for(self, adapter: Adapter, pause: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """Memory for vectors that no adapter had so far, which takes as long as many steps to be made; on any
        thread. Low-rank terms are not among them.

        What is returned puts it to use, on the thread that calls `place`. `pause` is called now and then.
        """
        kinds = {self._stack_of(key): key for key in vectors(adapter) if key not in self.stacks}
        room = {key: spread(self._stack_row(key), self._num_slots, pause) for key in kinds.values()}

        def use() -> None:
            for key, stack in room.items():
                if key not in self.stacks:
                    self._add_stack(key, stack)

        return use

    def low_rank_bytes(self, adapter: Adapter) -> int:
        """What low-rank terms take in all slots, with this adapter's and those of whichever was expected."""
        ranks, of_layers = self._with(adapter), self._base.config.num_layers * self._num_slots
        features = sum(rank * sum(linear_shape(self._spec, name)) for name, rank in ranks.items())
        return of_layers * features * self._base.dtype.itemsize

    def expect(self, adapter: Adapter) -> None:
        """An adapter that will be placed some time: room for it is reckoned with from now on."""
        self._ranks = self._with(adapter)

    def _with(self, adapter: Adapter) -> dict[LinearName, int]:
        """Ranks by linear, this adapter's among them."""
        lora = adapter.config.lora
        own = {name: max(lora.rank, self._ranks.get(name, 0)) for name in lora.targets} if lora else {}
        return self._ranks | own

    def _stack_of(self, key: str) -> Hashable:
        """The same for keys that share a stack."""
        return key

    def _stack_row(self, key: str) -> Tensor:
        """One slot of a stack, which changes nothing; [L, features]."""
        return self._identity(key)

    def _add_stack(self, key: str, stack: Tensor) -> None:
        self.stacks[key] = stack

    def _place_lora(self, slot: int, adapter: Adapter) -> None:
        rank = adapter.config.lora.rank if adapter.config.lora else 0
        self.expect(adapter)
        for name in LINEARS:
            own = name in adapter.lora
            if own:
                self._make_room(name, rank)
            if name not in self.lora:
                continue
            a_LSRi, b_LSRo = self.lora[name]
            a_LSRi[:, slot], b_LSRo[:, slot] = 0, 0
            if own:
                terms = adapter.lora[name]
                a_LSRi[:, slot, :rank] = terms["a"].to(a_LSRi.dtype)  # type: ignore[index]
                scaled_LRo = b_LSRo[:, slot, :rank]
                scaled_LRo.copy_(lora_scaling(adapter.config) * terms["b"].mT)  # type: ignore[index]
                scaled_LRo.nan_to_num_()  # finite, as others' tokens meet them too, with zeros

    def _make_room(self, name: LinearName, rank: int) -> None:
        """Let the stacks of one linear hold `rank`; terms already there are padded with zeros."""
        have = self.lora[name][0].shape[2] if name in self.lora else 0
        if have >= rank:
            return
        out_in = linear_shape(self._spec, name)
        stacks = []
        for i, features in enumerate((out_in[1], out_in[0])):
            grown = self._zeros(self._base.config.num_layers, self._num_slots, rank, features)
            if have:
                grown[:, :, :have] = self.lora[name][i]
            stacks.append(grown)
        self.lora[name] = (stacks[0], stacks[1])

    def _identity(self, key: str) -> Tensor:
        """[L, features] that changes nothing."""
        layers = [layer for layer in self._base.layers if isinstance(layer, Layer)]
        if key == "final_norm":
            return self._base.norm[None]
        if key in NORMS:
            return torch.stack([getattr(layer, key) for layer in layers])
        kind, name = key.split(".")
        if name == "head":
            zeros = self._zeros(1, self._base.config.vocab_size)
        else:
            out_features, in_features = linear_shape(self._spec, name)  # type: ignore[arg-type]
            zeros = self._zeros(len(layers), in_features if kind == "scale_in" else out_features)
        return zeros if kind == "bias" else zeros + 1

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._base.dtype, device=self._base.device)


class BatchAdaptation(_Adaptation):
    """A step's tokens, each with the adapter in its slot of the bank."""

    def __init__(self, bank: AdapterBank, slots_N: Tensor, active: Sequence[int]) -> None:
        """`active`: the distinct slots in `slots_N`, ascending."""
        self._bank = bank
        self._keys = bank.keys_of(active)
        # One slot for all: its rows broadcast, nothing is gathered.
        self._index: Tensor | int = active[0] if len(active) == 1 else slots_N
        self._active = active
        self._slots_N = slots_N
        self._with_lora: Tensor | None = None  # the active slots that have low-rank terms

    @property
    def changes_nothing(self) -> bool:
        return not self._keys

    def vector(self, key: str, layer: int) -> Tensor | None:
        stack_SC = self._stack(key, layer)
        return None if stack_SC is None else stack_SC[self._index]

    def scales_input(self, names: Sequence[LinearName]) -> bool:
        return any(f"scale_in.{name}" in self._keys for name in names)

    def _stack(self, key: str, layer: int) -> Tensor | None:
        """All slots' vectors, [S, features]."""
        return self._bank.stacks[key][layer] if key in self._keys else None

    def low_rank(self, layer: int, name: LinearName | Head, x: Tensor) -> Tensor | None:
        """All active slots' terms in two dense products, each token keeping its own slot's part."""
        if name == "head" or f"lora.{name}" not in self._keys:
            return None
        if self._with_lora is None:  # made late: a step without low-rank terms may be recorded as a graph
            slots = [
                slot
                for slot in self._active
                if any(k.startswith("lora.") for k in self._bank.keys_of([slot]))
            ]
            self._with_lora = upload(slots, x.device)
        with_lora = self._with_lora
        a_SRi, b_SRo = (stack[layer][with_lora] for stack in self._bank.lora[name])
        h_NAR = F.linear(x, a_SRi.flatten(0, 1)).unflatten(-1, a_SRi.shape[:2])
        if not isinstance(self._index, int):
            # Filled, not multiplied: by another's terms it may have overflowed, and infinity times 0 is NaN.
            h_NAR = h_NAR.masked_fill((self._slots_N[:, None] != with_lora)[..., None], 0)
        y_No: Tensor = h_NAR.flatten(1) @ b_SRo.flatten(0, 1)
        return y_No
