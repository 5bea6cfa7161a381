"""What a base's folder says of sampling: read as it stands, and refused where it cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_base import adapter_config

from models.adapter_config import AdapterConfig
from models.checkpoints.manifest import manifest_text
from models.errors import CheckpointError
from models.sampling_defaults import SamplingDefaults, read_sampling_defaults


def written(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_what_the_file_says(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path).given == {}
    llama_chat = {
        "bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0,
        "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.32.0.dev0",
    }  # fmt: skip
    assert read_sampling_defaults(written(tmp_path, llama_chat)).given == {"temperature": 0.6, "top_p": 0.9}
    fields = {"temperature": None, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    expected = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    assert read_sampling_defaults(written(tmp_path, fields)).given == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("top_k", -5),
     ("top_k", 2.5), ("min_p", 2), ("repetition_penalty", 0), ("temperature", [1])],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field}"):
        read_sampling_defaults(written(tmp_path, {field: value}))


def test_a_manifest_may_hold_them() -> None:
    plain = adapter_config("v1")
    assert "sampling" not in manifest_text(plain)
    own = plain.model_copy(update={"sampling": SamplingDefaults(temperature=0.1, top_p=0.75)})
    again = AdapterConfig.model_validate_json(manifest_text(own))
    assert again.sampling == own.sampling


def test_the_adapters_own_come_first() -> None:
    base = SamplingDefaults(temperature=0.6, top_p=0.9)
    assert SamplingDefaults(temperature=0.1, top_k=5).over(base).given == {
        "temperature": 0.1, "top_p": 0.9, "top_k": 5
    }  # fmt: skip
