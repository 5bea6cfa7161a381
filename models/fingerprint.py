"""Telling bases apart that have the same shape."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_ROWS = 256


def fingerprint(embed_VC: Tensor) -> str:
    """A short hash of a base's embedding: the first 16 hex digits of a SHA-256.

    Over up to 256 rows spread evenly through the vocabulary, in float32 rounded to bfloat16, so that
    float32 and bfloat16 copies of a base agree. float16 and quantised copies have values of their own.
    """
    V = embed_VC.shape[0]
    rows = torch.arange(min(V, _ROWS), device=embed_VC.device) * V // min(V, _ROWS)
    sample = embed_VC.detach()[rows].to(torch.float32).to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(str(tuple(embed_VC.shape)).encode())
    digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
