"""The child's end of the pipe between `bench/compare.py` and a peer in its own environment.

A line of JSON comes in for each burst of requests, `{"prompts": [[token, …], …], "max_tokens": n}`; one goes
out with the times of each request's tokens, in seconds since the line came. Between two of them the peer
sleeps. What the peer itself prints goes to the error output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

# Prompts and the number of tokens to generate → for each prompt when its tokens came, by `time.perf_counter`.
Generate = Callable[[Sequence[list[int]], int], Sequence[list[float]]]


def serve(start: Callable[[], Generate]) -> None:
    """Answer bursts until the input ends. `start` loads the peer."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate = start()
    out.write('"ready"\n')
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        times = generate(order["prompts"], order["max_tokens"])
        out.write(json.dumps([[at - began for at in own] for own in times]) + "\n")
