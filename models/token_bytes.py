"""The bytes of one token: what a `tokenizers` decoder does, piece by piece."""

from __future__ import annotations

import json
import re
from typing import Any

from models.errors import CheckpointError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceDecoder:
    """Bytes of a vocabulary's pieces: GPT-2's byte alphabet, or SentencePiece's ▁ and <0x0A>.

    `spec` is the `decoder` of a `tokenizer.json`. Raises CheckpointError for any other kind.
    `strips_leading_space`: whether the whole text's first space is the tokenizer's own.
    """

    def __init__(self, spec: dict[str, Any] | None) -> None:
        steps = _steps(spec)
        kinds = {step.get("type") for step in steps}
        self._alphabet = _gpt2_alphabet() if "ByteLevel" in kinds else None
        if self._alphabet is None and not kinds & {"ByteFallback", "Metaspace"}:
            raise CheckpointError(
                f"tokenizer.json: decoder {json.dumps(spec):.80} is neither ByteLevel nor SentencePiece's; "
                "use the tokenizer that belongs to the base"
            )
        self.strips_leading_space = any(
            (step.get("type") == "Strip" and step.get("content") == " " and step.get("start"))
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )

    def bytes_of(self, piece: str) -> bytes:
        """The bytes that a piece, as the vocabulary writes it, stands for."""
        if self._alphabet is not None:
            known = [self._alphabet.get(char) for char in piece]
            return piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()


def _steps(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    if spec is None:
        return []
    return list(spec["decoders"]) if spec.get("type") == "Sequence" else [spec]


def _gpt2_alphabet() -> dict[str, int]:
    """Character → byte. Printable Latin-1 stands for itself, the other bytes for U+0100 upwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
