"""What an adapter sees of an image, as the embeddings of a request's placeholders.

vLLM takes embeddings for some positions of a prompt and tokens for the others; it knows their blocks in
the cache by what is in them, so that another image's are never met.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.adapter import Adapter
from models.vision.encoder import VisionEncoder
from models.vllm_plugin.carriers import ROWS


@torch.inference_mode()
def visual_rows(adapter: Adapter, encoder: VisionEncoder, pixels_CHW: Tensor) -> Tensor:
    """What an image [3, H, W] adds to the prompt rows, [R, C], float32; the adapter must read images."""
    vision = adapter.config.vision
    assert vision is not None
    see = encoder.global_features if vision.features == "global" else encoder.tokens
    (visual_nC,) = adapter.see(see(pixels_CHW[None]))
    rows_RC = torch.zeros(ROWS, visual_nC.shape[-1])
    rows_RC[: adapter.config.max_prompt_len] = visual_nC  # one token is repeated over them all
    return rows_RC


def seeing_prompt(placeholders: list[int], tokens: list[int], rows_RC: Tensor, dtype: torch.dtype) -> Any:
    """vLLM's `EmbedsInput`: the rows for the placeholders, tokens for the rest."""
    return {
        "type": "embeds",
        "prompt_embeds": torch.cat(
            [rows_RC.to(dtype), torch.zeros(len(tokens), rows_RC.shape[1], dtype=dtype)]
        ),
        "prompt_token_ids": [*placeholders, *tokens],
        "is_token_ids": [False] * len(placeholders) + [True] * len(tokens),
    }
