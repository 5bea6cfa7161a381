"""Sends README's requests as they stand there to the server that `make serve` has started."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

blocks = re.findall(r"^```(\w+)\n(.*?)^```", Path("README.md").read_text(), re.MULTILINE | re.DOTALL)
curl = next(text for language, text in blocks if language == "bash" and text.startswith("curl"))
client = next(text for language, text in blocks if language == "python")

if shutil.which("curl"):
    answer = subprocess.run(
        ["bash", "-c", curl], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    print(answer)
    assert "Paris" in json.loads(answer)["choices"][0]["message"]["content"]

answer = subprocess.run(
    [sys.executable, "-c", client], capture_output=True, text=True, timeout=120, check=True
)
print(answer.stdout)
assert "CITY LIBRARY" in answer.stdout
