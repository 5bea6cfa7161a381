"""The adapter bank as the CPU's layers read it: what the panels of a packed weight need lies in their order.

An adapter's biases, or scales, of all a weight's outputs are one run of memory, which the processor foresees.

Shapes: L layers, S slots, A outputs of a packed weight, each linear's filled up to whole panels.
"""

from __future__ import annotations

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

    def _add_stack(self, key: str) -> None:
        kind, _, name = key.partition(".")
        if kind not in _KINDS:
            return super()._add_stack(key)
        weight = next(weight for weight, names in self.linears.items() if name in names)
        features = self._features[weight]
        widths = [num_panels(n) * PANEL for n in features.values()]
        L = 1 if name == "head" else self._base.config.num_layers
        value = 0 if kind == "bias" else 1
        panels_LSA = self._base.embed.new_full((L, self._num_slots, sum(widths)), value)
        self.panels[kind, weight] = panels_LSA
        starts = accumulate(widths, initial=0)
        for (other, n), start in zip(features.items(), starts, strict=False):
            self.stacks[f"{kind}.{other}"] = panels_LSA[..., start : start + n]
