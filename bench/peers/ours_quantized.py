"""Our own engine with weights in 8 or 4 bits: `ours_quantized.py BITS THREADS ADAPTER`, in `.venv`.

BITS is int8 or int4. A process of its own, as idle threads of another engine would disturb this one.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from driver import Generate, serve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine_client import start_engine

from server.processes import prepare_torch
from server.settings import WorkerSettings


def main() -> None:
    bits, threads, adapter = sys.argv[1:]
    prepare_torch(int(threads))
    settings = WorkerSettings.model_validate(
        {
            "adapters": (f"v1-0={adapter}",),
            "shipped_adapters": False,
            "quantization": bits,
            "num_threads": int(threads),
        }
    )
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        def start() -> Generate:
            client = runner.run(stack.enter_async_context(start_engine(settings)))

            async def ask(prompts: Sequence[list[int]], max_tokens: int) -> list[list[float]]:
                asked = [client.request("v1-0", tuple(ids), max_tokens) for ids in prompts]
                times = await asyncio.gather(*asked)
                return [[at for at, count in own for _ in range(count)] for own in times]

            return lambda prompts, max_tokens: runner.run(ask(prompts, max_tokens))

        serve(start)
        runner.run(stack.aclose())


if __name__ == "__main__":
    main()
