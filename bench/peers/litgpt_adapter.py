"""LitGPT's LLaMA-Adapter: `litgpt_adapter.py THREADS`, in `.venv-litgpt`.

A static batch of prompts of one length, over LitGPT's own KV cache. The weights are random, of the base's
shape: what they are changes no time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from driver import Generate, serve

_PROMPTS, _SKIPPED = 10, 2


def start() -> Generate:
    import torch
    from litgpt.adapter import GPT, Config
    from litgpt.generate.base import batched_next_token

    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    config = Config.from_name(
        "SmolLM2-135M-Instruct", adapter_prompt_length=_PROMPTS, adapter_start_layer=_SKIPPED
    )
    model = GPT(config).to(torch.bfloat16).eval()
    greedy = {"temperature": 0.0, "top_p": 0.0}

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]], max_tokens: int) -> list[list[float]]:
        end = len(prompts[0]) + max_tokens
        model.max_seq_length = end
        model.set_kv_cache(batch_size=len(prompts))
        tokens, positions = torch.tensor(prompts), torch.arange(len(prompts[0]))
        times: list[float] = []
        for _ in range(max_tokens):
            tokens = batched_next_token(model, positions, tokens, [greedy] * len(prompts))
            tokens.tolist()
            times.append(time.perf_counter())
            positions = positions[-1:] + 1
        model.clear_kv_cache()
        return [times] * len(prompts)

    return generate


if __name__ == "__main__":
    serve(start)
