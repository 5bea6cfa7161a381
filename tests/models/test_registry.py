"""The registry: ids, versions, hashes, and paths that stay inside the root. Needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.adapter_config import AdapterConfig
from models.checkpoints.manifest import manifest_text
from models.errors import CheckpointError
from models.registry import AdapterRegistry, check_id, content_hash, scan

CONFIG = AdapterConfig.model_validate(
    {
        "base": {
            "hidden_size": 8,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 4,
            "intermediate_size": 12,
        },
        "prompt": {"length": 2, "layers": (1,)},
    }
)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter.json").write_text(manifest_text(CONFIG))
    (folder / "adapter.safetensors").write_bytes(b"weights")
    return folder


def test_importing_it_brings_no_torch():
    code = "import sys, models.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_entries_are_found_listed_and_removed(tmp_path: Path):
    registry = AdapterRegistry()
    for id in ("b", "a"):
        registry.add(id, make(tmp_path / id), CONFIG)
    assert [entry.id for entry in registry] == ["b", "a"]
    found = registry.find("a")
    assert found is not None
    assert (found.path, found.config, found.version) == (tmp_path / "a", CONFIG, 1)
    assert registry.find("c") is None
    assert registry.remove("a") == found
    assert registry.remove("a") is None
    assert len(registry) == 1


def test_every_load_is_a_new_version_even_after_removal(tmp_path: Path):
    registry, folder = AdapterRegistry(), make(tmp_path / "a")
    first, second = registry.add("a", folder, CONFIG), registry.add("a", folder, CONFIG)
    registry.remove("a")
    third = registry.add("a", folder, CONFIG)
    assert [entry.version for entry in (first, second, third)] == [1, 2, 3]
    assert registry.add("other", folder, CONFIG).version == 1
    assert [registry.add("a", folder, CONFIG, version).version for version in (7, 7, 2)] == [7, 8, 9]
    assert first.hash == third.hash


def test_the_hash_is_of_names_and_contents(tmp_path: Path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert content_hash(first) == content_hash(second)
    (second / "adapter.safetensors").write_bytes(b"weighty")
    assert content_hash(first) != content_hash(second)
    (second / "adapter.safetensors").rename(second / "other")
    changed = content_hash(second)
    (second / "other").write_bytes(b"weights")
    assert content_hash(second) != changed
    assert len(content_hash(first / "adapter.json")) == 64
    with pytest.raises(CheckpointError, match="cannot be read"):
        content_hash(tmp_path / "nowhere")


@given(st.from_regex(r"[A-Za-z0-9._:-]{1,96}", fullmatch=True))
def test_plain_ids_are_good(id: str):
    assert check_id(id) == id


@pytest.mark.parametrize("id", ["", "a" * 97, "a/b", "a b", "é", "a\n", "a,b", "a=b", "a\0"])
def test_other_ids_are_refused(id: str):
    with pytest.raises(CheckpointError, match="is not valid; use 1 to 96"):
        check_id(id)


@given(st.text(max_size=100))
def test_whatever_passes_has_only_plain_characters(id: str):
    try:
        check_id(id)
    except CheckpointError:
        return
    assert id.isascii()
    assert 0 < len(id) <= 96
    assert not set(id) & set("/\\ ,=\n\0")


def test_paths_are_resolved_inside_the_root(tmp_path: Path):
    root = tmp_path / "root"
    folder = make(root / "sub" / "a")
    registry = AdapterRegistry(root)
    for path in ("sub/a", str(folder), "sub/../sub/a", "./sub/a/"):
        assert registry.resolve(path) == folder.resolve()
    (root / "link").symlink_to(folder)
    assert registry.resolve("link") == folder.resolve()


def test_paths_outside_the_root_are_refused(tmp_path: Path):
    root, outside = tmp_path / "root", make(tmp_path / "outside")
    make(root / "a")
    make(tmp_path / "root-2")  # shares the root's name as a prefix
    (root / "link").symlink_to(outside)
    (root / "up").symlink_to("..")
    registry = AdapterRegistry(root)
    for path in (
        "../outside",
        str(outside),
        "link",
        "up/outside",
        "a/../../outside",
        "../root-2",
        "/",
        "",
        ".",
    ):
        with pytest.raises(CheckpointError, match="outside the adapter root"):
            registry.resolve(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "loop"])
def test_paths_that_are_none_are_refused(tmp_path: Path, path: str):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"not a path|not in the adapter root"):
        AdapterRegistry(tmp_path).resolve(path)


def test_without_a_root_nothing_is_loaded_at_run_time(tmp_path: Path):
    with pytest.raises(CheckpointError, match="set adapter_root"):
        AdapterRegistry().resolve(str(make(tmp_path / "a")))


def test_scanning_finds_native_folders_by_name(tmp_path: Path):
    for name in ("b", "a", "c:1"):
        make(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pth").write_bytes(b"")
    make(tmp_path / "empty" / "deeper")
    assert list(scan(tmp_path)) == ["a", "b", "c:1"]
    assert scan(tmp_path / "nowhere") == {}


def test_scanning_refuses_a_bad_name_and_a_bad_manifest(tmp_path: Path):
    folder = make(tmp_path / "a b")
    with pytest.raises(CheckpointError, match="'a b' is not valid"):
        scan(tmp_path)
    folder = folder.rename(tmp_path / "a")
    (folder / "adapter.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match=r"a/adapter\.json: format"):
        scan(tmp_path)
