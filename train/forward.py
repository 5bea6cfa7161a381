"""One training pass: prompts, base, loss and gradients.

The loss is the mean of −log p over all tokens that the model is to write, of all passes and processes
of a step. Its head is computed only where there is such a token, a chunk of them at a time.

Shapes: N tokens of a pass, M targets, V vocabulary, C hidden size, J images, S prompt slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.adaptation import OneAdapter
from models.adapter import Adapter
from models.attention import Prompts
from models.llama import Attend, Layer, Llama
from models.vision.encoder import VisionEncoder, encode
from train.attention import PackedAttend
from train.data.batches import Pass

_LOGITS = 1 << 24  # logits held at once
_SOFTMAX_ROWS = 16


class Forward:
    """The frozen base with one adapter in training.

    Layers below the lowest trained parameter build no graph, since nothing in them needs a gradient.
    Prompt keys and values are made anew in each pass, never cached.
    """

    def __init__(
        self,
        base: Llama,
        adapter: Adapter,
        encoder: VisionEncoder | None,
        live: bool,
        checkpointing: bool,
        triton: bool = False,
    ) -> None:
        self._base = base
        self._adapter = adapter
        self._encoder = encoder
        self._live = live
        self._triton = triton
        self._wrap: Callable[[Layer], Callable[..., Tensor]] | None = _recomputed if checkpointing else None
        self._black: Tensor | None = None
        vision = adapter.config.vision
        if vision is not None and vision.no_image == "zero":
            assert encoder is not None
            size = encoder.image_size
            self._black = encode(vision, encoder, torch.zeros(1, 3, size, size)).to(base.device)

    def backward(self, batch: Pass, scale: Tensor | float) -> Tensor:
        """Add `scale` times the gradient of the summed loss, and return that sum, unscaled."""
        batch = batch.to(self._base.device)
        hidden_MC, adaptation = self._hidden(batch)
        leaf_MC = hidden_MC.detach().requires_grad_(hidden_MC.requires_grad)
        total = torch.zeros((), dtype=torch.float32, device=leaf_MC.device)
        # Each chunk's graph ends at the leaf and is freed at once; then one pass through the layers.
        for x_MC, targets_M in self._chunks(leaf_MC, batch.targets_M):
            logits_MV = self._base.logits(x_MC, adaptation)
            gradient_MV = logits_MV.detach()
            total += _loss(gradient_MV, targets_M, scale)
            if logits_MV.requires_grad:
                logits_MV.backward(gradient_MV)
        if hidden_MC.requires_grad:
            hidden_MC.backward(leaf_MC.grad)
        return total

    @torch.no_grad()
    def loss(self, batch: Pass) -> Tensor:
        """The summed loss."""
        batch = batch.to(self._base.device)
        hidden_MC, adaptation = self._hidden(batch)
        parts = [
            _loss(self._base.logits(x_MC, adaptation), targets_M)
            for x_MC, targets_M in self._chunks(hidden_MC, batch.targets_M)
        ]
        return torch.stack(parts).sum()

    def _hidden(self, batch: Pass) -> tuple[Tensor, OneAdapter]:
        """Hidden states [M, C] where something is to be predicted."""
        base = self._base
        prompts, slots_B = self._prompts(batch)
        attend: Attend
        if self._triton:
            from train.triton_attention import TritonPackedAttend  # not every machine has Triton

            attend = TritonPackedAttend(batch.lens_B, prompts, slots_B, base.device)
        else:
            attend = PackedAttend(batch.lens_B, prompts, slots_B, base.device)
        adaptation = OneAdapter(self._adapter, base.dtype)
        hidden_NC = base(batch.tokens_N, batch.positions_N, attend, adaptation, self._wrap)
        return hidden_NC.index_select(0, batch.predicting_M), adaptation

    def _chunks(self, x_MC: Tensor, targets_M: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = max(1, _LOGITS // self._base.config.vocab_size)
        return list(zip(x_MC.split(size), targets_M.split(size), strict=True))

    def _prompts(self, batch: Pass) -> tuple[Prompts | None, Tensor | None]:
        """The prompts of a pass, a slot per image and one for all without; and each sequence's slot."""
        adapter, base = self._adapter, self._base
        if not adapter.config.gated_layers:
            return None, None
        features = self._features(batch)
        if features is None:
            return adapter.prompts(base), None
        J = 0 if batch.images is None else batch.images.shape[0]
        prompts = adapter.prompts(base, adapter.see(features))
        if -1 in batch.image_B and self._black is None:
            prompts = _joined(prompts, adapter.prompts(base))
        slots = [J if image < 0 else image for image in batch.image_B]
        return prompts, torch.tensor(slots, device=base.device)

    def _features(self, batch: Pass) -> Tensor | None:
        """[J, …] of the pass's images, and after them the black image's where some row sees that one."""
        vision = self._adapter.config.vision
        features = batch.images
        if vision is None:
            return None
        if features is not None and self._live:
            assert self._encoder is not None
            features = encode(vision, self._encoder, features)
        if self._black is not None and -1 in batch.image_B:
            features = self._black if features is None else torch.cat([features, self._black])
        return features


def _loss(logits_MV: Tensor, targets_M: Tensor, scale: Tensor | float | None = None) -> Tensor:
    """Σ −log softmax(logits)[target]. With a `scale` the logits become scale · gradient, in their own memory.

    The gradient is softmax − one-hot. Few rows at a time: their float32 probabilities never leave the
    processor's cache.
    """
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    losses = []
    for x_mV, target_m in zip(logits_MV.split(_SOFTMAX_ROWS), targets_M.split(_SOFTMAX_ROWS), strict=True):
        target_m1 = target_m[:, None]
        p_mV = x_mV.softmax(-1, dtype=wide)
        # log Σ exp by the largest one: that of the target may be too small a number to be.
        total_m = x_mV.amax(-1).to(wide) - p_mV.amax(-1).log()
        losses.append(total_m - x_mV.gather(1, target_m1)[:, 0])
        if scale is not None:
            p_mV.scatter_add_(1, target_m1, p_mV.new_full(target_m1.shape, -1))
            x_mV.copy_(p_mV.mul_(scale))
    return torch.cat(losses).sum()


def _recomputed(layer: Layer) -> Callable[..., Tensor]:
    """The layer's call, its activations computed again in the backward pass instead of kept."""
    return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)


def _joined(a: Prompts, b: Prompts) -> Prompts:
    """The slots of both."""
    return Prompts(
        torch.cat([a.k_SLKGD, b.k_SLKGD]),
        torch.cat([a.v_SLKGD, b.v_SLKGD]),
        torch.cat([a.len_SL, b.len_SL]),
        torch.cat([a.gate_SLH, b.gate_SLH]),
    )
