"""Tests of the plugin in vLLM's CPU build, in an environment of their own: `make test-vllm`."""

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Without those that are set below, which processes of a parallel run inherit.
_GIVEN = {name for name in os.environ if not name.startswith("VLLM_")}

# Read when vLLM is imported. One process; no binding of threads to cores, which others may use.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

_VLLM = find_spec("vllm")
if _VLLM is None or _VLLM.origin is None:  # not installed; without an origin it is this folder
    collect_ignore_glob = ["test_*.py"]
else:
    from llvmlite.binding import ffi

    # For vLLM, which looks at the attributes of everything in every module, and trips over this object of
    # the native engine's kernels: asked for any name, it makes up a function.
    ffi.lib._fntab["__dict__"] = {}

    from tiny_base import adapter_config, write_tiny_base
    from vllm_engines import write_models
    from vllm_support import HEAD_DIM, Deployment, low_rank, scaled_inputs

    @pytest.fixture(scope="session")
    def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
        folder = tmp_path_factory.mktemp("tiny")
        write_tiny_base(folder / "base", head_dim=HEAD_DIM)
        deployment = Deployment(folder / "base", folder / "exports")
        for seed, (name, kind) in enumerate((("poet", "v1"), ("cook", "v1"), ("tuned", "v2"))):
            deployment.add(name, adapter_config(kind, HEAD_DIM), seed)
        deployment.add("scaled", scaled_inputs(), 3)
        deployment.add("low", low_rank(), 4)
        return deployment

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """`tiny`, and `adapters` of it."""
        folder = tmp_path_factory.mktemp("models")
        write_models(folder)
        return folder

    @pytest.fixture
    def environment(monkeypatch: pytest.MonkeyPatch) -> None:
        """As it came: what engines of other tests wrote into this process's would mislead other processes."""
        for name in os.environ.keys() - _GIVEN:
            monkeypatch.delenv(name)

    @pytest.fixture(autouse=True)
    def _no_engine_left() -> Iterator[None]:
        yield
        gc.collect()
