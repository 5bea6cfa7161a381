"""vLLM on the bare base, compiled as it is by default: `vllm_bare.py BASE THREADS`, in `make vllm`'s venv.

In one process, so that nothing waits for sockets, and without tokenizer: token ids go in and come out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from driver import Generate, serve


def start() -> Generate:
    base, threads = sys.argv[1:]
    os.environ |= {
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",  # not ours
    }
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        base,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    ).llm_engine
    sent = 0

    def generate(prompts: Sequence[list[int]], max_tokens: int) -> list[list[float]]:
        nonlocal sent
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times: dict[str, list[float]] = {}
        for ids in prompts:
            sent += 1
            times[str(sent)] = []
            engine.add_request(str(sent), {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                own = next(own for id, own in times.items() if output.request_id.split("-")[0] == id)
                own += [now] * len(output.outputs[0].token_ids)
        return list(times.values())

    return generate


if __name__ == "__main__":
    serve(start)
