"""Which parameters a step may change.

V2 trains disjoint groups (section 4.2): image-text steps the visual projection and the early gates,
instruction steps everything else. Early and late gates are rows of one tensor, so the optimizer is given
each row as a parameter of its own, sharing its memory: a row that a step does not train then keeps value
and moments exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from models.adapter import Adapter
from models.adapter_config import AdapterConfig
from train.errors import RecipeError

Trains = str | Sequence[str]

_BY_ROW = ("gate", "new_gate")
# Vectors, one per layer: decay would pull norms and scales to zero (the reference's rule for 1-D tensors).
_UNDECAYED = (
    "attention_norm",
    "feed_forward_norm",
    "final_norm",
    "head_scale",
    "head_bias",
    "bias.*",
    "scale.*",
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What is trained together: a tensor, or the rows of one that hold `.static` or `.visual` prompts."""

    name: str
    tensor: nn.Parameter
    rows: tuple[int, ...] | None  # None: all of it
    parts: tuple[nn.Parameter, ...]  # what the optimizer sees

    @property
    def visual(self) -> bool:
        return self.name.startswith("vision.") or self.name.endswith(".visual")

    @property
    def decays(self) -> bool:
        one_dimensional = self.name.startswith("vision.") and self.tensor.dim() < 2
        return not one_dimensional and not any(fnmatchcase(self.name, name) for name in _UNDECAYED)


class Groups:
    """The adapter's leaves, and for each source those that its steps train."""

    def __init__(self, adapter: Adapter, trains: Sequence[Trains]) -> None:
        """`trains`: per source `all`, `visual`, `text` or patterns over leaves' names.

        Raises RecipeError where a pattern matches nothing.
        """
        self._leaves = list(_leaves(adapter))
        self._of_source = [
            [leaf for leaf in self._leaves if leaf.name in names] for names in map(self._names, trains)
        ]
        trained = {leaf.name for leaves in self._of_source for leaf in leaves}
        self.trained = [leaf for leaf in self._leaves if leaf.name in trained]

    def _names(self, trains: Trains) -> set[str]:
        if trains == "all":
            return {leaf.name for leaf in self._leaves}
        if trains in ("visual", "text"):
            return {leaf.name for leaf in self._leaves if leaf.visual == (trains == "visual")}
        patterns = [trains] if isinstance(trains, str) else trains
        names: set[str] = set()
        for pattern in patterns:
            # `gate` means all of its rows, `gate.visual` some.
            hits = {leaf.name for leaf in self._leaves if _matches(leaf.name, pattern)}
            if not hits:
                known = ", ".join(leaf.name for leaf in self._leaves)
                raise RecipeError(f"recipe: trains: {pattern!r} matches no tensor of the adapter: {known}")
            names |= hits
        return names

    @property
    def num_trained(self) -> int:
        """Parameters that any source trains."""
        return sum(part.numel() for leaf in self.trained for part in leaf.parts)

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """For AdamW, in a fixed order."""
        sides = ((True, weight_decay), (False, 0.0))
        groups = [
            {
                "params": [part for leaf in self.trained if leaf.decays == decays for part in leaf.parts],
                "weight_decay": decay,
            }
            for decays, decay in sides
        ]
        return [group for group in groups if group["params"]]

    def activate(self, source: int) -> list[Leaf]:
        """Let gradients flow into this source's leaves only; returns them."""
        active = self._of_source[source]
        for leaf in self._leaves:
            leaf.tensor.requires_grad_(False)
            for parameter in (leaf.tensor, *leaf.parts):
                parameter.grad = None
        for leaf in active:
            leaf.tensor.requires_grad_(True)
        return active


def _matches(name: str, pattern: str) -> bool:
    stem, _, kind = name.rpartition(".")
    by_row = stem in _BY_ROW and kind in ("static", "visual")
    return fnmatchcase(name, pattern) or (by_row and fnmatchcase(stem, pattern))


def _leaves(adapter: Adapter) -> Iterable[Leaf]:
    early = adapter.config.vision is not None and adapter.config.vision.fusion == "early"
    for name, tensor in adapter.named_parameters():
        if not (early and name in _BY_ROW):
            yield Leaf(name, tensor, None, (tensor,))
            continue
        for kind, rows in _rows_by_kind(adapter.config):
            parts = tuple(nn.Parameter(tensor.data[row]) for row in rows)
            yield Leaf(f"{name}.{kind}", tensor, rows, parts)


def _rows_by_kind(config: AdapterConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Rows of `gate` whose layers hold static and visual prompts."""
    assert config.vision is not None
    layers = config.gated_layers
    visual = tuple(row for row, layer in enumerate(layers) if layer in config.vision.layers)
    static = tuple(row for row in range(len(layers)) if row not in visual)
    return [(kind, rows) for kind, rows in (("static", static), ("visual", visual)) if rows]


def gradients(leaves: Sequence[Leaf]) -> list[Tensor]:
    """Each leaf's gradient; zero where the step's passes did not touch it."""
    grads = []
    for leaf in leaves:
        grad = leaf.tensor.grad
        if grad is None:
            grad = torch.zeros_like(leaf.tensor)
        grads.append(grad if leaf.rows is None else grad[list(leaf.rows)])
    return grads


def set_gradients(leaves: Sequence[Leaf], grads: Sequence[Tensor]) -> None:
    """Give `gradients`, summed over processes, to what the optimizer sees."""
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf.rows is None:
            leaf.tensor.grad = grad
            continue
        for part, row in zip(leaf.parts, grad, strict=True):
            part.grad = row
