"""What a step freed, the next one has without asking the kernel."""

import subprocess
import sys

SCRIPT = """
import resource
import torch
from train.memory import keep_freed_memory

def faults():  # of four tensors of 64 MiB, one after another
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
assert keep_freed_memory()
for _ in range(6):
    faults()
print(usual, faults())
"""


def test_pages_are_asked_for_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 10
