"""Products with packed weights, as this processor computes them and as others do.

What a processor has decides how kernels are written: another one's are compiled for this one, in a process of
its own, from other answers to what is asked of LLVM.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Of the inputs, and of the packed weights where they have fewer bits.
KINDS = ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.bfloat16, "int4"))
PROCESSORS = {"AVX2": (), "AVX-512 without bfloat16": ("avx512f",)}
AS_IF = """
import os, sys
import llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
os.environ["NUMBA_CPU_FEATURES"] = features.flatten()  # what instructions there are to compile to
for name in [name for name in features if name.startswith("avx512")]:
    features[name] = False
features.update(dict.fromkeys(sys.argv[1:], True))
llvm.get_host_cpu_features = lambda: features
from tests.models.kernels.test_product_cpu import check
check()
"""


def check() -> None:
    """Each row is the float64 product, to the precision of float32 or of inputs as whole numbers; whatever is
    beside it, its bits are the same.
    """
    from input_rounding import input_rounding

    from models.kernels.linear_cpu import PANEL, pack, packed_linear
    from models.kernels.quantized_cpu import dequantize

    generator = torch.Generator().manual_seed(0)
    rows = (1, 2, 3, 4, 5, 6, 7, 11, 24, 26)
    for dtype, bits in KINDS:
        weight_OK = torch.randn(PANEL + 5, 96, generator=generator)
        packed = pack([weight_OK.to(dtype) if bits is None else weight_OK], bits)
        exact_OK = weight_OK.to(dtype) if bits is None else dequantize(packed, len(weight_OK))
        x_MK = torch.randn(max(rows), 96, generator=generator).to(dtype)
        want_MO = x_MK.double() @ exact_OK.double().T
        alone_MO = torch.cat([packed_linear(x_1K, packed) for x_1K in x_MK.split(1)])
        off_MO = (alone_MO[:, : len(weight_OK)].double() - want_MO).abs()
        rounding_MO = input_rounding(x_MK, exact_OK) if bits else 0
        assert (off_MO <= 1e-4 + 1e-5 * want_MO.abs() + rounding_MO).all(), (dtype, bits)
        for M in rows:
            assert torch.equal(packed_linear(x_MK[:M], packed), alone_MO[:M]), (dtype, bits, M)


def test_rows_do_not_depend_on_each_other():
    check()


@pytest.mark.long
@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors(processor: str, tmp_path: Path):
    command = [sys.executable, "-c", AS_IF, *PROCESSORS[processor]]
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NUMBA_NUM_THREADS": "1",
        "PYTHONPATH": str(root / "tests"),
    }
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
