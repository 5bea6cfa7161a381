"""The registry: ids, versions, hashes, and paths that stay inside the root. Needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import CheckpointError
from models.registry import AdapterRegistry, check_id, content_hash


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter.json").write_text("{}")
    (folder / "adapter.safetensors").write_bytes(b"weights")
    return folder


def test_importing_it_brings_no_torch():
    code = "import sys, models.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_load_is_a_new_version():
    registry = AdapterRegistry()
    assert [registry.next_version("a") for _ in range(3)] == [1, 2, 3]
    assert registry.next_version("other") == 1
    assert [registry.next_version("a", at_least) for at_least in (7, 7, 2)] == [7, 8, 9]
    with pytest.raises(CheckpointError, match="is not valid"):
        registry.next_version("a/b")


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


def test_files_of_a_folder_are_not_elsewhere_either(tmp_path: Path):
    root, outside = tmp_path / "root", make(tmp_path / "outside")
    folder, store = make(root / "a"), make(root / "store")
    registry, weights = AdapterRegistry(root), folder / "adapter.safetensors"
    weights.unlink()
    weights.symlink_to(store / "adapter.safetensors")  # as hub caches have them
    assert registry.resolve("a") == folder.resolve()
    weights.unlink()
    weights.symlink_to(outside / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"'a': adapter\.safetensors is a link that leaves"):
        registry.resolve("a")
