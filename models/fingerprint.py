"""Telling bases apart that have the same shape."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Likeness = Literal["same", "near", "other"]

_ROWS = 256
_NEAR = 8  # a near copy has less than one in so many bits of the sketch of its own
_FORM = re.compile(r"([0-9a-f]{16})(?:-((?:[0-9a-f]{2})+))?")


def fingerprint(embed_VC: Tensor) -> str:
    """What tells a base by its embedding, such as `469dfd4405ef2e61-8f0c…`: a hash and a sketch.

    Both are over up to 256 rows spread evenly through the vocabulary, rounded to bfloat16, so that float32
    and bfloat16 copies of a base agree. The hash is the first 16 hex digits of a SHA-256 of their values.
    The sketch is a bit per row: on which side of a fixed random hyperplane through their mean it lies
    (Charikar 2002). The share of bits in which two bases differ is the mean angle between rows over pi.
    """
    V = embed_VC.shape[0]
    picked = torch.arange(min(V, _ROWS), device=embed_VC.device) * V // min(V, _ROWS)
    rows_RC = embed_VC.detach()[picked].to(torch.float32).to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(str(tuple(embed_VC.shape)).encode())
    digest.update(rows_RC.view(torch.int16).numpy().tobytes())
    return f"{digest.hexdigest()[:16]}-{_sketch(rows_RC)}"


def likeness(ours: str, theirs: str) -> Likeness:
    """Whether two fingerprints are of one base, of near copies of one, or of different bases.

    4-bit quantisation turns a row by some 5 degrees and flips one bit in forty; rows of bases that were
    trained apart are orthogonal and share half of the bits. Fine-tuning that hardly moves the embedding
    looks like rounding. Fingerprints without a sketch are the same or different.
    """
    a, b = _FORM.fullmatch(ours), _FORM.fullmatch(theirs)
    if a is None or b is None:
        return "same" if ours == theirs else "other"
    if a[1] == b[1]:
        return "same"
    if a[2] is None or b[2] is None or len(a[2]) != len(b[2]):
        return "other"
    differing = (int(a[2], 16) ^ int(b[2], 16)).bit_count()
    return "near" if differing * _NEAR < len(a[2]) * 4 else "other"


def _sketch(rows_RC: Tensor) -> str:
    """The sign of each centred row's product with a direction of +1 and -1 of its own, as hex digits."""
    R, C = rows_RC.shape
    rows = rows_RC.double().numpy()
    stream = hashlib.shake_256(b"llama-adapter fingerprint").digest((R * C + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=R * C).reshape(R, C)
    products_R = ((rows - rows.mean(axis=0)) * (2.0 * bits - 1.0)).sum(axis=1)
    return np.packbits(products_R > 0).tobytes().hex()
