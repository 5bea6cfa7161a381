"""Loading a base takes its own size of memory, not the file's beside it, whatever format and dtype."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from base_files import random_weights, write_gguf, write_meta
from gguf import GGMLQuantizationType
from torch import Tensor

from models.checkpoints.huggingface import NAMES, write_huggingface
from models.config import ModelConfig

pytestmark = pytest.mark.long

# 138 million parameters, in tensors that are small beside the whole, as a real base's are.
CONFIG = ModelConfig(
    vocab_size=8000,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=20,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
)

MEASURE = r"""
import json, re, sys
from pathlib import Path
import torch
from models.checkpoints.base import load_base
import models.checkpoints.gguf, models.checkpoints.huggingface, models.checkpoints.meta

def peak():  # of this program alone; getrusage's also counts the one that started it
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024

torch.ones(8).to(torch.bfloat16).aminmax()
before = peak()
base, _ = load_base(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
tensors = {p.data_ptr(): p for p in base.parameters()}.values()
size = sum(p.numel() * p.element_size() for p in tensors)
print(json.dumps([peak() - before, size, sorted({str(p.dtype) for p in tensors})]))
"""


def as_bin(folder: Path, weights: dict[str, Tensor]) -> Path:
    write_huggingface(folder, CONFIG, [("norm.weight", weights["norm.weight"])])
    (folder / "model.safetensors").unlink()
    torch.save({NAMES.original(name): w for name, w in weights.items()}, folder / "pytorch_model.bin")
    return folder


def as_safetensors(folder: Path, weights: dict[str, Tensor]) -> Path:
    write_huggingface(folder, CONFIG, weights.items())
    return folder


def as_meta(folder: Path, weights: dict[str, Tensor]) -> Path:
    write_meta(folder, weights, CONFIG, shards=2)
    return folder


def as_gguf(folder: Path, weights: dict[str, Tensor]) -> Path:
    write_gguf(folder / "base.gguf", weights, CONFIG, GGMLQuantizationType.Q8_0)
    return folder


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(CONFIG)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Half a gigabyte, which pytest's own temporary folders would keep for three runs."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        (as_safetensors, "bfloat16"),
        (as_safetensors, "float32"),
        (as_bin, "bfloat16"),
        (as_meta, "bfloat16"),
        (as_gguf, "bfloat16"),
    ],
)
def test_the_peak_is_at_most_a_fifth_over_the_model(
    weights: dict[str, Tensor], folder: Path, write: Callable[..., Path], dtype: str
) -> None:
    path = write(folder, weights)
    command = [sys.executable, "-c", MEASURE, str(path), dtype]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    grown, size, dtypes = json.loads(printed)
    assert dtypes == [f"torch.{dtype}"]
    assert size > 250e6
    assert 0.9 < grown / size < 1.2
