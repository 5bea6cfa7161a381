"""What the loader takes of an adapter that sees: the encoder it names must be the one it was made for."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import pytest
import torch
from support import random_adapter
from tiny_base import adapter_config, tiny_config, write_tiny_base

from models.adapter_config import AdapterConfig
from models.checkpoints.native import save_adapter
from models.errors import AdapterMismatch
from models.sampling_defaults import SamplingDefaults
from server.errors import InvalidRequest
from server.settings import WorkerSettings
from server.worker.adapter_loading import AdapterLoader
from server.worker.build import build_engine

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
    made: ClassVar[WeakSet[ToyEncoder]] = WeakSet()

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.made.add(self)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.adapter_loading.load_encoder", ToyEncoder)


def write_seeing(folder: Path, encoder: str = "efficientnet-lite0", **changes: object) -> Path:
    """An adapter that sees through `encoder`, with some fields of its `vision` changed."""
    config = adapter_config("sight").model_dump()
    config["vision"] |= {"encoder": encoder, **changes}
    save_adapter(random_adapter(AdapterConfig.model_validate(config)), folder)
    return folder


def loader(root: Path, max_encoders: int = 4) -> AdapterLoader:
    return AdapterLoader(
        "tiny",
        tiny_config(),
        "",
        device=torch.device("cpu"),
        max_model_len=512,
        adapter_root=root,
        max_encoders=max_encoders,
    )


def alive() -> list[str]:
    """Names of the encoders that somebody holds."""
    gc.collect()
    return sorted(encoder.name for encoder in ToyEncoder.made)


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


def test_adapters_of_one_encoder_share_it_as_long_as_one_is_there(tmp_path: Path) -> None:
    ours = loader(tmp_path)
    for id in ("a", "b"):
        write_seeing(tmp_path / id, "open_clip:A:x")
    models = [ours.load_at_run_time(id, id, {}) for id in ("a", "b")]
    assert models[0].adapter is not None
    assert models[1].adapter is not None
    assert models[0].adapter.encoder is models[1].adapter.encoder
    del models[0]
    assert alive() == ["open_clip:A:x"]
    del models
    assert alive() == []


def test_a_refused_adapter_leaves_no_encoder(tmp_path: Path) -> None:
    ours = loader(tmp_path)
    write_seeing(tmp_path / "wide", "open_clip:A:x", feature_dim=9)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="feature_dim"):
            ours.load_at_run_time("wide", "wide", {})
        assert alive() == []


def test_run_time_loading_brings_so_many_encoders(tmp_path: Path) -> None:
    ours = loader(tmp_path, max_encoders=2)
    paths = {id: write_seeing(tmp_path / id, f"open_clip:{id}:x") for id in ("A", "B", "C")}
    models = {"A": ours.load(f"A={paths['A']}"), "B": ours.load_at_run_time("B", "B", {})}
    with pytest.raises(InvalidRequest, match="'open_clip:C:x' would be one more than max_encoders, 2") as no:
        ours.load_at_run_time("C", "C", {})
    assert no.value.code == "invalid_adapter"
    assert alive() == ["open_clip:A:x", "open_clip:B:x"]
    ours.load_at_run_time("again", "B", {})
    del models["B"]
    alive()
    models["C"] = ours.load_at_run_time("C", "C", {})
    models["more"] = ours.load(f"more={paths['B']}")  # who starts the worker knows what it holds
    assert alive() == ["open_clip:A:x", "open_clip:B:x", "open_clip:C:x"]


def test_a_file_that_the_start_named_is_opened_again(tmp_path: Path) -> None:
    """After the last adapter that had the encoder was unloaded."""
    ours = loader(tmp_path)
    path = write_seeing(tmp_path / "sees", "open_clip:A:/models/a.pt")
    with pytest.raises(InvalidRequest, match="run-time loading does not open"):
        ours.load_at_run_time("sees", "sees", {})
    ours.load(f"sees={path}")
    assert alive() == []
    assert ours.load_at_run_time("sees", "sees", {}).info.reads_images


def test_a_file_beside_the_server_is_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a slash in its name it could be one of open_clip's tags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"")
    write_seeing(tmp_path / "sees", "open_clip:A:a.pt")
    with pytest.raises(InvalidRequest, match="run-time loading does not open"):
        loader(tmp_path).load_at_run_time("sees", "sees", {})


async def test_an_unloaded_adapter_takes_its_encoder_along(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "tiny")
    for id in ("A", "B"):
        write_seeing(tmp_path / id, f"open_clip:{id}:x")
    engine = build_engine(
        WorkerSettings(
            base=str(tmp_path / "tiny"),
            dtype="float32",
            kv_cache_mib=1,
            adapters=(f"A={tmp_path / 'A'}",),
            adapter_root=tmp_path,
            max_encoders=1,
        )
    )
    await engine.start()
    with pytest.raises(InvalidRequest, match="max_encoders"):
        await engine.load_adapter("B", "B")
    await (await engine.unload_adapter("A"))
    assert alive() == []
    await engine.load_adapter("B", "B")
    assert alive() == ["open_clip:B:x"]
    await engine.stop()


@pytest.mark.parametrize("heard", ["model", "openai"])
def test_what_base_and_adapter_recommend_for_sampling(tmp_path: Path, heard: str) -> None:
    base = tmp_path / "base"
    write_tiny_base(base)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    config = adapter_config("v1").model_copy(update={"sampling": SamplingDefaults(temperature=0.1)})
    save_adapter(random_adapter(config), tmp_path / "own")
    save_adapter(random_adapter(adapter_config("v1")), tmp_path / "none")
    settings = WorkerSettings(
        base=str(base),
        base_id="tiny",
        adapters=(f"own={tmp_path / 'own'}", f"none={tmp_path / 'none'}"),
        sampling_defaults=heard,
        kv_cache_mib=1,
    )
    told = {info.id: info.sampling for info in build_engine(settings).models()}
    if heard == "openai":
        assert told == {"tiny": {}, "own": {}, "none": {}}
        return
    of_base = {"temperature": 0.6, "top_p": 0.9}
    assert told == {"tiny": of_base, "own": {"temperature": 0.1, "top_p": 0.9}, "none": of_base}
