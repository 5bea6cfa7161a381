"""What the loader takes of an adapter that sees: the encoder it names must be the one it was made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import random_adapter
from tiny_base import adapter_config, tiny_config

from models.adapter_config import AdapterConfig
from models.checkpoints.native import save_adapter
from models.errors import AdapterMismatch
from server.errors import InvalidRequest
from server.worker.adapter_loading import AdapterLoader

TOKENS = {
    "features": "tokens",
    "projector": "linear",
    "fusion": "early",
    "layers": (0,),
    "num_tokens": 7,
    "feature_dim": 12,
    "hidden_size": 12,
}


class ToyEncoder:
    """An encoder's name and sizes: what loading asks of one."""

    version, image_size = "1", 4
    token_dim, num_tokens, global_dim = 12, 7, 1752

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.adapter_loading.load_encoder", ToyEncoder)


def write_seeing(folder: Path, encoder: str = "efficientnet-lite0", **changes: object) -> Path:
    """An adapter that sees through `encoder`, with some fields of its `vision` changed."""
    config = adapter_config("sight").model_dump()
    config["vision"] |= {"encoder": encoder, **changes}
    save_adapter(random_adapter(AdapterConfig.model_validate(config)), folder)
    return folder


def loader(root: Path) -> AdapterLoader:
    return AdapterLoader(
        "tiny", tiny_config(), "", device=torch.device("cpu"), max_model_len=512, adapter_root=root
    )


def test_an_adapter_of_the_encoders_tokens_is_taken(tmp_path: Path) -> None:
    model = loader(tmp_path).load(f"sees={write_seeing(tmp_path / 'sees', **TOKENS)}")
    assert model.info.reads_images
    assert model.adapter is not None
    assert model.adapter.adapter.config.max_prompt_len == 7


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (TOKENS | {"num_tokens": 5}, "a row per token, 7 with the encoder .*, so `num_tokens` cannot be 5"),
        (
            TOKENS | {"feature_dim": 9, "hidden_size": 9},
            "`feature_dim` is 9, but the encoder .* gives 12 `tokens` features",
        ),
        ({"feature_dim": 9}, "`feature_dim` is 9, but the encoder .* gives 1752 `global` features"),
    ],
)
def test_an_adapter_of_another_encoders_features_is_refused(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    """Of another width, or with another number of rows: kernels read as many as the features have."""
    path = write_seeing(tmp_path / "sees", **changes)
    with pytest.raises(AdapterMismatch, match=f"^{path}: vision: .*{why}"):
        loader(tmp_path).load(f"sees={path}")
    with pytest.raises(InvalidRequest, match=why) as caught:
        loader(tmp_path).load_at_run_time("sees", "sees", {})
    assert (caught.value.param, caught.value.code) == ("path", "adapter_mismatch")
