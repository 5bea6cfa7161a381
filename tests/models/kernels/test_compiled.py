"""The kernels compile, which the interpreter does not tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = 99 * 1024  # bytes of a multiprocessor's memory that every GPU since Ampere lends one program


def ran(script: str) -> str:
    """What it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[2])
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_compile_for_a_gpu_that_is_not_here():
    compiled = [json.loads(line) for line in ran("compile_for_gpu.py").splitlines()]
    multiply = {"_decode", "_prefill", "forward", "backward_queries", "backward_keys", "backward_prompts"}
    assert {kernel["name"] for kernel in compiled} == multiply | {"_add_up", "_rms_norm", "_scale_bias"}
    for kernel in compiled:
        assert kernel["bytes"] > 0
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["tensor_cores"] == (kernel["name"] in multiply), kernel


def test_no_step_compiles_what_was_not_compiled_before():
    """Pointers into larger tensors are aligned in some layers, and in some steps, only."""
    lines = ran("count_variants.py").splitlines()
    found = json.loads(lines[-1])
    assert found["after"] == found["before"]
    assert all(found["before"].values())
