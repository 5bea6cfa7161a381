"""The adapter bank as the CPU's layers read it: what the panels of a packed weight need lies in their order.

An adapter's biases, or scales, of all a weight's outputs are one run of memory, which the processor foresees.

Shapes: L layers, S slots, A outputs of a packed weight, each linear's filled up to whole panels.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate

from torch import Tensor

from models.adaptation import AdapterBank
from models.kernels.linear_cpu import num_panels
from models.kernels.tile_cpu import PANEL
from models.llama import Layer, Llama

_KINDS = ("bias", "scale_out")


class PanelBank(AdapterBank):
    """`panels` has biases and output scales, [L, S, A], by kind and packed weight; of a linear's, `stacks` is
    its part. All linears of a weight have some as soon as one of them has.
    """

    def __init__(self, base: Llama, num_slots: int) -> None:
        super().__init__(base, num_slots)
        self.panels: dict[tuple[str, str], Tensor] = {}
        layer = base.layers[0]
        assert isinstance(layer, Layer)
        self._features = {
            weight: dict(zip(linear.names, linear.out_features, strict=True))
            for weight, linear in zip(("qkv", "wo", "gate_up", "w2"), layer.linears, strict=True)
        } | {"lm_head": {"head": base.config.vocab_size}}
        self.linears = {weight: tuple(features) for weight, features in self._features.items()}
        self._weight_of = {name: weight for weight, names in self.linears.items() for name in names}

    def _stack_of(self, key: str) -> Hashable:
        kind, _, name = key.partition(".")
        return (kind, self._weight_of[name]) if kind in _KINDS else key

    def _stack_row(self, key: str) -> Tensor:
        kind, _, name = key.partition(".")
        if kind not in _KINDS:
            return super()._stack_row(key)
        L = 1 if name == "head" else self._base.config.num_layers
        A = sum(self._widths(self._weight_of[name]))
        return self._base.embed.new_full((1, 1), 0 if kind == "bias" else 1).expand(L, A)

    def _add_stack(self, key: str, stack: Tensor) -> None:
        kind, _, name = key.partition(".")
        if kind not in _KINDS:
            return super()._add_stack(key, stack)
        weight = self._weight_of[name]
        self.panels[kind, weight] = stack
        starts = accumulate(self._widths(weight), initial=0)
        for (other, n), start in zip(self._features[weight].items(), starts, strict=False):
            self.stacks[f"{kind}.{other}"] = stack[..., start : start + n]

    def _widths(self, weight: str) -> list[int]:
        return [num_panels(n) * PANEL for n in self._features[weight].values()]
